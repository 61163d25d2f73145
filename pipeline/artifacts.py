"""Artifacts: a folder that is finished when, and only when, its header exists.

The header (`<name>.json`) is written last and names every other file by size and hash, so a killed job
leaves nothing that looks done, and a damaged file is an error instead of a wrong result.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.errors import InputError

PACKAGES = ("pipeline", "shards", "tokenizer", "pretrain", "jobs")


def sha256_hex(data: bytes) -> str:
    """SHA-256 of bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal values, equal bytes. NaN is refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def fingerprint(value: Any) -> str:
    """SHA-256 of the canonical JSON of a value."""
    return sha256_hex(canonical_json(value))


@functools.cache
def code_version() -> str:
    """Package version and a hash of its sources: `.git` does not travel with a Ray job."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode())
            digest.update(path.read_bytes())
    try:
        version = metadata.version("beit2-pipeline")
    except metadata.PackageNotFoundError:
        version = "uninstalled"
    return f"{version}+{digest.hexdigest()[:8]}"


def publish(url: str, name: str, files: Mapping[str, bytes], header: Mapping[str, Any]) -> dict[str, Any]:
    """Put the files, then the header that names them; returns the header as written."""
    named = {key: {"bytes": len(data), "sha256": sha256_hex(data)} for key, data in sorted(files.items())}
    complete = {**header, "code_version": code_version(), "files": named}
    text = json.dumps(complete, indent=2, sort_keys=True, allow_nan=False).encode() + b"\n"
    for key, data in files.items():
        storage.put(storage.join(url, key), data)
    storage.put(storage.join(url, f"{name}.json"), text)
    return complete


def read_header(url: str, name: str) -> dict[str, Any] | None:
    """The header of an artifact, or None where there is no finished one."""
    location = storage.join(url, f"{name}.json")
    data = storage.read_or_none(location)
    if data is None:
        return None
    try:
        header = json.loads(data)
    except ValueError as error:
        raise InputError(
            f"{location} is not JSON ({error}); the artifact is damaged, make it again"
        ) from None
    if not isinstance(header, dict) or "files" not in header:
        raise InputError(f"{location} is not the header of a {name} artifact; check the URL")
    return header


def read_file(url: str, header: Mapping[str, Any], filename: str) -> bytes:
    """One file of an artifact, its size and hash checked against the header."""
    location = storage.join(url, filename)
    expected = header["files"].get(filename)
    if expected is None:
        raise InputError(f"the artifact at {url} names no file {filename}; check the URL")
    try:
        data = storage.read(location)
    except FileNotFoundError:
        raise InputError(
            f"{location} is missing though its header names it; copy the artifact again"
        ) from None
    if len(data) != expected["bytes"] or sha256_hex(data) != expected["sha256"]:
        raise InputError(
            f"{location} is damaged: {len(data)} bytes, sha256 {sha256_hex(data)[:8]}…, but the header says "
            f"{expected['bytes']} bytes, {expected['sha256'][:8]}…; copy or make the artifact again"
        )
    return data


def claim(
    url: str, identity: Mapping[str, Any], *, may_change: Sequence[str] = (), finished: bool = False
) -> None:
    """Take an output URL for one run: `run.json` says whose it is, and another run is refused.

    `identity` is whatever decides the result: the configuration without its places, and the fingerprints of
    its inputs. The same identity may come back, to resume. Leaves named in `may_change`, such as
    `config.batch_size`, may differ then, unless the run is `finished`.
    """
    location = storage.join(url, "run.json")
    text = json.dumps(identity, indent=2, sort_keys=True, allow_nan=False).encode() + b"\n"
    held = storage.read_or_none(location)
    if held is None:
        if not storage.is_empty(url):
            raise InputError(f"{url} already holds something else; choose another --output or empty it")
        if storage.create(location, text):
            return
        held = storage.read(location)
    differing = differences(json.loads(held), json.loads(text))
    changed = [] if finished else [line for line in differing if line.split(":")[0] in may_change]
    if changed:
        print(f"{url} goes on with other settings: {'; '.join(changed)}", flush=True)
    differing = [line for line in differing if line not in changed]
    if differing:
        raise InputError(
            f"{url} belongs to another run, which differs in {'; '.join(differing[:4])}"
            "; choose another --output, or repeat that run's settings"
        )


def claimed_config(url: str) -> dict[str, Any]:
    """The settings of the run that claimed an output URL; empty where none did."""
    held = storage.read_or_none(storage.join(url, "run.json"))
    return {} if held is None else json.loads(held).get("config", {})


def differences(held: Any, asked: Any, path: str = "") -> list[str]:
    """`key: there X, asked Y` for every leaf in which two JSON values differ."""
    if isinstance(held, dict) and isinstance(asked, dict):
        found: list[str] = []
        for key in sorted({*held, *asked}):
            found += differences(held.get(key), asked.get(key), f"{path}.{key}" if path else str(key))
        return found
    return [] if held == asked else [f"{path}: there {held!r}, asked {asked!r}"]

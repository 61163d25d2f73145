"""A stage: one job with its settings and its places, and what tells that it is finished."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline import artifacts, storage
from pipeline.errors import InputError


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage: the settings it runs with. Where it reads and writes is the pipeline's business."""

    config: str | None = None
    """YAML file or URL of the stage's job; null runs the job's defaults."""

    overrides: dict[str, Any] = field(default_factory=dict)
    """Keys of that job set on top of its file, such as {views.views_per_image: 2}."""


@dataclass(frozen=True, kw_only=True)
class ClusterOverride:
    """What every stage is told about the cluster, on top of its own file."""

    num_workers: int | None = None
    """Worker processes of every stage; 0 runs in process, without Ray; null leaves it to the stage's file."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """One job with its places filled in.

    It is finished when, and only when, all headers among its outputs exist: a job writes them last. Whether
    they come from these settings is known to the pipeline's record, or to the name of a table's stage.
    """

    job: str
    """It is run as `python -m jobs.<job>`."""
    name: str
    """Unique among the stages of an output; names the log, and the folder of a table's stage."""
    settings: StageConfig
    flags: Mapping[str, str]
    """Where it reads and writes, and what else its graph decides; `output` is among them."""
    inputs: tuple[str, ...]
    """Headers of the artifacts it reads."""
    outputs: tuple[str, ...]
    """Headers of the artifacts it writes."""
    needs: Mapping[str, Stage] = field(default_factory=dict)
    """Flag -> the stage whose output it names, in the graph of a table."""
    resolved: Mapping[str, Any] = field(default_factory=dict)
    """Every setting of its job by dotted key, with stand-ins for places, in the graph of a table."""
    uses_cluster: bool = True
    echoes: bool = True
    """False keeps its output for the end: the report's is the summary."""

    @property
    def output(self) -> str:
        """Folder of its artifact; the report's is a page."""
        return self.flags["output"]

    def argv(self, cluster: ClusterOverride) -> list[str]:
        """The arguments of its job: its file, its places, and what overrides them, last."""
        words = ["--config", self.settings.config] if self.settings.config else []
        for key, value in self.flags.items():
            words += [f"--{key}", value]
        if self.uses_cluster and cluster.num_workers is not None:
            words += ["--cluster.num_workers", str(cluster.num_workers)]
        for key, value in leaves(self.settings.overrides):
            words.append(f"--{key}={value if isinstance(value, str) else json.dumps(value)}")
        return words

    def is_finished(self) -> bool:
        """All its outputs exist."""
        return all(storage.exists(url) for url in self.outputs)

    def settings_fingerprint(self, argv: Sequence[str]) -> str:
        """Fingerprint of everything the job is told: its arguments, and the content of its settings' file."""
        file_hash = None
        if self.settings.config is not None:
            try:
                file_hash = artifacts.sha256_hex(storage.read(self.settings.config))
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                raise InputError(
                    f"{self.job}.config: there is no file {self.settings.config}; name a YAML file or a URL"
                ) from None
        return artifacts.fingerprint({"argv": list(argv), "file": file_hash})


def headers_fingerprint(urls: Sequence[str]) -> str | None:
    """Fingerprint of headers, which name all else by size and hash; None unless every one exists."""
    headers = [storage.read_or_none(url) for url in urls]
    hashes = [artifacts.sha256_hex(header) for header in headers if header is not None]
    return artifacts.fingerprint(hashes) if len(hashes) == len(urls) else None


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every leaf of nested settings, in order; an empty mapping is a leaf."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check_address(address: str | None) -> None:
    """InputError for an address that cannot be a job server's."""
    if address is not None and not address.startswith(("http://", "https://")):
        raise InputError(f"address {address!r} is no job server; give http://host:8265")

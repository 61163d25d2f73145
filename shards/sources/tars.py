"""Somebody's WebDataset tars, indexed where they lie: a row per image member, and their bytes.

Members are untrusted: nothing is unpacked, executed or unpickled, and names are only looked at.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO

from pipeline import storage
from pipeline.errors import InputError
from shards.format.records import to_utf8
from shards.format.tar import TarError, TarMember, iter_members
from shards.sources.table import Source

IMAGE_EXTENSIONS = frozenset(
    (
        "apng", "avif", "bmp", "dib", "gif", "heic", "heif", "ico", "j2k", "jfif", "jp2", "jpe", "jpeg",
        "jpg", "jpx", "pbm", "pcx", "pgm", "png", "pnm", "ppm", "psd", "qoi", "sgi", "tga", "tif", "tiff",
        "webp",
    )
)  # fmt: skip
"""Members that end so are images until decoding says otherwise."""

_NOT_FOLLOWED = "links, devices and names that leave the tar are not followed"
_LABEL_EXTENSIONS = ("cls", "json")
_MAX_LABEL_BYTES = 1 << 20
_MAX_CLASS_NAME = 1000
_MAX_GAP_BYTES = 1 << 20
_MAX_RUN_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedFile:
    """The sources found in one file, in its order, and their labels: numbers, names or None.

    `class_names` is set where the file itself says what its numbers mean.
    """

    rows: list[Source]
    labels: list[int | str | None]
    class_names: tuple[str, ...] | None = None


def list_tar(url: str, version: str) -> ListedFile:
    """One row per image member of a tar, label from the `.cls` or `.json` ({"label": …}) of the same key.

    What cannot become a sample has a row with its reason, so that every member is accounted for: links,
    devices, unsafe names, a name that was there before, and members that are not an image nor belong to one.
    A damaged tar gives one more row for whatever is behind the damage. Members are told apart as webdataset
    does: the key ends at the first dot of the base name.
    """
    rows: list[Source] = []
    labels: dict[str, int | str | None] = {}
    others: list[TarMember] = []
    names: set[str] = set()

    def append(member: TarMember, reason: str | None = None, message: str | None = None) -> None:
        rows.append(
            Source(
                path=os.fsencode(url),
                member=member.name.encode("utf-8", "surrogateescape"),
                offset=member.offset,
                bytes=member.bytes,
                version=version,
                reject_reason=reason,
                reject_message=message,
            )
        )

    with storage.open_file(url) as file:
        try:
            for member in iter_members(file):
                key, extension = _key(member.name)
                if member.problem is not None:
                    append(member, member.problem, _NOT_FOLLOWED)
                elif member.name in names:
                    append(member, "duplicate_name", "an earlier member has the same name")
                elif extension in IMAGE_EXTENSIONS:
                    append(member)
                elif extension in _LABEL_EXTENSIONS:
                    label = _read_label(file, member, extension)
                    # .cls is the convention for class numbers, .json only sometimes holds one
                    if label is not None and (extension == "cls" or key not in labels):
                        labels[key] = label
                    others.append(member)
                else:
                    others.append(member)
                names.add(member.name)
        except TarError as error:
            damage = TarMember(name="", offset=-1, bytes=0)
            append(damage, "damaged_tar", f"{error}; what comes after is lost")
            rows[-1] = replace(rows[-1], member=None)
    keys = {_key(os.fsdecode(row.member))[0] for row in rows if row.member and row.reject_reason is None}
    for member in others:
        if _key(member.name)[0] not in keys:
            append(member, "not_an_image", "no image extension, and no image has its key")
    rows.sort(key=lambda row: row.offset if row.offset >= 0 else 1 << 62)
    return ListedFile(
        rows=rows,
        labels=[
            labels.get(_key(os.fsdecode(row.member))[0]) if row.member and row.reject_reason is None else None
            for row in rows
        ],
    )


def read_members(sources: Sequence[Source]) -> Iterator[bytes]:
    """The payloads of members of one tar, in order; neighbours are read together, a few MB at a time."""
    run: list[Source] = []
    for source in sources:
        if run and not _joins(run, source):
            yield from _read_run(run)
            run = []
        run.append(source)
    if run:
        yield from _read_run(run)


def check_unchanged(url: str, version: str) -> storage.FileStat:
    """The file's size and version, if it is still the one that was listed; InputError otherwise."""
    found = storage.stat(url)
    if found is None or found.version != version:
        state = "is gone" if found is None else "has changed"
        raise InputError(
            f"{url} {state} since it was listed; bring the old one back, or prepare to another output"
        )
    return found


def _joins(run: list[Source], source: Source) -> bool:
    end = run[-1].offset + run[-1].bytes
    return (
        0 <= source.offset - end <= _MAX_GAP_BYTES
        and source.offset + source.bytes - run[0].offset <= _MAX_RUN_BYTES
    )


def _read_run(run: list[Source]) -> Iterator[bytes]:
    start = run[0].offset
    data = storage.read(run[0].url, start, run[-1].offset + run[-1].bytes - start)
    for source in run:
        yield data[source.offset - start : source.offset - start + source.bytes]


def _key(name: str) -> tuple[str, str]:
    """(key, last extension in lower case): `a/b.seg.PNG` is (`a/b`, `png`)."""
    folder, slash, base = name.rpartition("/")
    stem, _, extensions = base.partition(".")
    return f"{folder}{slash}{stem}", extensions.rpartition(".")[2].lower()


def _read_label(file: BinaryIO, member: TarMember, extension: str) -> int | str | None:
    """The label in a `.cls` (a number, or a name) or `.json` member; None where there is none to be found."""
    if member.bytes > _MAX_LABEL_BYTES:
        return None
    file.seek(member.offset)
    text = file.read(member.bytes).decode("utf-8", "replace").strip()
    if extension == "cls":
        return _number_or_name(text)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    label = value.get("label") if isinstance(value, dict) else None
    if isinstance(label, str):
        return class_name(label)
    return label if isinstance(label, int) and not isinstance(label, bool) else None


def _number_or_name(text: str) -> int | str | None:
    if text.isascii() and text.removeprefix("-").isdigit() and len(text) < 20:
        return int(text)
    return class_name(text)


def class_name(text: str) -> str | None:
    """A name that may stand in a manifest; None for what is no name but a text or nothing."""
    return to_utf8(text) if 0 < len(text) <= _MAX_CLASS_NAME else None

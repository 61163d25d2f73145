"""Where images come from: image folders, WebDataset tars and Parquet files, listed once and read by range."""

from __future__ import annotations

import dataclasses
import errno
import fnmatch
import functools
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.cluster.config import ClusterConfig
from pipeline.cluster.items import map_items
from pipeline.draws import permute
from pipeline.errors import InputError
from pipeline.storage import FileStat
from pipeline.training.metrics import Progress
from shards.format.records import to_utf8
from shards.pixels.decode import Rejected
from shards.sources import parquet as source_parquet
from shards.sources import tars as source_tars
from shards.sources.table import SCHEMA, Source, SourceKind, Sources, table_of, with_labels
from shards.sources.tars import IMAGE_EXTENSIONS, ListedFile

LabelRule = Literal["folder", "top_folder", "none"]

_PERMUTATION_STREAM = 3  # 0 to 2 belong to the reader
_LISTED_IN_PROCESS = 4
_SIDE_FILES = (".json", ".txt", ".md", ".idx", ".index", ".crc", ".sha256", "_SUCCESS", "_metadata")

# A machine out of files or memory says nothing about the image.
_OUR_TROUBLE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """What to list, and how to read labels from it."""

    url: str
    labels: LabelRule = "folder"
    seed: int = 0
    image_column: str = "image"
    label_column: str | None = None

    @property
    def origin(self) -> dict[str, Any]:
        """What decides the listing, as JSON."""
        return {**dataclasses.asdict(self), "url": to_utf8(storage.absolute(self.url))}


# ------------------------------------------------------------------------------------------------ listing


def list_sources(config: SourceConfig, cluster: ClusterConfig) -> Sources:
    """Every source below a URL, in sample-id order.

    An image folder: each file is a source, whatever its name, in a seeded permutation (class-sorted folders
    would make every window of the reader one class); its label is the folder it lies in, relative to the root
    (`folder`), or the topmost of those (`top_folder`); the root's own files have none. Tars and Parquet files
    (one, a folder of them, or a pattern with `{000..009}`, `{a,b}`, `*`) keep their order; where it is sorted
    by label, a warning is printed. InputError where there is nothing, or nothing to be read this way.
    """
    kind, files = _detect(config.url)
    if kind == "folder":
        sources = _list_folder(config, files)
    else:
        for file in files:
            if to_utf8(file.url) != file.url:
                raise InputError(f"{to_utf8(file.url)} is not a UTF-8 name; rename the file")
        sources = _list_containers(config, kind, files, cluster)
        if _is_sorted_by_label(sources.table):
            print(
                f"warning: {sources.origin['url']} is sorted by label, and its order is kept: batches will "
                "see few classes at a time; better shuffle it first, or prepare from an image folder",
                flush=True,
            )
    return sources


def _detect(url: str) -> tuple[SourceKind, list[FileStat]]:
    """The kind of a source and its files, sorted."""
    location = storage.absolute(url)
    shown = to_utf8(location)
    kinds: dict[str, SourceKind] = {".tar": "tars", ".parquet": "parquet"}
    try:
        found = storage.stat(location)
    except OSError as error:  # links that lead in a circle, a folder above it that is closed
        raise InputError(f"{shown} cannot be looked at: {error.strerror or error}") from None
    if found is not None:
        kind = kinds.get(_suffix(location))
        if kind is None:
            is_packed = location.endswith((".gz", ".tgz", ".zip", ".bz2", ".xz", ".zst"))
            mend = "unpack it first" if is_packed else "name the folder it lies in"
            raise InputError(f"{shown} is a file, but neither a .tar nor a .parquet; {mend}")
        return kind, [dataclasses.replace(found, url=location)]
    if re.search(r"[*?\[{]", storage.name(location)):
        files = _expand(location)
        suffixes = {_suffix(file.url) for file in files}
        if not files:
            raise InputError(f"{shown} matches no file; check the pattern")
        if len(suffixes) > 1 or not suffixes <= set(kinds):
            raise InputError(
                f"{shown} matches {', '.join(sorted(suffixes))}; a pattern must match .tar or .parquet only"
            )
        return kinds[suffixes.pop()], files
    files = list(storage.list_files(location))
    if not files:
        raise InputError(f"there are no files at {shown}; check the path or URL of the source")
    if files[0].url == location:
        raise InputError(f"{shown} cannot be looked into; check its permissions")
    for suffix, kind in kinds.items():
        chosen = [file for file in files if _suffix(file.url) == suffix]
        beside = [file for file in files if _suffix(file.url) != suffix]
        if chosen and not any(_suffix(file.url)[1:] in IMAGE_EXTENSIONS for file in beside):
            hidden = [file for file in beside if not _is_side_file(file.url)]
            if hidden:
                raise InputError(
                    f"{shown} holds {suffix} files and {to_utf8(storage.name(hidden[0].url))}; "
                    f"name those to read with a pattern such as {shown}/*{suffix}"
                )
            return kind, chosen
    return "folder", files


def _suffix(url: str) -> str:
    return os.path.splitext(storage.name(url))[1].lower()


def _folder(url: str) -> str:
    return url.rpartition("/")[0]


def _is_side_file(url: str) -> bool:
    return storage.name(url).startswith(".") or url.endswith(_SIDE_FILES)


def _expand(pattern: str) -> list[FileStat]:
    """The files that a pattern with braces and wildcards in its last component names; a brace names each."""
    folder, last = _folder(pattern), storage.name(pattern)
    listed: list[FileStat] | None = None
    files: list[FileStat] = []
    for name in _braces(last):
        if re.search(r"[*?\[]", name):
            if listed is None:
                listed = [file for file in storage.list_files(folder) if _folder(file.url) == folder]
            files += [file for file in listed if fnmatch.fnmatchcase(storage.name(file.url), name)]
        else:
            url = f"{folder}/{name}"
            found = storage.stat(url)
            if found is None:
                name = to_utf8(url)
                raise InputError(f"{name}, one of {to_utf8(pattern)}, does not exist; check the pattern")
            files.append(dataclasses.replace(found, url=url))
    return list({file.url: file for file in files}.values())


def _braces(pattern: str) -> Iterator[str]:
    """`a{0..2}` gives a0, a1, a2, padded like the first number; `{x,y}` gives x and y."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if numbers is not None:
        first, last = int(numbers[1]), int(numbers[2])
        choices = [f"{i:0{len(numbers[1])}d}" for i in range(first, last + 1)]
    else:
        choices = match[1].split(",")
    for choice in choices:
        yield from _braces(pattern[: match.start()] + choice + pattern[match.end() :])


def _list_folder(config: SourceConfig, files: list[FileStat]) -> Sources:
    root = storage.absolute(config.url)
    folders: list[str | None] = []
    for file in files:
        folder = _folder(file.url[len(root) + 1 :])
        if config.labels == "top_folder":
            folder = folder.partition("/")[0]
        folders.append(to_utf8(folder) if folder and config.labels != "none" else None)
    # By column: a row object for each of many million files would take gigabytes.
    count = len(files)
    columns = {field.name: pa.nulls(count, field.type) for field in SCHEMA} | {
        "path": pa.array([os.fsencode(file.url) for file in files], pa.binary()),
        "offset": pa.array(np.full(count, -1)),
        "row": pa.array(np.full(count, -1)),
        "bytes": pa.array([file.bytes for file in files], pa.int64()),
        "version": pa.array([file.version for file in files], pa.string()),
    }
    table, class_names = with_labels(pa.table(columns, schema=SCHEMA), folders)
    table = table.take(pa.array(permute(count, config.seed, 0, _PERMUTATION_STREAM, 0)))
    return Sources(kind="folder", origin=config.origin, class_names=class_names, table=table.combine_chunks())


def _list_containers(
    config: SourceConfig, kind: SourceKind, files: list[FileStat], cluster: ClusterConfig
) -> Sources:
    if len(files) <= _LISTED_IN_PROCESS:
        cluster = dataclasses.replace(cluster, num_workers=0)
    listed: dict[int, ListedFile] = {}
    progress = Progress(f"listing {kind}", len(files), "files")
    make_lister = functools.partial(_make_lister, config, kind)
    for number, result in map_items(list(enumerate(files)), make_lister, cluster):
        listed[number] = result
        progress.update()
    results = [listed[number] for number in range(len(files))]
    if not any(result.rows for result in results):
        raise InputError(
            f"{to_utf8(storage.absolute(config.url))} holds no images; check the path or URL of the source"
        )
    named = {result.class_names for result in results if result.class_names is not None}
    if len(named) > 1:
        raise InputError(
            f"the files of {to_utf8(config.url)} disagree about their class names; prepare them apart"
        )
    table = pa.concat_tables([table_of(result.rows) for result in results]).combine_chunks()
    labels = list(itertools.chain.from_iterable(result.labels for result in results))
    if config.labels == "none":
        labels, named = [None] * len(labels), set()
    table, class_names = with_labels(table, labels)
    if named:
        class_names = named.pop()
        known = [n if isinstance(n, int) and n < len(class_names) else None for n in labels]
        table, _ = with_labels(table, known)
    return Sources(kind=kind, origin=config.origin, class_names=class_names, table=table)


def _make_lister(config: SourceConfig, kind: SourceKind) -> functools.partial[tuple[int, ListedFile]]:
    return functools.partial(_list_one, config, kind)


def _list_one(config: SourceConfig, kind: SourceKind, item: tuple[int, FileStat]) -> tuple[int, ListedFile]:
    number, file = item
    if kind == "tars":
        return number, source_tars.list_tar(file.url, file.version)
    columns = config.image_column, config.label_column
    return number, source_parquet.list_parquet(file.url, file.version, *columns)


def _is_sorted_by_label(table: pa.Table) -> bool:
    """True where labels change between neighbours less than a quarter as often as in a shuffled order."""
    labels = table.column("label").drop_null().to_numpy()
    if len(labels) < 20:
        return False
    shares = np.unique(labels, return_counts=True)[1] / len(labels)
    expected = (len(labels) - 1) * (1 - float(np.sum(shares**2)))
    # A few changes are expected where one class is nearly everything: too little to judge by.
    return expected >= 10 and int(np.count_nonzero(np.diff(labels))) < expected / 4


# ------------------------------------------------------------------------------------------------ reading


def read_sources(
    sources: Sequence[Source], *, image_column: str, max_file_bytes: int, pool: Executor
) -> Iterator[bytes | Rejected]:
    """The encoded image of each source, in order, or why there is none; read ahead by `pool`.

    All of one kind, as in a listing. What the listing already refused and what is larger than
    `max_file_bytes` is not read. A file that has another size, version (modification time, ETag) or content
    than when it was listed is rejected as `changed`; a tar or Parquet file that is not the one listed is an
    InputError.
    """
    readable = [source for source in sources if _refusal(source, max_file_bytes) is None]
    payloads = _payloads(readable, image_column, pool)
    for source in sources:
        refusal = _refusal(source, max_file_bytes)
        if refusal is None:
            payload = next(payloads)
            yield payload if isinstance(payload, Rejected) else _unchanged(source, payload)
        else:
            yield refusal


def _refusal(source: Source, max_file_bytes: int) -> Rejected | None:
    if source.reject_reason is not None:
        return Rejected(source.reject_reason, source.reject_message or "")
    if source.bytes > max_file_bytes:
        return Rejected("too_large", f"{source.bytes} bytes, more than max_file_bytes {max_file_bytes}")
    if source.bytes > 0:
        return None
    if source.version == "":
        message = "a link to nothing, no file but a pipe or device, or not to be looked at"
        return Rejected("unreadable", message)
    return Rejected("empty", "0 bytes")


def _payloads(sources: list[Source], image_column: str, pool: Executor) -> Iterator[bytes | Rejected]:
    if sources and sources[0].offset < 0 and sources[0].row < 0:
        yield from pool.map(_read_file, sources)
        return
    for _, group in itertools.groupby(sources, key=lambda source: source.path):
        rows = list(group)
        source_tars.check_unchanged(rows[0].url, rows[0].version)
        if rows[0].offset >= 0:
            yield from source_tars.read_members(rows)
        else:
            yield from source_parquet.read_column(rows, image_column)


def _read_file(source: Source) -> bytes | Rejected:
    """The bytes of a file that, once they are read, still has the version that was listed.

    At most one byte more than it had: that one is enough to see that it grew.
    """
    try:
        data = storage.read(source.url, 0, source.bytes + 1)
        found = storage.stat(source.url)
    except FileNotFoundError:
        return Rejected("unreadable", "gone since it was listed")
    except OSError as error:
        # Of a remote store, a refusal may be ours to mend (expired credentials): that ends the pass.
        if not storage.is_local(source.url) or error.errno in _OUR_TROUBLE:
            raise
        return Rejected("unreadable", error.strerror or str(error))
    if found is None:
        return Rejected("unreadable", "gone since it was listed")
    if len(data) == source.bytes and found.version != source.version:
        return Rejected("changed", "written to since it was listed")
    return data


def _unchanged(source: Source, data: bytes) -> bytes | Rejected:
    if len(data) != source.bytes:
        size = "more" if len(data) > source.bytes else len(data)
        return Rejected("changed", f"{size} bytes, but {source.bytes} when it was listed")
    if source.image_hash is not None and hashlib.sha256(data).digest() != source.image_hash:
        return Rejected("changed", "other bytes than when it was listed")
    return data

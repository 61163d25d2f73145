"""The frozen listing of a dataset's sources: one row per source, in sample-id order, never listed again."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.artifacts import sha256_hex
from pipeline.draws import SPLITMIX_STEP, splitmix
from pipeline.errors import InputError
from shards.format.records import to_utf8

SOURCES = "sources.parquet"
SOURCES_VERSION = 1
SourceKind = Literal["folder", "tars", "parquet"]

SCHEMA = pa.schema(
    [
        # URLs as bytes: file names need not be text.
        pa.field("path", pa.binary(), nullable=False),
        pa.field("member", pa.binary()),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("version", pa.string(), nullable=False),
        pa.field("label", pa.int32()),
        pa.field("image_hash", pa.binary(32)),
        pa.field("reject_reason", pa.string()),
        pa.field("reject_message", pa.string()),
    ]
)

_METADATA_KEY = b"beit2_sources"
_ROWS_PER_GROUP = 8192  # a work item reads one or two groups


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One source: a file, a member of a tar (`offset`), or a row of a Parquet file (`row`); -1 is "not that".

    `bytes` is the size of the encoded image and `version` that of the file it lies in (ETag, or modification
    time in ns). `image_hash` is the sha256 of the image where it is known. `reject_reason` is set where the
    listing already saw that this is no image.
    """

    path: bytes
    member: bytes | None = None
    offset: int = -1
    row: int = -1
    bytes: int
    version: str
    label: int | None = None
    image_hash: bytes | None = None
    reject_reason: str | None = None
    reject_message: str | None = None

    @property
    def url(self) -> str:
        """The file, as `pipeline.storage` takes it."""
        return os.fsdecode(self.path)

    @property
    def name(self) -> str:
        """`URL`, `URL#member` or `URL#row=7`, as valid text."""
        if self.member is not None:
            return to_utf8(f"{self.url}#{os.fsdecode(self.member)}")
        return to_utf8(f"{self.url}#row={self.row}" if self.row >= 0 else self.url)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sources:
    """All sources: row i of the table is sample i.

    `origin` says what was listed, and how. `fingerprint` is the sha256 of the file they are frozen in, empty
    before they are.
    """

    kind: SourceKind
    origin: dict[str, Any]
    class_names: tuple[str, ...] | None
    table: pa.Table
    fingerprint: str = ""

    def __len__(self) -> int:
        return self.table.num_rows

    def to_bytes(self) -> bytes:
        """As Parquet, with everything but the table in the schema's metadata."""
        header = {
            "version": SOURCES_VERSION,
            "kind": self.kind,
            "origin": self.origin,
            "class_names": None if self.class_names is None else list(self.class_names),
        }
        metadata = {_METADATA_KEY: json.dumps(header, sort_keys=True).encode()}
        sink = pa.BufferOutputStream()
        table = self.table.replace_schema_metadata(metadata)
        with pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
            writer.write_table(table, row_group_size=_ROWS_PER_GROUP)
        return sink.getvalue().to_pybytes()


def freeze(url: str, sources: Sources) -> Sources:
    """Create the listing at `url`, unless there is one: whichever stands is returned."""
    storage.create(url, sources.to_bytes())
    standing = load_sources(url)
    if standing is None:
        raise FileNotFoundError(f"{url} was there a moment ago and is gone")
    return standing


def load_sources(url: str) -> Sources | None:
    """The frozen listing at `url`, or None where there is none."""
    try:
        data = storage.read(url)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        table = pq.read_table(pa.BufferReader(data), use_threads=False)
        header = json.loads((table.schema.metadata or {})[_METADATA_KEY])
        if header["version"] != SOURCES_VERSION:
            raise InputError(
                f"{url} has version {header['version']}, not {SOURCES_VERSION}; choose another output"
            )
        class_names = header["class_names"]
        return Sources(
            kind=header["kind"],
            origin=header["origin"],
            class_names=None if class_names is None else tuple(class_names),
            table=table.replace_schema_metadata(None).cast(SCHEMA),
            fingerprint=sha256_hex(data),
        )
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise InputError(f"{url} is not a listing of sources ({error}); choose another output") from None


def load_rows(url: str, first_id: int, end_id: int) -> list[Source]:
    """The sources [first_id, end_id) of a frozen listing, reading only the row groups that hold them."""
    with storage.open_file(url) as file:
        parquet = pq.ParquetFile(file)
        ends = np.cumsum([parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)])
        first = int(np.searchsorted(ends, first_id, side="right"))
        last = int(np.searchsorted(ends, end_id - 1, side="right"))
        table = parquet.read_row_groups(list(range(first, last + 1)), use_threads=False)
    start = first_id - (int(ends[first - 1]) if first else 0)
    return rows_of(table.slice(start, end_id - first_id))


def rows_of(table: pa.Table) -> list[Source]:
    """The rows of a table of sources."""
    return [Source(**row) for row in table.to_pylist()]


def table_of(rows: Sequence[Source]) -> pa.Table:
    """Rows as a table."""
    columns = {field.name: [getattr(row, field.name) for row in rows] for field in SCHEMA}
    return pa.table(columns, schema=SCHEMA)


def with_labels(
    table: pa.Table, labels: Sequence[int | str | None]
) -> tuple[pa.Table, tuple[str, ...] | None]:
    """The table with labels, and the class names where labels came as names: those, sorted, are numbered.

    Numbers stay as they are; a number that cannot be a label (negative, beyond 31 bits) counts as none.
    """
    names = sorted({str(label) for label in labels if label is not None})
    class_names: tuple[str, ...] | None = None
    if any(isinstance(label, str) for label in labels):
        number = {name: i for i, name in enumerate(names)}
        labels = [None if label is None else number[str(label)] for label in labels]
        class_names = tuple(names)
    valid = [label if isinstance(label, int) and 0 <= label < 1 << 31 else None for label in labels]
    return _set_column(table, "label", pa.array(valid, pa.int32())), class_names


def with_hashes(sources: Sources, hashes: Sequence[bytes | None]) -> Sources:
    """The sources with the sha256 of every image that could be read."""
    table = _set_column(sources.table, "image_hash", pa.array(hashes, pa.binary(32)))
    return replace(sources, table=table, fingerprint="")


def split_by_content(sources: Sources, val_fraction: float, seed: int) -> tuple[Sources, Sources]:
    """(train, val): an image's side is a function of its content hash and the seed alone.

    So duplicates are never on both sides, and an image keeps its side when others come or go; the fraction
    holds on average. What could not be read, and so has no hash, goes to train to be rejected there.
    """
    hashes = sources.table.column("image_hash").combine_chunks()
    words = np.zeros(len(sources), np.uint64)
    known = ~np.array(hashes.is_null())
    if known.any():
        digests = np.frombuffer(b"".join(hashes.drop_null().to_pylist()), "<u8").reshape(-1, 4)
        # The seed is mixed in: other seeds give other splits.
        words[known] = splitmix(digests[:, 0] ^ np.uint64(seed * SPLITMIX_STEP & (1 << 64) - 1))
    in_val = known & (words.astype(np.float64) < val_fraction * 2.0**64)
    parts: list[Sources] = []
    for part, rows in (("train", ~in_val), ("val", in_val)):
        if not rows.any():
            raise InputError(
                f"val_fraction {val_fraction} of {len(sources)} images leaves {part} empty; choose another"
            )
        table = sources.table.filter(pa.array(rows)).combine_chunks()
        origin = {**sources.origin, "part": part}
        parts.append(replace(sources, table=table, origin=origin, fingerprint=""))
    return parts[0], parts[1]


def _set_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), SCHEMA.field(name), values)

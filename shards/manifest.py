"""What a finished dataset says about itself: the manifest, the shard table it names, and how both are opened.

A folder without `manifest.json` is unfinished, whatever else it holds. Three lines look into any dataset:

    dataset = open_dataset("runs/tokens")
    table = read_shard_index(dataset.shard(0, 0))
    print(codes_of(table)[0].reshape(dataset.manifest.grid))
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.artifacts import fingerprint, sha256_hex
from pipeline.errors import InputError
from shards.index import FORMAT_VERSION, IndexFormatError, as_numpy, read_index

Kind = Literal["images", "tokens"]
Decode = Callable[[bytes], np.ndarray]
"""Encoded image -> uint8 [H, W, 3]: `views.decode_crop`, or `decode.decode_image` with its config."""

MANIFEST = "manifest.json"
ROW_GROUP = 8192
"""Rows of the shard table that are read together; 500,000 shards have 62 such groups."""


# ------------------------------------------------------------------------------------------------ one shard


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardInfo:
    """One shard of one view: its ids [first_id, end_id), and its objects by place, size and hash.

    Places are relative to the dataset in everything that is stored, and complete URLs in what
    `Dataset.shard` returns. A foreign tar (indexed in place) always has its absolute URL and, instead of a
    hash, the version it had: ETag or modification time. `samples` are stored, `rejected` are not.
    """

    view: int
    number: int
    first_id: int
    end_id: int
    samples: int
    rejected: int
    tar: str
    tar_bytes: int
    tar_sha256: str | None
    tar_version: str | None
    index: str
    index_bytes: int
    index_sha256: str
    rejects: str | None = None
    rejects_bytes: int | None = None
    rejects_sha256: str | None = None

    @property
    def name(self) -> str:
        return shard_name(self.view, self.number)

    @property
    def is_foreign(self) -> bool:
        """True where the tar is somebody else's: check version and per-image hashes, not one hash."""
        return self.tar_sha256 is None

    def resolved(self, root: str) -> ShardInfo:
        """The same with complete URLs."""
        return dataclasses.replace(
            self,
            tar=self.tar if self.is_foreign else storage.join(root, self.tar),
            index=storage.join(root, self.index),
            rejects=None if self.rejects is None else storage.join(root, self.rejects),
        )


def shard_name(view: int, number: int) -> str:
    """`v00-00000`."""
    return f"v{view:02d}-{number:05d}"


def read_checked(url: str, num_bytes: int, sha256: str, shard: str) -> bytes:
    """An object's bytes, if they are those that were written; otherwise an error that names it."""
    try:
        data = storage.read(url)
    except FileNotFoundError:
        raise InputError(f"{url} of shard {shard} is missing; copy the dataset again or repair it") from None
    if len(data) != num_bytes or sha256_hex(data) != sha256:
        raise InputError(
            f"{url} of shard {shard} is damaged: {len(data)} bytes with sha256 {sha256_hex(data)[:8]}…, "
            f"written were {num_bytes} with {sha256[:8]}…; copy the dataset again or repair it"
        )
    return data


def read_shard_index(shard: ShardInfo, columns: Sequence[str] | None = None) -> pa.Table:
    """The index of a shard from `Dataset.shard`, or some of its columns, after checking size and hash."""
    data = read_checked(shard.index, shard.index_bytes, shard.index_sha256, shard.name)
    try:
        table = read_index(data, columns)
    except IndexFormatError as error:
        raise InputError(f"{shard.index} of shard {shard.name}: {error}") from None
    if table.num_rows != shard.samples:
        raise InputError(
            f"{shard.index} of shard {shard.name} has {table.num_rows} rows, not {shard.samples}"
        )
    return table


def check_foreign_tar(shard: ShardInfo) -> None:
    """Raise InputError where a tar that was indexed in place is no longer the one that was indexed."""
    found = storage.stat(shard.tar)
    if found is None:
        raise InputError(
            f"{shard.tar}, indexed in place as shard {shard.name}, is gone; bring it back or prepare again"
        )
    if (found.bytes, found.version) != (shard.tar_bytes, shard.tar_version):
        raise InputError(
            f"{shard.tar}, indexed in place as shard {shard.name}, has changed: it was "
            f"{shard.tar_bytes} bytes, version {shard.tar_version}, and is {found.bytes}, {found.version}; "
            "bring the old one back or prepare again"
        )


# ------------------------------------------------------------------------------------------------ shard table

TABLE_SCHEMA = pa.schema(
    [
        pa.field("view", pa.int8(), nullable=False),
        pa.field("number", pa.int32(), nullable=False),
        pa.field("first_id", pa.int64(), nullable=False),
        pa.field("end_id", pa.int64(), nullable=False),
        pa.field("samples", pa.int32(), nullable=False),
        pa.field("rejected", pa.int32(), nullable=False),
        pa.field("tar", pa.string(), nullable=False),
        pa.field("tar_bytes", pa.int64(), nullable=False),
        pa.field("tar_sha256", pa.binary(32)),
        pa.field("tar_version", pa.string()),
        pa.field("index", pa.string(), nullable=False),
        pa.field("index_bytes", pa.int64(), nullable=False),
        pa.field("index_sha256", pa.binary(32), nullable=False),
        pa.field("rejects", pa.string()),
        pa.field("rejects_bytes", pa.int64()),
        pa.field("rejects_sha256", pa.binary(32)),
    ],
    metadata={"format_version": str(FORMAT_VERSION)},
)
_HASHES = ("tar_sha256", "index_sha256", "rejects_sha256")


class TableWriter:
    """Builds the shard table row by row, holding only the last few thousand rows as Python objects."""

    def __init__(self) -> None:
        self._sink = pa.BufferOutputStream()
        # no dictionaries: they would only repeat paths and hashes, which are all different
        self._writer = pq.ParquetWriter(self._sink, TABLE_SCHEMA, compression="zstd", use_dictionary=False)
        self._rows: list[dict[str, Any]] = []

    def append(self, shard: ShardInfo) -> None:
        row = dataclasses.asdict(shard)
        for column in _HASHES:
            row[column] = None if row[column] is None else bytes.fromhex(row[column])
        self._rows.append(row)
        if len(self._rows) == ROW_GROUP:
            self._flush()

    def finish(self) -> bytes:
        """The Parquet bytes; the writer is used up."""
        self._flush()
        self._writer.close()
        return self._sink.getvalue().to_pybytes()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(
                pa.Table.from_pylist(self._rows, schema=TABLE_SCHEMA), row_group_size=ROW_GROUP
            )
            self._rows = []


# ------------------------------------------------------------------------------------------------ manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeEntry:
    """One stored image and the sha256 of its decoded pixels: unmasks a decoder that is not the writer's."""

    view: int
    number: int
    row: int
    key: str
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TableName:
    """Name, size and hash of the shard table, which lies beside the manifest."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a finished set of shards contains, and what produced it.

    Written last: a directory without `manifest.json` is unfinished, whatever else it holds. No time, host or
    credentials are in it, so that two honest writers make the same bytes. `inputs` are fingerprints by name,
    `recipe` is whatever decided the bytes. Counts are sums over views; `written_per_view` has one entry for
    each of the views first_view, first_view + 1, …
    """

    kind: Kind
    plan: str
    inputs: dict[str, str]
    recipe: dict[str, Any]
    first_view: int
    shards_per_view: int
    written_per_view: tuple[int, ...]
    samples_in: int
    samples_written: int
    samples_rejected: dict[str, int]
    class_names: tuple[str, ...] | None
    tokenizer: dict[str, Any] | None
    details: dict[str, Any]
    probe: tuple[ProbeEntry, ...]
    table: TableName
    format_version: int = FORMAT_VERSION

    @property
    def num_views(self) -> int:
        return len(self.written_per_view)

    @property
    def fingerprint(self) -> str:
        """Of the whole dataset: the header names the table by hash, and the table every object."""
        return fingerprint(self.to_json())

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the code grid."""
        if self.tokenizer is None:
            raise InputError("an image dataset has no code grid; precompute tokens from it first")
        rows, columns = self.tokenizer["grid"]
        return rows, columns

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self), allow_nan=False))

    def to_bytes(self) -> bytes:
        return json.dumps(self.to_json(), indent=2, sort_keys=True).encode() + b"\n"

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Manifest:
        return cls(
            **{
                **value,
                "written_per_view": tuple(value["written_per_view"]),
                "class_names": None if value["class_names"] is None else tuple(value["class_names"]),
                "probe": tuple(ProbeEntry(**entry) for entry in value["probe"]),
                "table": TableName(**value["table"]),
            }
        )


def read_manifest(url: str) -> Manifest:
    """The manifest of a finished dataset; InputError where there is none, or one that cannot be read."""
    location = storage.join(url, MANIFEST)
    try:
        value = json.loads(storage.read(location))
        version = value["format_version"]
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(_why_absent(url)) from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{location} is not the manifest of a dataset; check the URL") from None
    if version != FORMAT_VERSION:
        raise InputError(
            f"{url} has format version {version}, this program reads {FORMAT_VERSION}; use a newer program"
        )
    try:
        return Manifest.from_json(value)
    except (TypeError, KeyError) as error:
        raise InputError(f"{location} is damaged ({error}); copy the dataset again") from None


def _why_absent(url: str) -> str:
    if storage.exists(storage.join(url, "plan.json")):
        return f"{url} is unfinished: a plan but no manifest; run the job that writes it again, it will go on"
    parts = [part for part in ("train", "val") if storage.exists(storage.join(url, part, MANIFEST))]
    if parts:
        one = storage.join(url, parts[0])
        return f"{url} is not one dataset but holds {' and '.join(parts)}; name one of them, such as {one}"
    return f"there is no dataset at {url}: no {MANIFEST}; check the URL, or prepare one there"


# ------------------------------------------------------------------------------------------------ dataset


class Dataset:
    """A finished dataset opened for reading: the manifest, and columns of the shard table when asked for.

    Safe to share between threads and to send to other processes (the table travels along, nothing is read
    again). Views are counted from 0.
    """

    def __init__(self, url: str, manifest: Manifest, table: bytes) -> None:
        self.url = url
        self.manifest = manifest
        self.fingerprint = manifest.fingerprint
        self._table = table
        self._file = pq.ParquetFile(pa.BufferReader(table))
        self._lock = threading.Lock()
        self._row_groups: OrderedDict[int, pa.Table] = OrderedDict()
        self._sizes: np.ndarray | None = None
        if self._file.metadata.num_rows != manifest.num_views * manifest.shards_per_view:
            raise InputError(
                f"{url}: the shard table has {self._file.metadata.num_rows} rows, the manifest says otherwise"
            )

    def __reduce__(self) -> tuple[type[Dataset], tuple[str, Manifest, bytes]]:
        return Dataset, (self.url, self.manifest, self._table)

    def __repr__(self) -> str:
        return f"Dataset({self.url}, {self.manifest.kind}, {self.fingerprint[:8]})"

    @property
    def kind(self) -> Kind:
        return self.manifest.kind

    @property
    def num_views(self) -> int:
        return self.manifest.num_views

    @property
    def num_shards(self) -> int:
        """Shards of each view."""
        return self.manifest.shards_per_view

    def num_samples(self, view: int = 0) -> int:
        """Stored samples of a view."""
        return self.manifest.written_per_view[self._checked_view(view)]

    def shard_sizes(self, view: int = 0) -> np.ndarray:
        """Stored samples of each shard of a view, int64 [shards]; some may be 0."""
        start = self._checked_view(view) * self.num_shards
        with self._lock:
            sizes = self._sizes
            if sizes is None:
                chunks = self._column("samples").chunks
                sizes = np.concatenate([as_numpy(chunk) for chunk in chunks]).astype(np.int64)
                sizes.setflags(write=False)
                self._sizes = sizes
        return sizes[start : start + self.num_shards]

    def id_ranges(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """`first_ids` and `samples` of view 0: what the plan of a dataset made from this one needs."""
        with self._lock:
            first_ids = self._column("first_id").slice(0, self.num_shards).to_pylist()
            end_id = self._column("end_id")[self.num_shards - 1].as_py()
        return (*first_ids, end_id), tuple(self.shard_sizes(0).tolist())

    def shard(self, view: int, i: int) -> ShardInfo:
        """Shard i of a view, with complete URLs."""
        if not 0 <= i < self.num_shards:
            raise IndexError(f"shard {i} of {self.num_shards}")
        row = self._checked_view(view) * self.num_shards + i
        with self._lock:
            [record] = self._row_group(row // ROW_GROUP).slice(row % ROW_GROUP, 1).to_pylist()
        for column in _HASHES:
            record[column] = None if record[column] is None else record[column].hex()
        return ShardInfo(**record).resolved(self.url)

    def shards(self, view: int = 0) -> Iterable[ShardInfo]:
        """All shards of a view in order of ids."""
        return (self.shard(view, i) for i in range(self.num_shards))

    def index_files(self, view: int | None = None) -> list[str]:
        """The index files that the manifest names, of one view or of all: give them to `pyarrow.dataset`.

        A plain listing of `index/` could include leftovers of an attempt that lost.
        """
        with self._lock:
            paths = self._column("index").to_pylist()
        if view is not None:
            start = self._checked_view(view) * self.num_shards
            paths = paths[start : start + self.num_shards]
        return [storage.join(self.url, path) for path in paths]

    def _column(self, name: str) -> pa.ChunkedArray:
        return self._file.read(columns=[name], use_threads=False).column(name)

    def _row_group(self, number: int) -> pa.Table:
        if number not in self._row_groups:
            self._row_groups[number] = self._file.read_row_group(number, use_threads=False)
            if len(self._row_groups) > 4:  # a few MB each
                self._row_groups.popitem(last=False)
        self._row_groups.move_to_end(number)
        return self._row_groups[number]

    def _checked_view(self, view: int) -> int:
        if not 0 <= view < self.num_views:
            raise InputError(f"{self.url} has {self.num_views} views; there is no view {view}")
        return view


def open_dataset(url: str, kind: Kind | None = None) -> Dataset:
    """Open a finished dataset, which must be of `kind` if one is given.

    Reads the manifest and the shard table, whose size and hash are checked; no shard is touched. Raises
    InputError where there is no dataset, an unfinished or damaged one, or one of the other kind.
    """
    url = storage.absolute(url)
    manifest = read_manifest(url)
    if kind is not None and manifest.kind != kind:
        mend = {
            "tokens": "precompute tokens from it first, or pass it as images",
            "images": "give the image dataset that it was made from",
        }
        raise InputError(f"{url} holds {manifest.kind}, but {kind} are needed; {mend[kind]}")
    table = read_checked(
        storage.join(url, manifest.table.path),
        manifest.table.bytes,
        manifest.table.sha256,
        "table (all shards)",
    )
    return Dataset(url, manifest, table)


def index_files(url: str) -> list[str]:
    """The index files of a finished dataset, for `pyarrow.dataset.dataset(index_files(url))`."""
    return open_dataset(url).index_files()


# ------------------------------------------------------------------------------------------- decode probe


def pixels_hash(pixels: np.ndarray) -> str:
    """sha256 of decoded pixels uint8 [H, W, 3], shape included."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3:
        raise TypeError(f"decoded pixels are uint8 [H, W, 3], not {pixels.dtype} {pixels.shape}")
    digest = hashlib.sha256(f"{pixels.shape}".encode())
    digest.update(np.ascontiguousarray(pixels).tobytes())
    return digest.hexdigest()


def probe_shard(shard: ShardInfo, rows: Sequence[int], decode: Decode) -> list[ProbeEntry]:
    """Decode some rows of a shard (with complete URLs) and hash their pixels; reads only those images."""
    columns = ("key", "image_offset", "image_bytes", "image_hash")
    table = read_shard_index(shard, columns).take(pa.array(rows, pa.int64()))
    entries: list[ProbeEntry] = []
    for row, record in zip(rows, table.to_pylist(), strict=True):
        data = storage.read(shard.tar, record["image_offset"], record["image_bytes"])
        if hashlib.sha256(data).digest() != record["image_hash"]:
            raise InputError(
                f"{shard.tar} of shard {shard.name} is damaged at {record['key']}; repair or copy it again"
            )
        sha256 = pixels_hash(decode(data))
        entries.append(
            ProbeEntry(view=shard.view, number=shard.number, row=row, key=record["key"], sha256=sha256)
        )
    return entries


def probe_differences(dataset: Dataset, decode: Decode) -> list[str]:
    """Keys of the decode probe whose pixels decode differently here than at the writer's; often empty."""
    differing: list[str] = []
    for entry in dataset.manifest.probe:
        shard = dataset.shard(entry.view - dataset.manifest.first_view, entry.number)
        [found] = probe_shard(shard, [entry.row], decode)
        if (found.key, found.sha256) != (entry.key, entry.sha256):
            differing.append(entry.key)
    return differing

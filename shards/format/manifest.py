"""What a finished dataset says about itself: the manifest, the shard table it names, and how both are opened.

A folder without `manifest.json` is unfinished, whatever else it holds. Three lines look into any dataset:

    dataset = open_dataset("runs/tokens")
    table = read_shard_index(dataset.shard(0, 0))
    print(codes_of(table)[0].reshape(dataset.manifest.grid))
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.artifacts import fingerprint, sha256_hex
from pipeline.errors import InputError
from shards.format.index import (
    FORMAT_VERSION,
    IndexFormatError,
    as_numpy,
    index_schema,
    read_index,
    read_rejects,
)

Kind = Literal["images", "tokens", "codes"]
"""What a manifest names: source images, crops with codes, or codes alone (a code layer)."""
Decode = Callable[[bytes], np.ndarray]
"""Encoded image -> uint8 [H, W, 3]: `views.decode_crop`, or `decode.decode_image` with its config."""

MANIFEST = "manifest.json"
FINGERPRINT = "fingerprint"
ROW_GROUP = 8192
"""Rows of the shard table that are read together; 500,000 shards have 62 such groups."""


class DamageError(InputError):
    """An object of a dataset is missing, or its bytes are not those that were written; it is named."""


# ------------------------------------------------------------------------------------------------ one shard


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardInfo:
    """One shard of one view: its ids [first_id, end_id), and its objects by place, size and hash.

    Places are relative to the manifest's folder in everything that is stored, and complete URLs in what
    `Dataset.shard` returns. A foreign tar (indexed in place) always has its absolute URL and, instead of a
    hash, the version it had: ETag or modification time. A code layer's shard has no tar of its own and names
    the one of its pixels, by a place that begins with `../`. `samples` are stored, `rejected` are not.
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

    @property
    def is_borrowed(self) -> bool:
        """True where the tar belongs to another part of the dataset (only in what is stored)."""
        return self.tar.startswith("../")

    def resolved(self, root: str) -> ShardInfo:
        """The same with complete URLs."""
        return dataclasses.replace(
            self,
            tar=self.tar if self.is_foreign else _resolved(root, self.tar),
            index=storage.join(root, self.index),
            rejects=None if self.rejects is None else storage.join(root, self.rejects),
        )


def _resolved(root: str, path: str) -> str:
    """A relative place below `root`, or beside it: object stores do not know `..`."""
    while path.startswith("../"):
        root, path = root.rstrip("/").rpartition("/")[0], path[3:]
    return storage.join(root, path)


def shard_name(view: int, number: int) -> str:
    """`v00-00000`."""
    return f"v{view:02d}-{number:05d}"


def read_checked(url: str, num_bytes: int, sha256: str, shard: str) -> bytes:
    """An object's bytes, if they are those that were written; otherwise an error that names it."""
    try:
        data = storage.read(url)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise DamageError(f"{url} of shard {shard} is missing; copy the dataset again or repair it") from None
    if len(data) != num_bytes or sha256_hex(data) != sha256:
        raise DamageError(
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


def read_shard_rejects(shard: ShardInfo) -> pa.Table | None:
    """What was rejected from the id range of a shard from `Dataset.shard`, after checking size and hash."""
    if shard.rejects is None or shard.rejects_bytes is None or shard.rejects_sha256 is None:
        return None
    return read_rejects(read_checked(shard.rejects, shard.rejects_bytes, shard.rejects_sha256, shard.name))


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
        self._sink = io.BytesIO()  # gives its bytes without a copy: 45 MB for 500,000 shards
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
        return self._sink.getvalue()

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
        """The file: the header and, since nothing else vouches for it, its fingerprint."""
        value = {**self.to_json(), FINGERPRINT: self.fingerprint}
        return json.dumps(value, indent=2, sort_keys=True).encode() + b"\n"

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Manifest:
        return cls(
            **{
                **{key: entry for key, entry in value.items() if key != FINGERPRINT},
                "written_per_view": tuple(value["written_per_view"]),
                "class_names": None if value["class_names"] is None else tuple(value["class_names"]),
                "probe": tuple(ProbeEntry(**entry) for entry in value["probe"]),
                "table": TableName(**value["table"]),
            }
        )


def read_manifest(url: str) -> Manifest:
    """The manifest of a finished dataset; InputError where there is none, or one that cannot be read.

    DamageError where its bytes are not those that its own fingerprint vouches for.
    """
    location = storage.join(url, MANIFEST)
    try:
        data = storage.read(location)
        value = json.loads(data)
        version = value["format_version"]
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(_why_absent(url)) from None
    except (ValueError, KeyError, TypeError):
        raise DamageError(
            f"{location} is not the manifest of a dataset; check the URL, or repair the dataset"
        ) from None
    if version != FORMAT_VERSION:
        raise InputError(
            f"{url} has format version {version}, this program reads {FORMAT_VERSION}; use a newer program"
        )
    try:
        manifest = Manifest.from_json(value)
        # Manifests made before they held a fingerprint are taken at their word.
        sound = FINGERPRINT not in value or manifest.to_bytes() == data
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise DamageError(f"{location} is damaged ({error}); copy the dataset again or repair it") from None
    if not sound:
        raise DamageError(
            f"{location} is damaged: its own fingerprint is not that of what it says; copy the dataset again "
            "or repair it"
        )
    return manifest


def _why_absent(url: str) -> str:
    if storage.exists(storage.join(url, "plan.json")):
        return f"{url} is unfinished: a plan but no manifest; run the job that writes it again, it will go on"
    parts = [part for part in ("train", "val") if storage.exists(storage.join(url, part, MANIFEST))]
    if parts:
        one = storage.join(url, parts[0])
        return f"{url} is not one dataset but holds {' and '.join(parts)}; name one of them, such as {one}"
    return f"there is no dataset at {url}: no {MANIFEST}; check the URL, or prepare one there"


# ------------------------------------------------------------------------------------------------ one table


class ShardTable:
    """The shards that one manifest names; columns of its table are read when asked for.

    Safe to share between threads and to send to other processes (the table travels along, nothing is read
    again). Views are counted from 0, whatever number the first one bears.
    """

    def __init__(self, url: str, manifest: Manifest, table: bytes) -> None:
        self.url = url
        self.manifest = manifest
        self._table = table
        self._file = pq.ParquetFile(pa.BufferReader(table))
        self._lock = threading.Lock()
        self._row_groups: OrderedDict[int, pa.Table] = OrderedDict()
        self._sizes: np.ndarray | None = None
        if self._file.metadata.num_rows != manifest.num_views * manifest.shards_per_view:
            raise InputError(
                f"{url}: the shard table has {self._file.metadata.num_rows} rows, the manifest says otherwise"
            )

    def __reduce__(self) -> tuple[type[ShardTable], tuple[str, Manifest, bytes]]:
        return ShardTable, (self.url, self.manifest, self._table)

    @property
    def num_views(self) -> int:
        return self.manifest.num_views

    @property
    def num_shards(self) -> int:
        """Shards of each view."""
        return self.manifest.shards_per_view

    def shard_sizes(self, view: int) -> np.ndarray:
        """Stored samples of each shard of a view, int64 [shards]; some may be 0."""
        with self._lock:
            sizes = self._sizes
            if sizes is None:
                chunks = self._column("samples").chunks
                sizes = np.concatenate([as_numpy(chunk) for chunk in chunks]).astype(np.int64)
                sizes.setflags(write=False)
                self._sizes = sizes
        return sizes[view * self.num_shards : (view + 1) * self.num_shards]

    def shard_bytes(self, view: int) -> np.ndarray:
        """Bytes of the tar of each shard of a view, int64 [shards]."""
        with self._lock:
            column = self._column("tar_bytes").slice(view * self.num_shards, self.num_shards)
        return np.concatenate([as_numpy(chunk) for chunk in column.chunks])

    def id_ranges(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """`first_ids` and `samples` of the first view: what the plan of a dataset made from it needs."""
        with self._lock:
            first_ids = self._column("first_id").slice(0, self.num_shards).to_pylist()
            end_id = self._column("end_id")[self.num_shards - 1].as_py()
        return (*first_ids, end_id), tuple(self.shard_sizes(0).tolist())

    def shard(self, view: int, i: int) -> ShardInfo:
        """Shard i of a view, with complete URLs."""
        return self.stored(view, i).resolved(self.url)

    def stored(self, view: int, i: int) -> ShardInfo:
        """Shard i of a view as the table has it: its places are relative."""
        if not (0 <= view < self.num_views and 0 <= i < self.num_shards):
            raise IndexError(f"shard {i} of {self.num_shards}, view {view} of {self.num_views}")
        row = view * self.num_shards + i
        with self._lock:
            [record] = self._row_group(row // ROW_GROUP).slice(row % ROW_GROUP, 1).to_pylist()
        for column in _HASHES:
            record[column] = None if record[column] is None else record[column].hex()
        return ShardInfo(**record)

    def shards(self, view: int) -> Iterable[ShardInfo]:
        """All shards of a view in order of ids."""
        return (self.shard(view, i) for i in range(self.num_shards))

    def index_files(self, view: int) -> list[str]:
        """The index files of a view, complete URLs."""
        with self._lock:
            paths = self._column("index").slice(view * self.num_shards, self.num_shards).to_pylist()
        return [storage.join(self.url, path) for path in paths]

    def total(self, column: str) -> int:
        """Sum over all shards of a column of numbers without nulls, such as `tar_bytes`."""
        with self._lock:
            return sum(int(as_numpy(chunk).sum()) for chunk in self._column(column).chunks)

    def _column(self, name: str) -> pa.ChunkedArray:
        return self._file.read(columns=[name], use_threads=False).column(name)

    def _row_group(self, number: int) -> pa.Table:
        if number not in self._row_groups:
            self._row_groups[number] = self._file.read_row_group(number, use_threads=False)
            if len(self._row_groups) > 4:  # a few MB each
                self._row_groups.popitem(last=False)
        self._row_groups.move_to_end(number)
        return self._row_groups[number]


def open_table(url: str) -> ShardTable:
    """What the manifest in one folder names: a dataset without what was added to it, or one added part.

    Reads the manifest and the shard table, whose size and hash are checked; no shard is touched. Raises
    InputError where there is no manifest, or a damaged one.
    """
    manifest = read_manifest(url)
    table = read_checked(
        storage.join(url, manifest.table.path),
        manifest.table.bytes,
        manifest.table.sha256,
        "table (all shards)",
    )
    return ShardTable(url, manifest, table)


# ------------------------------------------------------------------------------------------------ dataset


class Dataset:
    """A finished dataset opened for reading: its first K views, wherever they lie, and one tokenizer's codes.

    Views that were added later follow those of the base, and with a code layer chosen its codes take the
    place of the stored ones. `manifest` describes what was opened: that of the base where nothing was added,
    else with the views, counts, probe and tokenizer of all. `fingerprint` covers header and table of every
    part in use. Safe to share between threads and to send to other processes. Views are counted from 0.
    """

    def __init__(
        self, url: str, parts: Sequence[ShardTable], layers: Sequence[ShardTable], num_views: int
    ) -> None:
        """`parts` hold `num_views` views or more, the last one being needed; `layers` is empty or as long."""
        self.url = url
        self.manifest = _merged(parts, layers, num_views)
        self.fingerprint = _fingerprint(parts, layers, num_views)
        self._parts = tuple(parts)
        self._layers = tuple(layers)

    def __reduce__(self) -> tuple[type[Dataset], tuple[Any, ...]]:
        return Dataset, (self.url, self._parts, self._layers, self.num_views)

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

    @property
    def is_remote(self) -> bool:
        """True where tars have to be fetched before they are read."""
        return self.num_shards > 0 and not storage.is_local(self.shard(0, 0).tar)

    @property
    def first_views(self) -> tuple[int, ...]:
        """The first view of each part in use: `(0,)` where nothing was added."""
        return tuple(part.manifest.first_view for part in self._parts)

    def num_samples(self, view: int = 0) -> int:
        """Stored samples of a view."""
        self._place(view)
        return self.manifest.written_per_view[view]

    def shard_sizes(self, view: int = 0) -> np.ndarray:
        """Stored samples of each shard of a view, int64 [shards]; some may be 0."""
        part, local = self._place(view)
        return self._parts[part].shard_sizes(local)

    def shard_bytes(self, view: int = 0) -> np.ndarray:
        """Bytes of the tar of each shard of a view, int64 [shards]; several shards may point into one tar."""
        part, local = self._place(view)
        return self._parts[part].shard_bytes(local)

    def id_ranges(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """`first_ids` and `samples` of view 0: what the plan of a dataset made from this one needs."""
        return self._parts[0].id_ranges()

    def shard(self, view: int, i: int) -> ShardInfo:
        """Shard i of a view, with complete URLs."""
        part, local = self._place(view)
        return self._parts[part].shard(local, i)

    def shards(self, view: int = 0) -> Iterable[ShardInfo]:
        """All shards of a view in order of ids."""
        return (self.shard(view, i) for i in range(self.num_shards))

    def read_index(self, view: int, i: int, columns: Sequence[str] | None = None) -> pa.Table:
        """The index of shard i of a view, or some columns of it, after checking size and hash.

        The codes are those of the chosen tokenizer; a layer whose rows are not those of the pixels is an
        InputError naming both files.
        """
        part, local = self._place(view)
        shard = self._parts[part].shard(local, i)
        if not self._layers or (columns is not None and "codes" not in columns):
            return read_shard_index(shard, columns)
        assert self.manifest.tokenizer is not None
        schema = index_schema(self.manifest.grid, int(self.manifest.tokenizer["codebook_size"]))
        wanted = schema.names if columns is None else list(columns)
        table = read_shard_index(shard, sorted({*wanted, "sample_id"} - {"codes"}))
        layer = self._layers[part].shard(local, i)
        added = read_shard_index(layer, ("sample_id", "codes"))
        if not added.column("sample_id").equals(table.column("sample_id")):
            raise InputError(f"{layer.index} holds other samples than {shard.index}; verify the dataset")
        table = table.append_column(schema.field("codes"), added.column("codes"))
        return table.select(wanted).replace_schema_metadata(schema.metadata)

    def index_files(self, view: int | None = None) -> list[str]:
        """The index files that the manifests name, of one view or of all: give them to `pyarrow.dataset`.

        A plain listing of `index/` could include leftovers of an attempt that lost. With a code layer
        chosen they are the layer's, whose columns are key, sample_id, view and codes.
        """
        views = range(self.num_views) if view is None else [view]
        tables = self._layers or self._parts
        places = [self._place(view) for view in views]
        return [path for part, local in places for path in tables[part].index_files(local)]

    def _place(self, view: int) -> tuple[int, int]:
        """Which part holds a view, and its number there."""
        if not 0 <= view < self.num_views:
            raise InputError(f"{self.url} has {self.num_views} views; there is no view {view}")
        part = 0
        while view >= self._parts[part].num_views:
            view -= self._parts[part].num_views
            part += 1
        return part, view


def views_url(root: str, first_view: int) -> str:
    """Where views from a number on lie: the dataset itself, or what was added to it."""
    return root if first_view == 0 else storage.join(root, "more", f"v{first_view:02d}")


def layer_url(root: str, codes: str, first_view: int) -> str:
    """Where a code layer keeps the codes of the views that begin with a number; `codes` is its tokenizer."""
    return storage.join(root, "codes", codes[:8], f"v{first_view:02d}")


def open_dataset(
    url: str, kind: Kind | None = None, *, views: int | None = None, codes: str | None = None
) -> Dataset:
    """Open a finished dataset, which must be of `kind` if one is given.

    Added views that are finished belong to it; `views` takes the first K only, so that a run keeps those it
    began with. `codes` names a code layer by its tokenizer's fingerprint, or the first 8 digits of it; then
    the views are those it covers. Reads manifests and shard tables, whose sizes and hashes are checked; no
    shard is touched. Raises InputError where there is no dataset, an unfinished or damaged one, one of
    another kind, or parts that do not belong together.
    """
    url = storage.absolute(url)
    base = open_table(url)
    if base.manifest.kind == "codes":
        raise InputError(
            f"{url} is a code layer, without pixels; open the dataset it belongs to and choose it by codes"
        )
    if kind is not None and base.manifest.kind != kind:
        mend = {
            "tokens": "precompute tokens from it first, or pass it as images",
            "images": "give the image dataset that it was made from",
        }
        raise InputError(
            f"{url} holds {base.manifest.kind}, but {kind} are needed; {mend.get(kind, 'name another')}"
        )
    parts = [base, *_added_views(url, base, views)]
    layers = [] if codes is None else _layers(url, parts, codes)
    if layers:
        parts = parts[: len(layers)]
    held = sum(part.num_views for part in parts)
    if views is None:
        views = held
    elif not 1 <= views <= held:
        whose = f" with codes of {codes}" if layers else ""
        raise InputError(
            f"{url} has {held} finished views{whose}, {views} are asked for; take at most {held}, or add "
            f"more with precompute_shards {'--code_layer' if layers else '--extend'}"
        )
    while views <= sum(part.num_views for part in parts[:-1]):
        parts, layers = parts[:-1], layers[:-1]
    return Dataset(url, parts, layers, views)


def index_files(url: str, *, views: int | None = None, codes: str | None = None) -> list[str]:
    """The index files of a finished dataset, for `pyarrow.dataset.dataset(index_files(url))`.

    All finished views or the first `views`; with `codes` those of a code layer.
    """
    return open_dataset(url, views=views, codes=codes).index_files()


def _added_views(url: str, base: ShardTable, wanted: int | None) -> Iterator[ShardTable]:
    """Finished parts that follow the base, found by name, so that no stale listing can hide one."""
    held = base.num_views
    while base.manifest.kind == "tokens" and base.manifest.first_view == 0:
        place = views_url(url, held)
        if (wanted is not None and held >= wanted) or not storage.exists(storage.join(place, MANIFEST)):
            return
        part = open_table(place)
        _require_same(part, "base", base, "views of another dataset")
        if part.manifest.tokenizer != base.manifest.tokenizer:
            theirs, ours = _tokenizer_of(part), _tokenizer_of(base)
            raise InputError(
                f"{place} has codes of tokenizer {theirs}, {url} of {ours}; codes of two tokenizers are "
                "never mixed, copy the dataset again"
            )
        yield part
        held += part.num_views


def _layers(url: str, parts: Sequence[ShardTable], codes: str) -> list[ShardTable]:
    """The code layer of a tokenizer for as many leading parts as it has; none where it is the base's own."""
    if len(codes) >= 8 and _tokenizer_of(parts[0]).startswith(codes):
        return []
    found: list[ShardTable] = []
    for part in parts:
        place = layer_url(url, codes, part.manifest.first_view)
        if not storage.exists(storage.join(place, MANIFEST)):
            break
        layer = open_table(place)
        _require_same(layer, "pixels", part, "codes of other pixels")
        tokenizer = _tokenizer_of(layer)
        if not tokenizer.startswith(codes) or (found and tokenizer != _tokenizer_of(found[0])):
            asked = codes if not found else _tokenizer_of(found[0])
            raise InputError(
                f"{place} has codes of tokenizer {tokenizer}, not of {asked}; codes of two tokenizers are "
                "never mixed, copy the dataset again"
            )
        found.append(layer)
    if not found:
        names = storage.list_folders(storage.join(url, "codes"))
        held = f"there are {', '.join(names)}" if names else "there is none"
        raise InputError(
            f"{url} has no finished code layer {codes} ({held}); add it with precompute_shards --code_layer"
        )
    return found


def _require_same(part: ShardTable, name: str, other: ShardTable, what: str) -> None:
    """A part names by fingerprint what it was made for, and has the same id ranges."""
    named, found = part.manifest.inputs.get(name), other.manifest.fingerprint
    if named != found or part.num_shards != other.num_shards:
        raise InputError(
            f"{part.url} holds {what}: it was made for {named}, but {other.url} is {found}; copy the dataset "
            "again, or remove that folder"
        )


def _tokenizer_of(table: ShardTable) -> str:
    return str((table.manifest.tokenizer or {}).get("fingerprint"))


def _fingerprint(parts: Sequence[ShardTable], layers: Sequence[ShardTable], num_views: int) -> str:
    own = [part.manifest.fingerprint for part in parts]
    if len(parts) == 1 and not layers and num_views == parts[0].num_views:
        return own[0]
    added = [layer.manifest.fingerprint for layer in layers]
    return fingerprint({"parts": own, "views": num_views, "codes": added})


def _merged(parts: Sequence[ShardTable], layers: Sequence[ShardTable], num_views: int) -> Manifest:
    """One manifest for all parts in use; plan, inputs, recipe and table are the base's."""
    base = parts[0].manifest
    if len(parts) == 1 and not layers and num_views == base.num_views:
        return base
    written: list[int] = []
    samples_in = 0
    rejected: dict[str, int] = {}
    probe: list[ProbeEntry] = []
    for manifest in (part.manifest for part in parts):
        used = min(manifest.num_views, num_views - len(written))
        written += manifest.written_per_view[:used]
        # The same sources are read for every view: where not all views are in use, their share is exact.
        samples_in += manifest.samples_in * used // manifest.num_views
        for reason, number in manifest.samples_rejected.items():
            rejected[reason] = rejected.get(reason, 0) + number * used // manifest.num_views
        probe += [entry for entry in manifest.probe if entry.view < base.first_view + num_views]
    return dataclasses.replace(
        base,
        written_per_view=tuple(written),
        samples_in=samples_in,
        samples_written=sum(written),
        samples_rejected=dict(sorted(rejected.items())),
        tokenizer=layers[0].manifest.tokenizer if layers else base.tokenizer,
        probe=tuple(probe),
    )


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

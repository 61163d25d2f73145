"""A finished dataset, opened: one manifest's shards, and the views and codes that were added to them.

Three lines look into any dataset:

    dataset = open_dataset("runs/tokens")
    table = read_shard_index(dataset.shard(0, 0))
    print(codes_of(table)[0].reshape(dataset.manifest.grid))
"""

from __future__ import annotations

import dataclasses
import threading
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.artifacts import fingerprint
from pipeline.errors import InputError
from shards.dataset.rows import Row, read_checked, read_rows, read_shard_index
from shards.format.index import as_numpy, index_schema
from shards.format.manifest import (
    HASH_COLUMNS,
    MANIFEST,
    ROW_GROUP,
    Kind,
    Manifest,
    ProbeEntry,
    ShardInfo,
    read_manifest,
)


class Shards:
    """Shards and the manifest that describes them. Views are counted from 0, whatever the first one's number.

    Safe to share between threads and to send to other processes.
    """

    url: str
    manifest: Manifest

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

    def shard(self, view: int, i: int) -> ShardInfo:
        """Shard i of a view, with complete URLs."""
        raise NotImplementedError

    def shards(self, view: int = 0) -> Iterable[ShardInfo]:
        """All shards of a view in order of ids."""
        return (self.shard(view, i) for i in range(self.num_shards))


class ShardTable(Shards):
    """The shards that one manifest names; columns of its table are read when they are asked for."""

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

    def shard_sizes(self, view: int) -> np.ndarray:
        """Stored samples of each shard of a view, int64 [shards]; some may be 0."""
        if self._sizes is None:
            sizes = self._numbers("samples").astype(np.int64)
            sizes.setflags(write=False)
            self._sizes = sizes
        return self._sizes[view * self.num_shards : (view + 1) * self.num_shards]

    def shard_bytes(self, view: int) -> np.ndarray:
        """Bytes of the tar of each shard of a view, int64 [shards]."""
        return self._numbers("tar_bytes")[view * self.num_shards : (view + 1) * self.num_shards]

    def id_ranges(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """`first_ids` and `samples` of the first view: what the plan of a dataset made from it needs."""
        first_ids = self._numbers("first_id")[: self.num_shards].tolist()
        end_id = int(self._numbers("end_id")[self.num_shards - 1])
        return (*first_ids, end_id), tuple(self.shard_sizes(0).tolist())

    def shard(self, view: int, i: int) -> ShardInfo:
        return self.stored(view, i).resolved(self.url)

    def stored(self, view: int, i: int) -> ShardInfo:
        """Shard i of a view as the table has it: its places are relative."""
        if not (0 <= view < self.num_views and 0 <= i < self.num_shards):
            raise IndexError(f"shard {i} of {self.num_shards}, view {view} of {self.num_views}")
        row = view * self.num_shards + i
        with self._lock:
            [record] = self._row_group(row // ROW_GROUP).slice(row % ROW_GROUP, 1).to_pylist()
        for column in HASH_COLUMNS:
            record[column] = None if record[column] is None else record[column].hex()
        return ShardInfo(**record)

    def index_files(self, view: int) -> list[str]:
        """The index files of a view, complete URLs."""
        paths = self._column("index").slice(view * self.num_shards, self.num_shards).to_pylist()
        return [storage.join(self.url, path) for path in paths]

    def total(self, column: str) -> int:
        """Sum over all shards of a column of numbers without nulls, such as `tar_bytes`."""
        return int(self._numbers(column).sum())

    def _numbers(self, name: str) -> np.ndarray:
        """A column of numbers without nulls."""
        return np.concatenate([as_numpy(chunk) for chunk in self._column(name).chunks])

    def _column(self, name: str) -> pa.ChunkedArray:
        with self._lock:
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


class Dataset(Shards):
    """A finished dataset opened for reading: its first K views, wherever they lie, and one tokenizer's codes.

    Views that were added later follow those of the base, and with a code layer chosen its codes take the
    place of the stored ones. `manifest` describes what was opened: that of the base where nothing was added,
    else with the views, counts, probe and tokenizer of all. `fingerprint` covers header and table of every
    part in use.
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
        part, local = self._place(view)
        return self._parts[part].shard(local, i)

    def read_index(self, view: int, i: int, columns: Sequence[str] | None = None) -> pa.Table:
        """The index of shard i of a view, or some columns of it, after checking size and hash.

        The codes are those of the chosen tokenizer; a layer whose rows are not those of the pixels is an
        InputError naming both files.
        """
        part, local = self._place(view)
        shard = self._parts[part].shard(local, i)
        if not self._layers or (columns is not None and "codes" not in columns):
            return read_shard_index(shard, columns)
        tokenizer = self.manifest.require_tokenizer()
        schema = index_schema(tokenizer.grid, tokenizer.codebook_size)
        columns = schema.names if columns is None else list(columns)
        table = read_shard_index(shard, sorted({*columns, "sample_id"} - {"codes"}))
        layer = self._layers[part].shard(local, i)
        added = read_shard_index(layer, ("sample_id", "codes"))
        if not added.column("sample_id").equals(table.column("sample_id")):
            raise InputError(f"{layer.index} holds other samples than {shard.index}; verify the dataset")
        table = table.append_column(schema.field("codes"), added.column("codes"))
        return table.select(columns).replace_schema_metadata(schema.metadata)

    def read_images(self, first_id: int, end_id: int) -> Iterator[Row]:
        """The images of view 0 with ids in [first_id, end_id), each checked; one shard at a time is read."""
        first_ids, _ = self.id_ranges()
        number = bisect_right(first_ids, first_id) - 1
        while number < self.num_shards and first_ids[number] < end_id:
            yield from read_rows(self.shard(0, number), ids=range(first_id, end_id))
            number += 1

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
    finished = sum(part.num_views for part in parts)
    if views is None:
        views = finished
    elif not 1 <= views <= finished:
        whose = f" with codes of {codes}" if layers else ""
        raise InputError(
            f"{url} has {finished} finished views{whose}, {views} are asked for; take at most {finished}, or "
            f"add more with precompute_shards {'--code_layer' if layers else '--extend'}"
        )
    while views <= sum(part.num_views for part in parts[:-1]):
        parts, layers = parts[:-1], layers[:-1]
    return Dataset(url, parts, layers, views)


def index_files(url: str, *, views: int | None = None, codes: str | None = None) -> list[str]:
    """The index files of a finished dataset, for `pyarrow.dataset.dataset(index_files(url))`.

    All finished views or the first `views`; with `codes` those of a code layer.
    """
    return open_dataset(url, views=views, codes=codes).index_files()


def _added_views(url: str, base: ShardTable, most: int | None) -> Iterator[ShardTable]:
    """Finished parts that follow the base, found by name, so that no stale listing can hide one."""
    num_views = base.num_views
    while base.manifest.kind == "tokens" and base.manifest.first_view == 0:
        place = views_url(url, num_views)
        if (most is not None and num_views >= most) or not storage.exists(storage.join(place, MANIFEST)):
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
        num_views += part.num_views


def _layers(url: str, parts: Sequence[ShardTable], codes: str) -> list[ShardTable]:
    """The code layer of a tokenizer for as many leading parts as it has; none where it is the base's own."""
    if len(codes) >= 8 and _tokenizer_of(parts[0]).startswith(codes):
        return []
    layers: list[ShardTable] = []
    for part in parts:
        place = layer_url(url, codes, part.manifest.first_view)
        if not storage.exists(storage.join(place, MANIFEST)):
            break
        layer = open_table(place)
        _require_same(layer, "pixels", part, "codes of other pixels")
        tokenizer = _tokenizer_of(layer)
        first = _tokenizer_of(layers[0] if layers else layer)
        if not tokenizer.startswith(codes) or tokenizer != first:
            asked = first if layers else codes
            raise InputError(
                f"{place} has codes of tokenizer {tokenizer}, not of {asked}; codes of two tokenizers are "
                "never mixed, copy the dataset again"
            )
        layers.append(layer)
    if not layers:
        names = storage.list_folders(storage.join(url, "codes"))
        others = f"there are {', '.join(names)}" if names else "there is none"
        raise InputError(
            f"{url} has no finished code layer {codes} ({others}); add it with precompute_shards --code_layer"
        )
    return layers


def _require_same(part: ShardTable, name: str, other: ShardTable, what: str) -> None:
    """A part names by fingerprint what it was made for, and has the same id ranges."""
    named, actual = part.manifest.inputs.get(name), other.manifest.fingerprint
    if named != actual or part.num_shards != other.num_shards:
        raise InputError(
            f"{part.url} holds {what}: it was made for {named}, but {other.url} is {actual}; copy the "
            "dataset again, or remove that folder"
        )


def _tokenizer_of(table: ShardTable) -> str:
    return str(table.manifest.tokenizer_fingerprint)


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
    rejected: Counter[str] = Counter()
    probe: list[ProbeEntry] = []
    for manifest in (part.manifest for part in parts):
        used = min(manifest.num_views, num_views - len(written))
        written += manifest.written_per_view[:used]
        # The same sources are read for every view: where not all views are in use, their share is exact.
        samples_in += manifest.samples_in * used // manifest.num_views
        for reason, number in manifest.samples_rejected.items():
            rejected[reason] += number * used // manifest.num_views
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

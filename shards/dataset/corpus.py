"""Several datasets read as one, or part of them: how a corpus grows, and how a subset of it stays frozen."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.artifacts import differences, fingerprint, sha256_hex
from pipeline.config import URL
from pipeline.errors import InputError
from pipeline.threads import in_order
from shards.dataset.dataset import Dataset, open_dataset
from shards.format.manifest import Kind, Manifest, ShardInfo
from shards.format.records import MAX_SAMPLE_ID, sample_key

_READ_AT_ONCE = 16
"""Index files that are read at the same time to find labels."""


@dataclass(frozen=True, kw_only=True)
class SubsetConfig:
    """Part of a dataset, frozen: samples of some classes, or a list of ids."""

    labels: tuple[str, ...] | None = None
    """Names of classes, or their numbers."""
    ids: str | None = field(default=None, metadata=URL)
    """A file or URL with a sample id or key per line (`42`, `0000000042-00`; `1/0000000042-00` in the second
    of several datasets); its hash is part of the fingerprint."""

    def __post_init__(self) -> None:
        if self.labels is not None and self.ids is not None:
            raise InputError("give subset.labels or subset.ids, not both")
        if self.labels == ():
            raise InputError("subset.labels is empty; name at least one class, or leave it out")

    @property
    def is_all(self) -> bool:
        """True where nothing is left out."""
        return self.labels is None and self.ids is None


def namespaced_key(sample_id: int, view: int) -> str:
    """`0000000042-00`, or `1/0000000042-00` for an id of the second of several datasets.

    The ids of dataset n begin at n x 10^10. Those of the first stay as they are when others join it.
    """
    number, own_id = divmod(sample_id, MAX_SAMPLE_ID)
    return sample_key(own_id, view) if number == 0 else f"{number}/{sample_key(own_id, view)}"


def split_urls(urls: str) -> tuple[str, ...]:
    """`a,b` -> both, absolute."""
    return tuple(storage.absolute(url.strip()) for url in urls.split(","))


def open_corpus(
    urls: str,
    kind: Kind | None = None,
    *,
    views: int | None = None,
    codes: str | None = None,
    subset: SubsetConfig | None = None,
) -> Dataset:
    """Open `urls`, one dataset or several with commas between them, or the subset of them.

    Several must have the same tokenizer and recipe; library versions, the number of views and their seed may
    differ. They are read with as many views as all of them have. Raises InputError where they do not belong
    together, where a dataset stands there twice, and where the subset names what is not there.
    """
    places = split_urls(urls)
    datasets = [open_dataset(url, kind, views=views, codes=codes) for url in places]
    whole = subset is None or subset.is_all
    if len(datasets) == 1 and whole:
        return datasets[0]
    fewest = min(dataset.num_views for dataset in datasets)
    datasets = [
        dataset if dataset.num_views == fewest else open_dataset(url, kind, views=fewest, codes=codes)
        for url, dataset in zip(places, datasets, strict=True)
    ]
    _require_one_kind(datasets)
    choice = None
    if subset is not None and subset.ids is not None:
        choice = _listed(datasets, subset.ids)
    elif subset is not None and subset.labels is not None:
        choice = _labelled(datasets, subset.labels)
    return Corpus(datasets, choice)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Choice:
    """The samples of a subset: namespaced ids int64 [n], ascending, and what says which they are."""

    ids: np.ndarray
    origin: dict[str, Any]


class Corpus(Dataset):
    """Datasets laid end to end, shard after shard, or the samples of them that were chosen.

    To a reader it is one dataset. Row i of a shard's index is the i-th row that belongs to it, and sample ids
    are namespaced. Labels are kept where all datasets have the same class names. `fingerprint` is that of the
    list of datasets, and of the choice.
    """

    def __init__(self, datasets: Sequence[Dataset], choice: Choice | None = None) -> None:
        self.datasets = tuple(datasets)
        self.choice = choice
        self.url = ",".join(dataset.url for dataset in datasets)
        self._firsts = np.cumsum([0, *(dataset.num_shards for dataset in datasets)])
        self._bounds = None if choice is None else _id_bounds(datasets, choice.ids)
        self._same_classes = len({dataset.manifest.class_names for dataset in datasets}) == 1
        self.fingerprint = fingerprint(
            {
                "datasets": [dataset.fingerprint for dataset in datasets],
                "subset": None if choice is None else choice.origin,
            }
        )
        self.manifest = self._described()

    def __reduce__(self) -> tuple[type[Corpus], tuple[Any, ...]]:
        return Corpus, (self.datasets, self.choice)

    @property
    def is_remote(self) -> bool:
        return any(dataset.is_remote for dataset in self.datasets)

    @property
    def first_views(self) -> tuple[int, ...]:
        return self.datasets[0].first_views

    def num_samples(self, view: int = 0) -> int:
        return int(self.shard_sizes(view).sum())

    def shard_sizes(self, view: int = 0) -> np.ndarray:
        if self._bounds is None:
            return np.concatenate([dataset.shard_sizes(view) for dataset in self.datasets])
        return np.diff(self._bounds, axis=1)[:, 0]

    def shard_bytes(self, view: int = 0) -> np.ndarray:
        return np.concatenate([dataset.shard_bytes(view) for dataset in self.datasets])

    def id_ranges(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        raise InputError(f"{self.url} is no single dataset; make another from each of its parts")

    def shard(self, view: int, i: int) -> ShardInfo:
        number = self._dataset_of(i)
        return self.datasets[number].shard(view, i - int(self._firsts[number]))

    def read_index(self, view: int, i: int, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of shard i that belong to the corpus, with namespaced ids."""
        number = self._dataset_of(i)
        dataset, local = self.datasets[number], i - int(self._firsts[number])
        asked = None if columns is None else sorted({*columns, "sample_id"})
        table = dataset.read_index(view, local, asked)
        ids = table.column("sample_id").to_numpy() + number * MAX_SAMPLE_ID
        table = _with_column(table, "sample_id", pa.array(ids, pa.int64()))
        if not self._same_classes and "label" in table.schema.names:
            table = _with_column(table, "label", pa.nulls(table.num_rows, pa.int32()))
        if self.choice is not None and self._bounds is not None:
            first, end = self._bounds[i].tolist()
            chosen = np.isin(ids, self.choice.ids[first:end])
            if int(chosen.sum()) != end - first:
                shard = dataset.shard(view, local)
                missing = np.setdiff1d(self.choice.ids[first:end], ids)[:4].tolist()
                keys = ", ".join(namespaced_key(sample_id, view) for sample_id in missing)
                raise InputError(
                    f"samples {keys} of the subset are not in {shard.index} of shard {shard.name} "
                    "(rejected, or never written); leave them out"
                )
            table = table.filter(pa.array(chosen))
        return table if columns is None else table.select(list(columns))

    def index_files(self, view: int | None = None) -> list[str]:
        """The index files of all datasets; of a subset too, which they hold among others."""
        return [path for dataset in self.datasets for path in dataset.index_files(view)]

    def _dataset_of(self, i: int) -> int:
        if not 0 <= i < self._firsts[-1]:
            raise IndexError(f"shard {i} of {self._firsts[-1]}")
        return int(np.searchsorted(self._firsts, i, side="right") - 1)

    def _described(self) -> Manifest:
        """The first one's manifest, with the counts of all and no probe: each dataset has its own."""
        manifests = [dataset.manifest for dataset in self.datasets]
        written = tuple(self.num_samples(view) for view in range(manifests[0].num_views))
        rejected: Counter[str] = Counter()
        for manifest in manifests:
            rejected.update(manifest.samples_rejected)
        return dataclasses.replace(
            manifests[0],
            inputs={"datasets": self.fingerprint},
            shards_per_view=int(self._firsts[-1]),
            written_per_view=written,
            samples_in=sum(manifest.samples_in for manifest in manifests),
            samples_written=sum(written),
            samples_rejected=dict(sorted(rejected.items())),
            class_names=manifests[0].class_names if self._same_classes else None,
            probe=(),
        )


def _with_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    """The table with other values in a column."""
    return table.set_column(table.schema.get_field_index(name), table.schema.field(name), values)


# ------------------------------------------------------------------------------------------------ together


def _require_one_kind(datasets: Sequence[Dataset]) -> None:
    first = datasets[0]
    for number, dataset in enumerate(datasets):
        if any(dataset.fingerprint == other.fingerprint for other in datasets[:number]):
            raise InputError(f"{dataset.url} stands twice in the list of datasets; name each once")
        if dataset.kind != first.kind:
            raise InputError(
                f"{first.url} holds {first.kind}, {dataset.url} {dataset.kind}; read one kind at a time"
            )
        ours, theirs = (opened.manifest.tokenizer_fingerprint for opened in (first, dataset))
        if ours != theirs:
            raise InputError(
                f"{first.url} has codes of tokenizer {ours}, {dataset.url} of {theirs}; codes of two "
                "tokenizers are never mixed: precompute one of them again, or add a code layer and choose it "
                "by --codes"
            )
        other = differences(_compared(first.manifest), _compared(dataset.manifest))
        if other:
            raise InputError(
                f"{first.url} and {dataset.url} were made by different recipes: {'; '.join(other[:4])} "
                "(there is the first one's); precompute one of them again"
            )


def _compared(manifest: Manifest) -> dict[str, Any]:
    """What of a recipe decides which pixels and codes a sample may have; not how many, nor how fast."""
    recipe = manifest.recipe.to_json()
    recipe.pop("libraries", None)
    for name in ("views_per_image", "seed"):
        recipe.get("views", {}).pop(name, None)
    for name in ("device", "batch_size", "threads"):
        recipe.get("encode", {}).pop(name, None)
    return recipe


# ------------------------------------------------------------------------------------------------ subset


def _listed(datasets: Sequence[Dataset], url: str) -> Choice:
    try:
        data = storage.read(url)
        lines = data.decode("ascii").split()
        ids = np.array(sorted(_id_of(line) for line in lines), np.int64)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"there is no list of ids at {url}; check subset.ids") from None
    except (UnicodeDecodeError, ValueError, OverflowError) as error:
        raise InputError(f"{url} is no list of ids, one per line ({error}); check subset.ids") from None
    if not len(ids):
        raise InputError(f"{url} names no sample; list at least one id")
    repeated = ids[1:][ids[1:] == ids[:-1]]
    if len(repeated):
        raise InputError(f"{url} names sample {repeated[0]} twice; list each once")
    bounds = _id_bounds(datasets, ids)
    inside = np.zeros(len(ids), bool)
    for first, end in bounds.tolist():
        inside[first:end] = True
    if not inside.all():
        raise InputError(
            f"{url} names sample {ids[~inside][0]}, which is not in {', '.join(d.url for d in datasets)}; "
            "use the list that was made for it"
        )
    return Choice(ids=ids, origin={"ids": sha256_hex(data)})


def _id_of(line: str) -> int:
    """`42`, `0000000042-00` or `1/0000000042-00` -> the namespaced id."""
    number, _, own = line.rpartition("/")
    own_id = int(own.partition("-")[0])
    if own_id < 0 or (number and own_id >= MAX_SAMPLE_ID):
        raise ValueError(f"{line!r} is no sample")
    return own_id + int(number or 0) * MAX_SAMPLE_ID


def _labelled(datasets: Sequence[Dataset], labels: Sequence[str]) -> Choice:
    """Reads the label of every sample: each index file once."""
    parts: list[np.ndarray] = []
    for number, dataset in enumerate(datasets):
        numbers = _label_numbers(dataset, labels)
        read = functools.partial(dataset.read_index, 0, columns=("sample_id", "label"))
        for table in in_order(read, np.flatnonzero(dataset.shard_sizes(0)).tolist(), _READ_AT_ONCE):
            chosen = np.isin(table.column("label").fill_null(-1).to_numpy(), numbers)
            parts.append(table.column("sample_id").to_numpy()[chosen] + number * MAX_SAMPLE_ID)
    ids = np.sort(np.concatenate([np.empty(0, np.int64), *parts]))
    if not len(ids):
        raise InputError(
            f"no sample of {', '.join(d.url for d in datasets)} is labelled {', '.join(labels)}; name others"
        )
    return Choice(ids=ids, origin={"labels": sorted(set(labels))})


def _label_numbers(dataset: Dataset, labels: Sequence[str]) -> list[int]:
    names = dataset.manifest.class_names or ()
    numbers: list[int] = []
    for label in labels:
        if label in names:
            numbers.append(names.index(label))
        elif label.isdecimal() and (not names or int(label) < len(names)):
            numbers.append(int(label))
        else:
            known = ", ".join(names[:8]) + ("…" if len(names) > 8 else "")
            raise InputError(
                f"{dataset.url} has no class {label} (it has {known or 'no class names'}); name one of them"
            )
    return numbers


def _id_bounds(datasets: Sequence[Dataset], ids: np.ndarray) -> np.ndarray:
    """Where the ids of each shard of the corpus begin and end among `ids`, int64 [shards, 2]."""
    bounds = [np.empty((0, 2), np.int64)]
    for number, dataset in enumerate(datasets):
        first_ids = np.array(dataset.id_ranges()[0], np.int64) + number * MAX_SAMPLE_ID
        edges = np.searchsorted(ids, first_ids, side="left")
        bounds.append(np.stack([edges[:-1], edges[1:]], axis=1).astype(np.int64))
    return np.concatenate(bounds)

"""How a token dataset uses its codebook: how often, where on the grid and in which classes each code occurs.

Index files are read one at a time: memory is that of the tables, whatever the number of crops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.errors import InputError
from pipeline.training.metrics import Progress
from shards.dataset.dataset import Dataset
from shards.dataset.rows import PLACE_COLUMNS, Place
from shards.format.index import codes_of
from shards.format.manifest import ShardInfo

LISTED_CODES = 8
"""Number of codes that are listed of the most used, of the least used, and of the dead ones."""
SAMPLED_SHARDS = 64
"""Shards that a sample of crops is drawn from, whose indexes are read; more where these hold too little."""
SHIFTS = 4
"""Number of random shifts of each grid: one alone scatters where codes are few."""
UNLABELLED = -1


# ------------------------------------------------------------------------------------------------ by code


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeCount:
    """One code and the number of patches that carry it."""

    code: int
    patches: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeStatistics:
    """How the patches of all stored views use the codebook.

    `usage` is the share of codes that occur at all (paper, Table 4); `perplexity` the exponential of the
    entropy of code frequencies, codebook_size at most. `least_used` are codes that occur.
    """

    codebook_size: int
    patches: int
    usage: float
    perplexity: float
    most_used: tuple[CodeCount, ...]
    least_used: tuple[CodeCount, ...]
    num_dead: int
    dead: tuple[int, ...]


def count_codes(dataset: Dataset, views: Sequence[int] | None = None) -> np.ndarray:
    """Number of patches of some views, or of all, that carry each code: int64 [codebook_size]."""
    counts = np.zeros(dataset.manifest.require_tokenizer().codebook_size, np.int64)
    for view in range(dataset.num_views) if views is None else views:
        for shard in dataset.shards(view):
            add_codes(counts, codes_of(dataset.read_index(view, shard.number, ("codes",))), shard)
    return counts


def add_codes(counts: np.ndarray, codes: np.ndarray, shard: ShardInfo) -> None:
    """Count a shard's codes into int64 [codebook_size]; InputError for one beyond the codebook."""
    require_codes(codes, len(counts), shard)
    counts += np.bincount(codes.ravel(), minlength=len(counts))


def require_codes(codes: np.ndarray, codebook_size: int, shard: ShardInfo) -> None:
    """InputError where a shard holds a code beyond the codebook."""
    largest = int(codes.max(initial=0))
    if largest >= codebook_size:
        raise InputError(
            f"{shard.index} of shard {shard.name} holds code {largest}, but the codebook has "
            f"{codebook_size} codes; verify the dataset"
        )


def code_statistics(counts: np.ndarray) -> CodeStatistics:
    """Statistics of code counts, int64 [codebook_size]; equally frequent codes are listed by number."""

    def listed(codes: np.ndarray) -> tuple[CodeCount, ...]:
        return tuple(CodeCount(code=int(code), patches=int(counts[code])) for code in codes)

    dead = np.flatnonzero(counts == 0)
    ascending, descending = np.argsort(counts, kind="stable"), np.argsort(-counts, kind="stable")
    used = len(counts) - len(dead)
    return CodeStatistics(
        codebook_size=len(counts),
        patches=int(counts.sum()),
        usage=used / len(counts),
        perplexity=perplexity(counts),
        most_used=listed(descending[: min(LISTED_CODES, used)]),
        least_used=listed(ascending[len(dead) : len(dead) + LISTED_CODES]),
        num_dead=len(dead),
        dead=tuple(dead[:LISTED_CODES].tolist()),
    )


def perplexity(counts: np.ndarray) -> float:
    """exp(entropy) of the frequencies that counts stand for; 0 where nothing was counted."""
    total = counts.sum()
    if total == 0:
        return 0.0
    share = counts[counts > 0] / total
    return float(np.exp(-(share * np.log(share)).sum()))


# ---------------------------------------------------------------------------------------- by place and class


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CodeCounts:
    """Patches of all stored views, int64: K codes, N places of the grid row by row, C classes.

    `shifted` are such tables without preferred places: each grid was shifted around its edges by a random
    distance of its own, which keeps what lies beside what. `by_class` has a row for each code that was asked
    for; `class_patches` counts those of every code. C is 0 where nothing has a label.
    """

    by_place: np.ndarray
    """[K, N]."""
    shifted: np.ndarray
    """[SHIFTS, K, N], each with the row sums of `by_place`."""
    by_class: np.ndarray
    """[codes asked for, C]."""
    class_patches: np.ndarray
    """[C]."""

    @property
    def by_code(self) -> np.ndarray:
        """[K]."""
        return self.by_place.sum(axis=1)


def count_places_and_classes(dataset: Dataset, codes: Sequence[int], *, seed: int) -> CodeCounts:
    """Count every stored code; classes only for `codes`, because codes x classes may be a large table.

    A pure function of dataset, codes and seed. InputError for a code beyond the codebook.
    """
    tokenizer = dataset.manifest.require_tokenizer()
    size, (rows, columns) = tokenizer.codebook_size, tokenizer.grid
    area = rows * columns
    slots = np.full(size, -1)
    slots[list(codes)] = np.arange(len(codes))
    by_place, shifted = np.zeros((size, area), np.int64), np.zeros((SHIFTS, size, area), np.int64)
    by_class, class_patches = np.zeros((len(codes), 0), np.int64), np.zeros(0, np.int64)
    progress = Progress("counting codes", dataset.manifest.samples_written, "crops")
    for view in range(dataset.num_views):
        for shard in dataset.shards(view):
            table = dataset.read_index(view, shard.number, ("label", "codes"))
            grids = codes_of(table).astype(np.int64)
            require_codes(grids, size, shard)
            rng = np.random.default_rng((seed, view, shard.number))
            _add_cells(by_place, grids * area + np.arange(area))
            for counts in shifted:
                _add_cells(counts, grids * area + _shifted_places(len(grids), tokenizer.grid, rng))
            labels = table.column("label").fill_null(UNLABELLED).to_numpy().astype(np.int64)
            labelled = labels != UNLABELLED
            if labelled.any():
                classes = max(int(labels.max()) + 1, len(class_patches))
                more = classes - len(class_patches)
                by_class = np.pad(by_class, ((0, 0), (0, more)))
                class_patches = np.pad(class_patches, (0, more))
                class_patches += area * np.bincount(labels[labelled], minlength=classes)
                asked = slots[grids[labelled]]
                _add_cells(by_class, (asked * classes + labels[labelled][:, None])[asked >= 0])
            progress.update(len(grids))
    progress.close()
    return CodeCounts(by_place=by_place, shifted=shifted, by_class=by_class, class_patches=class_patches)


def _add_cells(table: np.ndarray, cells: np.ndarray) -> None:
    """Count flat positions of a table into it."""
    table += np.bincount(cells.ravel(), minlength=table.size).reshape(table.shape)


def _shifted_places(crops: int, grid: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Where the patches of each crop lie after a shift of its grid around the edges, int64 [crops, N]."""
    rows, columns = grid
    down, right = rng.integers(0, rows, (crops, 1)), rng.integers(0, columns, (crops, 1))
    row, column = np.divmod(np.arange(rows * columns), columns)
    return (row + down) % rows * columns + (column + right) % columns


# ------------------------------------------------------------------------------------------------ a sample


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CropSample:
    """Crops of view 0, so of n different images, by id: codes uint16 [n, N], and where each crop lies."""

    codes: np.ndarray
    places: tuple[Place, ...]


def draw_sample(dataset: Dataset, number: int, *, seed: int) -> CropSample:
    """Up to `number` crops of view 0, a pure function of dataset, number and seed; no pixels are read."""
    sizes, size = dataset.shard_sizes(0), dataset.manifest.require_tokenizer().codebook_size
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(sizes))
    enough = int(np.searchsorted(np.cumsum(sizes[order]), number)) + 1
    numbers = np.sort(order[: max(SAMPLED_SHARDS, enough)])
    ends = np.cumsum(sizes[numbers])
    crops = int(ends[-1]) if len(ends) else 0
    if crops == 0:
        raise InputError(f"{dataset.url} holds no crops: every image was rejected")
    drawn = np.sort(rng.choice(crops, min(number, crops), replace=False))
    codes: list[np.ndarray] = []
    places: list[Place] = []
    for i, end in zip(numbers.tolist(), ends.tolist(), strict=True):
        first = end - sizes[i]
        rows = drawn[(drawn >= first) & (drawn < end)] - first
        if len(rows) == 0:
            continue
        table, shard = dataset.read_index(0, i, (*PLACE_COLUMNS, "codes")), dataset.shard(0, i)
        codes.append(codes_of(table)[rows])
        require_codes(codes[-1], size, shard)
        chosen = table.select(PLACE_COLUMNS).take(pa.array(rows))
        places += [Place.of(shard, record) for record in chosen.to_pylist()]
    return CropSample(codes=np.concatenate(codes), places=tuple(places))

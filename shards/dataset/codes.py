"""How often each code occurs in a token dataset, where on the grid, and in which classes.

One pass over the index files, shard by shard: memory is that of the tables, whatever the number of crops.
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
from shards.dataset.summary import add_codes, codebook_size, require_codes
from shards.format.index import codes_of

SAMPLED_SHARDS = 64
"""Shards that a sample of crops is drawn from, whose indexes are read; more where these hold too little."""
UNLABELLED = -1
SHIFTS = 4
"""So many times each grid is shifted: one alone scatters where codes are few."""


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
    manifest = dataset.manifest
    size, area = codebook_size(dataset), manifest.grid[0] * manifest.grid[1]
    slots = np.full(size, -1)
    slots[list(codes)] = np.arange(len(codes))
    counts = np.zeros(size, np.int64)
    by_place, shifted = np.zeros((size, area), np.int64), np.zeros((SHIFTS, size, area), np.int64)
    by_class, class_patches = np.zeros((len(codes), 0), np.int64), np.zeros(0, np.int64)
    progress = Progress("counting codes", manifest.samples_written, "crops")
    for view in range(dataset.num_views):
        for shard in dataset.shards(view):
            table = dataset.read_index(view, shard.number, ("label", "codes"))
            found = codes_of(table).astype(np.int64)
            add_codes(counts, found, shard)
            rng = np.random.default_rng((seed, view, shard.number))
            _add_places(by_place, found, np.arange(area))
            for one in shifted:
                _add_places(one, found, _shifted_places(len(found), manifest.grid, rng))
            labels = table.column("label").fill_null(UNLABELLED).to_numpy().astype(np.int64)
            if (labels != UNLABELLED).any():
                classes = max(int(labels.max()) + 1, len(class_patches))
                more = classes - len(class_patches)
                by_class, class_patches = (
                    np.pad(by_class, ((0, 0), (0, more))),
                    np.pad(class_patches, (0, more)),
                )
                labelled, kept = labels[labels != UNLABELLED], slots[found[labels != UNLABELLED]]
                class_patches += area * np.bincount(labelled, minlength=classes)
                cells = (kept * classes + labelled[:, None])[kept >= 0]
                by_class += np.bincount(cells, minlength=by_class.size).reshape(by_class.shape)
            progress.update(len(found))
    progress.close()
    return CodeCounts(by_place=by_place, shifted=shifted, by_class=by_class, class_patches=class_patches)


def _add_places(table: np.ndarray, codes: np.ndarray, places: np.ndarray) -> None:
    """Count codes [n, N] into a table [K, N'] at their places, [N] or [n, N]."""
    cells = (codes * table.shape[1] + places).ravel()
    table += np.bincount(cells, minlength=table.size).reshape(table.shape)


def _shifted_places(crops: int, grid: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Where the patches of each crop lie after a shift of its grid around the edges, int64 [crops, N]."""
    rows, columns = grid
    down, right = rng.integers(0, rows, (crops, 1)), rng.integers(0, columns, (crops, 1))
    row, column = np.divmod(np.arange(rows * columns), columns)
    return (row + down) % rows * columns + (column + right) % columns


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CropSample:
    """Crops of view 0, so of n different images, by id: codes uint16 [n, N], and where each crop lies."""

    codes: np.ndarray
    places: tuple[Place, ...]


def draw_sample(dataset: Dataset, number: int, *, seed: int) -> CropSample:
    """Up to `number` crops of view 0, a pure function of dataset, number and seed; no pixels are read."""
    sizes = dataset.shard_sizes(0)
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
    for i, end, size in zip(numbers.tolist(), ends.tolist(), sizes[numbers].tolist(), strict=True):
        rows = drawn[(drawn >= end - size) & (drawn < end)] - (end - size)
        if len(rows) == 0:
            continue
        table, shard = dataset.read_index(0, i, (*PLACE_COLUMNS, "codes")), dataset.shard(0, i)
        codes.append(codes_of(table)[rows])
        require_codes(codes[-1], codebook_size(dataset), shard)
        chosen = table.select(PLACE_COLUMNS).take(pa.array(rows))
        places += [Place.of(shard, record) for record in chosen.to_pylist()]
    return CropSample(codes=np.concatenate(codes), places=tuple(places))

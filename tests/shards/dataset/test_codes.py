"""Counts by place and class are those of a loop over every stored patch; shifts keep codes and neighbours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import InputError
from shards.dataset import codes as code_counts
from shards.dataset.codes import add_codes, count_codes, count_places_and_classes
from shards.dataset.dataset import Dataset, open_dataset
from shards.format.index import codes_of


@pytest.fixture
def dataset(small_dataset: Callable, tmp_path: Path) -> Dataset:
    small_dataset(first_ids=(0, 4, 7, 9), views=2, rejected={5: "truncated"}).write(str(tmp_path / "tokens"))
    return open_dataset(str(tmp_path / "tokens"))


def test_counts_are_those_of_a_slow_loop(dataset: Dataset):
    places: Counter[tuple[int, int]] = Counter()
    classes: Counter[tuple[int, int]] = Counter()
    patches: Counter[int] = Counter()
    for view in range(2):
        for shard in dataset.shards(view):
            table = dataset.read_index(view, shard.number)
            for codes, label in zip(codes_of(table), table.column("label").to_pylist(), strict=True):
                for place, code in enumerate(codes.tolist()):
                    places[code, place] += 1
                    if label is not None:
                        classes[code, label] += 1
                        patches[label] += 1
    counts = count_places_and_classes(dataset, [7, 3], seed=0)
    assert counts.by_place.shape == (16, 6)
    assert {(int(c), int(p)): int(counts.by_place[c, p]) for c, p in np.argwhere(counts.by_place)} == places
    np.testing.assert_array_equal(counts.by_code, count_codes(dataset))
    np.testing.assert_array_equal(
        counts.by_class, [[classes[code, label] for label in range(3)] for code in (7, 3)]
    )
    np.testing.assert_array_equal(counts.class_patches, [patches[label] for label in range(3)])


def test_shifted_counts_keep_the_codes_and_depend_on_the_seed_alone(dataset: Dataset):
    first, again, other = (count_places_and_classes(dataset, [], seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.shifted, again.shifted)
    assert (first.shifted != other.shifted).any()
    assert len({table.tobytes() for table in (first.by_place, *first.shifted)}) == 1 + code_counts.SHIFTS
    for table in first.shifted:
        np.testing.assert_array_equal(table.sum(axis=1), first.by_code)
        np.testing.assert_array_equal(table.sum(axis=0), first.by_place.sum(axis=0))


def test_a_shift_moves_the_whole_grid_around_its_edges():
    places = code_counts._shifted_places(60, (3, 4), np.random.default_rng(0))
    grids = {tuple(row) for row in places.tolist()}
    rolled = {
        tuple(np.argsort(np.roll(np.arange(12).reshape(3, 4), (down, right), (0, 1)).ravel()).tolist())
        for down in range(3)
        for right in range(4)
    }
    assert grids == rolled, "each of the twelve shifts, and nothing else"


def test_a_code_beyond_the_codebook_is_refused(dataset: Dataset):
    with pytest.raises(InputError, match="holds code 16, but the codebook has 16"):
        add_codes(np.zeros(16, np.int64), np.array([[3, 16]]), dataset.shard(0, 0))

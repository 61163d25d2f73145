"""Consistency, chosen patches and position statistics: slow formulas, and codes of known meaning."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from pretrain.evals import codebook
from pretrain.evals.codebook import Likeness, PositionStatistics, choose_patches, position_bits
from shards.dataset.codes import CodeCounts

PATCH, SIDE = 8, 4
SIZE = PATCH * SIDE


def _pictures(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images of noise, stripes and flat patches with codes 0 to 3, which are not even: code 3 is rare."""
    rng = np.random.default_rng(seed)
    codes = rng.choice(4, (count, SIDE * SIDE), p=[0.4, 0.3, 0.25, 0.05])
    images = np.full((count, SIZE, SIZE, 3), 110, np.uint8)
    stripes = (np.where(np.arange(PATCH) % 4 < 2, 20, 230)[None, :, None] * np.ones((PATCH, 1, 3))).astype(
        np.uint8
    )
    for row, patch in itertools.product(range(count), range(SIDE * SIDE)):
        top, left = patch // SIDE * PATCH, patch % SIDE * PATCH
        code = codes[row, patch]
        if code == 1:
            images[row, top : top + PATCH, left : left + PATCH] = stripes
        elif code != 0:
            images[row, top : top + PATCH, left : left + PATCH] = rng.integers(0, 256, (PATCH, PATCH, 3))
    return images, codes


# ------------------------------------------------------------------------------------------------ consistency


def _slow_consistency(descriptors: np.ndarray, codes: np.ndarray, code: int) -> float:
    """Over pairs of images: the mean cosine between a patch of one and a patch of the other."""
    values = []
    for first, second in itertools.combinations(range(len(codes)), 2):
        ours, theirs = (descriptors[i][codes[i] == code] for i in (first, second))
        if len(ours) and len(theirs):
            values.append(np.mean([a @ b for a in ours for b in theirs]))
    return float(np.mean(values)) if values else math.nan


def test_consistency_is_the_mean_over_pairs_of_images():
    images, codes = _pictures(9)
    likeness = Likeness(codes, 6, PATCH)
    for first in (0, 4, 7):
        likeness.add(first, images[first : {0: 4, 4: 7, 7: 9}[first]])
    descriptors = codebook.patch_descriptors(images, PATCH)
    slow = [_slow_consistency(descriptors, codes, code) for code in range(6)]
    np.testing.assert_allclose(likeness.consistency(), slow, atol=1e-6)
    assert math.isnan(slow[5]) and slow[1] > 0.99
    assert likeness.of_any() == pytest.approx(_slow_consistency(descriptors, 0 * codes, 0), abs=1e-6)
    np.testing.assert_array_equal(likeness.patches_per_code, np.bincount(codes.ravel(), minlength=6))
    np.testing.assert_array_equal(
        likeness.images_per_code, [(codes == c).any(axis=1).sum() for c in range(6)]
    )


def test_patches_of_one_image_do_not_make_a_code_consistent():
    """Sixteen equal patches in each of two images that differ: the pair between them counts alone."""
    images = np.zeros((2, SIZE, SIZE, 3), np.uint8)
    images[0], images[1] = (
        np.where(np.arange(SIZE) % 4 < 2, 0, 255)[None, :, None],
        np.where(np.arange(SIZE) % 4 < 2, 0, 255)[:, None, None],
    )
    likeness = Likeness(np.zeros((2, SIDE * SIDE), int), 1, PATCH)
    likeness.add(0, images)
    assert likeness.consistency()[0] < 0.3


def test_colour_alone_does_not_make_patches_alike():
    images, codes = _pictures(12)
    grey, dark = Likeness(codes, 4, PATCH), Likeness(codes, 4, PATCH)
    grey.add(0, images // 2 + 60)
    dark.add(0, images // 2)
    np.testing.assert_allclose(grey.consistency(), dark.consistency(), atol=1e-6)


def test_ranking_wants_images_enough_and_puts_flat_codes_last():
    images, codes = _pictures(30)
    codes[codes == 3] = 2
    codes[codes == 0] = 2
    codes[0] = 3  # sixteen patches, but of one image
    images[20:], codes[20:] = 110, 0
    likeness = Likeness(codes, 5, PATCH)
    likeness.add(0, images)
    consistency = likeness.consistency()
    assert consistency[0] > consistency[1] > consistency[2], "flat, striped, and what is left"
    assert likeness.ranked(min_patches=12, min_images=6) == [1, 2, 0]
    assert likeness.ranked(min_patches=12, min_images=1) == [1, 2, 0], "one image has no pair"
    assert likeness.ranked(min_patches=10_000, min_images=1) == []


def test_every_image_gives_one_patch_before_any_gives_two():
    where = np.random.default_rng(0).random((7, 10)) < 0.4
    where[3] = False
    for count in (1, 4, 6, 9, 100):
        chosen = choose_patches(where, count, seed=(0, 1))
        assert len(chosen) == len(set(chosen)) == min(count, int(where.sum()))
        assert all(where[image, patch] for image, patch in chosen)
        times = np.bincount([image for image, _ in chosen], minlength=7)
        unfinished = times < where.sum(axis=1)
        assert times.max() - times[unfinished].min(initial=times.max()) <= 1
    assert choose_patches(where, 4, seed=(0, 1)) == choose_patches(where, 4, seed=(0, 1))
    assert len({tuple(choose_patches(where, 4, seed=(0, code))) for code in range(9)}) > 5


# ------------------------------------------------------------------------------------------------ position


def test_position_bits_are_those_of_the_formula():
    table = np.random.default_rng(0).integers(0, 9, (5, 6))
    table[2] = 0
    for code in range(5):
        divergence = sum(
            share * math.log2(share / (table[:, place].sum() / table.sum()))
            for place, share in enumerate(table[code] / max(1, table[code].sum()))
            if share > 0
        )
        assert position_bits(table)[code] == pytest.approx(divergence)
    assert (position_bits(np.zeros((3, 4), int)) == 0).all()


def test_bound_codes_say_all_of_their_place_and_free_ones_nothing():
    assert position_bits(np.eye(16, dtype=int) * 3) == pytest.approx(np.full(16, 4))
    assert position_bits(np.full((5, 16), 7)) == pytest.approx(np.zeros(5), abs=1e-12)


def _counts(codes: np.ndarray, size: int) -> CodeCounts:
    """Of grids [n, rows, columns]."""
    rng = np.random.default_rng(1)

    def table(grids: np.ndarray) -> np.ndarray:
        return np.stack([(grids == code).sum(axis=0).ravel() for code in range(size)])

    def rolled(grid: np.ndarray) -> np.ndarray:
        return np.roll(grid, rng.integers(0, grid.shape), (0, 1))

    empty = np.zeros((0, 0), np.int64)
    return CodeCounts(
        by_place=table(codes),
        shifted=np.stack([table(np.stack([rolled(grid) for grid in codes])) for _ in range(4)]),
        by_class=empty,
        class_patches=empty[0:0].ravel(),
    )


def test_what_chance_gives_is_told_from_what_position_gives():
    """Blocks of one code, anywhere: the information is all chance. Sky above, ground below: it is not."""
    rng = np.random.default_rng(0)
    anywhere = np.zeros((60, 12, 12), int)
    for grid in anywhere:
        block = np.zeros((12, 12), int)
        block[:3, :3] = rng.integers(1, 6)
        grid[:] = np.roll(block, rng.integers(0, 12, 2), (0, 1))
    free = PositionStatistics(_counts(anywhere, 6), (12, 12))
    assert free.bits > 0.05 and free.bits_shifted == pytest.approx(free.bits, rel=0.3)

    grid = (6, 6)
    placed = rng.integers(0, 2, (60, *grid))
    placed[:, :2] = 2
    placed[:, 5] = 3
    bound = PositionStatistics(_counts(placed, 5), grid)
    assert bound.bits > 5 * bound.bits_shifted
    assert {place.code for place in bound.most[:2]} == {2, 3}
    share = bound.of(2).spread
    assert share.shape == grid and (share[:2] > 2).all() and (share[2:] < 0.2).all()
    assert bound.code_entropy == pytest.approx(
        -sum(p * math.log2(p) for p in np.bincount(placed.ravel()) / placed.size)
    )

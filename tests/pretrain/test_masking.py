from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import InputError
from pretrain.masking import NUM_TRIES, BlockMasks, MaskConfig, MaskSpec, draw_block_masks

NUM_DRAWN = 10_000


def block_masks(
    positions: np.ndarray, grid: tuple[int, int], config: MaskConfig, *, seed: int, epoch: int
) -> np.ndarray:
    return draw_block_masks(positions, config.resolve(grid), seed=seed, epoch=epoch).mask


def block_mask(spec: MaskSpec, draws: random.Random, single_draws: np.random.RandomState) -> np.ndarray:
    """One mask [height, width] bool by the official procedure, slow and plain; measures `block_masks`.

    Consumes `draws` (area, aspect, top, left per proposal) and `single_draws` (the top-up) in the official
    order, so that generators seeded alike give the official masks (reference.md §4).
    """
    mask = np.zeros((spec.height, spec.width), dtype=bool)
    log_low, log_high = math.log(spec.aspect[0]), math.log(spec.aspect[1])
    while (room := spec.num_masked - int(mask.sum())) > 0:
        for _ in range(NUM_TRIES):
            # When room < min_block this draws between the two: the blocks then overlap or are refused.
            area = draws.uniform(spec.min_block, room)
            ratio = math.exp(draws.uniform(log_low, log_high))
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if height >= spec.height or width >= spec.width:
                continue
            top = draws.randint(0, spec.height - height)
            left = draws.randint(0, spec.width - width)
            block = mask[top : top + height, left : left + width]
            if 0 < block.size - int(block.sum()) <= room:
                block[:] = True
                break
        else:
            break
    if room > 0:
        rows, columns = np.nonzero(~mask)
        chosen = single_draws.choice(len(rows), room, replace=False)
        mask[rows[chosen], columns[chosen]] = True
    return mask


@pytest.fixture(scope="module")
def official(shared_dir: Path) -> dict[str, Any]:
    return json.loads((shared_dir / "reference" / "masking.json").read_text())


@pytest.fixture(scope="module")
def drawn() -> BlockMasks:
    return draw_block_masks(np.arange(NUM_DRAWN), MaskConfig().resolve((14, 14)), seed=5, epoch=2)


def test_scalar_procedure_gives_the_official_masks_bit_for_bit(official):
    golden = next(value for key, value in official.items() if key.startswith("golden_by_seed"))
    spec = MaskConfig().resolve((14, 14))
    assert len(golden) > 0
    for seed, expected in golden.items():
        draws, single_draws = random.Random(int(seed)), np.random.RandomState(int(seed))
        for bits in expected:
            mask = block_mask(spec, draws, single_draws)
            assert "".join("01"[int(cell)] for cell in mask.ravel()) == bits


def test_batched_masks_follow_the_official_distribution(official, drawn):
    """Tolerances are about 4 standard errors of the difference between two samples of 10,000 masks."""
    reference = official["official_75_16"]
    assert reference["n"] == NUM_DRAWN

    counts = drawn.mask.sum(axis=1)
    assert counts.min() == counts.max() == 75

    assert drawn.num_blocks.mean() == pytest.approx(reference["blocks"]["mean"], abs=0.09)
    histogram = np.bincount(drawn.num_blocks, minlength=20)
    for blocks, expected in reference["blocks"]["hist"].items():
        assert histogram[int(blocks)] == pytest.approx(expected, abs=4 * (2 * expected + 2) ** 0.5)

    assert 100 * (drawn.num_single == 0).mean() == pytest.approx(
        reference["before_fix"]["exact_pct"], abs=2.7
    )
    short = drawn.num_single[drawn.num_single > 0]
    assert short.mean() == pytest.approx(reference["before_fix"]["topup_mean_when_under"], abs=0.09)

    difference = drawn.mask.mean(axis=0).reshape(14, 14) - np.array(reference["freq"])
    assert np.abs(difference).max() < 0.03
    assert (difference**2).mean() ** 0.5 < 0.01

    perimeter, components = zip(
        *(_outline(mask) for mask in drawn.mask[:1000].reshape(-1, 14, 14)), strict=True
    )
    assert np.mean(perimeter) == pytest.approx(reference["perimeter_mean"], rel=0.03)
    assert np.mean(components) == pytest.approx(reference["components_mean"], abs=0.15)


def test_batched_masks_on_another_grid_follow_the_scalar_procedure():
    config = MaskConfig(num_masked=20, min_block=6, aspect=(0.5, 2.0))
    spec = config.resolve((6, 11))
    draws, single_draws = random.Random(0), np.random.RandomState(0)
    slow = np.array([block_mask(spec, draws, single_draws) for _ in range(3000)])
    fast = draw_block_masks(np.arange(3000), spec, seed=0, epoch=0).mask.reshape(-1, 6, 11)
    assert set(fast.sum(axis=(1, 2))) == set(slow.sum(axis=(1, 2))) == {20}
    assert np.abs(fast.mean(axis=0) - slow.mean(axis=0)).max() < 0.055  # 4.3 standard errors


def test_a_mask_depends_on_seed_epoch_and_position_alone():
    positions = np.arange(300)
    everything = block_masks(positions, (14, 14), MaskConfig(), seed=1, epoch=4)

    order = np.random.default_rng(0).permutation(300)
    for part in np.array_split(order, 7):
        np.testing.assert_array_equal(
            block_masks(part, (14, 14), MaskConfig(), seed=1, epoch=4), everything[part]
        )
    np.testing.assert_array_equal(
        block_masks(positions[41:42], (14, 14), MaskConfig(), seed=1, epoch=4), everything[41:42]
    )

    assert len(np.unique(everything, axis=0)) == 300
    for seed, epoch in [(1, 5), (2, 4), (4, 1)]:
        other = block_masks(positions, (14, 14), MaskConfig(), seed=seed, epoch=epoch)
        assert not (other == everything).all(axis=1).any()
    # Neighbouring seeds, epochs and positions share no stream: agreement is what chance gives.
    agreement = (everything == block_masks(positions, (14, 14), MaskConfig(), seed=1, epoch=5)).mean()
    by_chance = everything.mean(axis=0)
    assert agreement == pytest.approx((by_chance**2 + (1 - by_chance) ** 2).mean(), abs=0.02)


def test_far_positions_and_negative_seeds_work():
    masks = block_masks(np.array([0, 2**40, 2**62]), (14, 14), MaskConfig(), seed=-1, epoch=10**6)
    assert masks.sum(axis=1).tolist() == [75, 75, 75]
    assert len(np.unique(masks, axis=0)) == 3


def test_an_empty_batch_is_an_empty_mask():
    masks = block_masks(np.arange(0), (14, 14), MaskConfig(), seed=0, epoch=0)
    assert masks.shape == (0, 196) and masks.dtype == bool


@pytest.mark.parametrize(
    ("grid", "num_masked", "min_block"),
    [((14, 14), 75, 16), ((8, 8), 24, 5), ((4, 4), 6, 1), ((24, 24), 220, 47), ((2, 2), 2, 1)],
)
def test_defaults_scale_with_the_grid(grid, num_masked, min_block):
    spec = MaskConfig().resolve(grid)
    assert (spec.num_masked, spec.min_block) == (num_masked, min_block)
    masks = block_masks(np.arange(50), grid, MaskConfig(), seed=0, epoch=0)
    assert masks.shape == (50, grid[0] * grid[1])
    assert (masks.sum(axis=1) == num_masked).all()


@pytest.mark.parametrize("num_masked", [1, 100, 194, 195])
def test_any_share_is_met_exactly(num_masked):
    config = MaskConfig(num_masked=num_masked, min_block=1)
    assert (block_masks(np.arange(64), (14, 14), config, seed=3, epoch=0).sum(axis=1) == num_masked).all()


@pytest.mark.parametrize(
    ("config", "grid", "named"),
    [
        (MaskConfig(num_masked=196), (14, 14), "num_masked"),
        (MaskConfig(num_masked=0), (14, 14), "num_masked"),
        (MaskConfig(num_masked=10, min_block=11), (14, 14), "min_block"),
        (MaskConfig(min_block=0), (14, 14), "min_block"),
        (MaskConfig(aspect=(2.0, 0.5)), (14, 14), "aspect"),
        (MaskConfig(aspect=(0.0, 1.0)), (14, 14), "aspect"),
        (MaskConfig(), (65, 14), "65x14"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config, grid, named):
    with pytest.raises(InputError, match=named):
        config.resolve(grid)


def _outline(mask: np.ndarray) -> tuple[int, int]:
    """Perimeter (the image border included) and number of 4-connected components of one mask."""
    padded = np.pad(mask, 1)
    perimeter = sum(int((padded != np.roll(padded, 1, axis=axis)).sum()) for axis in (0, 1))
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask), strict=True)}
    components = 0
    while left:
        components += 1
        stack = [left.pop()]
        while stack:
            y, x = stack.pop()
            near = {(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)} & left
            left -= near
            stack.extend(near)
    return perimeter, components

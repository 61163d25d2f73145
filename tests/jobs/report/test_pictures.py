"""Pictures of codes and predictions show what the arrays say, and nothing else."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from jobs.report import pictures
from pretrain.model.backbone import BackboneConfig
from pretrain.model.mim import MIM, MIMConfig, PatchAggregationConfig

PATCH, SIDE, SIZE = 8, 4, 32


def _model(layer: int | None = 1) -> MIM:
    torch.manual_seed(0)
    config = BackboneConfig(image_size=SIZE, patch_size=PATCH, width=16, depth=2, heads=2)
    aggregation = PatchAggregationConfig(layer=layer, head_depth=1)
    return MIM(config, MIMConfig(patch_aggregation=aggregation), codebook_size=11).eval()


def _striped_and_noisy(count: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Images whose patches are stripes (code 1), noise (code 2) or flat (code 0), by a known grid."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 3, (count, SIDE * SIDE))
    images = np.full((count, SIZE, SIZE, 3), 120, np.uint8)
    stripes = np.where(np.arange(PATCH) % 4 < 2, 30, 220)[None, :, None] * np.ones((PATCH, 1, 3))
    for row, patch in itertools.product(range(count), range(SIDE * SIDE)):
        top, left = patch // SIDE * PATCH, patch % SIDE * PATCH
        if codes[row, patch] == 1:
            images[row, top : top + PATCH, left : left + PATCH] = stripes
        elif codes[row, patch] == 2:
            images[row, top : top + PATCH, left : left + PATCH] = rng.integers(0, 256, (PATCH, PATCH, 3))
    return images, codes


def test_groups_hold_patches_of_their_code_and_stripes_are_more_alike_than_noise():
    images, codes = _striped_and_noisy()
    consistent, used = pictures.group_by_code(
        images, codes, patch_size=PATCH, num_consistent=2, num_used=2, per_code=10
    )
    found = {group.code: group for group in [*consistent, *used]}
    assert sorted(found) == [0, 1, 2] and len(consistent) == 2
    assert found[1].consistency > found[2].consistency
    for code, group in found.items():
        assert group.share == pytest.approx((codes == code).mean())
        assert len(group.tiles) == 10
        for tile in group.tiles:
            assert tile.shape == (3 * PATCH, 3 * PATCH, 3)
            center = tile[PATCH : 2 * PATCH, PATCH : 2 * PATCH].astype(int)
            if code == 0:
                assert (center == 120).all()
            if code == 1:
                assert set(np.unique(center)) == {30, 220}


def test_rare_codes_and_codes_of_few_images_are_not_shown():
    images, codes = _striped_and_noisy()
    codes[codes == 2] = 0
    codes[0] = 2  # 16 patches, but all of one image
    consistent, used = pictures.group_by_code(
        images, codes, patch_size=PATCH, num_consistent=5, num_used=5, per_code=4
    )
    assert {group.code for group in [*consistent, *used]} == {0, 1}


def test_patches_come_from_as_many_images_as_possible():
    images = np.zeros((8, SIZE, SIZE, 3), np.uint8)
    images += np.arange(8, dtype=np.uint8)[:, None, None, None] * 10
    codes = np.zeros((8, SIDE * SIDE), int)
    [group], _ = pictures.group_by_code(
        images, codes, patch_size=PATCH, num_consistent=1, num_used=1, per_code=8
    )
    assert sorted(int(tile[0, 0, 0]) // 10 for tile in group.tiles) == list(range(8))


def test_codes_get_different_colours_and_neighbours_similar_ones():
    rng = np.random.default_rng(0)
    codebook = rng.normal(size=(64, 8))
    codebook[1] = codebook[0] + 0.001
    colors = pictures.code_colors(codebook, 64).astype(int)
    assert colors.shape == (64, 3) and len(np.unique(colors, axis=0)) == 64
    assert np.abs(colors[0] - colors[1]).max() < 20
    assert np.array_equal(pictures.code_colors(None, 64), pictures.code_colors(None, 64))
    assert len(np.unique(pictures.code_colors(None, 64), axis=0)) > 60


def test_predictions_are_the_models_for_hidden_patches_only():
    model, rng = _model(), np.random.default_rng(0)
    images = rng.integers(0, 256, (5, SIZE, SIZE, 3), dtype=np.uint8)
    codes = rng.integers(0, 11, (5, SIDE * SIDE)).astype(np.uint16)
    predictions = pictures.predict(model, images, codes)
    for i, one in enumerate(predictions):
        mask = torch.from_numpy(one.mask)[None]
        alone = model(model.normalize(torch.from_numpy(images[i : i + 1])), mask)
        assert np.array_equal(one.guess[one.mask], alone.logits.argmax(1).numpy())
        assert one.guess_cls is not None and alone.logits_cls is not None
        assert np.array_equal(one.guess_cls[one.mask], alone.logits_cls.argmax(1).numpy())
        assert (one.guess[~one.mask] == -1).all() and 0 < one.mask.sum() < one.mask.size
    hits = [one.guess[j] == one.codes[j] for one in predictions for j in np.flatnonzero(one.mask)]
    assert pictures.accuracy(predictions) == pytest.approx(np.mean(hits))


def test_without_aggregation_the_second_head_is_absent():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
    predictions = pictures.predict(_model(None), images, np.zeros((2, SIDE * SIDE), np.uint16))
    assert predictions[0].guess_cls is None and pictures.accuracy(predictions, cls_head=True) is None


def test_maps_paint_each_patch_by_its_values():
    mask = np.zeros(SIDE * SIDE, bool)
    mask[[0, 5]] = True
    codes, guess = np.arange(SIDE * SIDE) % 11, np.full(SIDE * SIDE, -1)
    guess[[0, 5]] = 0, 7  # right for patch 0, wrong for patch 5
    one = pictures.Prediction(
        image=np.full((SIZE, SIZE, 3), 200, np.uint8), mask=mask, codes=codes, guess=guess, guess_cls=None
    )
    colors = pictures.code_colors(None, 11)
    size = 64

    def patch(picture: np.ndarray, number: int) -> np.ndarray:
        side = size // SIDE
        top, left = number // SIDE * side, number % SIDE * side
        block = picture[top : top + side, left : left + side].reshape(-1, 3)
        assert (block == block[0]).all()
        return block[0].astype(int)

    hidden = pictures.masked_image(one, size)
    assert (patch(hidden, 0) == pictures.HIDDEN).all() and (patch(hidden, 1) == 200).all()
    assert np.array_equal(patch(pictures.code_map(codes, colors, size), 3), colors[3])
    guesses = pictures.guess_map(one, colors, size)
    assert np.array_equal(patch(guesses, 5), colors[7]) and not np.array_equal(patch(guesses, 3), colors[3])
    verdict = pictures.verdict_map(one, size, right=(0, 255, 0), wrong=(255, 0, 0))
    assert patch(verdict, 0)[1] > patch(verdict, 0)[0] and patch(verdict, 5)[0] > patch(verdict, 5)[1]
    assert len(set(patch(verdict, 9))) == 1

"""Pictures of codes and predictions show what the arrays say, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jobs.report import pictures
from jobs.report.pictures import BORDER, RED, Row, Tile
from pretrain.evals.codebook import Example
from pretrain.model.backbone import BackboneConfig
from pretrain.model.mim import MIM, MIMConfig, PatchAggregationConfig

PATCH, SIDE, SIZE = 8, 4, 32


def _predictions(layer: int | None = 1) -> tuple[MIM, pictures.Predictions]:
    torch.manual_seed(0)
    config = BackboneConfig(image_size=SIZE, patch_size=PATCH, width=16, depth=2, heads=2)
    aggregation = PatchAggregationConfig(layer=layer, head_depth=1)
    model = MIM(config, MIMConfig(patch_aggregation=aggregation), codebook_size=11).eval()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, SIZE, SIZE, 3), dtype=np.uint8)
    codes = rng.integers(0, 11, (5, SIDE * SIDE)).astype(np.uint16)
    return model, pictures.predict(model, images, codes)


@pytest.mark.parametrize(("side", "patches"), [(32, 8), (224, 14)])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_the_box_surrounds_exactly_the_patch(side: int, patches: int, place: str):
    patch = {"first": 0, "middle": patches * 3 + 5, "last": patches**2 - 1}[place]
    step = side // patches
    row, column = divmod(patch, patches)
    pixels = np.full((side, side, 3), 100, np.uint8)
    pixels[row * step : (row + 1) * step, column * step : (column + 1) * step] = (0, 0, 255)
    tile = pictures.patch_tile(Example(key="k", patch=patch, pixels=pixels), (patches, patches), 128)
    crop = pictures.fitted(pixels, 128)
    assert crop.width == 128, "four times 32, or shrunk"
    shown = np.asarray(tile.picture)[: crop.height + 2 * BORDER].astype(int)
    rows, columns = np.nonzero((shown == RED).all(axis=2))
    top, bottom, left, right = rows.min(), rows.max(), columns.min(), columns.max()
    inside = shown[top + 2 : bottom - 1, left + 2 : right - 1]
    edges = [BORDER + n * crop.width // patches for n in (row, row + 1, column, column + 1)]
    assert [top + 2, bottom - 1, left + 2, right - 1] == edges
    # All four sides are there, two pixels wide, and hide nothing of the patch.
    assert len(rows) == 4 * (right - left + bottom - top - 2)
    assert np.abs(np.median(inside.reshape(-1, 3), axis=0) - (0, 0, 255)).max() < 4
    if side == 32:
        assert (inside == (0, 0, 255)).all(), "enlarged with hard edges"
    near = np.asarray(tile.picture)[crop.height + 2 * BORDER + 2 :]
    third = len(near) // 3
    middle = near[third : 2 * third, (tile.picture.width - third) // 2 : (tile.picture.width + third) // 2]
    assert (middle == (0, 0, 255)).all() and (near == RED).all(axis=2).sum() == 8 * (third + 2)


def test_a_sheet_shows_every_tile_whole():
    colors = [(200, n, 0) for n in range(40)]
    tiles = [Tile(picture=pictures.Image.new("RGB", (90, 50), color), alt="") for color in colors]
    rows = [
        Row(title="first", words=["a", "b"], tiles=tiles[:3]),
        Row(title="second", words=[], tiles=tiles[3:]),
    ]
    sheet = np.asarray(pictures.sheet("title", "lead", rows))
    assert sheet.shape[1] == pictures.WIDTH
    for color in colors:
        assert (sheet == color).all(axis=2).sum() == 90 * 50


def test_maps_are_red_where_a_code_is_frequent_and_blue_where_it_is_rare():
    colors = pictures.spread_colors(np.array([[8.0, 1.0], [1.0, 0.1]])).astype(int)
    assert colors[0, 0, 0] > colors[0, 0, 2] and colors[1, 1, 2] > colors[1, 1, 0]
    assert colors[0, 1].tolist() == colors[1, 0].tolist() and np.ptp(colors[0, 1]) < 5


@pytest.mark.parametrize("size", [2, 256, 8192])
def test_the_usage_chart_falls_from_the_most_used_code(size: int):
    counts = np.random.default_rng(0).zipf(1.5, size).clip(max=10**6)
    counts[: size // 4] = 0
    blue = (np.asarray(pictures.usage_chart(counts)) == pictures.BLUE).all(axis=2)
    used = np.flatnonzero(blue.any(axis=0))
    heights = blue.sum(axis=0)[used]
    assert heights.max() == heights[:3].max() and (np.diff(heights) <= 2).all(), "up to lines drawn across"
    full = 1090
    assert len(used) == pytest.approx(full * (counts > 0).mean(), abs=3)


def test_codes_get_different_colours_and_neighbours_similar_ones():
    codebook = np.random.default_rng(0).normal(size=(64, 8))
    codebook[1] = codebook[0] + 0.001
    colors = pictures.code_colors(codebook, 64).astype(int)
    assert colors.shape == (64, 3) and len(np.unique(colors, axis=0)) == 64
    assert np.abs(colors[0] - colors[1]).max() < 20
    assert np.array_equal(pictures.code_colors(None, 64), pictures.code_colors(None, 64))
    assert len(np.unique(pictures.code_colors(None, 64), axis=0)) > 60
    assert pictures.code_colors(codebook[:, :2], 64).shape == (64, 3)


def test_predictions_are_the_models_for_hidden_patches_only():
    model, made = _predictions()
    assert made.guess_cls is not None
    for i, (mask, guess) in enumerate(zip(made.mask, made.guess, strict=True)):
        alone = model(model.normalize(torch.from_numpy(made.images[i : i + 1])), torch.from_numpy(mask)[None])
        assert np.array_equal(guess[mask], alone.logits.argmax(1).numpy())
        assert np.array_equal(made.guess_cls[i][mask], alone.logits_cls.argmax(1).numpy())
        assert (guess[~mask] == -1).all() and 0 < mask.sum() < mask.size
    hits = [made.guess[place] == made.codes[place] for place in zip(*np.nonzero(made.mask), strict=True)]
    assert made.accuracy(made.guess) == pytest.approx(np.mean(hits))
    assert _predictions(None)[1].guess_cls is None, "no second head without aggregation"


def test_maps_paint_each_patch_by_its_values():
    mask = np.zeros(SIDE * SIDE, bool)
    mask[[0, 5]] = True
    codes, guess = np.arange(SIDE * SIDE) % 11, np.full(SIDE * SIDE, -1)
    guess[[0, 5]] = 0, 7  # right for patch 0, wrong for patch 5
    image, colors = np.full((SIZE, SIZE, 3), 200, np.uint8), pictures.code_colors(None, 11)

    def patch(picture: np.ndarray, number: int) -> np.ndarray:
        side = len(picture) // SIDE
        top, left = number // SIDE * side, number % SIDE * side
        block = picture[top : top + side, left : left + side].reshape(-1, 3)
        assert (block == block[0]).all()
        return block[0].astype(int)

    hidden = pictures.masked_image(image, mask)
    assert (patch(hidden, 0) == pictures.HIDDEN).all() and (patch(hidden, 1) == 200).all()
    assert np.array_equal(patch(pictures.code_map(codes, colors), 3), colors[3])
    guesses = pictures.guess_map(mask, codes, guess, colors)
    assert np.array_equal(patch(guesses, 5), colors[7]) and not np.array_equal(patch(guesses, 3), colors[3])
    verdict = pictures.verdict_map(image, mask, codes == guess)
    assert patch(verdict, 0)[1] > patch(verdict, 0)[0] and patch(verdict, 5)[0] > patch(verdict, 5)[1]
    assert len(set(patch(verdict, 9))) == 1

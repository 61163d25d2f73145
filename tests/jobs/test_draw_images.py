"""The drawn set: the same for ever, labelled truthfully, and impossible for a linear classifier on pixels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.draw_images import DrawConfig, draw_images
from jobs.report import drawing
from pipeline.errors import InputError

SMALL = {"num_images": 26, "num_classes": 12, "image_size": 48}


def _draw(index: int, *, num_classes: int = 12, image_size: int = 64, seed: int = 0) -> drawing.Drawing:
    return drawing.draw(index, num_classes=num_classes, image_size=image_size, seed=seed)


def _tree(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()
    }


# ------------------------------------------------------------------------------------------------ one picture


def test_a_picture_is_a_pure_function_of_seed_and_index():
    first = [_draw(i) for i in range(8)]
    again = [_draw(i) for i in reversed(range(8))][::-1]
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a.pixels, b.pixels) and np.array_equal(a.label_map, b.label_map)
    assert len({picture.pixels.tobytes() for picture in [*first, _draw(0, seed=1)]}) == 9


@pytest.mark.parametrize("num_classes", [2, 5, drawing.MAX_CLASSES])
def test_label_maps_hold_the_object_of_the_label_and_nothing_foreign(num_classes: int):
    names = drawing.class_names(num_classes)
    assert list(names) == sorted(set(names)) and len(names) == num_classes
    assert len(drawing.label_palette(num_classes)) == 3 * len(drawing.label_names(num_classes))
    for index in range(2 * num_classes):
        picture = _draw(index, num_classes=num_classes)
        assert picture.label == index % num_classes
        assert picture.pixels.shape == (64, 64, 3) and picture.pixels.dtype == np.uint8
        values, counts = np.unique(picture.label_map, return_counts=True)
        assert set(values) <= {0, picture.label + 1, num_classes + 1}
        assert counts[values == picture.label + 1].sum() > 0.02 * 64 * 64


@pytest.mark.parametrize("shape", drawing.SHAPES)
def test_antialiased_coverage_is_the_area_of_the_shape(shape: str):
    """Against counting the sign of the distance on a 12 times finer grid."""
    radius = 20.0

    def grid(count: int) -> tuple[np.ndarray, np.ndarray]:
        ticks = (np.arange(count) + 0.5) / count * 64 - 32
        y, x = np.meshgrid(ticks, ticks, indexing="ij")
        return x / radius, y / radius

    coverage = np.clip(0.5 - drawing.shape_distance(shape, *grid(64)) * radius, 0, 1).sum()
    area = (drawing.shape_distance(shape, *grid(768)) < 0).mean() * 64 * 64
    assert coverage == pytest.approx(area, rel=0.02)
    assert 0.2 * np.pi < area / radius**2 < 0.9 * np.pi


@pytest.mark.parametrize("texture", drawing.TEXTURES)
def test_textures_show_both_colours(texture: str):
    ticks = np.arange(64, dtype=np.float32) / 10
    v, u = np.meshgrid(ticks, ticks, indexing="ij")
    weight = drawing.texture_weight(np.random.default_rng(0), texture, u, v, 10.0)
    assert weight.min() >= 0 and weight.max() <= 1
    assert 0.15 < weight.mean() < 0.85 and (weight < 0.1).mean() > 0.1 and (weight > 0.9).mean() > 0.1


# ------------------------------------------------------------------------------------------------ difficulty


def _linear_accuracy(features: np.ndarray, labels: np.ndarray, split: int) -> float:
    """Test accuracy of ridge regression of one-hot labels on standardised features."""
    features = (features - features[:split].mean(0)) / (features[:split].std(0) + 1e-6)
    train, target = features[:split], np.eye(12)[labels[:split]] - 1 / 12
    weights = np.linalg.solve(train.T @ train + 100 * np.eye(train.shape[1]), train.T @ target)
    assert ((train @ weights).argmax(1) == labels[:split]).mean() > 0.25, "it did not fit its training set"
    return float(((features[split:] @ weights).argmax(1) == labels[split:]).mean())


def _gradient_words(gray: np.ndarray) -> np.ndarray:
    """Histogram [n, 32] of each picture's cells over 32 of their gradient orientation histograms."""
    dy, dx = np.gradient(gray, axis=(1, 2))
    angle = np.minimum((np.mod(np.arctan2(dy, dx), np.pi) / np.pi * 9).astype(int), 8)
    shape = (len(gray), gray.shape[1] // 4, 4, gray.shape[2] // 4, 4)
    bins = [np.where(angle == k, np.hypot(dy, dx), 0).reshape(shape).sum((2, 4)) for k in range(9)]
    cells = np.stack(bins, axis=-1).reshape(-1, 9)
    cells /= np.linalg.norm(cells, axis=1, keepdims=True) + 0.05
    words = cells[np.random.default_rng(0).choice(len(cells), 32, replace=False)]
    nearest = np.argmin((words**2).sum(1) - 2 * cells @ words.T, axis=1).reshape(len(gray), -1)
    return np.stack([np.sqrt(np.bincount(row, minlength=32)) for row in nearest])


def test_raw_pixels_stay_below_twice_chance_and_local_structure_does_not():
    count, split, chance = 2000, 1500, 1 / 12
    pictures = [_draw(i) for i in np.random.default_rng(0).permutation(count).tolist()]
    labels = np.array([picture.label for picture in pictures])
    small = [Image.fromarray(picture.pixels).resize((16, 16)) for picture in pictures]
    pixels = np.stack([np.asarray(image, float).ravel() / 255 for image in small])
    assert _linear_accuracy(pixels, labels, split) < 2 * chance
    words = _gradient_words(np.stack([picture.pixels.mean(axis=2) / 255 for picture in pictures]))
    assert _linear_accuracy(words, labels, split) > 2 * chance


# ------------------------------------------------------------------------------------------------ the folder


def test_the_folder_holds_what_was_drawn(tmp_path: Path):
    images = Path(draw_images(DrawConfig(output=str(tmp_path / "set"), **SMALL)))
    poor = Path(draw_images(DrawConfig(output=str(tmp_path / "poor"), jpeg_quality=30, **SMALL)))
    sizes = [sum(file.stat().st_size for file in folder.rglob("*.jpg")) for folder in (images, poor)]
    assert sizes[1] < 0.5 * sizes[0]
    header = json.loads((tmp_path / "set" / "drawing.json").read_text())
    names = drawing.class_names(12)
    assert header["classes"] == list(names) == sorted(path.name for path in images.iterdir())
    assert len(list(images.rglob("*.jpg"))) == 26
    for index in (0, 11, 25):
        picture = _draw(index, image_size=48)
        place = f"{names[picture.label]}/{index:05d}"
        decoded = np.asarray(Image.open(images / f"{place}.jpg"))
        assert np.abs(decoded.astype(int) - picture.pixels).mean() < 10
        label_map = Image.open(tmp_path / "set" / "label_maps" / f"{place}.png")
        assert np.array_equal(np.asarray(label_map), picture.label_map)


def test_an_interrupted_or_damaged_set_is_completed_and_a_finished_one_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = DrawConfig(output=str(tmp_path / "set"), **SMALL)
    real = drawing.draw

    def dying(index: int, **arguments: int) -> drawing.Drawing:
        if index == 10:
            raise KeyboardInterrupt
        return real(index, **arguments)

    monkeypatch.setattr(drawing, "draw", dying)
    with pytest.raises(KeyboardInterrupt):
        draw_images(config)
    monkeypatch.setattr(drawing, "draw", real)
    assert not (tmp_path / "set" / "drawing.json").exists()
    draw_images(config)
    draw_images(DrawConfig(output=str(tmp_path / "straight"), **SMALL))
    finished = _tree(tmp_path / "set")
    assert finished == _tree(tmp_path / "straight")

    next((tmp_path / "set" / "images").rglob("*.jpg")).unlink()
    draw_images(config)
    assert _tree(tmp_path / "set") == finished
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    draw_images(config)
    with pytest.raises(InputError, match="seed: there 0, asked 1"):
        draw_images(DrawConfig(output=config.output, seed=1, **SMALL))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_an_output_that_holds_something_else_is_refused_untouched(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="already holds something else"):
        draw_images(DrawConfig(output=str(tmp_path), **SMALL))
    assert _tree(tmp_path) == {"notes.txt": b"mine"}


@pytest.mark.parametrize(
    "wrong",
    [{"num_classes": 1}, {"num_classes": 13}, {"num_images": 5}, {"image_size": 8}, {"jpeg_quality": 0}],
)
def test_values_out_of_range_are_named(wrong: dict[str, int]):
    key = next(iter(wrong))
    with pytest.raises(InputError, match=f"--{key}"):
        DrawConfig(output="x", **wrong)

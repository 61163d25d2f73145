"""Corrupted copies: against slow loops and Pillow, stronger with severity, and always the same."""

from __future__ import annotations

import io
import math
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pretrain.evals.corruptions import CORRUPTIONS, SEVERITIES, STRENGTHS, Corruption, blur, default_table

TABLES = ("imagenet_c", "cifar10_c")


def picture(size: int = 32) -> np.ndarray:
    """Stripes, a gradient and some grain: something to blur, to fade and to compress."""
    y, x = np.mgrid[:size, :size]
    grain = np.random.default_rng(0).normal(0, 6, (size, size, 3))
    stripes = 60.0 * ((x + 2 * y) // 5 % 2)[..., None] * np.array([1.0, 0.4, 0.7])
    return np.clip(60 + 2 * y[..., None] + stripes + grain, 0, 255).astype(np.uint8)


def corruption(name: str, severity: int = 3, **changes: Any) -> Corruption:
    settings: dict[str, Any] = {"name": name, "severity": severity, "table": "cifar10_c", "seed": 0}
    return Corruption(**{**settings, **changes})


def slow_blur(pixels: np.ndarray, std: float) -> np.ndarray:
    """Every pixel the weighted mean of its surroundings, the border repeated."""
    size, reach = len(pixels), int(4 * std + 0.5)
    weights = {d: math.exp(-(d**2) / (2 * std**2)) for d in range(-reach, reach + 1)}
    out = np.zeros(pixels.shape)
    for row in range(size):
        for column in range(size):
            total = 0.0
            for down, first in weights.items():
                for right, second in weights.items():
                    there = pixels[min(max(row + down, 0), size - 1), min(max(column + right, 0), size - 1)]
                    out[row, column] += first * second * there
                    total += first * second
            out[row, column] /= total
    return out


@pytest.mark.parametrize("std", [0.4, 1.0, 2.0])
def test_blur_is_the_slow_one(std: float) -> None:
    pixels = picture(14)
    assert np.abs(blur(pixels, std) - slow_blur(pixels, std)).max() <= 0.5 + 1e-6


def test_contrast_is_the_slow_one() -> None:
    pixels, factor = picture(), 0.4  # severity 3
    mean = [sum(pixels[..., c].ravel().tolist()) / pixels[..., c].size for c in range(3)]
    expected = [
        [[round(mean[c] + factor * (pixel[c] - mean[c])) for c in range(3)] for pixel in row]
        for row in pixels.tolist()
    ]
    assert np.abs(corruption("contrast")(pixels, 0, 0).astype(int) - np.array(expected)).max() <= 1


def test_jpeg_is_pillows() -> None:
    pixels, file = picture(), io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=58)  # severity 3
    np.testing.assert_array_equal(corruption("jpeg")(pixels, 0, 0), np.asarray(Image.open(file)))


@pytest.mark.parametrize("severity", SEVERITIES)
def test_noise_has_the_stated_deviation_and_no_bias(severity: int) -> None:
    grey = np.full((64, 64, 3), 128, np.uint8)
    noise = corruption("gaussian_noise", severity)(grey, 7, 0).astype(float) - 128
    std = (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1] * 255
    assert noise.std() == pytest.approx(std, rel=0.03) and abs(noise.mean()) < 4 * std / 110
    channels = noise.reshape(-1, 3)
    assert abs(np.corrcoef(channels[:, 0], channels[:, 1])[0, 1]) < 0.08


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_higher_severity_is_further_from_the_image(name: str, table: str) -> None:
    pixels = picture(64)
    copies = [corruption(name, severity, table=table)(pixels, 0, 0) for severity in SEVERITIES]
    distances = [np.square(copy.astype(float) - pixels).mean() for copy in copies]
    # Two JPEG qualities that are close may change places on a picture of straight lines.
    slack = 0.99 if name == "jpeg" else 1.0
    assert distances[0] > 0 and distances[4] > 1.2 * distances[0]
    assert all(weaker * slack < stronger for weaker, stronger in pairwise(distances))
    assert all(copy.shape == pixels.shape and copy.dtype == np.uint8 for copy in copies)
    assert len(STRENGTHS[table][name]) == 5  # type: ignore[index]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_copy_is_a_function_of_the_image_whatever_else_happens(name: str) -> None:
    pixels, one = picture(), corruption(name)
    before = pixels.copy()
    alone = {i: one(pixels, i, 0) for i in range(6)}
    np.random.seed(1)  # a global generator has no part in it
    with ThreadPoolExecutor(4) as pool:
        again = dict(
            zip(reversed(range(6)), pool.map(lambda i: one(pixels, i, 3), reversed(range(6))), strict=True)
        )
    for i in range(6):
        np.testing.assert_array_equal(alone[i], again[i])
    np.testing.assert_array_equal(pixels, before)


def test_noise_is_drawn_anew_for_every_sample_seed_and_severity() -> None:
    grey = np.full((32, 32, 3), 128, np.uint8)

    def noise(sample_id: int = 0, severity: int = 3, **changes: Any) -> np.ndarray:
        copy = corruption("gaussian_noise", severity, **changes)(grey, sample_id, 0)
        return copy.astype(float).ravel() - 128

    first = noise()
    for other in (noise(sample_id=1), noise(seed=1), noise(severity=4)):
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.08
    # The other table scales the same noise.
    assert np.corrcoef(first, noise(table="imagenet_c"))[0, 1] > 0.95


def test_constants_follow_the_size_of_the_images() -> None:
    assert [default_table(size) for size in (32, 96, 128, 224)] == ["cifar10_c"] * 2 + ["imagenet_c"] * 2
    assert corruption("gaussian_blur", 5, table="imagenet_c").strength == 6.0
    assert corruption("contrast", 5).strength == 0.15 and corruption("contrast", 5).label == "contrast 5"

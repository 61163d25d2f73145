from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tokenizer.hog import FLAT_GRADIENT, ORIENTATIONS, Hog, cell_histograms


def picture(size: int = 24, seed: int = 0) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def slow_hog(image: np.ndarray, patch: int, cells: int) -> np.ndarray:
    """One image [3, S, S], pixel by pixel, in the words of the docstring."""
    size, cell = image.shape[1], patch // cells
    grid = size // patch
    votes = np.zeros((grid, grid, cells, cells, 3, ORIENTATIONS))
    for c in range(3):
        for y in range(size):
            for x in range(size):
                above, below = image[c, max(y - 1, 0), x], image[c, min(y + 1, size - 1), x]
                left, right = image[c, y, max(x - 1, 0)], image[c, y, min(x + 1, size - 1)]
                dx, dy = (right - left) / 2, (below - above) / 2
                degrees = math.degrees(math.atan2(dy, dx)) % 180.0
                where = degrees / (180.0 / ORIENTATIONS) - 0.5
                lower = math.floor(where)
                inside = votes[y // patch, x // patch, y % patch // cell, x % patch // cell, c]
                inside[lower % ORIENTATIONS] += math.hypot(dx, dy) * (1 - (where - lower))
                inside[(lower + 1) % ORIENTATIONS] += math.hypot(dx, dy) * (where - lower)
    histograms = votes / cell**2 + FLAT_GRADIENT / ORIENTATIONS
    histograms /= np.linalg.norm(histograms, axis=-1, keepdims=True)
    return histograms.reshape(grid * grid, -1)


@pytest.mark.parametrize(("patch", "cells", "dim"), [(8, 2, 108), (3, 1, 27)])
def test_equals_a_pixel_by_pixel_computation(patch: int, cells: int, dim: int):
    hog = Hog(patch)
    images = picture()
    found = hog(images)
    assert (hog.cells, hog.dim) == (cells, dim)
    assert found.shape == (2, (24 // patch) ** 2, dim) and found.dtype == torch.float32
    for image, descriptors in zip(images, found, strict=True):
        np.testing.assert_allclose(
            descriptors.numpy(), slow_hog(image.double().numpy(), patch, cells), atol=1e-5
        )


def test_flat_patches_give_the_constant_vector_not_zero():
    """1/3 in each of 9 bins has length 1; a cosine target must not be zero."""
    for level in (0.0, 0.5, 1.0):
        found = Hog(8)(torch.full((1, 3, 16, 16), level))
        torch.testing.assert_close(found, torch.full((1, 4, 108), 1.0 / 3.0))


def test_noise_below_a_grey_level_stays_near_flat_and_an_edge_does_not():
    flat = torch.full((108,), 1.0 / 3.0)
    noisy = 0.5 + 0.5 / 255 * torch.rand(1, 3, 8, 8)
    edge = torch.zeros(1, 3, 8, 8)
    edge[..., 4:] = 1.0
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(Hog(8)(noisy)[0, 0], flat, dim=0) > 0.98
    assert cosine(Hog(8)(edge)[0, 0], flat, dim=0) < 0.8


def test_every_histogram_has_unit_length_and_no_negative_value():
    found = Hog(8)(picture()).view(2, 9, 12, ORIENTATIONS)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(2, 9, 12))
    assert (found >= 0).all()


@pytest.mark.parametrize(("degrees", "bins"), [(10, [0]), (90, [4]), (150, [7]), (0, [0, 8]), (60, [2, 3])])
def test_a_ramp_falls_into_the_bin_of_its_direction(degrees: int, bins: list[int]):
    angle = math.radians(degrees)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    ramp = (0.5 + 0.02 * (math.cos(angle) * (x - 8) + math.sin(angle) * (y - 8))).expand(1, 3, 16, 16)
    histogram = cell_histograms(ramp, 4)[0, :, 0, 1, 1]  # an inner cell
    assert sorted(histogram.topk(len(bins)).indices.tolist()) == bins


def test_contrast_sign_and_brightness_do_not_matter():
    images = 0.5 * picture()
    torch.testing.assert_close(Hog(8)(1.0 - images), Hog(8)(images), atol=1e-5, rtol=0)
    torch.testing.assert_close(Hog(8)(images + 0.4), Hog(8)(images), atol=1e-4, rtol=0)


def test_a_mirrored_image_has_mirrored_patches_cells_and_angles():
    images = picture()
    here = Hog(8)(images).view(2, 3, 3, 2, 2, 3, ORIENTATIONS)
    mirrored = Hog(8)(images.flip(-1)).view(2, 3, 3, 2, 2, 3, ORIENTATIONS)
    torch.testing.assert_close(mirrored.flip(2, 4, 6), here, atol=1e-5, rtol=0)


def test_autocast_changes_nothing():
    images = picture()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(Hog(8)(images), Hog(8)(images.clone()))
        inside = Hog(8)(images)
    assert torch.equal(inside, Hog(8)(images))

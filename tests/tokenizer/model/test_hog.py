from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tokenizer.model.hog import COLOUR, FAINT_GRADIENT, FLATNESS, ORIENTATIONS, Hog


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
                degrees = math.degrees(math.atan2(dy, dx)) % 360.0
                where = degrees / (360.0 / ORIENTATIONS)
                lower = math.floor(where)
                inside = votes[y // patch, x // patch, y % patch // cell, x % patch // cell, c]
                inside[lower % ORIENTATIONS] += math.hypot(dx, dy) * (1 - (where - lower))
                inside[(lower + 1) % ORIENTATIONS] += math.hypot(dx, dy) * (where - lower)
    histograms = votes / cell**2
    descriptors = []
    for number, patch_histograms in enumerate(histograms.reshape(grid * grid, -1, ORIENTATIONS)):
        top, left = patch * (number // grid), patch * (number % grid)
        colour = COLOUR * (image[:, top : top + patch, left : left + patch].mean(axis=(1, 2)) - 0.5)
        length = math.sqrt((patch_histograms**2).sum())
        centred = patch_histograms - patch_histograms.mean(axis=1, keepdims=True)
        descriptors.append([*(centred / (length + FAINT_GRADIENT)).ravel(), *colour, FLATNESS])
    return np.array(descriptors)


@pytest.mark.parametrize(("patch", "cells", "dim"), [(16, 2, 100), (8, 1, 28), (3, 1, 28)])
def test_equals_a_pixel_by_pixel_computation(patch: int, cells: int, dim: int):
    hog = Hog(patch)
    images = picture(48)
    found = hog(images)
    assert (hog.cells, hog.dim) == (cells, dim)
    assert found.shape == (2, (48 // patch) ** 2, dim) and found.dtype == torch.float32
    for image, descriptors in zip(images, found, strict=True):
        np.testing.assert_allclose(
            descriptors.numpy(), slow_hog(image.double().numpy(), patch, cells), atol=1e-5
        )


def test_flat_patches_are_their_colour_and_never_zero():
    for level in (0.0, 0.5, 1.0):
        found = Hog(8)(torch.full((1, 3, 16, 16), level))
        assert torch.equal(found[..., -1], torch.full((1, 4), FLATNESS))
        torch.testing.assert_close(found[..., -4:-1], torch.full((1, 4, 3), COLOUR * (level - 0.5)))
        assert found[..., :-4].abs().max() < 1e-6


def test_noise_below_a_grey_level_stays_near_flat_and_an_edge_does_not():
    flat = torch.zeros(28)
    flat[-1] = 1.0
    noisy = 0.5 + 0.5 / 255 * torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    edge = torch.zeros(1, 3, 8, 8)
    edge[..., 4:] = 1.0
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(Hog(8)(noisy)[0, 0], flat, dim=0) > 0.95
    assert cosine(Hog(8)(edge)[0, 0], flat, dim=0) < 0.5


def test_brightness_moves_colour_only_and_inverting_turns_every_edge_around():
    images = 0.5 * picture()
    here, brighter, inverted = Hog(8)(images), Hog(8)(images + 0.4), Hog(8)(1.0 - images)
    torch.testing.assert_close(brighter[..., :-4], here[..., :-4], atol=1e-4, rtol=0)
    torch.testing.assert_close(brighter[..., -4:-1], here[..., -4:-1] + COLOUR * 0.4, atol=1e-5, rtol=0)
    turned = here[..., :-4].view(2, 9, 3, ORIENTATIONS).roll(ORIENTATIONS // 2, dims=-1).flatten(2)
    torch.testing.assert_close(inverted[..., :-4], turned, atol=1e-5, rtol=0)
    torch.testing.assert_close(inverted[..., -4:-1], -here[..., -4:-1], atol=1e-5, rtol=0)


def test_autocast_changes_nothing():
    images = picture()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(Hog(8)(images), Hog(8)(images.clone()))
        inside = Hog(8)(images)
    assert torch.equal(inside, Hog(8)(images))

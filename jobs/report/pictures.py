"""What codes and predictions look like (in the spirit of Figures 4 and 5), as arrays for the report.

Nothing here measures a model: a dozen codes and a handful of images are for people's eyes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from pretrain.evals.codebook import CHUNK, MIN_PATCHES, Likeness, choose_patches
from pretrain.masking import MaskConfig, block_masks
from pretrain.model.mim import MIM

# Shapes below: n images of S pixels a side, a square grid of N patches of P pixels a side, K codes.

HIDDEN = 128
"""Grey level of masked patches, and what faded colours tend to."""
CONTEXT = 1
"""Patches of surroundings shown on every side of a patch: one alone, often 8 pixels wide, says little."""
MIN_IMAGES = 6
"""A code from fewer images of the sample is not shown as a group."""


@dataclass(frozen=True, kw_only=True)
class CodeGroup:
    """Patches of one code. `tiles` are uint8 [3 P, 3 P, 3]: the patch with its surroundings."""

    code: int
    share: float
    """Of all patches of the sample, in [0, 1]."""
    consistency: float
    """As `pretrain.evals.codebook` defines it, 0 (unrelated) to 1 (alike)."""
    tiles: list[np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One image, what was hidden of it, its codes, and what each head guessed for the hidden ones."""

    image: np.ndarray
    """uint8 [S, S, 3]."""
    mask: np.ndarray
    """[N] bool, True = hidden."""
    codes: np.ndarray
    """[N] int64, the tokenizer's."""
    guess: np.ndarray
    """[N] int64, the main head's where hidden, elsewhere -1."""
    guess_cls: np.ndarray | None
    """The same of the [CLS] head; None without patch aggregation."""


# ------------------------------------------------------------------------------------------------ codes


def group_by_code(
    images: np.ndarray,
    codes: np.ndarray,
    *,
    patch_size: int,
    num_consistent: int,
    num_used: int,
    per_code: int,
) -> tuple[list[CodeGroup], list[CodeGroup]]:
    """The most consistent codes of a sample, and the most used of the others; at most as many as asked for.

    images uint8 [n, S, S, 3], codes [n, N]. The patches of a group come from as many images as possible.
    """
    likeness = Likeness(codes, int(codes.max()) + 1, patch_size)
    for first in range(0, len(images), CHUNK):
        likeness.add(first, images[first : first + CHUNK])
    ranked = likeness.ranked(min_patches=MIN_PATCHES, min_images=MIN_IMAGES)
    consistent, rest = ranked[:num_consistent], sorted(ranked[num_consistent:])
    used = sorted(rest, key=lambda code: -likeness.patches[code])[:num_used]
    consistency, grid = likeness.consistency(), (images.shape[1] // patch_size, images.shape[2] // patch_size)

    def group(code: int) -> CodeGroup:
        return CodeGroup(
            code=code,
            share=likeness.patches[code] / codes.size,
            consistency=float(consistency[code]),
            tiles=[
                surroundings(images[row], patch, grid)
                for row, patch in choose_patches(codes == code, per_code, seed=(0, code))
            ],
        )

    return [group(code) for code in consistent], [group(code) for code in used]


def code_colors(codebook: np.ndarray | None, codebook_size: int) -> np.ndarray:
    """A colour per code, uint8 [K, 3]: similar codes get similar colours where the codebook [K, D] is known.

    The first three principal directions become red, green and blue, by rank, so that all shades are used.
    Without a codebook the colours are random, and only equality means anything.
    """
    if codebook is None:
        axes = np.random.default_rng(0).permuted(np.tile(np.arange(codebook_size)[:, None], (1, 3)), axis=0)
    else:
        centered = codebook - codebook.mean(axis=0)
        _, _, directions = np.linalg.svd(centered, full_matrices=False)
        axes = (centered @ directions[:3].T).argsort(axis=0).argsort(axis=0)
        if axes.shape[1] < 3:
            axes = np.pad(axes, ((0, 0), (0, 3 - axes.shape[1])), mode="edge")
    return (35 + 215 * axes / max(1, codebook_size - 1)).astype(np.uint8)


# ------------------------------------------------------------------------------------------------ predictions


@torch.no_grad()
def predict(model: MIM, images: np.ndarray, codes: np.ndarray, *, seed: int = 0) -> list[Prediction]:
    """A model's guesses for images uint8 [n, S, S, 3] with codes [n, N], hidden in part, block-wise."""
    grid = model.config.grid
    mask = block_masks(np.arange(len(images)), grid, MaskConfig(), seed=seed, epoch=0)
    output = model(model.normalize(torch.from_numpy(images)), torch.from_numpy(mask))

    def spread(logits: torch.Tensor) -> np.ndarray:
        guesses = np.full(mask.shape, -1, np.int64)
        guesses[mask] = logits.argmax(dim=1).numpy()
        return guesses

    guess = spread(output.logits)
    guess_cls = None if output.logits_cls is None else spread(output.logits_cls)
    return [
        Prediction(
            image=images[i],
            mask=mask[i],
            codes=codes[i].astype(np.int64),
            guess=guess[i],
            guess_cls=None if guess_cls is None else guess_cls[i],
        )
        for i in range(len(images))
    ]


def accuracy(predictions: Sequence[Prediction], *, cls_head: bool = False) -> float | None:
    """Share of hidden patches whose code was guessed; None for the [CLS] head of a model without one."""
    right = total = 0
    for one in predictions:
        guess = one.guess_cls if cls_head else one.guess
        if guess is None:
            return None
        right += int((guess == one.codes)[one.mask].sum())
        total += int(one.mask.sum())
    return right / total


def masked_image(one: Prediction, size: int) -> np.ndarray:
    """The image as the model saw it, hidden patches grey, uint8 [size, size, 3]."""
    picture = enlarged(one.image, size).copy()
    picture[_per_pixel(one.mask, size)] = HIDDEN
    return picture


def code_map(codes: np.ndarray, colors: np.ndarray, size: int) -> np.ndarray:
    """Codes [N] of all patches in their colours, uint8 [size, size, 3]."""
    return colors[_per_pixel(codes, size)]


def guess_map(one: Prediction, colors: np.ndarray, size: int) -> np.ndarray:
    """Guessed codes in their colours where hidden; the visible patches' own codes, faded."""
    faded = (0.25 * colors + 0.75 * HIDDEN).astype(np.uint8)
    own, hidden = faded[_per_pixel(one.codes, size)], _per_pixel(one.mask, size)
    return np.where(hidden[..., None], colors[np.maximum(_per_pixel(one.guess, size), 0)], own)


def verdict_map(one: Prediction, size: int, *, right: Sequence[int], wrong: Sequence[int]) -> np.ndarray:
    """The image in grey, hidden patches tinted by whether the main head guessed their code."""
    picture = enlarged(one.image, size).mean(axis=2, keepdims=True).repeat(3, axis=2)
    hit = _per_pixel(one.guess == one.codes, size)[..., None]
    tint = np.where(hit, np.array(right), np.array(wrong))
    hidden = _per_pixel(one.mask, size)[..., None]
    return np.where(hidden, 0.3 * picture + 0.7 * tint, 0.5 * picture + 0.5 * HIDDEN).astype(np.uint8)


def enlarged(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [S, S, 3] -> [size, size, 3]."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def surroundings(pixels: np.ndarray, patch: int, grid: tuple[int, int]) -> np.ndarray:
    """A patch in the middle of the 3 x 3 patches around it, uint8 [3 P, 3 P', 3]; edges are repeated."""
    height, width = pixels.shape[0] // grid[0], pixels.shape[1] // grid[1]
    row, column = divmod(patch, grid[1])
    padded = np.pad(pixels, ((height, height), (width, width), (0, 0)), mode="edge")
    return padded[row * height : (row + 3) * height, column * width : (column + 3) * width]


def _per_pixel(values: np.ndarray, size: int) -> np.ndarray:
    """One value per patch [N] -> one per pixel [size, size]."""
    side = round(len(values) ** 0.5)
    index = np.arange(size) * side // size
    return values.reshape(side, side)[index][:, index]

"""What codes and predictions look like (in the spirit of Figures 4 and 5), as arrays for the report.

Nothing here measures a model: a dozen codes and a handful of images are for people's eyes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from pretrain.masking import MaskConfig, block_masks
from pretrain.mim import MIM
from tokenizer.hog import Hog

# Shapes below: n images of S pixels a side, a square grid of N patches of P pixels a side, K codes.

HIDDEN = 128
"""Grey level of masked patches, and what faded colours tend to."""
CONTEXT = 1
"""Patches of surroundings shown on every side of a patch: one alone, often 8 pixels wide, says little."""
MIN_PATCHES, MIN_IMAGES = 12, 6
"""A code with fewer patches in the sample, or from fewer images, is not shown as a group."""


@dataclass(frozen=True, kw_only=True)
class CodeGroup:
    """Patches of one code. `tiles` are uint8 [3 P, 3 P, 3]: the patch with its surroundings."""

    code: int
    share: float
    """Of all patches of the sample, in [0, 1]."""
    consistency: float
    """Mean cosine between HOG descriptors of two of its patches, 0 (unrelated) to 1 (alike)."""
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
    Only codes with more contrast than the median code compete for consistency: flat patches are all alike.
    """
    counts = np.bincount(codes.ravel())
    descriptors, contrasts = _descriptors(images, patch_size), _contrasts(images, patch_size)
    candidates: list[tuple[int, float]] = []
    contrast: dict[int, float] = {}
    for code in np.argsort(-counts, kind="stable"):
        if counts[code] < MIN_PATCHES:
            break
        rows, patches = np.nonzero(codes == code)
        if len(np.unique(rows)) < MIN_IMAGES:
            continue
        candidates.append((int(code), _mean_cosine(descriptors[rows, patches])))
        contrast[int(code)] = float(contrasts[rows, patches].mean())

    median = float(np.median(list(contrast.values()))) if contrast else 0.0
    structured = [pair for pair in candidates if contrast[pair[0]] >= median]
    consistent = sorted(structured, key=lambda pair: -pair[1])[:num_consistent]
    chosen = {code for code, _ in consistent}
    used = [pair for pair in candidates if pair[0] not in chosen][:num_used]

    def group(code: int, consistency: float) -> CodeGroup:
        return CodeGroup(
            code=code,
            share=counts[code] / codes.size,
            consistency=consistency,
            tiles=_tiles(images, codes == code, patch_size, per_code),
        )

    return [group(*pair) for pair in consistent], [group(*pair) for pair in used]


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


def _descriptors(images: np.ndarray, patch_size: int) -> np.ndarray:
    """Unit HOG descriptors [n, N, T] of all patches, whatever the tokenizer's teacher was."""
    hog = Hog(patch_size)
    with torch.no_grad():
        chunks = [
            hog(torch.from_numpy(chunk).permute(0, 3, 1, 2).float() / 255)
            for chunk in np.array_split(images, max(1, len(images) // 64))
        ]
    found = torch.nn.functional.normalize(torch.cat(chunks), dim=-1)
    return found.numpy()


def _contrasts(images: np.ndarray, patch_size: int) -> np.ndarray:
    """Standard deviation of the brightness within each patch [n, N]."""
    n, size = images.shape[:2]
    side = size // patch_size
    cells = images.mean(axis=3).reshape(n, side, patch_size, side, patch_size)
    return cells.std(axis=(2, 4)).reshape(n, side * side)


def _mean_cosine(descriptors: np.ndarray) -> float:
    """Mean cosine over all pairs of rows of unit vectors [m, T], m > 1, without forming the pairs."""
    m = len(descriptors)
    return float((np.square(descriptors.sum(axis=0)).sum() - m) / (m * (m - 1)))


def _tiles(images: np.ndarray, where: np.ndarray, patch_size: int, count: int) -> list[np.ndarray]:
    """Up to `count` patches of `where` [n, N] with their surroundings, taking a second from an image last."""
    side = images.shape[1] // patch_size
    rows, patches = np.nonzero(where)
    seen: dict[int, int] = {}
    turn = np.empty(len(rows), np.int64)
    for i, row in enumerate(rows.tolist()):
        turn[i] = seen[row] = seen.get(row, 0) + 1
    reach = CONTEXT * patch_size
    tiles = []
    for i in np.argsort(turn, kind="stable")[:count]:
        top, left = (patches[i] // side) * patch_size, (patches[i] % side) * patch_size
        padded = np.pad(images[rows[i]], ((reach, reach), (reach, reach), (0, 0)), mode="edge")
        tiles.append(padded[top : top + patch_size + 2 * reach, left : left + patch_size + 2 * reach])
    return tiles


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


def _per_pixel(values: np.ndarray, size: int) -> np.ndarray:
    """One value per patch [N] -> one per pixel [size, size]."""
    side = round(len(values) ** 0.5)
    index = np.arange(size) * side // size
    return values.reshape(side, side)[index][:, index]

"""Pictures of codes and predictions for people's eyes (in the spirit of Figures 4 and 5)."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw

from pretrain.evals.codebook import Example
from pretrain.masking import MaskConfig, draw_block_masks
from pretrain.model.mim import MIM

# Shapes below: n images of S pixels a side, a square grid of N patches of P pixels a side, K codes.

WIDTH, MARGIN, LABEL = 1600, 32, 200
"""Pixels of a sheet's width, of its margins, and of the words to the left of its tiles."""
PAPER, INK, MUTED, BLUE = (252, 252, 251), (28, 27, 26), (107, 105, 99), (42, 111, 201)
RED = (255, 45, 45)
"""Colour of the box around a patch."""
BORDER = 3
"""Paper around a crop, in pixels, so that a box at its edge is whole: two pixels of red, one of paper."""
LESS, EVEN, MORE = np.array((33, 102, 172)), np.array((244, 244, 242)), np.array((178, 24, 43))
"""Colours of places with a quarter of an even spread, an even spread, and four times that."""
HIDDEN = 128
"""Grey level of masked patches, and what faded colours tend to."""
RIGHT, WRONG = (31, 157, 85), (211, 63, 63)
"""Tints of hidden patches whose code was guessed, and of those whose code was not."""


# ------------------------------------------------------------------------------------------------ sheets


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A small picture with what it shows, in words; `sharp` keeps its pixels exact."""

    picture: Image.Image
    alt: str
    caption: str = ""
    sharp: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    """A title with a few lines of words, and tiles beside it."""

    title: str
    words: Sequence[str]
    tiles: Sequence[Tile]


def sheet(title: str, lead: str, rows: Sequence[Row]) -> Image.Image:
    """A titled sheet of `WIDTH` pixels with one row below the other; tiles wrap."""
    strips = [_strip(row) for row in rows]
    picture = Image.new("RGB", (WIDTH, 104 + sum(strip.height for strip in strips) + MARGIN), PAPER)
    draw, top = ImageDraw.Draw(picture), 104
    draw.text((MARGIN, 24), title, INK, font_size=26)
    draw.text((MARGIN, 60), lead, MUTED, font_size=15)
    draw.line((MARGIN, 90, WIDTH - MARGIN, 90), INK, 2)
    for strip in strips:
        picture.paste(strip, (MARGIN, top))
        top += strip.height
    return picture


def _strip(row: Row) -> Image.Image:
    width, step = WIDTH - 2 * MARGIN, max(tile.picture.width for tile in row.tiles) + 3
    pitch, per_line = max(tile.picture.height for tile in row.tiles) + 22, (width - LABEL) // step
    height = max(-(-len(row.tiles) // per_line) * pitch, 40 + 17 * len(row.words))
    strip = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(strip)
    draw.text((0, 2), row.title, INK, font_size=18)
    draw.text((0, 28), "\n".join(row.words), MUTED, font_size=13)
    for number, tile in enumerate(row.tiles):
        left, top = LABEL + number % per_line * step, number // per_line * pitch
        strip.paste(tile.picture, (left, top))
        draw.text((left, top + tile.picture.height + 3), tile.caption, MUTED, font_size=12)
    return strip


def png(picture: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def fitted(pixels: np.ndarray, side: int) -> Image.Image:
    """At most `side` pixels a side: what is small grows by a whole factor, with hard edges; others shrink."""
    factor = side // len(pixels)
    size = factor * len(pixels) if factor else side
    how = Image.Resampling.NEAREST if factor else Image.Resampling.LANCZOS
    return Image.fromarray(np.ascontiguousarray(pixels)).resize((size, size), how)


# ------------------------------------------------------------------------------------------------ codes


def patch_tile(example: Example, grid: tuple[int, int], side: int) -> Tile:
    """The crop, up to `side` pixels, with a red box around the patch; below, that patch from near by."""
    crop, (row, column) = fitted(example.pixels, side), divmod(example.patch, grid[1])
    across, down = ([BORDER + n * crop.width // size for n in range(size + 1)] for size in grid[::-1])
    box = (across[column], down[row], across[column + 1], down[row + 1])
    zoom = fitted(surroundings(example.pixels, example.patch, grid), side // 2)
    third = zoom.width // 3
    _frame(zoom, (third, third, 2 * third, 2 * third), RED)
    tile = Image.new("RGB", (crop.width + 2 * BORDER, crop.height + 2 * BORDER + 2 + zoom.height), PAPER)
    tile.paste(crop, (BORDER, BORDER))
    _frame(tile, box, PAPER, BORDER)
    _frame(tile, box, RED)
    tile.paste(zoom, ((tile.width - zoom.width) // 2, tile.height - zoom.height))
    # Enlarged pixels stay exact; photographs cost a fifth as JPEG.
    sharp = example.pixels.shape[0] <= side // 2
    return Tile(picture=tile, alt=f"{example.key}, patch {example.patch}", sharp=sharp)


def _frame(picture: Image.Image, box: tuple[int, ...], color: tuple[int, ...], width: int = 2) -> None:
    """Draw a frame around the pixels of `box` (left, top, right, bottom), of which it hides none."""
    left, top, right, bottom = box
    frame = (left - width, top - width, right + width - 1, bottom + width - 1)
    ImageDraw.Draw(picture).rectangle(frame, outline=color, width=width)


def surroundings(pixels: np.ndarray, patch: int, grid: tuple[int, int]) -> np.ndarray:
    """A patch in the middle of the 3 x 3 patches around it, uint8 [3 P, 3 P, 3]; edges are repeated."""
    height, width = pixels.shape[0] // grid[0], pixels.shape[1] // grid[1]
    row, column = divmod(patch, grid[1])
    padded = np.pad(pixels, ((height, height), (width, width), (0, 0)), mode="edge")
    return padded[row * height : (row + 3) * height, column * width : (column + 3) * width]


def spread_colors(spread: np.ndarray) -> np.ndarray:
    """Colours uint8 [..., 3] of how often a code occurs over an even spread: blue is rarer, red more."""
    values = np.clip(np.log2(spread) / 2, -1, 1)[..., None]
    colors = np.where(values < 0, EVEN + values * (EVEN - LESS), EVEN + values * (MORE - EVEN))
    return colors.round().astype(np.uint8)


def usage_chart(counts: np.ndarray) -> Image.Image:
    """Share of patches by rank of use, on a logarithmic scale, with that of even use; counts int64 [K]."""
    shares, even = np.sort(counts[counts > 0])[::-1] / counts.sum(), 1 / len(counts)
    low = math.floor(math.log10(min(shares[-1], even)))
    high = max(low + 1, math.ceil(math.log10(max(shares[0], even))))
    left, right, top, foot = 90, 1180, 12, 380
    picture = Image.new("RGB", (right + 20, foot + 50), PAPER)
    draw = ImageDraw.Draw(picture)

    def level(share: float) -> float:
        return foot - (math.log10(share) - low) / (high - low) * (foot - top)

    for power in range(low, high + 1):
        y = level(10.0**power)
        draw.line((left, y, right, y), MUTED)
        draw.text((left - 10, y), f"{100 * 10.0**power:g} %", MUTED, font_size=18, anchor="rm")
    width = (right - left) / len(counts)
    for rank, share in enumerate(shares.tolist()):
        draw.rectangle((left + rank * width, level(share), left + (rank + 1) * width, foot), BLUE)
    draw.line((left, level(even), right, level(even)), INK)
    draw.text((right, level(even) - 4), "even use", INK, font_size=18, anchor="rs")
    draw.text((right, foot + 30), "codes, most used first", MUTED, font_size=18, anchor="rs")
    return picture


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
        axes = np.pad(axes, ((0, 0), (0, 3 - axes.shape[1])), mode="edge")
    return (35 + 215 * axes / max(1, codebook_size - 1)).astype(np.uint8)


# ------------------------------------------------------------------------------------------------ predictions


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Images, what was hidden of them, their codes, and what each head guessed for the hidden ones."""

    images: np.ndarray
    """uint8 [n, S, S, 3]."""
    mask: np.ndarray
    """[n, N] bool, True = hidden."""
    codes: np.ndarray
    """[n, N] int64, the tokenizer's."""
    guess: np.ndarray
    """[n, N] int64, the main head's where hidden, elsewhere -1."""
    guess_cls: np.ndarray | None
    """The same of the [CLS] head; None without patch aggregation."""

    def accuracy(self, guess: np.ndarray) -> float:
        """Share of hidden patches whose code was guessed."""
        return float((guess == self.codes)[self.mask].mean())


@torch.no_grad()
def predict(model: MIM, images: np.ndarray, codes: np.ndarray, *, seed: int = 0) -> Predictions:
    """A model's guesses for images uint8 [n, S, S, 3] with codes [n, N], hidden in part, block-wise."""
    spec = MaskConfig().resolve(model.config.grid)
    mask = draw_block_masks(np.arange(len(images)), spec, seed=seed, epoch=0).mask
    output = model(model.normalize(torch.from_numpy(images)), torch.from_numpy(mask))

    def spread(logits: torch.Tensor) -> np.ndarray:
        guesses = np.full(mask.shape, -1, np.int64)
        guesses[mask] = logits.argmax(dim=1).numpy()
        return guesses

    guess_cls = None if output.logits_cls is None else spread(output.logits_cls)
    return Predictions(
        images=images,
        mask=mask,
        codes=codes.astype(np.int64),
        guess=spread(output.logits),
        guess_cls=guess_cls,
    )


def code_map(codes: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Codes [N] of all patches in their colours, one pixel each: uint8 [side, side, 3]."""
    return colors[_square(codes)]


def guess_map(mask: np.ndarray, codes: np.ndarray, guess: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Guessed codes in their colours where hidden; the visible patches' own codes, faded."""
    faded = (0.25 * colors + 0.75 * HIDDEN).astype(np.uint8)
    return np.where(_square(mask)[..., None], code_map(guess, colors), code_map(codes, faded))


def masked_image(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image uint8 [S, S, 3] as the model saw it, hidden patches grey."""
    return np.where(_per_pixel(mask, len(image)), np.uint8(HIDDEN), image)


def verdict_map(image: np.ndarray, mask: np.ndarray, hits: np.ndarray) -> np.ndarray:
    """The image uint8 [S, S, 3] in grey, hidden patches tinted by whether their code was guessed (`hits`)."""
    grey, size = image.mean(axis=2, keepdims=True), len(image)
    tinted = 0.3 * grey + 0.7 * np.where(_per_pixel(hits, size), RIGHT, WRONG)
    return np.where(_per_pixel(mask, size), tinted, 0.5 * grey + 0.5 * HIDDEN).astype(np.uint8)


def _square(values: np.ndarray) -> np.ndarray:
    """One value per patch [N] -> [side, side]."""
    return values.reshape(math.isqrt(len(values)), -1)


def _per_pixel(values: np.ndarray, size: int) -> np.ndarray:
    """One value per patch [N] -> one per pixel [size, size, 1]."""
    return np.kron(_square(values), np.ones((size // math.isqrt(len(values)),) * 2, bool))[..., None]

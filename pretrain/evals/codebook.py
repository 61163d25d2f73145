"""What the codes of a token dataset stand for (paper §3.4, Figures 4 and 5): their looks, and their places.

**Consistency** of a code is the mean cosine between two of its patches from two different images, over all
pairs of images, each weighing the same however many such patches it has. Compared are gradient histograms
(`tokenizer.model.hog`, without its colour, which would make dark patches the most alike), whatever the
tokenizer's teacher was: a code is consistent where its patches look alike, and a code with one meaning in
many looks is not recognised this way. Codes in too few patches or images have none worth naming. Flat patches
are all alike, so codes of less contrast than the median code come after all others.

**Position** is measured as mutual information of code and place on the grid, over every stored patch. It is
never 0 in a finite dataset, so it is compared with that of the same grids, each shifted around its edges by
random distances: the same codes beside the same neighbours, without preferred places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from pipeline.threads import in_order
from pipeline.training.metrics import Progress
from shards.dataset.codes import (
    CodeCounts,
    CodeStatistics,
    CropSample,
    code_statistics,
    count_places_and_classes,
)
from shards.dataset.dataset import Dataset
from shards.pixels.views import decode_crop
from tokenizer.model.hog import Hog

# Shapes below: n images of S pixels a side, a square grid of N patches of P pixels a side, K codes, T values
# of a descriptor.

MIN_PATCHES = 12
"""A code with fewer patches in the sample is not called consistent, whatever they look like."""
CHUNK = 64
"""Crops compared at a time: 10 MB of pixels and 5 MB of descriptors, at 224 pixels."""
READ_THREADS = 16
"""Crops that are read at the same time, which hides an object store's latency."""
TOP_CLASSES = NEIGHBOURS = 3
PRIOR = 4
"""Patches added at each place before comparing with an even spread: a rare code's map is mostly chance."""
PLACED_CODES = 12
"""Number of the codes kept that say most about their place."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One patch of a code, in its image."""

    key: str
    """Key of the crop."""
    patch: int
    """Place on the grid, row by row."""
    pixels: np.ndarray
    """The crop, uint8 [S, S, 3]."""


@dataclass(frozen=True, kw_only=True)
class PlacedCode:
    """Where on the grid a code occurs."""

    code: int
    spread: np.ndarray
    """[rows, columns]: patches at each place over those of an even spread; `PRIOR` is added to both."""
    bits: float
    """Kullback-Leibler divergence of its places from all places."""
    bits_shifted: float
    """The same after shifting each grid: what chance gives."""


@dataclass(frozen=True, kw_only=True)
class ClassShare:
    """How much of a code's labelled patches lies in images of one class."""

    label: int
    share: float
    lift: float
    """Ratio of `share` to the share of this class among all labelled patches."""


@dataclass(frozen=True, kw_only=True)
class ShownCode:
    """One code with patches that carry it."""

    code: int
    consistency: float
    images: int
    """Crops of the sample that carry it."""
    share: float
    """Share of the patches that were counted."""
    examples: tuple[Example, ...]
    place: PlacedCode | None = None
    """None where places were not counted."""
    classes: tuple[ClassShare, ...] = ()
    """The most frequent ones; empty where nothing has a label."""
    neighbours: tuple[tuple[int, float], ...] = ()
    """The nearest other codes in the codebook, with their cosines; empty where it is not known."""


@dataclass(frozen=True, kw_only=True)
class ExaminedCodebook:
    """All that is shown of a codebook."""

    statistics: CodeStatistics
    counts: np.ndarray
    """Patches of each code, int64 [K]."""
    searched: int
    """Crops of the sample."""
    eligible: int
    """Codes in patches and images enough to be called consistent."""
    likeness_of_any: float
    """The mean cosine between two patches of different images, whatever their codes."""
    codes: tuple[ShownCode, ...]
    """The most consistent first."""
    position: PositionStatistics


# ------------------------------------------------------------------------------------------------ consistency


def patch_descriptors(images: np.ndarray, patch_size: int) -> np.ndarray:
    """Unit gradient histograms float32 [n, N, T] of all patches of uint8 [n, S, S, 3]."""
    with torch.no_grad():
        descriptors = Hog(patch_size)(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
        descriptors[..., -4:-1] = 0  # red, green, blue
        return torch.nn.functional.normalize(descriptors, dim=-1).numpy()


class Likeness:
    """How alike the patches of each code are, from sums over images: K x T numbers, however many images.

    `codes` [n, N] are those of all images; their pixels are added a few images at a time, each once.
    """

    def __init__(self, codes: np.ndarray, codebook_size: int, patch_size: int) -> None:
        self.codes = codes.astype(np.int64)
        self.codebook_size = codebook_size
        self.patch_size = patch_size
        self.patches_per_code = np.bincount(self.codes.ravel(), minlength=codebook_size)
        """int64 [K]."""
        ordered = np.sort(self.codes, axis=1)
        first = np.diff(ordered, axis=1, prepend=-1) != 0
        self.images_per_code = np.bincount(ordered[first], minlength=codebook_size)
        """int64 [K]."""
        self._contrasts = np.zeros(codebook_size)
        # Over rows of mean descriptors: of each code, and at last of all patches of an image.
        self._rows, self._squares = np.zeros((2, codebook_size + 1))
        self._sums = np.zeros((codebook_size + 1, Hog(patch_size).dim))

    def add(self, first: int, images: np.ndarray) -> None:
        """The pixels uint8 [m, S, S, 3] of images first, first + 1, …"""
        codes = self.codes[first : first + len(images)]
        n, side = len(images), images.shape[1] // self.patch_size
        brightness = images.mean(axis=3).reshape(n, side, self.patch_size, side, self.patch_size)
        contrasts = brightness.std(axis=(2, 4)).reshape(n, -1)
        self._contrasts += np.bincount(codes.ravel(), contrasts.ravel(), self.codebook_size)
        descriptors = patch_descriptors(images, self.patch_size)
        # The mean descriptor of each pair (image, code) that occurs, one row for each.
        pairs = (np.arange(n)[:, None] * self.codebook_size + codes).ravel()
        order = np.argsort(pairs, kind="stable")
        occurring, starts, counts = np.unique(pairs[order], return_index=True, return_counts=True)
        sums = np.add.reduceat(descriptors.reshape(len(pairs), -1)[order], starts, axis=0)
        rows = np.concatenate([sums / counts[:, None], descriptors.mean(axis=1)])
        groups = np.append(occurring % self.codebook_size, np.full(n, self.codebook_size))
        self._rows += np.bincount(groups, minlength=len(self._rows))
        self._squares += np.bincount(groups, np.square(rows).sum(axis=1), len(self._rows))
        np.add.at(self._sums, groups, rows)

    def add_all(self, sample: CropSample) -> None:
        """Read and add the pixels of every crop of the sample."""
        progress = Progress("comparing patches", len(sample.places), "crops")
        for first in range(0, len(sample.places), CHUNK):
            places = sample.places[first : first + CHUNK]
            crops = in_order(lambda place: decode_crop(place.read()), places, READ_THREADS)
            self.add(first, np.stack(list(crops)))
            progress.update(len(places))
        progress.close()

    def consistency(self) -> np.ndarray:
        """Mean cosine between patches of two different images by code, float64 [K]; NaN below two images."""
        return self._pair_means()[:-1]

    def of_any(self) -> float:
        """The same for patches of any two codes."""
        return float(self._pair_means()[-1])

    def _pair_means(self) -> np.ndarray:
        """Mean dot product of two rows of each group: |sum|² - sum of squares is twice the sum over pairs."""
        pairs = np.where(self._rows > 1, self._rows * (self._rows - 1), np.nan)
        return (np.square(self._sums).sum(axis=1) - self._squares) / pairs

    def eligible(self, min_images: int, min_patches: int = MIN_PATCHES) -> np.ndarray:
        """The codes with so many patches in so many images, ascending; pixels play no part."""
        in_pairs = self.images_per_code >= max(2, min_images)
        return np.flatnonzero(in_pairs & (self.patches_per_code >= min_patches))

    def ranked(self, min_images: int, min_patches: int = MIN_PATCHES) -> list[int]:
        """The eligible codes, the most consistent first; those of less than median contrast come last."""
        codes = self.eligible(min_images, min_patches)
        if len(codes) == 0:
            return []
        contrast = self._contrasts[codes] / self.patches_per_code[codes]
        flat = contrast < np.median(contrast)
        return codes[np.lexsort((codes, -self.consistency()[codes], flat))].tolist()


def choose_patches(where: np.ndarray, count: int, *, seed: Sequence[int]) -> list[tuple[int, int]]:
    """Up to `count` places (image, patch) of `where` [n, N] bool, drawn by seed.

    No image gives a second one before each that can has given its first.
    """
    images, patches = np.nonzero(where)
    mixed = np.random.default_rng(seed).permutation(len(images))
    images, patches = images[mixed], patches[mixed]
    by_image = np.argsort(images, kind="stable")
    _, starts, counts = np.unique(images[by_image], return_index=True, return_counts=True)
    turn = np.empty(len(images), np.int64)
    turn[by_image] = np.arange(len(images)) - np.repeat(starts, counts)
    chosen = np.argsort(turn, kind="stable")[:count]
    return list(zip(images[chosen].tolist(), patches[chosen].tolist(), strict=True))


# ------------------------------------------------------------------------------------------------ position


def position_bits(table: np.ndarray) -> np.ndarray:
    """Divergence of each code's places from those of all patches, in bits, [K]; 0 for a dead code.

    `table` holds counts [K, N]. Its mean over patches is the mutual information of code and place.
    """
    places = table.sum(axis=0) / max(1, table.sum())
    within = table / np.maximum(1, table.sum(axis=1, keepdims=True))
    ratio = np.divide(within, places, out=np.ones_like(within), where=within > 0)
    return (within * np.log2(ratio)).sum(axis=1)


class PositionStatistics:
    """How much a patch's place says of its code, in bits, over all stored patches.

    `bits` is the mutual information of code and place, as counted; `bits_shifted` the same after shifting
    each grid, which is what chance gives; `most` are the codes with the largest parts in their difference.
    """

    def __init__(self, counts: CodeCounts, grid: tuple[int, int]) -> None:
        self._counts, self._grid = counts.by_place, grid
        self._bits = position_bits(counts.by_place)
        self._shifted = np.mean([position_bits(table) for table in counts.shifted], axis=0)
        share = counts.by_code / max(1, counts.by_code.sum())
        used, parts = share[share > 0], share * (self._bits - self._shifted)
        self.bits, self.bits_shifted = float(share @ self._bits), float(share @ self._shifted)
        self.code_entropy = float(-(used * np.log2(used)).sum())
        order = np.argsort(-parts, kind="stable")[:PLACED_CODES].tolist()
        self.most = tuple(self.of(code) for code in order if parts[code] > 0)

    def of(self, code: int) -> PlacedCode:
        """Where one code occurs."""
        patches = self._counts[code]
        return PlacedCode(
            code=code,
            spread=((patches + PRIOR) / (patches.mean() + PRIOR)).reshape(self._grid),
            bits=float(self._bits[code]),
            bits_shifted=float(self._shifted[code]),
        )


# ------------------------------------------------------------------------------------------------ the whole


def show_codes(
    sample: CropSample, likeness: Likeness, codes: Sequence[int], *, patches_per_code: int, seed: int
) -> list[ShownCode]:
    """Codes with patches that carry them, drawn by seed, and their share of the sample's patches."""
    consistency, places = likeness.consistency(), sample.places
    return [
        ShownCode(
            code=code,
            consistency=float(consistency[code]),
            images=int(likeness.images_per_code[code]),
            share=float(likeness.patches_per_code[code] / sample.codes.size),
            examples=tuple(
                Example(key=places[image].key, patch=patch, pixels=decode_crop(places[image].read()))
                for image, patch in choose_patches(sample.codes == code, patches_per_code, seed=(seed, code))
            ),
        )
        for code in codes
    ]


def examine_codebook(
    dataset: Dataset,
    sample: CropSample,
    likeness: Likeness,
    *,
    codebook: np.ndarray | None,
    num_codes: int,
    patches_per_code: int,
    min_images: int,
    seed: int,
) -> ExaminedCodebook:
    """Read the pixels of the sample and the codes of every stored crop, and say what the codes stand for.

    `codebook`, unit vectors [K, D], gives each code its neighbours. A pure function of its arguments.
    """
    likeness.add_all(sample)
    ranked = likeness.ranked(min_images)
    chosen, grid = ranked[:num_codes], dataset.manifest.grid
    counts = count_places_and_classes(dataset, chosen, seed=seed)
    by_code, position = counts.by_code, PositionStatistics(counts, grid)
    shown = show_codes(sample, likeness, chosen, patches_per_code=patches_per_code, seed=seed)
    complete = [
        replace(
            code,
            share=float(by_code[code.code] / by_code.sum()),
            place=position.of(code.code),
            classes=_classes(counts, slot),
            neighbours=() if codebook is None else _neighbours(codebook, code.code),
        )
        for slot, code in enumerate(shown)
    ]
    return ExaminedCodebook(
        statistics=code_statistics(by_code),
        counts=by_code,
        searched=len(sample.codes),
        eligible=len(ranked),
        likeness_of_any=likeness.of_any(),
        codes=tuple(complete),
        position=position,
    )


def _classes(counts: CodeCounts, slot: int) -> tuple[ClassShare, ...]:
    patches = counts.by_class[slot]
    if patches.sum() == 0:
        return ()
    shares, all_shares = patches / patches.sum(), counts.class_patches / counts.class_patches.sum()
    top = np.argsort(-patches, kind="stable")[:TOP_CLASSES].tolist()
    return tuple(
        ClassShare(label=label, share=float(shares[label]), lift=float(shares[label] / all_shares[label]))
        for label in top
        if patches[label] > 0
    )


def _neighbours(codebook: np.ndarray, code: int) -> tuple[tuple[int, float], ...]:
    cosines = codebook @ codebook[code]
    nearest = [other for other in np.argsort(-cosines, kind="stable").tolist() if other != code]
    return tuple((other, float(cosines[other])) for other in nearest[:NEIGHBOURS])

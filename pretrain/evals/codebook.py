"""What the codes of a token dataset stand for (paper §3.4, Figures 4 and 5): their looks, and their places.

**Consistency** of a code is the mean cosine between two of its patches from two different images, over all
pairs of images, each weighing the same however many such patches it has. Compared are gradient histograms
(`tokenizer.model.hog`, without its colour, which would make dark patches the most alike), whatever the
tokenizer's teacher was: a code is consistent where its patches look alike, and a code with one meaning in
many looks is not found this way. Codes in too few patches or images have none worth naming. Flat
patches are all alike, so codes of less contrast than the median code come after all others.

**Position** is measured as mutual information of code and place on the grid, over every stored patch. It is
never 0 in a finite dataset, so it is compared with that of the same grids, each shifted around its edges by
random distances: the same codes beside the same neighbours, without preferred places.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.errors import InputError
from pipeline.training.metrics import Progress
from shards.dataset.codes import CodeCounts, count_places_and_classes
from shards.dataset.crop_sample import CropSample
from shards.dataset.dataset import Dataset
from shards.dataset.summary import CodeStatistics, code_statistics, codebook_size
from tokenizer.model.hog import Hog

# Shapes below: n images of S pixels a side, a square grid of N patches of P pixels a side, K codes, T values
# of a descriptor.

MIN_PATCHES = 12
"""A code with fewer patches in the sample is not called consistent, whatever they look like."""
CHUNK = 64
"""Crops in memory at a time: 10 MB of pixels and 5 MB of descriptors, at 224 pixels."""
READ_AT_ONCE = 16
"""Crops that are read at the same time, which hides an object store's latency."""
TOP_CLASSES = 3
NEIGHBOURS = 3
PRIOR = 4
"""Patches added at each place before comparing with an even spread: a rare code's map is mostly chance."""
PLACED_CODES = 12
"""So many of the codes that say most about their place are kept."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One patch of a code, in its image."""

    key: str
    """Of the crop."""
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
    """Over the share of this class among all labelled patches."""


@dataclass(frozen=True, kw_only=True)
class ShownCode:
    """One code with patches that carry it."""

    code: int
    consistency: float
    images: int
    """Crops of the sample that carry it."""
    share: float
    """Of all stored patches."""
    examples: tuple[Example, ...]
    place: PlacedCode
    classes: tuple[ClassShare, ...]
    """The most frequent ones; empty where nothing has a label."""
    neighbours: tuple[tuple[int, float], ...]
    """The nearest other codes in the codebook, with their cosines; empty where it is not known."""


@dataclass(frozen=True, kw_only=True)
class PositionStatistics:
    """How much a patch's place says of its code, in bits."""

    bits: float
    """Mutual information of code and place, as counted."""
    bits_shifted: float
    """The same after shifting each grid: what chance gives."""
    code_entropy: float
    most: tuple[PlacedCode, ...]
    """The codes with the largest parts in `bits` - `bits_shifted`."""


@dataclass(frozen=True, kw_only=True)
class CodebookFindings:
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
        found = Hog(patch_size)(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
        found[..., -4:-1] = 0  # red, green, blue
        return torch.nn.functional.normalize(found, dim=-1).numpy()


def patch_contrasts(images: np.ndarray, patch_size: int) -> np.ndarray:
    """Standard deviation of the brightness within each patch [n, N]."""
    n, size = images.shape[:2]
    side = size // patch_size
    cells = images.mean(axis=3).reshape(n, side, patch_size, side, patch_size)
    return cells.std(axis=(2, 4)).reshape(n, side * side)


class Likeness:
    """How alike the patches of each code are, from sums over images: K x T numbers, however many images.

    `codes` [n, N] are those of all images; their pixels are added a few images at a time, each once.
    """

    def __init__(self, codes: np.ndarray, codebook_size: int, patch_size: int) -> None:
        self.codes = codes.astype(np.int64)
        self.codebook_size = codebook_size
        self.patch_size = patch_size
        self.patches = np.bincount(self.codes.ravel(), minlength=codebook_size)
        """Of each code, int64 [K]."""
        ordered = np.sort(self.codes, axis=1)
        first = np.diff(ordered, axis=1, prepend=-1) != 0
        self.images = np.bincount(ordered[first], minlength=codebook_size)
        """That carry each code, int64 [K]."""
        self._contrasts = np.zeros(codebook_size)
        self._means = _PairMean(codebook_size, Hog(patch_size).dim)
        self._any = _PairMean(1, Hog(patch_size).dim)

    def add(self, first: int, images: np.ndarray) -> None:
        """The pixels uint8 [m, S, S, 3] of images first, first + 1, …"""
        codes = self.codes[first : first + len(images)]
        contrasts = patch_contrasts(images, self.patch_size)
        self._contrasts += np.bincount(codes.ravel(), contrasts.ravel(), self.codebook_size)
        descriptors = patch_descriptors(images, self.patch_size)
        self._any.add(np.zeros(len(images), np.int64), descriptors.mean(axis=1))
        # The mean descriptor of each pair (image, code) that occurs, one row for each.
        pairs = (np.arange(len(images))[:, None] * self.codebook_size + codes).ravel()
        order = np.argsort(pairs, kind="stable")
        found, starts, counts = np.unique(pairs[order], return_index=True, return_counts=True)
        sums = np.add.reduceat(descriptors.reshape(len(pairs), -1)[order], starts, axis=0)
        self._means.add(found % self.codebook_size, sums / counts[:, None])

    def consistency(self) -> np.ndarray:
        """Mean cosine between patches of two different images by code, float64 [K]; NaN below two images."""
        return self._means.mean()

    def of_any(self) -> float:
        """The same for patches of any two codes."""
        return float(self._any.mean()[0])

    def eligible(self, *, min_patches: int, min_images: int) -> np.ndarray:
        """The codes with so many patches in so many images, ascending; pixels play no part."""
        # One image has no pair.
        return np.flatnonzero((self.patches >= min_patches) & (self.images >= max(2, min_images)))

    def ranked(self, *, min_patches: int, min_images: int) -> list[int]:
        """The eligible codes, the most consistent first; those of less than median contrast come last."""
        codes = self.eligible(min_patches=min_patches, min_images=min_images)
        if len(codes) == 0:
            return []
        contrast = self._contrasts[codes] / self.patches[codes]
        flat = contrast < np.median(contrast)
        return codes[np.lexsort((codes, -self.consistency()[codes], flat))].tolist()


class _PairMean:
    """Mean dot product over all pairs of different rows of each group, without keeping the rows.

    |sum|² - sum of squares is twice the sum over pairs, so two sums for each group are enough.
    """

    def __init__(self, groups: int, dim: int) -> None:
        self._rows = np.zeros(groups, np.int64)
        self._sum = np.zeros((groups, dim))
        self._squares = np.zeros(groups)

    def add(self, groups: np.ndarray, rows: np.ndarray) -> None:
        rows = rows.astype(np.float64)
        self._rows += np.bincount(groups, minlength=len(self._rows))
        self._squares += np.bincount(groups, np.square(rows).sum(axis=1), len(self._rows))
        np.add.at(self._sum, groups, rows)

    def mean(self) -> np.ndarray:
        pairs = np.where(self._rows > 1, self._rows * (self._rows - 1), np.nan)
        return (np.square(self._sum).sum(axis=1) - self._squares) / pairs


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


def mutual_information(table: np.ndarray) -> float:
    """Of code and place, in bits, from counts [K, N]; as counted, so too large by chance."""
    return float(position_bits(table) @ table.sum(axis=1) / max(1, table.sum()))


def shifted_bits(counts: CodeCounts) -> np.ndarray:
    """`position_bits` of shifted grids, the mean over their tables, [K]."""
    return np.mean([position_bits(table) for table in counts.shifted], axis=0)


def position_statistics(counts: CodeCounts, grid: tuple[int, int]) -> PositionStatistics:
    """How position-bound codes are, over all stored patches."""
    bits, shifted = position_bits(counts.by_place), shifted_bits(counts)
    share = counts.by_code / max(1, counts.by_code.sum())
    parts = share * (bits - shifted)
    most = [code for code in np.argsort(-parts, kind="stable")[:PLACED_CODES].tolist() if parts[code] > 0]
    used = share[share > 0]
    return PositionStatistics(
        bits=float(share @ bits),
        bits_shifted=float(share @ shifted),
        code_entropy=float(-(used * np.log2(used)).sum()),
        most=tuple(_placed(code, counts, grid, bits, shifted) for code in most),
    )


def _placed(
    code: int, counts: CodeCounts, grid: tuple[int, int], bits: np.ndarray, shifted: np.ndarray
) -> PlacedCode:
    held = counts.by_place[code]
    return PlacedCode(
        code=code,
        spread=((held + PRIOR) / (held.mean() + PRIOR)).reshape(grid),
        bits=float(bits[code]),
        bits_shifted=float(shifted[code]),
    )


# ------------------------------------------------------------------------------------------------ the whole


def sampled_likeness(dataset: Dataset, sample: CropSample, *, min_images: int) -> Likeness:
    """The likeness of a sample, still without pixels; InputError where no code is in `min_images` crops."""
    assert dataset.manifest.tokenizer is not None
    patch_size = dataset.manifest.require_tokenizer().patch_size
    likeness = Likeness(sample.codes, codebook_size(dataset), patch_size)
    if len(likeness.eligible(min_patches=MIN_PATCHES, min_images=min_images)) == 0:
        raise InputError(
            f"no code has {MIN_PATCHES} patches in {max(2, min_images)} of the {len(sample.codes):,} crops "
            f"sampled from {dataset.url}; raise --samples or lower --min_images"
        )
    return likeness


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
) -> CodebookFindings:
    """Read the pixels of the sample and the codes of every stored crop, and say what the codes stand for.

    `codebook`, unit vectors [K, D], gives each code its neighbours. The same arguments find the same.
    """
    for first, pixels in _pixels(sample):
        likeness.add(first, pixels)
    ranked = likeness.ranked(min_patches=MIN_PATCHES, min_images=min_images)
    chosen = ranked[:num_codes]
    counts = count_places_and_classes(dataset, chosen, seed=seed)
    consistency, grid = likeness.consistency(), dataset.manifest.grid
    bits, shifted = position_bits(counts.by_place), shifted_bits(counts)
    by_code = counts.by_code
    shown = [
        ShownCode(
            code=code,
            consistency=float(consistency[code]),
            images=int(likeness.images[code]),
            share=float(by_code[code] / by_code.sum()),
            examples=_examples(sample, code, patches_per_code, seed),
            place=_placed(code, counts, grid, bits, shifted),
            classes=_classes(counts, slot),
            neighbours=() if codebook is None else _neighbours(codebook, code),
        )
        for slot, code in enumerate(chosen)
    ]
    return CodebookFindings(
        statistics=code_statistics(by_code),
        counts=by_code,
        searched=len(sample.codes),
        eligible=len(ranked),
        likeness_of_any=likeness.of_any(),
        codes=tuple(shown),
        position=position_statistics(counts, grid),
    )


def _pixels(sample: CropSample) -> Iterator[tuple[int, np.ndarray]]:
    """The crops of a sample, `CHUNK` at a time: number of the first, uint8 [m, S, S, 3]."""
    progress = Progress("comparing patches", len(sample.places), "crops")
    with ThreadPoolExecutor(READ_AT_ONCE, "crops") as readers:
        for first in range(0, len(sample.places), CHUNK):
            places = sample.places[first : first + CHUNK]
            yield first, np.stack(list(readers.map(lambda place: place.pixels(), places)))
            progress.update(len(places))
    progress.close()


def _examples(sample: CropSample, code: int, count: int, seed: int) -> tuple[Example, ...]:
    places = choose_patches(sample.codes == code, count, seed=(seed, code))
    return tuple(
        Example(key=sample.places[image].key, patch=patch, pixels=sample.places[image].pixels())
        for image, patch in places
    )


def _classes(counts: CodeCounts, slot: int) -> tuple[ClassShare, ...]:
    held = counts.by_class[slot]
    if held.sum() == 0:
        return ()
    shares, all_shares = held / held.sum(), counts.class_patches / counts.class_patches.sum()
    top = [label for label in np.argsort(-held, kind="stable")[:TOP_CLASSES].tolist() if held[label] > 0]
    return tuple(
        ClassShare(label=label, share=float(shares[label]), lift=float(shares[label] / all_shares[label]))
        for label in top
    )


def _neighbours(codebook: np.ndarray, code: int) -> tuple[tuple[int, float], ...]:
    cosines = codebook @ codebook[code]
    nearest = [other for other in np.argsort(-cosines, kind="stable").tolist() if other != code]
    return tuple((other, float(cosines[other])) for other in nearest[:NEIGHBOURS])

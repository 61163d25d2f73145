"""A look into token shards: some crops with their codes, and patches from many images that share a code.

Index files are read until enough rows are known, and single crops by their byte range, so that a preview of
any dataset costs a few hundred small reads.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import InputError
from shards.dataset.crop_sample import CropPlace
from shards.format.index import codes_of
from shards.format.manifest import Dataset

SCANNED_CROPS = 50_000
"""So many crops of view 0 are searched for codes: 20 MB of codes on a grid of 14 x 14."""
COLUMNS = ("key", "sample_id", "source", "label", "image_offset", "image_bytes", "image_hash", "codes")
GOLDEN = 0.6180339887498949


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ShownSample:
    """The stored views of one image: pixels uint8 [V, S, S, 3], codes uint16 [V, rows, columns]."""

    sample_id: int
    source: str
    label: int | None
    pixels: np.ndarray
    codes: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SharedCode:
    """One code, how many of the searched patches carry it, and some of them from different images.

    `patches` are uint8 [3 P, 3 P, 3]: each in the middle of its surroundings, which beyond the border of the
    crop repeat its edge; `keys` name their crops.
    """

    code: int
    count: int
    images: int
    patches: list[np.ndarray]
    keys: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Preview:
    """What a contact sheet shows; `searched` counts crops, of view 0."""

    samples: list[ShownSample]
    codes: list[SharedCode]
    searched: int
    patches: int


def preview(
    dataset: Dataset, *, samples: int, views: int, code: int | None, codes: int, patches: int
) -> Preview:
    """Up to `samples` images spread over the dataset in their first `views` views, and patches by code.

    `code` is shown with `patches` patches; None shows `codes` codes, from the most used to the rarest that
    occurs. The same arguments show the same. InputError where the dataset has no crops, or no such code.
    """
    tokenizer = dataset.manifest.tokenizer
    if dataset.kind != "tokens" or tokenizer is None:
        raise InputError(f"{dataset.url} holds images without codes; precompute tokens from it first")
    if code is not None and not 0 <= code < tokenizer["codebook_size"]:
        raise InputError(f"code {code} is not below the codebook's {tokenizer['codebook_size']}")
    if dataset.num_samples(0) == 0:
        raise InputError(f"{dataset.url} holds no crops: every image was rejected")
    searched = _search(dataset)
    counts = np.bincount(searched.codes.ravel(), minlength=tokenizer["codebook_size"])
    chosen = [code] if code is not None else _over_the_ranks(counts, codes)
    crops = _Crops(dataset)
    return Preview(
        samples=_samples(dataset, crops, samples, min(views, dataset.num_views)),
        codes=[_shared(dataset, crops, searched, one, int(counts[one]), patches) for one in chosen],
        searched=len(searched.codes),
        patches=int(counts.sum()),
    )


def code_colors(codebook_size: int) -> np.ndarray:
    """A colour for every code, uint8 [codebook_size, 3]: the same in every picture and every dataset.

    Hues follow the golden ratio, so that numbers near each other look different; lightness and saturation
    take turns, because hue alone gives too few.
    """
    colors = np.empty((codebook_size, 3))
    for code in range(codebook_size):
        lightness, saturation = (0.42, 0.55, 0.68)[code % 3], (0.55, 0.75)[code // 3 % 2]
        colors[code] = colorsys.hls_to_rgb(code * GOLDEN % 1.0, lightness, saturation)
    return (255 * colors).round().astype(np.uint8)


def surroundings(pixels: np.ndarray, patch: int, grid: tuple[int, int]) -> np.ndarray:
    """A patch in the middle of the 3 x 3 patches around it, uint8 [3 P, 3 P', 3]; edges are repeated."""
    height, width = pixels.shape[0] // grid[0], pixels.shape[1] // grid[1]
    row, column = divmod(patch, grid[1])
    padded = np.pad(pixels, ((height, height), (width, width), (0, 0)), mode="edge")
    return padded[row * height : (row + 3) * height, column * width : (column + 3) * width]


# ------------------------------------------------------------------------------------------------ inside


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Searched:
    """Codes of many crops, uint16 [n, area], and where each lies: shard number and row."""

    codes: np.ndarray
    shards: np.ndarray
    rows: np.ndarray


def _search(dataset: Dataset) -> _Searched:
    codes: list[np.ndarray] = []
    numbers: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    held = 0
    for shard in dataset.shards(0):
        found = codes_of(dataset.read_index(0, shard.number, ("codes",)))
        codes.append(found)
        numbers.append(np.full(len(found), shard.number))
        rows.append(np.arange(len(found)))
        held += len(found)
        if held >= SCANNED_CROPS:
            break
    return _Searched(codes=np.concatenate(codes), shards=np.concatenate(numbers), rows=np.concatenate(rows))


def _over_the_ranks(counts: np.ndarray, number: int) -> list[int]:
    """Codes that occur, evenly spread over the ranks of use, the most used first."""
    ranked = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    places = np.linspace(0, len(ranked) - 1, min(number, len(ranked))).round().astype(int)
    return ranked[places].tolist()


class _Crops:
    """Reads single crops by their byte range; the indexes that say where stay open."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._tables: dict[tuple[int, int], pa.Table] = {}

    def ids(self, view: int, number: int) -> np.ndarray:
        """Sample ids of a shard, int64, ascending."""
        return self._table(view, number).column("sample_id").to_numpy()

    def row(self, view: int, number: int, row: int) -> tuple[dict[str, Any], np.ndarray]:
        """An index row and the pixels of its crop, uint8 [S, S, 3], checked against their hash."""
        [record] = self._table(view, number).slice(row, 1).to_pylist()
        tar = self._dataset.shard(view, number).tar
        return record, CropPlace.of(tar, record).pixels()

    def _table(self, view: int, number: int) -> pa.Table:
        if (view, number) not in self._tables:
            self._tables[view, number] = self._dataset.read_index(view, number, COLUMNS)
        return self._tables[view, number]


def _samples(dataset: Dataset, crops: _Crops, number: int, views: int) -> list[ShownSample]:
    """Images spread evenly over the samples of view 0; a view that lacks one of them repeats view 0."""
    ends = np.cumsum(dataset.shard_sizes(0))
    positions = np.linspace(0, ends[-1] - 1, min(number, int(ends[-1]))).round().astype(int)
    shown: list[ShownSample] = []
    for position in positions.tolist():
        shard = int(np.searchsorted(ends, position, side="right"))
        row = position - int(ends[shard] - dataset.shard_sizes(0)[shard])
        sample_id = int(crops.ids(0, shard)[row])
        found = [crops.row(0, shard, row)]
        for view in range(1, views):
            ids = crops.ids(view, shard)
            there = int(np.searchsorted(ids, sample_id))
            held = there < len(ids) and ids[there] == sample_id
            found.append(crops.row(view, shard, there) if held else found[0])
        record = found[0][0]
        shown.append(
            ShownSample(
                sample_id=sample_id,
                source=record["source"],
                label=record["label"],
                pixels=np.stack([pixels for _, pixels in found]),
                codes=np.array([one["codes"] for one, _ in found], np.uint16).reshape(
                    views, *dataset.manifest.grid
                ),
            )
        )
    return shown


def _shared(
    dataset: Dataset, crops: _Crops, searched: _Searched, code: int, count: int, number: int
) -> SharedCode:
    """A code with patches of at most `number` images that carry it, one of each, spread over all of them."""
    holders = np.flatnonzero((searched.codes == code).any(axis=1))
    chosen = holders[np.linspace(0, len(holders) - 1, min(number, len(holders))).round().astype(int)]
    patches: list[np.ndarray] = []
    keys: list[str] = []
    for place in chosen.tolist():
        record, pixels = crops.row(0, int(searched.shards[place]), int(searched.rows[place]))
        carriers = np.flatnonzero(searched.codes[place] == code)
        patches.append(surroundings(pixels, int(carriers[len(carriers) // 2]), dataset.manifest.grid))
        keys.append(record["key"])
    return SharedCode(code=code, count=count, images=len(holders), patches=patches, keys=tuple(keys))

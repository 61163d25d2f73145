"""Block-wise masks (paper §2.3, as in BEiT): which patches the student must guess.

`draw_block_masks` draws them for a whole batch, as a pure function of (seed, epoch, position).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pipeline.draws import SPLITMIX_STEP, splitmix
from pipeline.errors import InputError

NUM_TRIES = 10  # proposals per block before the procedure gives up and tops up with single patches

# Share and smallest block of the paper's 14x14 grid; other grids scale them by area.
_MASKED_SHARE = 75 / 196
_MIN_BLOCK_SHARE = 16 / 196

_TOP_UP_WORD = 1 << 32  # words from here on choose the single patches; blocks use far fewer
_WORD_BITS = 64


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """How many patches are masked, and in what blocks."""

    num_masked: int | None = None
    """Patches masked in every image, exactly; null is 75/196 of the grid, rounded (75 of 14x14)."""
    min_block: int | None = None
    """Smallest area a block is drawn with, in patches; null is 16/196 of the grid, rounded (16 of 14x14)."""
    aspect: tuple[float, float] = (0.3, 1 / 0.3)
    """Bounds of a block's height / width, drawn log-uniformly."""

    def resolve(self, grid: tuple[int, int]) -> MaskSpec:
        """The numbers for a grid of (rows, columns); InputError when they make no sense for it."""
        height, width = grid
        if not (0 < height <= _WORD_BITS and 0 < width <= _WORD_BITS):
            raise InputError(
                f"masks are made for token grids up to {_WORD_BITS}x{_WORD_BITS}, not {height}x{width}; "
                "choose a larger patch size"
            )
        area = height * width
        num_masked = round(_MASKED_SHARE * area) if self.num_masked is None else self.num_masked
        if not 0 < num_masked < area:
            raise InputError(
                f"mask.num_masked is {num_masked} on a grid of {height}x{width}; choose 1 to {area - 1}"
            )
        min_block = self.min_block
        if min_block is None:
            min_block = min(max(1, round(_MIN_BLOCK_SHARE * area)), num_masked)
        if not 0 < min_block <= num_masked:
            raise InputError(f"mask.min_block is {min_block}; choose 1 to num_masked, which is {num_masked}")
        low, high = self.aspect
        if not 0 < low <= high < math.inf:
            raise InputError(f"mask.aspect is {self.aspect}; give two positive bounds, the smaller one first")
        return MaskSpec(
            height=height, width=width, num_masked=num_masked, min_block=min_block, aspect=self.aspect
        )


@dataclass(frozen=True, kw_only=True)
class MaskSpec:
    """A `MaskConfig` resolved and validated for one grid."""

    height: int
    width: int
    num_masked: int
    min_block: int
    aspect: tuple[float, float]


@dataclass(frozen=True)
class BlockMasks:
    """Masks of a batch, and how they came about.

    mask [B, height * width] bool, True = masked; num_blocks [B] and num_single [B] count the rectangles and
    the single patches that filled the rest.
    """

    mask: np.ndarray
    num_blocks: np.ndarray
    num_single: np.ndarray


def draw_block_masks(positions: np.ndarray, spec: MaskSpec, *, seed: int, epoch: int) -> BlockMasks:
    """The masks of the samples at these B positions of an epoch; each has exactly `num_masked` patches.

    A sample's mask depends on (seed, epoch, position) alone, so ranks, batch sizes and resumed runs agree.
    All proposals of one block are drawn and measured together for every image that still has room, which is
    the official procedure with its inner loop unrolled: a refused proposal changes nothing.
    DEVIATION: counter-based draws where the reference's workers use Python's and numpy's generators, so the
    masks are others of the same distribution, and do not depend on workers or on where a run resumed.
    """
    streams = _streams(np.asarray(positions), seed=seed, epoch=epoch)
    num_images = len(streams)
    # One unsigned word per grid row, bit x = column x: a rectangle's overlap is AND and popcount.
    rows = np.zeros((num_images, spec.height), dtype=np.uint64)
    room = np.full(num_images, spec.num_masked, dtype=np.int64)
    num_blocks = np.zeros(num_images, dtype=np.int64)

    active = np.arange(num_images)
    block = 0
    while len(active):
        proposal, added = _propose(rows[active], room[active], streams[active], spec, block)
        accepted = added > 0
        active = active[accepted]
        rows[active] |= proposal[accepted]
        room[active] -= added[accepted]
        num_blocks[active] += 1
        active = active[room[active] > 0]
        block += 1

    bits = np.arange(spec.width, dtype=np.uint64)
    cells = (rows[:, :, None] >> bits) & np.uint64(1)  # [B, height, width]
    mask = cells.astype(bool).reshape(num_images, spec.height * spec.width)
    _top_up(mask, room, streams)
    return BlockMasks(mask=mask, num_blocks=num_blocks, num_single=room)


def _propose(
    rows: np.ndarray, room: np.ndarray, streams: np.ndarray, spec: MaskSpec, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first acceptable rectangle of NUM_TRIES for each of A images.

    Returns its row words [A, height] and the number of patches it adds [A], 0 where none was acceptable.
    """
    first_word = np.uint64(block * 2 * NUM_TRIES)
    words = _words(streams[:, None], first_word + np.arange(2 * NUM_TRIES, dtype=np.uint64))
    halves = words.view(np.uint32).reshape(len(rows), NUM_TRIES, 4) * 2.0**-32  # [A, T, 4] in [0, 1)

    log_low, log_high = math.log(spec.aspect[0]), math.log(spec.aspect[1])
    area = spec.min_block + (room[:, None] - spec.min_block) * halves[:, :, 0]
    root = np.sqrt(area)
    root_ratio = np.exp(0.5 * (log_low + (log_high - log_low) * halves[:, :, 1]))
    height = np.rint(root * root_ratio).astype(np.int64)
    width = np.rint(root / root_ratio).astype(np.int64)
    fits = (height < spec.height) & (width < spec.width)
    # Proposals that do not fit are measured like the others, as something harmless, and refused below.
    height, width = np.where(fits, height, 0), np.where(fits, width, 0)
    top = (halves[:, :, 2] * (spec.height - height + 1)).astype(np.int64)
    left = (halves[:, :, 3] * (spec.width - width + 1)).astype(np.uint64)

    bit = np.uint64(1)
    columns = ((bit << width.astype(np.uint64)) - bit) << left  # [A, T]
    # Patches the rectangle adds in each row of the grid; only rows inside it count.
    fresh = np.bitwise_count(columns[:, :, None] & ~rows[:, None, :])
    inside = _row_ranges(spec.height).take(top * (spec.height + 1) + height, axis=0)  # [A, T, height]
    added = np.einsum("ath,ath->at", fresh, inside, dtype=np.uint16).astype(np.int64)

    acceptable = (added > 0) & (added <= room[:, None])
    chosen = acceptable.argmax(axis=1)
    image = np.arange(len(rows))
    proposal = columns[image, chosen, None] * inside[image, chosen]
    return proposal, added[image, chosen] * acceptable[image, chosen]


def _row_ranges(num_rows: int) -> np.ndarray:
    """[(R + 1)^2, R] uint8 for R rows: entry top * (R + 1) + height marks rows [top, top + height)."""
    edge = np.arange(num_rows + 1)
    top, height, row = edge[:, None, None], edge[None, :, None], edge[:num_rows]
    ranges = (row >= top) & (row < top + height)
    return ranges.view(np.uint8).reshape(-1, num_rows)


def _top_up(mask: np.ndarray, room: np.ndarray, streams: np.ndarray) -> None:
    """Mask `room` random visible patches of each image, in place, one after another."""
    short = np.flatnonzero(room)
    num_patches = mask.shape[1]
    for k in range(int(room.max(initial=0))):
        short = short[room[short] > k]
        num_visible = num_patches - mask[short].sum(axis=1)
        word = _words(streams[short], np.array([_TOP_UP_WORD + k], dtype=np.uint64))
        rank = ((word >> np.uint64(11)) * 2.0**-53 * num_visible).astype(np.int64)
        mask[short, (np.cumsum(~mask[short], axis=1) > rank[:, None]).argmax(axis=1)] = True


def _streams(positions: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """A 64-bit stream key per position [B] uint64, hashed from (seed, epoch, position) one after another."""
    key = splitmix(np.array([seed % 2**64], dtype=np.uint64))
    key = splitmix(key + np.uint64(epoch % 2**64))
    return splitmix(key + positions.astype(np.uint64))


def _words(streams: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Word `index` of each SplitMix64 stream, uint64. Counter-based: any word costs the same, in any order.

    numpy's Philox has the same property but one object per stream, which costs more than the mask itself.
    """
    return splitmix(streams + (index + np.uint64(1)) * np.uint64(SPLITMIX_STEP))

"""Relative positions (reference.md §3), and position tables for another grid than that of pretraining.

Resizing follows the official fine-tuning code (reference.md §6.1), so that tables agree with its tables.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.interpolate import RectBivariateSpline
from torch import Tensor, nn

from pipeline.errors import InputError

NUM_SPECIAL_ROWS = 3  # [CLS] to patch, patch to [CLS], [CLS] to itself: the last rows of every table


class RelativePositionBias(nn.Module):
    """A learned attention bias per head and displacement, shared by all blocks; zero at the start."""

    relative_position_index: Tensor

    def __init__(self, grid: tuple[int, int], heads: int) -> None:
        super().__init__()
        index = relative_position_index(grid)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(num_displacements(grid), heads))
        # A function of the grid, so no part of the state; exports to the official layout add it.
        self.register_buffer("relative_position_index", index, persistent=False)

    def forward(self) -> Tensor:
        """Bias [1, H, T, T] for the attention logits, contiguous: fused kernels want a unit last stride."""
        return gather_bias(self.relative_position_bias_table, self.relative_position_index)


def gather_bias(table: Tensor, index: Tensor) -> Tensor:
    """Bias [1, H, T, T] from a table [R, H] and the row of each pair of tokens, index [T, T]; contiguous."""
    return table[index].permute(2, 0, 1).unsqueeze(0).contiguous()


def num_displacements(grid: tuple[int, int]) -> int:
    """Rows of a relative-position table: every displacement in the grid, and three that involve [CLS]."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3


def relative_position_index(grid: tuple[int, int]) -> Tensor:
    """Table row for each (query, key) pair of tokens: [T, T] int64, in the published layout.

    With d = query - key, patches use row (dy + rows - 1) * (2 * columns - 1) + dx + columns - 1.
    The last three rows are [CLS] to patch, patch to [CLS], [CLS] to itself (reference.md §3).
    """
    rows, columns = grid
    patch = torch.arange(rows * columns)
    y, x = patch // columns, patch % columns
    dy = y[:, None] - y[None, :] + rows - 1
    dx = x[:, None] - x[None, :] + columns - 1
    first_special = num_displacements(grid) - 3
    index = torch.empty(rows * columns + 1, rows * columns + 1, dtype=torch.int64)
    index[1:, 1:] = dy * (2 * columns - 1) + dx
    index[0, 1:] = first_special
    index[1:, 0] = first_special + 1
    index[0, 0] = first_special + 2
    return index


def resize_position_table(table: Tensor, grid_from: int, grid_to: int) -> Tensor:
    """A relative-position table for another grid: [T, H] of grid_from -> [T', H] of grid_to.

    Per head, a bicubic spline through the biases at `spline_coordinates`, read at whole displacements: near
    neighbours keep their bias, far ones are stretched. Never extrapolates: beyond the table, its border
    holds. The last three rows, which involve [CLS], are carried over. Type and device stay.
    """
    if table.ndim != 2 or table.shape[0] != num_displacements((grid_from, grid_from)):
        raise InputError(
            f"a relative-position table of shape {list(table.shape)} is none of a {grid_from}x{grid_from} "
            f"grid, which has {num_displacements((grid_from, grid_from))} rows; give the grid it was made for"
        )
    if grid_from == grid_to:
        return table
    if grid_from < 2:
        raise InputError("the table of a 1x1 grid knows no displacement, so it cannot be resized")
    side, heads = 2 * grid_from - 1, table.shape[1]
    source = np.array(spline_coordinates(grid_from, grid_to))
    target = np.arange(1.0 - grid_to, grid_to)
    degree = min(3, side - 1)  # a 2x2 grid has three points along a side, too few for a cubic
    biases = table[:-NUM_SPECIAL_ROWS].detach().float().cpu().numpy().reshape(side, side, heads)
    resized = [
        RectBivariateSpline(source, source, biases[:, :, head], kx=degree, ky=degree)(target, target).ravel()
        for head in range(heads)
    ]
    rows = torch.from_numpy(np.stack(resized, axis=1)).to(table)
    return torch.cat([rows, table[-NUM_SPECIAL_ROWS:].detach()])


def spline_coordinates(grid_from: int, grid_to: int) -> list[float]:
    """Coordinates of the old displacements among the new ones: 0, ±1, ±(1 + q), ±(1 + q + q²), ...

    q is found by bisection in [1.01, 1.5] such that the outermost of the 2 * grid_from - 1 coordinates is the
    outermost new displacement, grid_to - 1. A smaller grid than the old one ends at q = 1.01 and reads the
    inner part of the table.
    """
    reach = grid_from - 1
    low, high, q = 1.01, 1.5, 1.0
    while high - low > 1e-6:
        q = (low + high) / 2.0
        if (1.0 - q**reach) / (1.0 - q) > grid_to - 1:
            high = q
        else:
            low = q
    one_side = list(itertools.accumulate(q**i for i in range(reach)))
    return [-x for x in reversed(one_side)] + [0.0] + one_side


def resize_absolute_positions(pos_embed: Tensor, grid_to: int) -> Tensor:
    """Absolute positions [1, N + 1, D] of a square grid, bicubic, for grid_to² patches; [CLS]'s stays.

    DEVIATION: once, when weights are loaded. The reference resizes in every forward pass, by a factor with a
    tenth of a patch added, so its positions lie a little apart from these.
    """
    num_patches = pos_embed.shape[1] - 1
    grid = math.isqrt(num_patches)
    if grid * grid != num_patches:
        raise InputError(
            f"absolute positions of shape {list(pos_embed.shape)} are none of a square grid and a [CLS] token"
        )
    if grid == grid_to:
        return pos_embed
    image = pos_embed[:, 1:].unflatten(1, (grid, grid)).permute(0, 3, 1, 2).float()
    resized = F.interpolate(image, size=(grid_to, grid_to), mode="bicubic", align_corners=False)
    patches = resized.flatten(2).transpose(1, 2).to(pos_embed)
    return torch.cat([pos_embed[:, :1], patches], dim=1)


def table_grid(rows: int) -> int:
    """Side of the square grid whose relative-position table has this many rows; InputError without one."""
    grid = (math.isqrt(max(rows - NUM_SPECIAL_ROWS, 0)) + 1) // 2
    if num_displacements((grid, grid)) != rows:
        raise InputError(f"a relative-position table of {rows} rows belongs to no square grid")
    return grid

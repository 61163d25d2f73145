"""Histograms of oriented gradients (HOG), one descriptor per patch: a teacher without weights.

Hand-crafted, not semantic: it is what MaskFeat regresses (arXiv 2112.09133), and codes learned from it group
edges and textures. It lets the pipeline run anywhere; for BEiT v2's results take a CLIP or DINO teacher.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ORIENTATIONS = 9
"""Bins over half a turn: a gradient and its opposite count as one (unsigned)."""

FLAT_GRADIENT = 1.0 / 255.0
"""Mean gradient (per pixel, of a [0, 1] image) below which a cell counts as flat: one grey level."""


class Hog(nn.Module):
    """RGB images in [0, 1] to HOG descriptors of their patches.

    Each patch has cells x cells cells (2 x 2; one where the patch size is odd), each cell one histogram of 9
    orientations per colour channel, each histogram unit length: 108 values, none negative, for 2 x 2 cells.
    """

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.cells = 2 if patch_size % 2 == 0 else 1
        self.dim = 3 * self.cells**2 * ORIENTATIONS

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S] -> [B, N, 3 x cells^2 x 9] float32, N patches row by row.

        The values of a patch are ordered cell row, cell column, channel, orientation.
        """
        histograms = cell_histograms(images, self.patch_size // self.cells)
        batch, bins, channels, rows, columns = histograms.shape
        n = self.cells
        split = histograms.view(batch, bins, channels, rows // n, n, columns // n, n)
        by_patch = split.permute(0, 3, 5, 4, 6, 2, 1)
        return by_patch.reshape(batch, (rows // n) * (columns // n), self.dim)


def cell_histograms(images: Tensor, cell: int) -> Tensor:
    """images [B, C, S, S] in [0, 1] -> unit histograms [B, 9, C, S / cell, S / cell] of gradient orientation.

    Gradients are central differences, with the image's edge repeated outwards. A pixel gives its magnitude
    to the two nearest orientations, in proportion. One grey level of gradient, spread evenly, is added to
    every cell: a flat cell is then the constant vector 1/3 instead of zero, whose cosine with anything is
    undefined, and faint noise does not look like a strong edge.
    """
    with torch.autocast(images.device.type, enabled=False):
        x = F.pad(images.float(), (1, 1, 1, 1), mode="replicate")
        dx = 0.5 * (x[..., 1:-1, 2:] - x[..., 1:-1, :-2])
        dy = 0.5 * (x[..., 2:, 1:-1] - x[..., :-2, 1:-1])
        magnitude = torch.sqrt(dx * dx + dy * dy)
        # In units of bins, 0 at the centre of bin 0.
        position = torch.remainder(torch.atan2(dy, dx), math.pi) * (ORIENTATIONS / math.pi) - 0.5
        histograms = []
        for orientation in range(ORIENTATIONS):
            half = ORIENTATIONS / 2
            distance = (torch.remainder(position - orientation + half, ORIENTATIONS) - half).abs()
            votes = magnitude * (1.0 - distance).clamp(min=0.0)
            histograms.append(F.avg_pool2d(votes, cell))
        stacked = torch.stack(histograms, dim=1) + FLAT_GRADIENT / ORIENTATIONS
        return F.normalize(stacked, dim=1)

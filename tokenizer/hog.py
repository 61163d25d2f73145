"""Histograms of oriented gradients (HOG), one descriptor per patch: a teacher without weights.

Hand-crafted, not semantic: a cousin of what MaskFeat regresses (arXiv 2112.09133), and codes learned from
it group edges and textures. It lets the pipeline run anywhere; for BEiT v2's results take CLIP or DINO.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ORIENTATIONS = 8
"""Bins over a full turn: an edge from dark to light is not one from light to dark.

MaskFeat's are unsigned. Those are even functions of the pixels: no linear layer sees anything of them, and a
small ViT sat on the plateau of the mean for its first hundreds of steps, while the codebook collapsed.
"""

FAINT_GRADIENT = 4.0 / 255.0
"""Length of a patch's histograms (mean gradient per pixel, of a [0, 1] image) that counts as half an edge."""

FLATNESS = 0.25
"""The last value of every descriptor: alone in a flat patch, small beside an edge."""


class Hog(nn.Module):
    """RGB images in [0, 1] to HOG descriptors of their patches.

    Each patch has cells x cells cells (2 x 2; one where the patch size is odd), each cell one histogram of
    8 signed orientations per colour channel. They are normalised together, over the whole patch, and the
    mean of each histogram is taken away, because a cosine target should not be dominated by what all patches
    share. One constant value at the end keeps flat patches away from zero, whose cosine with anything is
    undefined: 97 values for 2 x 2 cells.
    """

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.cells = 2 if patch_size % 2 == 0 else 1
        self.dim = 3 * self.cells**2 * ORIENTATIONS + 1

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S] -> [B, N, 3 x cells^2 x 8 + 1] float32, N patches row by row.

        The values of a patch are ordered cell row, cell column, channel, orientation; then the constant.
        """
        with torch.autocast(images.device.type, enabled=False):
            histograms = cell_histograms(images, self.patch_size // self.cells)
            batch, bins, channels, rows, columns = histograms.shape
            n = self.cells
            split = histograms.view(batch, bins, channels, rows // n, n, columns // n, n)
            by_patch = split.permute(0, 3, 5, 4, 6, 2, 1).reshape(
                batch, (rows // n) * (columns // n), -1, bins
            )
            centred = by_patch - by_patch.mean(dim=-1, keepdim=True)
            energy = by_patch.flatten(2).norm(dim=-1, keepdim=True)
            edges = centred.flatten(2) / (energy + FAINT_GRADIENT)
            return torch.cat([edges, torch.full_like(energy, FLATNESS)], dim=-1)


def cell_histograms(images: Tensor, cell: int) -> Tensor:
    """images [B, C, S, S] in [0, 1] -> mean gradient per pixel [B, 8, C, S / cell, S / cell] by orientation.

    Gradients are central differences, with the image's edge repeated outwards. A pixel gives its magnitude
    to the two nearest orientations, in proportion; orientation 0 points to the right, 2 downwards.
    """
    x = F.pad(images.float(), (1, 1, 1, 1), mode="replicate")
    dx = 0.5 * (x[..., 1:-1, 2:] - x[..., 1:-1, :-2])
    dy = 0.5 * (x[..., 2:, 1:-1] - x[..., :-2, 1:-1])
    magnitude = torch.sqrt(dx * dx + dy * dy)
    position = torch.remainder(torch.atan2(dy, dx), 2 * math.pi) * (ORIENTATIONS / (2 * math.pi))
    histograms = []
    for orientation in range(ORIENTATIONS):
        half = ORIENTATIONS / 2
        distance = (torch.remainder(position - orientation + half, ORIENTATIONS) - half).abs()
        histograms.append(F.avg_pool2d(magnitude * (1.0 - distance).clamp(min=0.0), cell))
    return torch.stack(histograms, dim=1)

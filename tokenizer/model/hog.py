"""Histograms of oriented gradients (HOG) and mean colour per patch: a teacher without weights.

Hand-crafted, not semantic: a cousin of what MaskFeat regresses (arXiv 2112.09133), and codes learned from
it group edges, textures and colours. It lets the pipeline run anywhere; for BEiT v2's results take CLIP or
DINO.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ORIENTATIONS = 8
"""Bins over a full turn: an edge from dark to light is not one from light to dark.

MaskFeat's are unsigned. Those are even functions of the pixels, which no linear layer sees; in short trials a
small ViT was still on the plateau of the mean after 60 to 155 steps, also without the quantizer.
"""

FAINT_GRADIENT = 4.0 / 255.0
"""Length of a patch's histograms (mean gradient per pixel, of a [0, 1] image) that counts as half an edge."""

CELL = 8
"""Side of a cell in pixels, as in Dalal and Triggs (2005); a smaller patch is one cell."""

COLOUR = 2.0
"""Weight of a patch's mean colour, measured from mid-grey in [-0.5, 0.5]."""

FLATNESS = 0.25
"""The last value of every descriptor: alone in a flat grey patch, small beside an edge or a colour."""


class Hog(nn.Module):
    """RGB images in [0, 1] to descriptors of their patches.

    Each patch has cells x cells cells (of 8 x 8 pixels: 2 x 2 in a patch of 16), each cell one histogram of 8
    signed orientations per colour channel. They are normalised together, over the whole patch, and the mean
    of each histogram is taken away, because a cosine target should not be dominated by what all patches
    share. Then the patch's mean colour: edges alone say too little of their neighbours for masked patches to
    be guessed. Then a constant that keeps flat grey patches away from zero, whose cosine is undefined:
    28 values for 1 cell, 100 for 2 x 2.
    """

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        # As many cells as fit in whole pixels: a patch of 14 has one, not 1.75.
        self.cells = patch_size // CELL if patch_size % CELL == 0 else 1
        self.dim = 3 * self.cells**2 * ORIENTATIONS + 3 + 1

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S] -> [B, N, 3 x cells^2 x 8 + 4] float32, N patches row by row.

        The values of a patch are ordered cell row, cell column, channel, orientation; then red, green, blue;
        then the constant.
        """
        with torch.autocast(images.device.type, enabled=False):
            histograms = cell_histograms(images, self.patch_size // self.cells)
            batch, bins, channels, rows, columns = histograms.shape
            n = self.cells
            num_patches = (rows // n) * (columns // n)
            split = histograms.view(batch, bins, channels, rows // n, n, columns // n, n)
            by_patch = split.permute(0, 3, 5, 4, 6, 2, 1).reshape(batch, num_patches, -1, bins)
            centred = by_patch - by_patch.mean(dim=-1, keepdim=True)
            energy = by_patch.flatten(2).norm(dim=-1, keepdim=True)
            edges = centred.flatten(2) / (energy + FAINT_GRADIENT)
            colour = F.avg_pool2d(images.float() - 0.5, self.patch_size).flatten(2).transpose(1, 2)
            return torch.cat([edges, COLOUR * colour, torch.full_like(energy, FLATNESS)], dim=-1)


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

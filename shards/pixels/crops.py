"""What a reader shows of an encoded image: a stored crop as it is, or one made afresh from a source image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import numpy as np

from shards.pixels.decode import DecodeConfig, decode_image
from shards.pixels.views import ViewPolicy, center_view, decode_crop, encode_crop, render, view_at

Augment = Callable[[np.ndarray, int, int], np.ndarray]
"""(crop uint8 [S, S, 3], sample id, epoch) -> uint8 [S, S, 3]; called by several threads at once."""


@dataclass(frozen=True, slots=True)
class Showing:
    """Which sample is shown, and for which time."""

    sample_id: int
    """Unique among all datasets that are read together."""
    own_id: int
    """The sample's id in its own dataset, by which views are drawn."""
    view: int
    """Index of the view to draw."""
    epoch: int


@dataclass(frozen=True, slots=True)
class StoredCrops:
    """The crops of a token dataset, decoded exactly: their codes belong to these pixels."""

    def fill(self, out: np.ndarray, data: memoryview, showing: Showing) -> tuple[int, ...]:
        """Write a crop into `out`, contiguous uint8 [S, S, 3], if it has this shape; the crop's own shape."""
        del showing
        return decode_crop(data, out).shape


@dataclass(frozen=True, slots=True)
class FreshCrops:
    """Crops of an image dataset: in every epoch a new one where `policy.views_per_image` is 0, else the one
    that a token dataset of that policy would show.
    """

    policy: ViewPolicy
    _: KW_ONLY
    center_fraction: float | None = None
    """Side of the centred square over the image's shorter side, for evaluation; None draws random crops."""
    augment: Augment | None = None
    """Changes crops after all else."""
    stored_pixels: bool = False
    """Crops pass through the stored JPEG: equal to those of a token dataset bit for bit."""
    decode: DecodeConfig | None = None
    """How source images are decoded; None: as they were when the dataset was prepared."""

    def fill(self, out: np.ndarray, data: memoryview, showing: Showing) -> tuple[int, ...]:
        """Write a crop into `out`, uint8 [S, S, 3], if it has this shape; the crop's own shape."""
        policy, image = self.policy, decode_image(bytes(data), self.decode or DecodeConfig())
        height, width = image.shape[:2]
        if self.center_fraction is not None:
            view = center_view(policy, height=height, width=width, fraction=self.center_fraction)
        else:
            view = view_at(policy, showing.own_id, showing.view, height=height, width=width)
        pixels = render(image, view, policy.interpolation)
        if self.stored_pixels:
            pixels = decode_crop(encode_crop(pixels, policy.jpeg_quality))
        if self.augment is not None:
            pixels = self.augment(pixels, showing.sample_id, showing.epoch)
        if pixels.shape == out.shape:
            out[...] = pixels
        return pixels.shape


Crops = StoredCrops | FreshCrops
"""What decides the pixels that a reader gives."""

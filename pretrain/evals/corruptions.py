"""Corrupted copies of clean images, after ImageNet-C and CIFAR-10-C (Hendrycks and Dietterich 2019).

Four of their corruptions, with the constants of the code published beside arXiv 1903.12261. They are made
here, of the uint8 crop that the model sees, so nothing needs to be downloaded. Unlike in the published sets,
values are rounded, not cut off, and no copy passes through a JPEG of quality 85, as ImageNet-C's do: figures
need not equal published ones.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from pipeline.errors import InputError
from shards.pixels.views import decode_crop

CorruptionName = Literal["gaussian_noise", "gaussian_blur", "contrast", "jpeg"]
CORRUPTIONS: tuple[CorruptionName, ...] = get_args(CorruptionName)

StrengthTable = Literal["imagenet_c", "cifar10_c"]

STRENGTHS: dict[StrengthTable, dict[CorruptionName, tuple[float, ...]]] = {
    "imagenet_c": {
        "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
        "gaussian_blur": (1.0, 2.0, 3.0, 4.0, 6.0),
        "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
        "jpeg": (25, 18, 15, 10, 7),
    },
    "cifar10_c": {
        "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
        "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1.0),
        "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
        "jpeg": (80, 65, 58, 50, 40),
    },
}
"""By severity, 1 first: standard deviation of the noise (white is 1); that of the blur, in pixels; factor on
the distance from the mean colour; JPEG quality."""

SEVERITIES = (1, 2, 3, 4, 5)

_NOISE_STREAM = 0x6E6F6973  # "nois": a counter word that no other draw has


def default_table(image_size: int) -> StrengthTable:
    """Constants made for such images: ImageNet-C's are for 224 pixels a side, CIFAR-10-C's for 32."""
    return "imagenet_c" if image_size >= 128 else "cifar10_c"  # what lies between is our choice


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """One corruption at one severity, as a `shards.pixels.crops.Augment`.

    The copy of an image is a function of (seed, sample id, corruption, severity).
    """

    name: CorruptionName
    severity: int
    """1 to 5."""
    table: StrengthTable
    seed: int
    """Draws other noise when changed."""

    @property
    def label(self) -> str:
        """`gaussian_noise 3`."""
        return f"{self.name} {self.severity}"

    @property
    def strength(self) -> float:
        return STRENGTHS[self.table][self.name][self.severity - 1]

    def __call__(self, pixels: np.ndarray, sample_id: int, epoch: int) -> np.ndarray:
        """The corrupted copy of a crop, both uint8 [S, S, 3]."""
        del epoch  # every pass sees the same copies
        match self.name:
            case "gaussian_noise":
                noise = self._draws(sample_id).standard_normal(pixels.shape)
                return _to_uint8(pixels + 255.0 * self.strength * noise)
            case "gaussian_blur":
                return blur(pixels, self.strength)
            case "contrast":
                mean = pixels.mean(axis=(0, 1), keepdims=True)
                return _to_uint8(mean + self.strength * (pixels - mean))
            case "jpeg":
                return compress(pixels, int(self.strength))

    def _draws(self, sample_id: int) -> np.random.Generator:
        key = np.array([self.seed, sample_id], dtype=np.uint64)
        counter = np.array([0, self.severity, _NOISE_STREAM, 0], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))


def parse_corruptions(
    names: str | None, severities: str, *, table: StrengthTable, seed: int
) -> list[Corruption]:
    """Corruptions named with commas between, in the order of `CORRUPTIONS`, at each severity, ascending.

    InputError for an unknown name, and for severities other than 1 to 5 or none.
    """
    levels, chosen = split_list(severities), split_list(names)
    if not levels or not {*levels} <= {*map(str, SEVERITIES)}:
        raise InputError(f"severities is {severities!r}; give some of 1,2,3,4,5")
    for name in chosen:
        if name not in CORRUPTIONS:
            raise InputError(f"corruptions names {name!r}; give some of {','.join(CORRUPTIONS)}")
    return [
        Corruption(name=name, severity=severity, table=table, seed=seed)
        for name in CORRUPTIONS
        if name in chosen
        for severity in SEVERITIES
        if str(severity) in levels
    ]


def split_list(text: str | None) -> list[str]:
    """The words of a list with commas."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def blur(pixels: np.ndarray, std: float) -> np.ndarray:
    """Each channel convolved with a normal kernel of `std` pixels; the border's pixels go on outside."""
    values = pixels.astype(np.float64)
    return _to_uint8(gaussian_filter(values, sigma=(std, std, 0), mode="nearest", truncate=4.0))


def compress(pixels: np.ndarray, quality: int) -> np.ndarray:
    """As a JPEG of this quality and 4:2:0 chroma shows them.

    Pillow's encoder, like that of the published copies: the one of stored crops rounds otherwise, by up to 14
    levels at the same quality.
    """
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return decode_crop(file.getvalue())


def _to_uint8(values: np.ndarray) -> np.ndarray:
    return np.rint(values).clip(0.0, 255.0).astype(np.uint8)

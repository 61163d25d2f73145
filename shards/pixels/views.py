"""Which part of an image a view shows (paper §3.1: crop, flip, colour jitter), and how it becomes pixels.

A view is data, not a closure: it is a pure function of (policy, sample id, index) and can be stored, compared
and rendered again anywhere. Its coordinates are those of `shards.pixels.decode.decode_image`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import cast

import numpy as np
import simplejpeg
from PIL import Image, ImageEnhance

from pipeline.draws import philox
from pipeline.errors import InputError

CENTER_FRACTION = 0.875
"""Side of the evaluation crop over the shorter side of the image: 224 of 256."""

_TRIES = 10
_VIEW_STREAM = 0x76696577  # "view": the third counter word, so that no other draw shares these numbers
_RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CropBox:
    """A rectangle in pixels of the decoded image, before any flip."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Jitter:
    """Colour factors, 1 changes nothing, and their order: 0 brightness, 1 contrast, 2 saturation."""

    brightness: float
    contrast: float
    saturation: float
    order: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """One view of one image: `crop` resized to image_size x image_size, mirrored if `hflip`."""

    index: int
    crop: CropBox
    hflip: bool
    jitter: Jitter | None
    image_size: int


@dataclass(frozen=True, kw_only=True)
class ViewPolicy:
    """How the views of every image are drawn."""

    image_size: int | None = None
    """Side of a view in pixels; null is the tokenizer's, which owns it."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest share of the image's area that a crop covers (0.2 for MIM, 0.08 for VQ-KD)."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of a crop."""
    interpolation: str = "bicubic"
    """How a crop is resized: bicubic, bilinear or lanczos."""
    hflip_prob: float = 0.5
    """Share of views that are mirrored."""
    color_jitter: float = 0.0
    """Brightness, contrast and saturation factors are drawn from [1 - j, 1 + j]; 0 is off."""
    views_per_image: int = 1
    """Stored views of each image; 0 draws a new view in every epoch (online only)."""
    center_first: bool = False
    """View 0 is the plain centre crop."""
    jpeg_quality: int = 95
    """Quality of a stored crop."""
    seed: int = 0
    """Draws other views when changed."""

    def __post_init__(self) -> None:
        (low, high), (narrow, wide), side = self.scale, self.ratio, self.image_size
        rules = {
            "image_size": (side is None or 1 <= side <= 16384, "give 1 to 16384 pixels"),
            "scale": (0 < low <= high <= 1, "give shares of the area, 0 < smallest <= largest <= 1"),
            "ratio": (0 < narrow <= wide < math.inf, "give two widths / heights, 0 < smallest <= largest"),
            "interpolation": (self.interpolation in _RESAMPLING, f"give one of {', '.join(_RESAMPLING)}"),
            "hflip_prob": (0 <= self.hflip_prob <= 1, "give 0 to 1"),
            "color_jitter": (0 <= self.color_jitter <= 1, "give 0 to 1"),
            "views_per_image": (0 <= self.views_per_image <= 100, "give 0 to 100"),
            "jpeg_quality": (1 <= self.jpeg_quality <= 100, "give 1 to 100"),
            "seed": (0 <= self.seed < 1 << 63, "give 0 to 2^63 - 1"),
        }
        for name, (holds, mend) in rules.items():
            if not holds:
                raise InputError(f"views.{name} is {getattr(self, name)}; {mend}")

    @property
    def side(self) -> int:
        """Side of a view in pixels, once it is known."""
        if self.image_size is None:
            raise ValueError("this policy has no image size yet: resolve() it with the tokenizer's")
        return self.image_size

    def resolve(self, image_size: int) -> ViewPolicy:
        """The same policy at the size of the tokenizer; InputError when it was given another."""
        if self.image_size not in (None, image_size):
            raise InputError(
                f"views.image_size is {self.image_size}, but the tokenizer reads {image_size} pixels; "
                "leave views.image_size out, or use another tokenizer"
            )
        return dataclasses.replace(self, image_size=image_size)


def view_at(policy: ViewPolicy, sample_id: int, index: int, *, height: int, width: int) -> View:
    """View `index` of an image of height x width pixels; the same arguments always give the same view.

    The crop follows the official rule (reference §4): ten tries with an area drawn from U(scale) and a
    log-uniform ratio, then the largest centred box within `ratio`. Random numbers are addressed, not drawn
    in turn (Philox, key (seed, sample_id), counter (0, index, stream, 0)), and every decision has words of
    its own, so switching the jitter on moves no crop.
    """
    if policy.center_first and index == 0:
        return center_view(policy, height=height, width=width)
    words = philox((policy.seed, sample_id), (0, index, _VIEW_STREAM, 0), 8 + 4 * _TRIES).tolist()
    return View(
        index=index,
        crop=_random_crop(policy, words[8:], height, width),
        hflip=_unit(words[0]) < policy.hflip_prob,
        jitter=_random_jitter(policy.color_jitter, words[1:7]) if policy.color_jitter > 0 else None,
        image_size=policy.side,
    )


def center_view(policy: ViewPolicy, *, height: int, width: int, fraction: float = CENTER_FRACTION) -> View:
    """The evaluation view, index 0: the centred square of `fraction` x the shorter side.

    DEVIATION: Resize(256) and CenterCrop(224) in one resize of a box of whole pixels; the same region to
    within a pixel, at every image size.
    """
    side = max(1, round(fraction * min(height, width)))
    crop = CropBox(top=(height - side) // 2, left=(width - side) // 2, height=side, width=side)
    return View(index=0, crop=crop, hflip=False, jitter=None, image_size=policy.side)


def render(image: np.ndarray, view: View, interpolation: str) -> np.ndarray:
    """The pixels of a view, uint8 [S, S, 3], from the decoded image, uint8 [H, W, 3].

    Jitter on the full image (its contrast step uses the mean of the whole image), then the crop, one resize
    and the flip. Cropping comes before resizing, as in torchvision: `resize(box=)` would let pixels outside
    the box into its border.
    DEVIATION: the official code flips the image before it draws the box. Mirroring last gives the same
    distribution of views, on a smaller array, and keeps boxes in the coordinates of the decoded image.
    """
    crop = view.crop
    height, width = image.shape[:2]
    if min(crop.top, crop.left) < 0 or crop.top + crop.height > height or crop.left + crop.width > width:
        raise ValueError(f"{crop} lies outside an image of {height} x {width} pixels")
    if view.jitter is not None:
        image = apply_jitter(image, view.jitter)
    box = image[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    size = (view.image_size, view.image_size)
    resized = np.asarray(Image.fromarray(box).resize(size, _RESAMPLING[interpolation]))
    return np.ascontiguousarray(resized[:, ::-1] if view.hflip else resized)


def apply_jitter(image: np.ndarray, jitter: Jitter) -> np.ndarray:
    """The image, uint8 [H, W, 3], after the three colour factors in their order, as in torchvision."""
    pixels = Image.fromarray(image)
    for step in jitter.order:
        match step:
            case 0:
                pixels = ImageEnhance.Brightness(pixels).enhance(jitter.brightness)
            case 1:
                pixels = ImageEnhance.Contrast(pixels).enhance(jitter.contrast)
            case _:
                pixels = ImageEnhance.Color(pixels).enhance(jitter.saturation)
    return np.asarray(pixels)


def encode_crop(pixels: np.ndarray, quality: int) -> bytes:
    """A crop, uint8 [S, S, 3], as a baseline JPEG with 4:2:0 chroma: equal pixels give equal bytes."""
    encoded = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality=quality, colorspace="RGB", colorsubsampling="420", fastdct=False
    )
    return bytes(cast(bytes, encoded))


def decode_crop(data: bytes | memoryview, out: np.ndarray | None = None) -> np.ndarray:
    """The pixels of a stored crop, uint8 [S, S, 3]; ValueError when the bytes are damaged.

    `out`, contiguous uint8, gets the pixels where they fit into it, and the result is a view of it.
    Exact mode: the fast DCT and fast upsampling change pixels, and the codes belong to exactly these.
    """
    return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=False, fastupsample=False, buffer=out)


def _random_crop(policy: ViewPolicy, words: list[int], height: int, width: int) -> CropBox:
    log_low, log_high = math.log(policy.ratio[0]), math.log(policy.ratio[1])
    for attempt in range(_TRIES):
        area_word, ratio_word, top_word, left_word = words[4 * attempt : 4 * attempt + 4]
        low, high = policy.scale
        area = (low + (high - low) * _unit(area_word)) * height * width
        ratio = math.exp(log_low + (log_high - log_low) * _unit(ratio_word))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        # A tiny image can round to nothing, which the official code would fail to resize.
        if 1 <= crop_width <= width and 1 <= crop_height <= height:
            return CropBox(
                top=_below(top_word, height - crop_height + 1),
                left=_below(left_word, width - crop_width + 1),
                height=crop_height,
                width=crop_width,
            )
    crop_height, crop_width = height, width
    if width / height < policy.ratio[0]:
        crop_height = max(1, min(height, round(width / policy.ratio[0])))
    elif width / height > policy.ratio[1]:
        crop_width = max(1, min(width, round(height * policy.ratio[1])))
    return CropBox(
        top=(height - crop_height) // 2, left=(width - crop_width) // 2, height=crop_height, width=crop_width
    )


def _random_jitter(strength: float, words: list[int]) -> Jitter:
    factors = [1 + strength * (2 * _unit(word) - 1) for word in words[:3]]
    first, second, third = sorted(range(3), key=lambda step: words[3 + step])
    return Jitter(
        brightness=factors[0], contrast=factors[1], saturation=factors[2], order=(first, second, third)
    )


def _unit(word: int) -> float:
    """A 64-bit word as a number in [0, 1)."""
    return (word >> 11) * 2.0**-53


def _below(word: int, bound: int) -> int:
    """A 64-bit word as a number in range(bound)."""
    return (word * bound) >> 64

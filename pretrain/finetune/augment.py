"""Augmentation of fine-tuning (Table 10): RandAugment, random erasing, Mixup, CutMix, label smoothing.

The operations, their strengths and the order of their draws are timm's, and so equal timm's for equal random
numbers. timm draws from the global generators of the process, which all decoding threads share; here every
image and every batch has generators of its own, so that what comes out is a pure function of (seed, epoch,
sample), whatever the number of threads.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp, rand_augment_transform
from timm.data.auto_augment import RandAugment as TimmRandAugment
from timm.data.mixup import mixup_target
from torch import Tensor

from pipeline.draws import philox
from pipeline.errors import InputError

Rgb = tuple[float, float, float]

ERASED_AREA = (0.02, 1 / 3)
ERASED_ASPECT = (0.3, 1 / 0.3)
ERASE_TRIES = 10

_FULL_LEVEL = 10.0  # timm's magnitudes run from 0 to 10

# Counter words, one per kind of draw: no two of them share random numbers.
_RAND_STREAM = 0x72616E64  # "rand"
_ERASE_STREAM = 0x65726173  # "eras"
_MIX_STREAM = 0x6D697878  # "mixx"

# Shapes below: B images, S pixels a side, C classes.


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Changes to crops and labels in training. Defaults: Table 10."""

    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    """RandAugment in timm's notation: magnitude 9 with a standard deviation of 0.5; null leaves it out."""
    erase_prob: float = 0.25
    """Share of images in which a rectangle becomes noise."""
    mixup: float = 0.8
    """Mixup's alpha; 0 is off."""
    cutmix: float = 1.0
    """CutMix's alpha; 0 is off."""
    mix_prob: float = 1.0
    """Share of draws that mix at all."""
    switch_prob: float = 0.5
    """Share of those that are CutMix where both are on."""
    mix_images: int = 128
    """Images that share one draw, as those of one GPU do in the official recipes."""
    label_smoothing: float = 0.1
    """Share of every label that is spread over all classes."""

    def __post_init__(self) -> None:
        for name in ("erase_prob", "mix_prob", "switch_prob"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"augment.{name} is {getattr(self, name)}; give 0 to 1")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise InputError(f"augment.label_smoothing is {self.label_smoothing}; give 0 up to below 1")
        if min(self.mixup, self.cutmix) < 0.0 or self.mix_images < 1:
            raise InputError(
                f"augment.mixup {self.mixup} and augment.cutmix {self.cutmix} must not be negative, "
                f"augment.mix_images {self.mix_images} at least 1"
            )
        if self.rand_augment is not None:
            _parse(self.rand_augment)


# ------------------------------------------------------------------------------------------------ RandAugment


class RandAugment:
    """timm's RandAugment as an `Augment` of the reader: (crop, sample id, epoch) -> crop, from any thread."""

    def __init__(self, spec: str, *, mean: Rgb, seed: int) -> None:
        self._seed = seed
        # Pixels that move out of an image leave its mean behind.
        fill = tuple(min(255, round(255 * channel)) for channel in mean)
        parsed = _parse(spec, fill)
        self._ops, self._weights = parsed.ops, parsed.choice_weights
        self._num_layers = parsed.num_layers

    def __call__(self, pixels: np.ndarray, sample_id: int, epoch: int) -> np.ndarray:
        """A crop, uint8 [S, S, 3], changed by the draws of this sample in this epoch."""
        draws, choices = _generators(self._seed, sample_id, epoch, _RAND_STREAM)
        return np.asarray(self.apply(Image.fromarray(pixels), draws, choices))

    def apply(self, image: Image.Image, draws: random.Random, choices: np.random.RandomState) -> Image.Image:
        """The image after operations chosen by `choices`, whether and how strongly each by `draws`."""
        replace = self._weights is None
        for i in choices.choice(len(self._ops), self._num_layers, replace=replace, p=self._weights):
            op = self._ops[i]
            if op.prob < 1.0 and draws.random() > op.prob:
                continue
            level = float(op.magnitude)
            if op.magnitude_std == math.inf:
                level = draws.uniform(0.0, level)
            elif op.magnitude_std > 0:
                level = draws.gauss(level, op.magnitude_std)
            level = max(0.0, min(level, op.magnitude_max or _FULL_LEVEL))
            image = op.aug_fn(image, *_arguments(op, level, draws), **op.kwargs)
        return image


def _arguments(op: AugmentOp, level: float, draws: random.Random) -> tuple[Any, ...]:
    """An operation's arguments at this level; timm's functions, but for those that draw a sign."""

    def signed(reach: float) -> float:
        value = level / _FULL_LEVEL * reach
        return -value if draws.random() > 0.5 else value

    match op.name:
        case "Rotate":
            return (signed(30.0),)
        case "ShearX" | "ShearY":
            return (signed(0.3),)
        case "TranslateXRel" | "TranslateYRel":
            return (signed(0.45),)
        case "ColorIncreasing" | "ContrastIncreasing" | "BrightnessIncreasing" | "SharpnessIncreasing":
            return (max(0.1, 1.0 + signed(0.9)),)
        case "Posterize" | "PosterizeIncreasing":
            # DEVIATION: one bit stays. At full level timm keeps none, which older Pillows turned into a black
            # image and newer ones refuse.
            return (max(1, *op.level_fn(level, op.hparams)),)
        case _:
            return () if op.level_fn is None else op.level_fn(level, op.hparams)


def _parse(spec: str, fill: tuple[int, ...] = (128, 128, 128)) -> TimmRandAugment:
    """timm's reading of a specification; InputError for what it cannot read."""
    try:
        return rand_augment_transform(spec, {"img_mean": fill, "interpolation": Image.Resampling.BICUBIC})
    except (AssertionError, ValueError):
        raise InputError(
            f"augment.rand_augment is {spec!r}, which timm cannot read; give rand-m9-mstd0.5-inc1, or null"
        ) from None


# ------------------------------------------------------------------------------------------------ erasing


def erase_each(pixels: Tensor, sample_ids: np.ndarray, epoch: int, *, prob: float, seed: int) -> None:
    """Random erasing in place: normalised pixels [B, 3, S, S], each image by draws of its own."""
    if prob == 0.0:
        return
    for image, sample_id in zip(pixels, sample_ids.tolist(), strict=True):
        first, second = _words(seed, sample_id, epoch, _ERASE_STREAM)
        draws = random.Random(first)
        if draws.random() <= prob:
            erase(image, draws, torch.Generator(image.device).manual_seed(second >> 1))


def erase(image: Tensor, draws: random.Random, noise: torch.Generator) -> None:
    """Turn a rectangle of a normalised image [3, H, W] into normal noise, in place (timm's `pixel` mode).

    Area and aspect are drawn up to ten times, until the rectangle fits.
    """
    _, height, width = image.shape
    log_low, log_high = (math.log(bound) for bound in ERASED_ASPECT)
    for _ in range(ERASE_TRIES):
        area = draws.uniform(*ERASED_AREA) * height * width
        aspect = math.exp(draws.uniform(log_low, log_high))
        rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if rows < height and columns < width:
            top, left = draws.randint(0, height - rows), draws.randint(0, width - columns)
            box = image[:, top : top + rows, left : left + columns]
            box.copy_(torch.randn(box.shape, generator=noise, dtype=image.dtype, device=image.device))
            return


# ------------------------------------------------------------------------------------------------ mixing


@dataclass(frozen=True)
class MixedBatch:
    """Normalised images [B, 3, S, S], and how much of each class is in them: targets [B, C]."""

    pixels: Tensor
    targets: Tensor


def mix_batch(
    pixels: Tensor,
    labels: Tensor,
    num_classes: int,
    config: AugmentConfig,
    *,
    seed: int,
    epoch: int,
    position: int,
    rank: int,
) -> MixedBatch:
    """One rank's part of the global batch at `position`, mixed in groups of `mix_images`, in place."""
    targets = []
    for first in range(0, len(pixels), config.mix_images):
        rows = slice(first, first + config.mix_images)
        _, choices = _generators(seed, position, epoch, _MIX_STREAM, (rank << 32) + first)
        targets.append(mix(pixels[rows], labels[rows], num_classes, config, choices))
    return MixedBatch(pixels, torch.cat(targets))


def mix(
    pixels: Tensor, labels: Tensor, num_classes: int, config: AugmentConfig, choices: np.random.RandomState
) -> Tensor:
    """Mix each image with its mirror image in the batch, in place, and return the targets [B, C].

    Mixup adds pixels [B, 3, S, S] weighted, CutMix pastes a box; one weight for the batch. `labels` are
    int64 [B]. Without mixing, the targets are the smoothed labels.
    """
    weight = _mix_pixels(pixels, config, choices) if config.mixup or config.cutmix else 1.0
    return mixup_target(labels, num_classes, weight, config.label_smoothing)


def _mix_pixels(pixels: Tensor, config: AugmentConfig, choices: np.random.RandomState) -> float:
    """Mix in place; returns the share that every image keeps of itself."""
    if choices.rand() >= config.mix_prob:
        return 1.0
    cut = config.cutmix > 0 and (config.mixup == 0 or choices.rand() < config.switch_prob)
    alpha = config.cutmix if cut else config.mixup
    weight = float(choices.beta(alpha, alpha))
    partners = pixels.flip(0)
    if not cut:
        pixels.mul_(weight).add_(partners, alpha=1.0 - weight)
        return weight
    height, width = pixels.shape[-2:]
    side = math.sqrt(1.0 - weight)
    rows, columns = int(height * side), int(width * side)
    y, x = int(choices.randint(height)), int(choices.randint(width))
    top, bottom = max(y - rows // 2, 0), min(y + (rows + 1) // 2, height)
    left, right = max(x - columns // 2, 0), min(x + (columns + 1) // 2, width)
    pixels[:, :, top:bottom, left:right] = partners[:, :, top:bottom, left:right]
    # The border may have cut the box.
    return 1.0 - (bottom - top) * (right - left) / (height * width)


# ------------------------------------------------------------------------------------------------ draws


def _words(seed: int, number: int, epoch: int, stream: int, place: int = 0) -> list[int]:
    """Two 64-bit words for one sample, or one batch, of an epoch."""
    return philox((seed, number), (0, epoch, stream, place), 2).tolist()


def _generators(
    seed: int, number: int, epoch: int, stream: int, place: int = 0
) -> tuple[random.Random, np.random.RandomState]:
    """The two kinds of generator that timm draws from, for one sample or one batch of an epoch."""
    first, second = _words(seed, number, epoch, stream, place)
    state = np.array([second & 0xFFFFFFFF, second >> 32], dtype=np.uint32)
    return random.Random(first), np.random.RandomState(state)

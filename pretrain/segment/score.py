"""Scores of predicted label maps (mIoU, Table 11), and pictures of them."""

from __future__ import annotations

import colorsys
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pretrain.segment.label_maps import IGNORED


@dataclass(frozen=True, kw_only=True)
class Score:
    """Scores of predictions over all labelled pixels; shares, not percent. None where a class has none.

    iou: intersection over union per class, None where it is neither labelled nor predicted;
    accuracy: share of a class's pixels that are predicted so; pixels: share of all labelled pixels.
    """

    num_images: int
    iou: tuple[float | None, ...]
    accuracy: tuple[float | None, ...]
    pixels: tuple[float, ...]
    pixel_accuracy: float

    @staticmethod
    def of(confusion: np.ndarray, num_images: int) -> Score:
        """From counts [C, C] of labelled pixels, rows by label and columns by prediction."""
        right, labelled = np.diag(confusion), confusion.sum(axis=1)
        union = labelled + confusion.sum(axis=0) - right
        return Score(
            num_images=num_images,
            iou=_ratios(right, union),
            accuracy=_ratios(right, labelled),
            pixels=tuple((labelled / labelled.sum()).tolist()),
            pixel_accuracy=float(right.sum() / labelled.sum()),
        )

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Score:
        """The score that `to_json` wrote."""
        fields: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in values.items()}
        return Score(**fields)

    def to_json(self) -> dict[str, Any]:
        """The score for the artifact's header."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}

    @property
    def miou(self) -> float:
        """Mean IoU over the classes that have one."""
        return _mean(self.iou)

    @property
    def mean_accuracy(self) -> float:
        """Mean accuracy over the labelled classes."""
        return _mean(self.accuracy)

    def figures(self) -> dict[str, float]:
        """The figures of metrics.jsonl."""
        return {name: getattr(self, name) for name in ("miou", "mean_accuracy", "pixel_accuracy")}

    def table(self, names: Sequence[str]) -> str:
        """Scores by class, for people."""
        width = max(len(name) for name in names)
        lines = [f"{'':<{width}}      IoU  accuracy  of pixels"]
        for name, iou, accuracy, pixels in zip(names, self.iou, self.accuracy, self.pixels, strict=True):
            shown = "".join(f"{'-' if x is None else f'{x:.4f}':>10}" for x in (iou, accuracy, pixels))
            lines.append(f"{name:<{width}}{shown}")
        lines.append(
            f"{self.num_images:,} images, aAcc {self.pixel_accuracy:.4f}, mAcc {self.mean_accuracy:.4f}, "
            f"mIoU over {sum(x is not None for x in self.iou)} of {len(self.iou)} classes"
        )
        return "\n".join(lines)


def _ratios(parts: np.ndarray, wholes: np.ndarray) -> tuple[float | None, ...]:
    return tuple(
        None if whole == 0 else float(part / whole) for part, whole in zip(parts, wholes, strict=True)
    )


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known)


def confusion_matrix(classes: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Counts int64 [C, C] of pixels by class (rows) and prediction, int64 of one shape; not IGNORED."""
    labelled = classes != IGNORED
    pairs = classes[labelled] * num_classes + predicted[labelled]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def picture(image: np.ndarray, classes: np.ndarray, predicted: np.ndarray, num_classes: int) -> bytes:
    """PNG of an image uint8 [H, W, 3], its classes and the predicted ones [H, W], side by side."""
    colours = class_colours(num_classes)
    gap = np.full((image.shape[0], 4, 3), 255, np.uint8)
    row = np.concatenate([image, gap, colours[classes], gap, colours[predicted]], axis=1)
    file = io.BytesIO()
    Image.fromarray(row).save(file, "PNG")
    return file.getvalue()


def class_colours(num_classes: int) -> np.ndarray:
    """Colours uint8 [C + 1, 3], the last one black: index IGNORED finds it. Hues a golden section apart."""
    golden = (math.sqrt(5) - 1) / 2
    tones = ((0.65, 0.95), (0.9, 0.75), (0.4, 0.85))
    colours = [colorsys.hsv_to_rgb(i * golden % 1, *tones[i % 3]) for i in range(num_classes)]
    return np.array([*colours, (0.0, 0.0, 0.0)]).dot(255).round().astype(np.uint8)

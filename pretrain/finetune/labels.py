"""The classes of a classifier that is fine-tuned: read off all labels before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.errors import InputError
from shards.dataset.dataset import Dataset
from shards.dataset.labels import UNLABELLED, read_labels, translate_labels


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The classes that are told apart, and what val calls them."""

    num_classes: int
    class_names: tuple[str, ...] | None
    """By label in the training images; None where they have none."""
    val_class_names: tuple[str, ...] | None


def check_labels(train: Dataset, val: Dataset | None) -> Labels:
    """The classes of the training images, after a look at all labels of both.

    InputError for an empty dataset, an image without a label, a label that is out of range, and a class that
    only val has.
    """
    names = train.manifest.class_names
    labels = _labels(train, None if names is None else len(names))
    num_classes = int(labels.max()) + 1 if names is None else len(names)
    if num_classes < 2:
        raise InputError(f"all images of {train.url} are of one class; there is nothing to learn")
    val_names = None if val is None else val.manifest.class_names
    if val is not None:
        labels = _labels(val, num_classes if names is None or val_names is None else len(val_names))
        translate_labels(labels, val_names, names)
    return Labels(num_classes=num_classes, class_names=names, val_class_names=val_names)


def _labels(dataset: Dataset, num_classes: int | None) -> np.ndarray:
    """Labels int64 [N] of all images, 0 to num_classes - 1; InputError for others, or where N is 0.

    Without num_classes, the largest label is that of the last class.
    """
    labels = read_labels(dataset)
    if not len(labels):
        raise InputError(f"{dataset.url} holds no images; prepare it from a folder that has some")
    if missing := int((labels == UNLABELLED).sum()):
        raise InputError(
            f"{missing:,} of the {len(labels):,} images of {dataset.url} have no label; prepare them from "
            "class folders, or leave them out"
        )
    low, high = int(labels.min()), int(labels.max())
    num_classes = high + 1 if num_classes is None else num_classes
    if low < 0 or high >= num_classes:
        raise InputError(
            f"an image of {dataset.url} has label {low if low < 0 else high}, but there are {num_classes} "
            f"classes, 0 to {num_classes - 1}; prepare the images again with the labels of one numbering"
        )
    return labels

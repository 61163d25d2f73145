"""Class labels of a dataset's images, and how two datasets that number their classes separately agree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.errors import InputError
from shards.dataset.dataset import Dataset

UNLABELLED = -1
"""Label of an image that has none."""


def read_labels(dataset: Dataset) -> np.ndarray:
    """Labels int64 [N] of a dataset's images, -1 where there is none, from its indexes alone."""
    indexes = (dataset.read_index(0, number, ("label",)) for number in range(dataset.num_shards))
    columns = (index.column("label") for index in indexes)
    parts = [np.asarray(column.fill_null(UNLABELLED).to_pylist(), dtype=np.int64) for column in columns]
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])


def translate_labels(
    labels: np.ndarray, names: Sequence[str] | None, into: Sequence[str] | None
) -> np.ndarray:
    """Labels int64 [n] that index `names` as labels that index `into`; unchanged where either is not named.

    Two datasets number their classes separately: a class folder missing in one shifts all that follow.
    Images without a label keep -1. InputError names a class that occurs in `labels` but not in `into`.
    """
    if names is None or into is None or list(names) == list(into):
        return labels
    place = {name: i for i, name in enumerate(into)}
    for label in np.unique(labels[labels != UNLABELLED]).tolist():
        if names[label] not in place:
            raise InputError(
                f"val has images of class {names[label]!r}, which train lacks; give two parts of one dataset"
            )
    table = np.array([*(place.get(name, UNLABELLED) for name in names), UNLABELLED], dtype=np.int64)
    return table[labels]

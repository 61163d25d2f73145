from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import InputError
from shards.dataset.dataset import open_dataset
from shards.dataset.labels import read_labels, translate_labels


def test_labels_come_in_the_order_of_ids(small_dataset: Callable[..., Any], tmp_path: Path) -> None:
    small_dataset(kind="images", first_ids=(0, 4, 7, 12), views=1).write(str(tmp_path))
    # Sample 5 is rejected; every fifth of the others has no label.
    expected = [-1 if i % 5 == 4 else i % 3 for i in range(12) if i != 5]
    assert read_labels(open_dataset(str(tmp_path), "images")).tolist() == expected


def test_labels_are_matched_by_class_name() -> None:
    labels = np.array([0, 1, 1, -1])
    assert translate_labels(labels, ["ant", "cat"], ["ant", "bee", "cat"]).tolist() == [0, 2, 2, -1]
    assert translate_labels(labels, ["ant", "bee"], ["ant", "bee"]).tolist() == labels.tolist()
    assert translate_labels(labels, None, ["ant", "bee"]).tolist() == labels.tolist()
    # A class without images may be unknown; one with images may not.
    assert translate_labels(labels, ["ant", "bee", "dog"], ["bee", "ant"]).tolist() == [1, 0, 0, -1]
    with pytest.raises(InputError, match="'dog'"):
        translate_labels(labels, ["ant", "dog"], ["ant", "bee"])

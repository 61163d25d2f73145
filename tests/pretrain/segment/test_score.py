from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.segment.label_maps import IGNORED
from pretrain.segment.score import Score, class_colours, confusion_matrix, picture


def test_score_equals_a_slow_count_of_pixels() -> None:
    rng = np.random.default_rng(0)
    # Class 3 is neither labelled nor predicted, class 4 only predicted, class 2 never found.
    classes = rng.choice([0, 1, 2, IGNORED], (2, 9, 11))
    predicted = rng.choice([0, 1, 4], (2, 9, 11))
    confusion = sum(
        confusion_matrix(torch.from_numpy(a), torch.from_numpy(b), 5)
        for a, b in zip(classes, predicted, strict=True)
    )
    assert isinstance(confusion, torch.Tensor)
    score = Score.of(confusion.numpy(), 2)
    both = zip(classes.ravel().tolist(), predicted.ravel().tolist(), strict=True)
    pixels = [(a, b) for a, b in both if a != IGNORED]
    ious = []
    for c in range(5):
        union = sum(a == c or b == c for a, b in pixels)
        ious.append(sum(a == c and b == c for a, b in pixels) / union if union else None)
    assert score.iou == pytest.approx(ious, nan_ok=True) and score.iou[3] is None and score.iou[4] == 0.0
    assert score.miou == pytest.approx(sum(x for x in ious if x is not None) / 4)
    assert score.pixel_accuracy == pytest.approx(sum(a == b for a, b in pixels) / len(pixels))
    found = [sum(a == b == c for a, b in pixels) / sum(a == c for a, _ in pixels) for c in range(3)]
    assert score.accuracy[:3] == pytest.approx(found) and score.accuracy[3:] == (None, None)
    assert score.mean_accuracy == pytest.approx(sum(found) / 3)
    assert score.pixels == pytest.approx([sum(a == c for a, _ in pixels) / len(pixels) for c in range(5)])
    assert Score.from_json(json.loads(json.dumps(score.to_json()))) == score
    table = score.table(["a", "b", "c", "d", "e"])
    assert "mIoU over 4 of 5 classes" in table and f"{score.iou[0]:.4f}" in table.splitlines()[1]


def test_picture_shows_image_labels_and_prediction() -> None:
    colours = class_colours(150)
    assert len({tuple(colour) for colour in colours}) == 151 and colours[IGNORED].tolist() == [0, 0, 0]
    image = np.full((4, 6, 3), 77, np.uint8)
    classes, predicted = np.full((4, 6), 3), np.full((4, 6), 8)
    classes[0, 0] = IGNORED
    shown = np.asarray(Image.open(io.BytesIO(picture(image, classes, predicted, 150))))
    assert shown.shape == (4, 6 * 3 + 2 * 4, 3)
    assert (shown[:, :6] == 77).all() and (shown[0, 10] == 0).all()
    assert (shown[1:, 10:16] == colours[3]).all() and (shown[:, 20:] == colours[8]).all()

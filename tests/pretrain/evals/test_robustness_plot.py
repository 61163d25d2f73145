"""The picture has a panel for what there is, and shows the values it was given."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from pretrain.evals.robustness_plot import Curve, Point, draw


def point(value: float, label: str = "x", clean: float | None = None) -> Point:
    return Point(label=label, value=value, low=value - 0.02, high=value + 0.02, clean=clean)


def drawn(sets: list[Point], curves: list[Curve]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(draw("a title", point(0.9), sets, curves))).convert("RGB"))


def test_a_panel_for_the_sets_one_for_the_corruptions_or_both() -> None:
    sets = [point(0.5, "sketch", clean=0.8)]
    curves = [Curve(label="jpeg", severities=(1, 3), points=[point(0.7), point(0.4)])]
    widths = [drawn(*shown).shape[1] for shown in ((sets, []), ([], curves), (sets, curves))]
    assert widths[2] == sum(widths[:2])


def test_a_bar_is_as_high_as_its_value() -> None:
    blue = (0, 114, 178)
    areas = [int((drawn([point(value)], []) == blue).all(axis=2).sum()) for value in (0.25, 0.5, 0.75)]
    assert np.allclose([areas[1] / areas[0], areas[2] / areas[0]], [2, 3], rtol=0.05)

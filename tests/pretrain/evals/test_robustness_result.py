"""The interval of a difference is the published one, and the table says what was found."""

from __future__ import annotations

import numpy as np
import pytest

from pretrain.evals.robustness_result import RobustnessResult, Row, difference_interval


def test_a_difference_of_independent_shares() -> None:
    """Newcombe 1998, table II, method 10, his examples (a) and (h)."""
    low, high = difference_interval(56, 70, 48, 80)
    assert (low, high) == (pytest.approx(0.0524, abs=1e-4), pytest.approx(0.3339, abs=1e-4))
    low, high = difference_interval(10, 10, 0, 10)
    assert (low, high) == (pytest.approx(0.6075, abs=1e-4), pytest.approx(1.0, abs=1e-4))
    # It covers: of many draws of equal shares about 95 % hold zero.
    rng = np.random.default_rng(0)
    draws = rng.binomial(200, 0.3, (2000, 2)).tolist()
    inside = sum(low <= 0 <= high for low, high in (difference_interval(a, 200, b, 200) for a, b in draws))
    assert 0.935 < inside / 2000 < 0.965


def test_the_table_says_what_was_found() -> None:
    row = Row(
        name="clean", corruption=None, severity=None, num_images=1000, num_classes=10, num_answers=10,
        top1=0.9, low=0.88, high=0.92, top5=0.99, difference=None,
    )  # fmt: skip
    text = RobustnessResult(
        image_size=32, center_fraction=0.875, interpolation="bicubic", strengths=None, sets=(), rows=(row,)
    ).table()
    assert "90.0 %   88.0 % to 92.0 %" in text and "99.0 %" in text and "mean" not in text

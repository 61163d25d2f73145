from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pretrain.evals.intervals import Difference, compare, difference_to_clean, wilson_interval


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (1, 10), (5, 10), (37, 400), (400, 400), (1, 1)])
def test_wilson_interval_solves_its_defining_equation(successes, trials):
    """Its ends are the shares p from which the observed one lies 1.96 standard errors *of p* away."""
    low, high = wilson_interval(successes, trials)
    share = successes / trials
    assert 0.0 <= low <= share <= high <= 1.0
    for end in (low, high):
        if 0.0 < end < 1.0:
            assert abs(share - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / trials))


def test_paired_interval_covers_the_true_difference_and_is_tighter_than_two_intervals():
    rng = np.random.default_rng(0)
    trials, images, covered = 400, 150, 0
    for _ in range(trials):
        difficulty = rng.random(images)
        ours, theirs = difficulty < 0.6, difficulty + rng.normal(0, 0.05, images) < 0.5
        truth = 0.1  # by symmetric noise, far from the ends
        found = compare(torch.from_numpy(ours), torch.from_numpy(theirs), of="a", over="b")
        assert found.difference == pytest.approx(ours.mean() - theirs.mean())
        covered += found.low <= truth <= found.high
        apart = sum(np.diff(wilson_interval(int(x.sum()), images))[0] for x in (ours, theirs))
        assert found.high - found.low < 0.7 * apart
    assert 0.92 <= covered / trials <= 0.99


@pytest.mark.parametrize(
    ("only_ours", "only_theirs", "verdict"),
    [(30, 5, "gain"), (5, 30, "loss"), (12, 9, "within"), (0, 0, "within")],
)
def test_verdict_needs_an_interval_without_zero(only_ours, only_theirs, verdict):
    ours = torch.tensor([True] * only_ours + [False] * only_theirs + [True] * 100)
    theirs = torch.tensor([False] * only_ours + [True] * only_theirs + [True] * 100)
    found = compare(ours, theirs, of="a", over="b")
    assert found.verdict == verdict
    assert found.low <= found.difference <= found.high


def difference(right: int, num: int, clean_right: int, num_clean: int, *, paired: bool = False) -> Difference:
    hits = (torch.arange(total) < some for some, total in ((right, num), (clean_right, num_clean)))
    found = difference_to_clean(*hits, paired=paired)
    assert found is not None
    return found


def test_a_difference_of_independent_shares():
    """Newcombe 1998, table II, method 10, his examples (a) and (h)."""
    for counts, low, high in (((56, 70, 48, 80), 0.0524, 0.3339), ((10, 10, 0, 10), 0.6075, 1.0)):
        found = difference(*counts)
        assert (found.low, found.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
    # It covers: of many draws of equal shares about 95 % hold zero.
    draws = np.random.default_rng(0).binomial(200, 0.3, (2000, 2)).tolist()
    inside = sum(x.low <= 0 <= x.high for x in (difference(a, 200, b, 200) for a, b in draws))
    assert 0.935 < inside / 2000 < 0.965


def test_a_difference_of_pairs():
    found, apart = (difference(30, 50, 40, 50, paired=paired) for paired in (True, False))
    pairs = compare(torch.arange(50) < 30, torch.arange(50) < 40, of="a", over="b")
    assert (found.low, found.high) == (pairs.low, pairs.high)
    assert found.difference == pytest.approx(-0.2) == apart.difference
    assert found.in_words().endswith("from 80.0 %, in pairs") and "50 clean images" in apart.in_words()
    assert difference_to_clean(torch.ones(3).bool(), torch.ones(0).bool(), paired=False) is None

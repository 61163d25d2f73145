"""Confidence intervals of accuracies, and of the difference of two."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Z_95 = 1.959964  # two-sided 95 % of a normal distribution


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Accuracy of one classifier minus another's on the same images; the 95 % interval is for pairs."""

    of: str
    over: str
    difference: float
    low: float
    high: float

    @property
    def verdict(self) -> Literal["gain", "loss", "within"]:
        """What the interval allows to say; "within" when it holds zero."""
        if self.low > 0:
            return "gain"
        return "loss" if self.high < 0 else "within"


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson 1927): sound near 0 and 1 and for few trials."""
    share = successes / trials
    denominator = 1.0 + Z_95**2 / trials
    centre = (share + Z_95**2 / (2 * trials)) / denominator
    half = Z_95 / denominator * math.sqrt(share * (1 - share) / trials + Z_95**2 / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def compare(ours: Tensor, theirs: Tensor, *, of: str, over: str) -> Comparison:
    """Difference of two accuracies from per-image correctness, bool [n] each, on the same images.

    Interval for paired shares (Agresti and Min 2005: Wald with half an image added to each cell of the 2x2
    table). Pairing takes out how hard the images are, which two separate intervals would count twice.
    """
    num = len(ours)
    only_ours, only_theirs = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    b, c, n = only_ours + 0.5, only_theirs + 0.5, num + 2.0
    centre = (b - c) / n
    half = Z_95 * math.sqrt(b + c - (b - c) ** 2 / n) / n
    return Comparison(
        of=of,
        over=over,
        difference=(only_ours - only_theirs) / num,
        low=max(-1.0, centre - half),
        high=min(1.0, centre + half),
    )


def difference_interval(
    successes: int, trials: int, other_successes: int, other_trials: int
) -> tuple[float, float]:
    """95 % confidence interval of the first share minus the other, of independent images.

    Newcombe 1998, method 10: the two Wilson intervals, combined.
    """
    share, other = successes / trials, other_successes / other_trials
    low, high = wilson_interval(successes, trials)
    other_low, other_high = wilson_interval(other_successes, other_trials)
    difference = share - other
    return (
        difference - math.hypot(share - low, other_high - other),
        difference + math.hypot(high - share, other - other_low),
    )


def percent(share: float) -> str:
    """`12.3 %`."""
    return f"{100 * share:.1f} %"

"""Confidence intervals of accuracies, and of the difference of two."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Z_95 = 1.959964  # two-sided 95 % of a normal distribution


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Accuracy of one classifier minus another's on the same images, with its 95 % interval for pairs."""

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


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Accuracy minus that on clean images, with its 95 % interval; shares."""

    clean_top1: float
    num_clean: int
    difference: float
    low: float
    high: float
    paired: bool
    """The clean images are the originals of the others; else the two sets are independent."""

    def in_words(self) -> str:
        """`-3.0 points (95 %: -4.1 to -1.9) from 80.0 %, in pairs`."""
        how = "in pairs" if self.paired else f"{self.num_clean:,} clean images"
        return (
            f"{100 * self.difference:+.1f} points (95 %: {100 * self.low:+.1f} to {100 * self.high:+.1f}) "
            f"from {percent(self.clean_top1)}, {how}"
        )


def difference_to_clean(right: Tensor, clean_right: Tensor, *, paired: bool) -> Difference | None:
    """Difference from per-image correctness, bool [n] and bool [m]; None where there are no clean images.

    Interval of pairs as in `compare`; of independent images by Newcombe 1998, method 10, which combines the
    two Wilson intervals.
    """
    if not len(clean_right):
        return None
    share, clean = share_of(right), share_of(clean_right)
    if paired:
        pairs = compare(right, clean_right, of="shifted", over="clean")
        difference, low, high = pairs.difference, pairs.low, pairs.high
    else:
        difference = share - clean
        low, high = wilson_interval(int(right.sum()), len(right))
        clean_low, clean_high = wilson_interval(int(clean_right.sum()), len(clean_right))
        low = difference - math.hypot(share - low, clean_high - clean)
        high = difference + math.hypot(high - share, clean - clean_low)
    return Difference(
        clean_top1=clean, num_clean=len(clean_right), difference=difference, low=low, high=high, paired=paired
    )


def share_of(right: Tensor) -> float:
    """Share of images that are right, of bool [n]."""
    return right.double().mean().item()


def percent(share: float) -> str:
    """`12.3 %`."""
    return f"{100 * share:.1f} %"

"""What a robustness evaluation says: a row per set, corruption and severity, as a record and as a table."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from pretrain.evals.corruptions import StrengthTable
from pretrain.evals.intervals import wilson_interval

CLEAN = "clean"
"""Name of the row of the images without a shift."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Top-1 accuracy minus that on clean images of the same classes with the same answers allowed; shares.

    The 95 % interval is for pairs (`intervals.compare`) where the clean images are the originals of the
    shifted ones, else for two independent shares (Newcombe 1998).
    """

    clean_top1: float
    num_clean: int
    difference: float
    low: float
    high: float
    paired: bool


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the comparison: accuracies are shares, with the Wilson 95 % interval of top-1."""

    name: str
    """clean, the name of a set, or `contrast 3`."""
    corruption: str | None
    severity: int | None
    num_images: int
    num_classes: int
    """Classes of its images."""
    num_answers: int
    """Classes whose logits compete."""
    top1: float
    low: float
    high: float
    top5: float | None
    """None where no more than five classes compete."""
    difference: Difference | None
    """None for the clean images, and where these have no image of the row's classes."""


@dataclass(frozen=True, kw_only=True)
class SetAccount:
    """What became of the files of one set: those evaluated, and the rejected ones by reason."""

    name: str
    num_images: int
    rejected: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class RobustnessResult:
    """The comparison; the first row is that of the clean images."""

    image_size: int
    center_fraction: float
    interpolation: str
    strengths: StrengthTable | None
    """Which constants the corruptions have; None where nothing was corrupted."""
    sets: tuple[SetAccount, ...]
    rows: tuple[Row, ...]

    @property
    def mean_corrupted(self) -> float | None:
        """Top-1 accuracy, mean over all corruptions and severities."""
        found = [row.top1 for row in self.rows if row.corruption is not None]
        return sum(found) / len(found) if found else None

    def to_json(self) -> dict[str, Any]:
        """For the artifact's header."""
        return {**dataclasses.asdict(self), "mean_corrupted": self.mean_corrupted}

    def table(self) -> str:
        """For people."""
        width = max(len(row.name) for row in self.rows) + 2
        lines = [
            f"robustness: centre crops of {self.image_size} pixels a side, {self.center_fraction:.4g} of the "
            f"shorter side, {self.interpolation}",
            f"  {'':<{width}}{'images':>8}{'classes':>9}{'answers':>9}{'top-1':>9}   {'95 % interval':<18}"
            f"{'top-5':>8}   difference to clean images of the same classes",
        ]
        for row in self.rows:
            interval = f"{_percent(row.low)} to {_percent(row.high)}"
            top5 = "-" if row.top5 is None else _percent(row.top5)
            lines.append(
                f"  {row.name:<{width}}{row.num_images:>8,}{row.num_classes:>9,}{row.num_answers:>9,}"
                f"{_percent(row.top1):>9}   {interval:<18}{top5:>8}   {_in_words(row)}".rstrip()
            )
        lines.append("  answers: so many classes compete")
        if self.mean_corrupted is not None:
            lines.append(
                f"  mean over corruptions and severities: {_percent(self.mean_corrupted)} "
                f"(constants of {self.strengths})"
            )
        for account in self.sets:
            if account.rejected:
                reasons = ", ".join(f"{reason} {count:,}" for reason, count in account.rejected.items())
                lines.append(
                    f"  {account.name}: {sum(account.rejected.values()):,} files rejected when prepared, not "
                    f"evaluated ({reasons})"
                )
        return "\n".join(lines)


def _in_words(row: Row) -> str:
    found = row.difference
    if found is None:
        return "" if row.name == CLEAN else "no clean image of its classes"
    how = "in pairs" if found.paired else f"{found.num_clean:,} clean images"
    return (
        f"{100 * found.difference:+.1f} points (95 %: {100 * found.low:+.1f} to {100 * found.high:+.1f}) "
        f"from {_percent(found.clean_top1)}, {how}"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


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

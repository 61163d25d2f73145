"""The picture of a robustness evaluation: accuracy by set, and by corruption and severity.

Plain values go in, a PNG comes out; nothing here knows a model.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_COLORS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
)  # told apart by colour-blind eyes
_MARKERS = "osD^vP"
_CLEAN = "#555555"


@dataclass(frozen=True, kw_only=True)
class Point:
    """An accuracy with its interval, all shares."""

    label: str
    value: float
    low: float
    high: float
    clean: float | None = None
    """That on clean images of the same classes."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Accuracies of one corruption, by severity."""

    label: str
    severities: Sequence[int]
    points: Sequence[Point]


def draw(title: str, clean: Point, sets: Sequence[Point], curves: Sequence[Curve]) -> bytes:
    """A PNG with a panel for the sets and one for the corruptions, each where there are some."""
    panels = [bool(sets), bool(curves)]
    widths = [max(4.0, 2.2 + 0.9 * len(sets)), 6.2]
    ratios = [width for width, wanted in zip(widths, panels, strict=True) if wanted]
    figure = Figure(figsize=(sum(ratios), 4.6), layout="constrained")
    axes = figure.subplots(1, len(ratios), width_ratios=ratios, squeeze=False)[0].tolist()
    if sets:
        _draw_sets(axes.pop(0), clean, sets)
    if curves:
        _draw_curves(axes.pop(0), clean, curves)
    figure.suptitle("\n".join(textwrap.wrap(title, round(9 * sum(ratios)))), fontsize="medium")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


def _draw_sets(axes: Axes, clean: Point, sets: Sequence[Point]) -> None:
    shown = [clean, *sets]
    colors = [_CLEAN, *(_COLORS[0] for _ in sets)]
    axes.bar(range(len(shown)), [100 * one.value for one in shown], 0.6, color=colors)
    for place, one in enumerate(shown):
        _interval(axes, place, one, "black")
        axes.annotate(
            f"{100 * one.value:.1f}",
            (place, 100 * one.high),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
        )
    held = [(place, one.clean) for place, one in enumerate(shown) if one.clean is not None]
    if held:
        axes.hlines(
            [100 * value for _, value in held],
            [place - 0.4 for place, _ in held],
            [place + 0.4 for place, _ in held],
            color=_CLEAN,
            linestyle="--",
            label="clean images of the same classes",
        )
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize="small")
    axes.set_xticks(
        range(len(shown)),
        [one.label for one in shown],
        rotation=25 if len(sets) > 2 else 0,
        ha="right" if len(sets) > 2 else "center",
    )
    _label(axes)


def _draw_curves(axes: Axes, clean: Point, curves: Sequence[Curve]) -> None:
    axes.axhspan(100 * clean.low, 100 * clean.high, color=_CLEAN, alpha=0.15, linewidth=0)
    axes.axhline(100 * clean.value, color=_CLEAN, linestyle="--", label=f"clean, {100 * clean.value:.1f} %")
    for number, curve in enumerate(curves):
        color, marker = _COLORS[number % len(_COLORS)], _MARKERS[number % len(_MARKERS)]
        # Side by side, so that intervals at one severity can be told apart.
        places = [severity + 0.06 * (number - (len(curves) - 1) / 2) for severity in curve.severities]
        axes.plot(
            places,
            [100 * point.value for point in curve.points],
            color=color,
            marker=marker,
            label=curve.label,
        )
        for place, point in zip(places, curve.points, strict=True):
            _interval(axes, place, point, color)
    axes.set_xticks(sorted({severity for curve in curves for severity in curve.severities}))
    axes.set_xlabel("severity of the corruption, 1 weakest")
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize="small")
    _label(axes)


def _interval(axes: Axes, place: float, point: Point, color: str) -> None:
    axes.vlines(place, 100 * point.low, 100 * point.high, color=color, linewidth=1.2)


def _label(axes: Axes) -> None:
    axes.set_ylabel("top-1 accuracy, %; strokes: 95 % interval")
    axes.set_ylim(0, 100)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)

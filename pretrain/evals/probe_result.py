"""What the linear probe and k-NN found: for the artifact as JSON, for people as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pretrain.evals.intervals import Comparison

Model = Literal["pretrained", "untrained", "pixels"]

_INPUT_NAMES = {"cls": "[CLS]", "mean_patch": "mean patch", "raw": "pixels"}

_VERDICTS = {
    "gain": "a gain",
    "loss": "a loss",
    "within": "within the confidence interval: no difference is shown",
}


@dataclass(frozen=True, kw_only=True)
class Score:
    """Top-1 accuracy of one classifier, with its Wilson 95 % confidence interval; shares, not percent."""

    model: Model
    input: Literal["cls", "mean_patch", "raw", "layer"]
    top1: float
    low: float
    high: float
    lr: float
    """The chosen learning rate."""
    holdout_top1: float
    """Accuracy on the held-out training images by which it was chosen."""
    edge: Literal["highest", "lowest"] | None = None
    """The chosen rate is this one of the sweep: beyond it nothing was tried, where a better one may lie."""
    layer: int | None = None
    """The block whose output was the input, 1-based, where `input` is "layer"."""

    @property
    def label(self) -> str:
        """`pretrained [CLS]`."""
        if self.model == "pixels":
            return _INPUT_NAMES["raw"]
        source = f"layer {self.layer}" if self.input == "layer" else _INPUT_NAMES[self.input]
        return f"{self.model} {source}"


@dataclass(frozen=True, kw_only=True)
class KnnScore:
    """Top-1 accuracy of weighted k-NN, with its Wilson 95 % confidence interval; shares, not percent."""

    model: Model
    input: Literal["cls", "mean_patch"]
    k: int
    top1: float
    low: float
    high: float

    @property
    def label(self) -> str:
        """`pretrained [CLS]`."""
        return f"{self.model} {_INPUT_NAMES[self.input]}"


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What the probe found, or why it could not be done.

    The first score is the probe's: the pretrained backbone, seen as its pretraining suggests.
    """

    skipped: str | None
    num_classes: int = 0
    """Classes of the training images."""
    num_train: int = 0
    num_val: int = 0
    largest_class: float = 0.0
    """Share of the most frequent class in val: what guessing reaches."""
    scores: tuple[Score, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    layers: tuple[Score, ...] = ()
    """Of the pretrained backbone, by layer; empty unless asked for."""
    best_layer: int | None = None
    """The layer with the best accuracy on the held-out training images."""
    knn: tuple[KnnScore, ...] = ()
    """For every k; none was chosen."""

    def to_json(self) -> dict[str, Any]:
        """For the artifact's header; labels and verdicts are written out."""
        result = dataclasses.asdict(self)
        for name in ("scores", "layers", "knn"):
            result[name] = [{**dataclasses.asdict(one), "label": one.label} for one in getattr(self, name)]
        result["comparisons"] = [
            {**dataclasses.asdict(one), "verdict": one.verdict} for one in self.comparisons
        ]
        return result

    def table(self) -> str:
        """For people."""
        if self.skipped is not None:
            return f"linear probe skipped: {self.skipped}"
        head = (
            f"linear probe: {self.num_classes} classes, {self.num_train:,} training and {self.num_val:,} "
            f"validation images, the largest class holds {percent(self.largest_class)} of these"
        )
        return "\n".join(
            [head, *self._score_lines(), *self._layer_lines(), *self._edge_lines(), *self._knn_lines()]
        )

    def _score_lines(self) -> Iterator[str]:
        yield f"  {'':<24}{'top-1':>8}   {'95 % interval':<18}{'lr':>8}"
        for score in self.scores:
            yield _line(score)
        for one in self.comparisons:
            yield (
                f"  {one.of} over {one.over}: {100 * one.difference:+.1f} points "
                f"(95 %: {100 * one.low:+.1f} to {100 * one.high:+.1f}), {_VERDICTS[one.verdict]}"
            )

    def _layer_lines(self) -> Iterator[str]:
        if self.layers:
            yield "  [CLS] and mean patch of each layer, without the final norm:"
        for score in self.layers:
            best = "  best on the held-out images" if score.layer == self.best_layer else ""
            yield _line(score) + best

    def _edge_lines(self) -> Iterator[str]:
        """Where a wider sweep is due."""
        for edge, advice in (("highest", "add higher ones to --lrs"), ("lowest", "add lower ones to --lrs")):
            labels = [score.label for score in (*self.scores, *self.layers) if score.edge == edge]
            if labels:
                yield f"  * the {edge} rate of the sweep; a better one may lie beyond it: {advice}"

    def _knn_lines(self) -> Iterator[str]:
        if not self.knn:
            return
        ks = sorted({one.k for one in self.knn})
        yield "  weighted k-NN, top-1     " + "".join(f"{f'k = {k}':>9}" for k in ks)
        rows: dict[str, dict[int, float]] = {}
        for one in self.knn:
            rows.setdefault(one.label, {})[one.k] = one.top1
        for label, row in rows.items():
            yield f"  {label:<23}" + "".join(f"{percent(row[k]):>9}" for k in ks)


def percent(share: float) -> str:
    """`12.3 %`."""
    return f"{100 * share:.1f} %"


def _line(score: Score) -> str:
    interval = f"{percent(score.low)} to {percent(score.high)}"
    mark = " *" if score.edge else ""
    return f"  {score.label:<24}{percent(score.top1):>8}   {interval:<18}{score.lr:>8.0e}{mark}"

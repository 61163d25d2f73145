"""What the stages of a table measured, beside the paper's numbers: cells, orderings, Markdown and JSON."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jobs.stages.paper_tables import CONTROLS, METRICS, Metric, Ordering, Row, Table
from jobs.stages.tables import HEADERS, Node
from pipeline import artifacts
from pipeline.errors import InputError
from pretrain.evals.intervals import wilson_interval
from pretrain.segment.score import Score
from shards.dataset.dataset import open_dataset

DASH: Literal["–"] = "–"
CONTROL = "a control"
"""Where orderings stand that the paper does not have."""

_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Two-sided 95 % of Student's t for 1 to 9 degrees of freedom."""
MAX_SEEDS = len(_T_95) + 1

Verdict = Literal["agrees", "disagrees", "within the confidence interval", "–"]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One number of one artifact, in its column's units, with half the width of its 95 % interval."""

    value: float
    half: float | None = None


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One column of one row."""

    paper: float | None
    readings: tuple[Reading, ...] = ()
    """One for each seed that is finished."""
    reason: str | None = None
    """Why there is none, or not one of every seed."""

    @property
    def mean(self) -> float | None:
        """Over the seeds; None without a reading."""
        return statistics.fmean(one.value for one in self.readings) if self.readings else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds, from two on."""
        return statistics.stdev(one.value for one in self.readings) if len(self.readings) > 1 else None

    @property
    def half(self) -> float | None:
        """Half the 95 % interval: of the test images with one seed; of the mean over seeds with several.

        Seeds share the test images, so theirs is an interval for these images, and for other seeds.
        """
        if not self.readings:
            return None
        if self.spread is None:
            return self.readings[0].half
        num = len(self.readings)
        return _T_95[num - 2] * self.spread / math.sqrt(num)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row with its cells, by key of METRICS."""

    row: Row
    here: Mapping[str, Any]
    """What the row's settings are at this scale, where they differ from the paper's."""
    cells: Mapping[str, Cell]
    stages: tuple[str, ...] = ()
    """Folders of the stages behind it, in order."""
    trainings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Folder -> figures of its last epoch, for tokenizers and backbones."""
    control: bool = False
    """Not one of the paper's rows."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What became of an ordering in one column."""

    ordering: Ordering
    metric: str
    difference: float | None
    """Better minus worse, in the column's units; a loss with its sign turned."""
    half: float | None
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Result:
    """A table at a scale: everything that is printed of it."""

    table: Table
    scale: str
    seeds: tuple[int, ...]
    metrics: tuple[str, ...]
    lines: tuple[Line, ...]
    note: str = ""
    """The scale's."""
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What was set on top of scale and rows."""

    @property
    def marker(self) -> str:
        """Names the table in the document it is written into."""
        return f"table {self.table.number}, {self.scale}"


# ------------------------------------------------------------------------------------------------ reading


def read_metric(metric: str, row: Row, node: Node, output: str) -> Reading:
    """A column of a row from its finished artifact; InputError where it does not hold it."""
    header = artifacts.read_header(node.place(output), HEADERS[node.job])
    if header is None:
        raise InputError(f"{node.header(output)} is missing; run the table again")
    value, half = _value(metric, row, header, node, output)
    factor = 100.0 if METRICS[metric].percent else 1.0
    return Reading(value=factor * value, half=None if half is None else factor * half)


def read_training(node: Node, output: str) -> dict[str, Any]:
    """What a tokenizer or a backbone says of its training; empty where it does not, or is not finished."""
    if node.job not in ("train_tokenizer", "pretrain_mim"):
        return {}
    header = artifacts.read_header(node.place(output), HEADERS[node.job]) or {}
    held = header if node.job == "train_tokenizer" else header.get("run", {})
    return held.get("metrics") or {}


def _value(
    metric: str, row: Row, header: Mapping[str, Any], node: Node, output: str
) -> tuple[float, float | None]:
    """The number as it stands in the artifact, and half its 95 % interval."""
    match metric:
        case "rec_loss" | "usage":
            name = {"rec_loss": "reconstruction_loss", "usage": "codebook_usage"}[metric]
            value = header["metrics"][name]
            if value is None:
                raise InputError(f"{node.name} did not measure its {name}")
            return value, None
        case "finetune":
            top1 = header["metrics"]["val_top1"]
            return top1, _half_of_share(top1, node.reads["val"], output)
        case "probe":
            result = header["result"]
            if result["skipped"] is not None:
                raise InputError(f"{node.name} was skipped: {result['skipped']}")
            # The first one of a model is the one its pretraining suggests ([CLS] or mean patch).
            score = next((one for one in result["scores"] if one["model"] == row.probed), None)
            if score is None:
                raise InputError(f"{node.name} has no score of {row.probed} features")
            return score["top1"], (score["high"] - score["low"]) / 2
        case "miou":
            return Score.from_json(header["result"]).miou, None
        case "corruptions":
            value = header["result"]["mean_corrupted"]
            if value is None:
                raise InputError(f"{node.name} corrupted nothing")
            return value, None
        case _:
            found = next((one for one in header["result"]["rows"] if one["name"] == metric), None)
            if found is None:
                raise InputError(f"{node.name} has no images of {metric}")
            return found["top1"], (found["high"] - found["low"]) / 2


def _half_of_share(share: float, images: Node, output: str) -> float | None:
    """Half the Wilson interval of an accuracy on prepared images; None where these are not at hand."""
    if not images.finished(output):
        return None
    num = open_dataset(images.place(output), "images").num_samples()
    low, high = wilson_interval(round(share * num), num)
    return (high - low) / 2


# ------------------------------------------------------------------------------------------------ orderings


def judge(result: Result) -> list[Judgement]:
    """The paper's orderings, column by column, and the default row over every control."""
    lines = {line.row.label: line for line in result.lines}
    # Where a scale has no run of the paper's default, its own is among the controls.
    ours = CONTROLS["beit_v2"].label
    default = ours if ours in lines else result.table.default
    expected = [
        Ordering(better=default, worse=line.row.label, metrics=result.metrics, said=CONTROL)
        for line in result.lines
        if line.control and line.row.label != ours
    ]
    return [
        _judgement(ordering, metric, lines[ordering.better].cells, lines[ordering.worse].cells)
        for ordering in (*result.table.orderings, *expected)
        for metric in ordering.metrics
        if metric in result.metrics
    ]


def _judgement(
    ordering: Ordering, metric: str, better: Mapping[str, Cell], worse: Mapping[str, Cell]
) -> Judgement:
    ours, theirs = better[metric], worse[metric]
    if ours.mean is None or theirs.mean is None:
        return Judgement(ordering=ordering, metric=metric, difference=None, half=None, verdict=DASH)
    difference = (ours.mean - theirs.mean) * (-1 if METRICS[metric].lower_is_better else 1)
    half = None
    if ours.half is not None and theirs.half is not None:
        half = math.hypot(ours.half, theirs.half)
    return Judgement(
        ordering=ordering,
        metric=metric,
        difference=difference,
        half=half,
        verdict=verdict_of(difference, half),
    )


def verdict_of(difference: float, half: float | None) -> Verdict:
    """Whether a difference, positive where the order is the paper's, is more than its interval's half width.

    Without an interval the sign alone decides; the lines say that there is none.
    """
    if half is not None and abs(difference) <= half:
        return "within the confidence interval"
    return "agrees" if difference > 0 else "disagrees"


# ------------------------------------------------------------------------------------------------ printing


def markdown(result: Result) -> str:
    """The table, its reasons for dashes and its orderings, for people and for docs/reproduce.md."""
    titles = [METRICS[key].title for key in result.metrics]
    seeds = f"seed {result.seeds[0]}" if len(result.seeds) == 1 else f"{len(result.seeds)} seeds"
    head = ["row", *(f"{title}: {whose}" for title in titles for whose in ("paper", "ours"))]
    lines = [
        f"Table {result.table.number}, {result.table.title}; scale {result.scale}, {seeds}:",
        "",
        _row(head),
        _row(["---"] * len(head)),
    ]
    reasons: dict[str, int] = {}
    number = 0
    for line in result.lines:
        cells = []
        for key in result.metrics:
            cell = line.cells[key]
            mark = ""
            if cell.reason is not None:
                mark = f" [{reasons.setdefault(cell.reason, len(reasons) + 1)}]"
            cells += [_paper(METRICS[key], cell), f"{_ours(METRICS[key], cell)}{mark}"]
        number += not line.control
        here = ", ".join(f"{key.split('.', 1)[-1]} {value}" for key, value in line.here.items())
        label = line.row.label if line.control else f"{number}. {line.row.label}"
        lines.append(_row([f"{label} (here: {here})" if here else label, *cells]))
    if reasons:
        lines += ["", *(f"[{mark}] {reason}" + "  " for reason, mark in reasons.items())]
    # Controls that were not measured are no news; the paper's orderings are.
    judged = [one for one in judge(result) if one.ordering.said != CONTROL or one.verdict != DASH]
    if judged:
        lines += ["", _row(["order", "column", "said in", "ours", ""]), _row(["---"] * 5)]
        lines += [_judged(one) for one in judged]
    lines += ["", " ".join(note for note in (result.table.note, result.note, _about(result)) if note)]
    return "\n".join(lines).replace("  \n\n", "\n\n").rstrip() + "\n"


def _about(result: Result) -> str:
    """What the intervals are of, and what makes these runs others than the table's."""
    if len(result.seeds) == 1:
        about = "Intervals (95 %) are those of the test images; one seed leaves out the chance of training."
    else:
        about = "± in a cell is the standard deviation over seeds; in an order, half the 95 % interval."
    if result.overrides:
        about += f" Run with other settings than the table's: {json.dumps(result.overrides)}."
    return about


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _paper(metric: Metric, cell: Cell) -> str:
    return DASH if cell.paper is None else _figure(metric, cell.paper)


def _ours(metric: Metric, cell: Cell) -> str:
    """The mean over seeds ± their standard deviation, or the number with its interval."""
    if cell.mean is None:
        return DASH
    shown = _figure(metric, cell.mean)
    if cell.spread is not None:
        return f"{shown} ± {_figure(metric, cell.spread)}"
    if cell.half is not None:
        return f"{shown} [± {_figure(metric, cell.half)}]"
    return shown


def _figure(metric: Metric, value: float) -> str:
    return f"{value:.1f}" if metric.percent else f"{value:.4g}"


def _judged(one: Judgement) -> str:
    metric = METRICS[one.metric]
    ours = DASH
    if one.difference is not None:
        ours = f"{one.difference:+.1f}" if metric.percent else f"{one.difference:+.4f}"
        ours += "" if one.half is None else f" ± {_figure(metric, one.half)}"
    verdict = one.verdict
    if one.difference is not None and one.half is None:
        verdict = f"{verdict}, no interval"
    order = f"{one.ordering.better} > {one.ordering.worse}"
    return _row([order, metric.title, one.ordering.said, ours, verdict])


def to_json(result: Result) -> dict[str, Any]:
    """Everything that is known of a table at a scale."""
    return {
        "table": result.table.number,
        "title": result.table.title,
        "scale": result.scale,
        "seeds": list(result.seeds),
        "overrides": {job: dict(keys) for job, keys in result.overrides.items()},
        "rows": [
            {
                "label": line.row.label,
                "control": line.control,
                "here": dict(line.here),
                "stages": list(line.stages),
                "trainings": {name: dict(figures) for name, figures in line.trainings.items()},
                "metrics": {
                    key: {
                        "paper": cell.paper,
                        "values": [one.value for one in cell.readings],
                        "mean": cell.mean,
                        "std": cell.spread,
                        "half_interval": cell.half,
                        "reason": cell.reason,
                    }
                    for key, cell in line.cells.items()
                },
            }
            for line in result.lines
        ],
        "orderings": [
            {
                "better": one.ordering.better,
                "worse": one.ordering.worse,
                "metric": one.metric,
                "said": one.ordering.said,
                "difference": one.difference,
                "half_interval": one.half,
                "verdict": one.verdict,
            }
            for one in judge(result)
        ],
    }


def written_into(document: str, result: Result, url: str) -> str:
    """The document with the table between its markers, at the end where it has none yet.

    InputError where only one of the markers is there, or one twice.
    """
    begin, end = (f"<!-- {result.marker}: {what} -->" for what in ("begin", "end"))
    block = f"{begin}\n\n{markdown(result)}\n{end}"
    counts = (document.count(begin), document.count(end))
    if counts == (0, 0):
        return f"{document.rstrip()}\n\n{block}\n" if document.strip() else f"{block}\n"
    if counts != (1, 1) or document.index(begin) > document.index(end):
        raise InputError(f"{url} does not hold {begin} and, after it, {end} once each; mend or remove them")
    return document[: document.index(begin)] + block + document[document.index(end) + len(end) :]

"""What the stages of a table measured, beside the paper's numbers: cells, orderings, Markdown and JSON."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from jobs.stages.naming import JOBS
from jobs.stages.paper_tables import Metric, Ordering, Row, paper_tables
from jobs.stages.rows import ReproduceConfig
from jobs.stages.stage import Stage
from jobs.stages.tables import PlannedRow, TablePlan
from pipeline import artifacts
from pipeline.errors import InputError
from pretrain.evals.intervals import wilson_interval
from pretrain.segment.score import Score
from shards.dataset.dataset import open_dataset

DASH: Literal["–"] = "–"
CONTROL = "a control"
"""Source of the orderings that the paper does not have."""

T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Two-sided 95 % of Student's t for 1 to 9 degrees of freedom."""

Verdict = Literal["agrees", "disagrees", "within the confidence interval", "–"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One column of one row, in the column's units."""

    paper: float | None = None
    values: tuple[float, ...] = ()
    """One for each seed that is finished."""
    half: float | None = None
    """Half the 95 % interval: of the test images with one value; of the mean over seeds with several.

    Seeds share the test images, so theirs is an interval for these images, and for other seeds.
    """
    reason: str | None = None
    """Why there is no value, or not one of every seed."""

    @property
    def mean(self) -> float | None:
        """Over the seeds; None without a value."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds, from two on."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True, kw_only=True)
class Result:
    """A table at a scale: everything that is printed of it."""

    plan: TablePlan
    cells: Mapping[str, Mapping[str, Cell]]
    """Label of a row -> key of a metric -> what was measured."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What became of an ordering in one column."""

    better: str
    worse: str
    metric: str
    said: str
    """Where the paper says so; CONTROL for an ordering that it does not have."""
    difference: float | None = None
    """Better minus worse, in the column's units; a loss with its sign turned."""
    half_interval: float | None = None
    """Half the 95 % interval of the difference."""
    verdict: Verdict = DASH


# ------------------------------------------------------------------------------------------------ reading


def collect(plan: TablePlan, lost: Mapping[str, str]) -> Result:
    """What is finished of a table, whether it was run now or before.

    lost: stages of no use, by name, each with its reason.
    """
    return Result(
        plan=plan,
        cells={
            planned.row.label: {metric: _cell(metric, planned, lost) for metric in plan.metrics}
            for planned in plan.rows
        },
    )


def _cell(metric: str, planned: PlannedRow, lost: Mapping[str, str]) -> Cell:
    values, halves, reason = [], [], planned.reasons.get(metric)
    for stage in planned.measured_by.get(metric, ()):
        if stage.name in lost:
            reason = lost[stage.name]
        elif not stage.is_finished():
            reason = "not run"
        else:
            try:
                value, half = _read(metric, planned.row, stage)
            except InputError as error:
                reason = str(error)
            else:
                values.append(value)
                halves.append(half)
    half = halves[0] if halves else None
    if (num := len(values)) > 1:
        half = T_95[num - 2] * statistics.stdev(values) / math.sqrt(num)
    return Cell(paper=planned.row.paper.get(metric), values=tuple(values), half=half, reason=reason)


def _header(stage: Stage) -> dict[str, Any]:
    """The header of a stage's artifact; empty where it is not finished."""
    return artifacts.read_header(stage.output, JOBS[stage.job].header) or {}


def _read(metric: str, row: Row, stage: Stage) -> tuple[float, float | None]:
    """A column of a row, and half its 95 % interval; InputError where the artifact does not hold it."""
    header = _header(stage)
    low = high = None
    match metric:
        case "rec_loss" | "usage":
            name = {"rec_loss": "reconstruction_loss", "usage": "codebook_usage"}[metric]
            value, lack = header["metrics"][name], f"did not measure its {name}"
        case "finetune":
            value, lack = header["metrics"]["val_top1"], "did not measure its top-1"
            images = stage.needs["val"]
            if images.is_finished():
                num = open_dataset(images.output, "images").num_samples()
                low, high = wilson_interval(round(value * num), num)
        case "miou":
            value, lack = Score.from_json(header["result"]).miou, "has no mIoU"
        case "corruptions":
            value, lack = header["result"]["mean_corrupted"], "corrupted nothing"
        case _:
            result, lack = header["result"], f"has no images of {metric}"
            scores = [score for score in result.get("rows", ()) if score["name"] == metric]
            if metric == "probe":
                # The first one of a model is the one its pretraining suggests ([CLS] or mean patch).
                scores = [score for score in result["scores"] if score["model"] == row.probed]
                lack = f"has no score of {row.probed} features"
                if result["skipped"] is not None:
                    scores, lack = [], f"was skipped: {result['skipped']}"
            first = scores[0] if scores else {}
            value, low, high = (first.get(key) for key in ("top1", "low", "high"))
    if value is None:
        raise InputError(f"{stage.name} {lack}")
    factor = 100.0 if paper_tables().metrics[metric].percent else 1.0
    return factor * value, None if low is None or high is None else factor * ((high - low) / 2)


# ------------------------------------------------------------------------------------------------ orderings


def judge(result: Result) -> list[Judgement]:
    """The paper's orderings, column by column, and the default row over every control."""
    plan = result.plan
    # Where a scale has no run of the paper's default, its own is among the controls.
    own = paper_tables().controls["beit_v2"].label
    default = own if own in result.cells else plan.table.default
    controls = [row.row.label for row in plan.rows if row.control and row.row.label != own]
    expected = [
        Ordering(better=default, worse=label, metrics=plan.metrics, said=CONTROL) for label in controls
    ]
    return [
        judge_column(
            ordering, metric, result.cells[ordering.better][metric], result.cells[ordering.worse][metric]
        )
        for ordering in (*plan.table.orderings, *expected)
        for metric in ordering.metrics
        if metric in plan.metrics
    ]


def judge_column(ordering: Ordering, metric: str, better: Cell, worse: Cell) -> Judgement:
    """Whether the difference has the ordering's sign, and is more than half its 95 % interval.

    Without an interval the sign alone decides; the printed line says that there is none.
    """
    judgement = Judgement(better=ordering.better, worse=ordering.worse, metric=metric, said=ordering.said)
    if better.mean is None or worse.mean is None:
        return judgement
    difference, half = better.mean - worse.mean, None
    if paper_tables().metrics[metric].lower_is_better:
        difference = -difference
    if better.half is not None and worse.half is not None:
        half = math.hypot(better.half, worse.half)
    verdict: Verdict = "agrees" if difference > 0 else "disagrees"
    if half is not None and abs(difference) <= half:
        verdict = "within the confidence interval"
    return replace(judgement, difference=difference, half_interval=half, verdict=verdict)


# ------------------------------------------------------------------------------------------------ printing


def markdown(result: Result) -> str:
    """The table, its reasons for dashes and its orderings, for people and for docs/reproduce.md."""
    plan, config = result.plan, result.plan.config
    metrics = {key: paper_tables().metrics[key] for key in plan.metrics}
    first, *more = config.seed_numbers
    seeds = f"{len(more) + 1} seeds" if more else f"seed {first}"
    titles = [f"{metric.title}: {whose}" for metric in metrics.values() for whose in ("paper", "ours")]
    lines = [f"Table {config.table}, {plan.table.title}; scale {config.scale_name}, {seeds}:", ""]
    lines += [_row("row", *titles), _row(*["---"] * (1 + len(titles)))]
    reasons: dict[str, int] = {}
    for number, planned in enumerate(plan.rows, start=1):
        cells = result.cells[planned.row.label]
        label = planned.row.label if planned.control else f"{number}. {planned.row.label}"
        here = ", ".join(f"{key.split('.', 1)[-1]} {value}" for key, value in planned.here.items())
        texts = [f"{label} (here: {here})" if here else label]
        for key, metric in metrics.items():
            ours, reason = _ours(metric, cells[key]), cells[key].reason
            if reason is not None:
                ours += f" [{reasons.setdefault(reason, len(reasons) + 1)}]"
            texts += [_figure(metric, cells[key].paper), ours]
        lines.append(_row(*texts))
    if reasons:
        lines += ["", *(f"[{mark}] {reason}" + "  " for reason, mark in reasons.items())]
    # Controls that were not measured are no news; the paper's orderings are.
    judged = [each for each in judge(result) if each.said != CONTROL or each.verdict != DASH]
    if judged:
        lines += ["", _row("order", "column", "said in", "ours", ""), _row(*["---"] * 5)]
        lines += [_judged(metrics[each.metric], each) for each in judged]
    lines += ["", " ".join(note for note in (plan.table.note, plan.note, _about(config)) if note)]
    return "\n".join(lines).replace("  \n\n", "\n\n").rstrip() + "\n"


def _about(config: ReproduceConfig) -> str:
    """What the intervals are of, and what makes these runs others than the table's."""
    if len(config.seed_numbers) == 1:
        about = "Intervals (95 %) are those of the test images; one seed leaves out the chance of training."
    else:
        about = "± in a cell is the standard deviation over seeds; in an order, half the 95 % interval."
    if config.overrides:
        about += f" Run with other settings than the table's: {json.dumps(config.overrides)}."
    return about


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _ours(metric: Metric, cell: Cell) -> str:
    """The mean over seeds ± their standard deviation, or the number with its interval."""
    mean = _figure(metric, cell.mean)
    if cell.spread is not None:
        return f"{mean} ± {_figure(metric, cell.spread)}"
    return mean if cell.half is None else f"{mean} [± {_figure(metric, cell.half)}]"


def _figure(metric: Metric, value: float | None) -> str:
    if value is None:
        return DASH
    return f"{value:.1f}" if metric.percent else f"{value:.4g}"


def _judged(metric: Metric, judged: Judgement) -> str:
    ours, verdict = DASH, str(judged.verdict)
    if judged.difference is not None:
        ours = f"{judged.difference:+.1f}" if metric.percent else f"{judged.difference:+.4f}"
        if judged.half_interval is None:
            verdict = f"{verdict}, no interval"
        else:
            ours = f"{ours} ± {_figure(metric, judged.half_interval)}"
    return _row(f"{judged.better} > {judged.worse}", metric.title, judged.said, ours, verdict)


def to_json(result: Result) -> dict[str, Any]:
    """Everything that is known of a table at a scale."""

    def row(planned: PlannedRow) -> dict[str, Any]:
        trainings: dict[str, Any] = {}
        for stage in planned.stages:
            if stage.job == "train_tokenizer":
                trainings[stage.name] = _header(stage).get("metrics")
            elif stage.job == "pretrain_mim":
                trainings[stage.name] = _header(stage).get("run", {}).get("metrics")
        return {
            "label": planned.row.label,
            "control": planned.control,
            "here": planned.here,
            "stages": [stage.name for stage in planned.stages],
            "trainings": {name: figures for name, figures in trainings.items() if figures},
            "metrics": {
                key: {
                    "paper": cell.paper,
                    "values": cell.values,
                    "mean": cell.mean,
                    "std": cell.spread,
                    "half_interval": cell.half,
                    "reason": cell.reason,
                }
                for key, cell in result.cells[planned.row.label].items()
            },
        }

    config = result.plan.config
    return {
        "table": config.table,
        "title": result.plan.table.title,
        "scale": config.scale_name,
        "seeds": list(config.seed_numbers),
        "overrides": config.overrides,
        "rows": [row(planned) for planned in result.plan.rows],
        "orderings": [asdict(judgement) for judgement in judge(result)],
    }


def written_into(document: str, result: Result, url: str) -> str:
    """The document with the table between its markers, at the end where it has none yet.

    InputError where only one of the markers is there, or one twice.
    """
    marker = f"table {result.plan.config.table}, {result.plan.config.scale_name}"
    begin, end = (f"<!-- {marker}: {what} -->" for what in ("begin", "end"))
    block = f"{begin}\n\n{markdown(result)}\n{end}"
    counts = (document.count(begin), document.count(end))
    if counts == (0, 0):
        return f"{document.rstrip()}\n\n{block}\n" if document.strip() else f"{block}\n"
    if counts != (1, 1) or document.index(begin) > document.index(end):
        raise InputError(f"{url} does not hold {begin} and, after it, {end} once each; mend or remove them")
    return document[: document.index(begin)] + block + document[document.index(end) + len(end) :]

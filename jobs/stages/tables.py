"""A table of the paper as a graph of stages: planning it, showing it, and running what is missing."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.stages.naming import JOBS, other_run
from jobs.stages.paper_tables import Row, Table, paper_tables
from jobs.stages.rows import BENCHMARKS, LeftOut, RowPlanner, read_scale
from jobs.stages.runner import StartJob, run_stage
from jobs.stages.stage import ClusterOverride, Stage, check_address
from pipeline import storage
from pipeline.errors import InputError

MAX_SEEDS = 10
"""The results know the quantiles of Student's t up to so many."""
GIVEN = ("train_source", "val_source", "teacher", "finetune_ids", "imagenet21k", "ade20k", *BENCHMARKS)
"""Options that name what the user has."""


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig:
    """Run the rows of one of the paper's tables, and print what they measured beside the paper's numbers.

    Every stage has a folder of its own below the output, named by what decides its result: rows and tables
    that need the same run share it, and what is finished is not run again. After a failed stage the rows that
    do not need it go on; the same command takes up what is missing.
    """

    table: int
    """Number of the table, 1 to 7."""
    scale: str
    """imagenet1k (the paper's), cifar10, or a YAML file of your own like those in jobs/configs/reproduce."""
    train_source: str
    """Images to train on, as prepare_images reads them: class folders."""
    val_source: str
    """Images on which accuracy is measured."""
    output: str
    """Folder or URL of all stages; tables of one scale belong into one."""
    teacher: str | None = None
    """Weights of the teacher in the place of CLIP: a path or URL of a state dict."""
    finetune_ids: str | None = None
    """Fine-tune on these images only: a file with a sample id per line."""
    imagenet21k: str | None = None
    """Images of ImageNet-21k, for the rows with an intermediate fine-tuning."""
    ade20k: str | None = None
    """ADE20K as published: images/ and annotations/, each with training/ and validation/."""
    imagenet_a: str | None = None
    """ImageNet-A, folders by wnid."""
    imagenet_r: str | None = None
    """ImageNet-R, folders by wnid."""
    imagenet_sketch: str | None = None
    """ImageNet-Sketch, folders by wnid."""
    rows: str | None = None
    """Numbers of the rows to run, with commas between, controls counted on after the paper's; null: all. The
    others show what was finished before."""
    seeds: str = "0"
    """Seeds of tokenizer, pretraining and evaluations, with commas between; every row is run with each."""
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Job -> dotted key -> value, on top of scale and rows, in every row: a run of today, not the table."""
    dry_run: bool = False
    """Print the stages, which of them would run, and their commands; write nothing."""
    write: str | None = None
    """Markdown file in which the table is replaced between its markers, or put at the end."""
    address: str | None = None
    """Job server of a Ray cluster (http://host:8265) to which stages are submitted; null runs them here."""
    cluster: ClusterOverride = field(default_factory=ClusterOverride)
    """Cluster settings of every stage."""

    def __post_init__(self) -> None:
        if not 1 <= self.table <= 7:
            raise InputError(f"the paper's tables are 1 to 7, and table is {self.table}")
        seeds = self.seed_numbers
        if len(set(seeds)) != len(seeds) or not 1 <= len(seeds) <= MAX_SEEDS:
            raise InputError(
                f"seeds is {self.seeds!r}; give one to {MAX_SEEDS} different numbers, as in 0,1,2"
            )
        check_address(self.address)
        for job in self.overrides:
            if job not in JOBS:
                raise InputError(f"overrides names {job}, which is no stage; name one of {', '.join(JOBS)}")

    @property
    def root(self) -> str:
        """The output under a name that holds in every process."""
        return storage.absolute(self.output)

    @property
    def given(self) -> dict[str, str]:
        """Option -> absolute URL of what the user has."""
        urls: dict[str, str | None] = {option: getattr(self, option) for option in GIVEN}
        return {option: storage.absolute(url) for option, url in urls.items() if url is not None}

    @property
    def scale_name(self) -> str:
        """Without the folder and ending of a file."""
        return Path(storage.name(self.scale)).stem

    @property
    def seed_numbers(self) -> tuple[int, ...]:
        """The seeds."""
        return _numbers("seeds", self.seeds)


def _numbers(key: str, text: str) -> tuple[int, ...]:
    """`0,1,2` as numbers; InputError for anything else."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise InputError(f"{key} is {text!r}; give numbers with commas between, as in 0,1,2")
    return tuple(int(part) for part in parts)


@dataclass(frozen=True, kw_only=True)
class PlannedRow:
    """A row with the stages that measure it."""

    row: Row
    control: bool
    """Not one of the paper's rows."""
    asked: bool
    """Named by --rows; the others only show what is there."""
    here: Mapping[str, Any]
    """What the row's settings are at this scale, where they differ from the paper's."""
    measured_by: Mapping[str, tuple[Stage, ...]]
    """Column -> the stage that measures it, for every seed."""
    reasons: Mapping[str, str]
    """Column -> why nothing measures it."""

    @property
    def stages(self) -> list[Stage]:
        """All stages behind the row, in order."""
        return topological(stage for stages in self.measured_by.values() for stage in stages)


@dataclass(frozen=True, kw_only=True)
class TablePlan:
    """A table at a scale, before anything is run."""

    config: ReproduceConfig
    table: Table
    note: str
    """The scale's."""
    metrics: tuple[str, ...]
    """The columns."""
    rows: tuple[PlannedRow, ...]

    @property
    def stages(self) -> list[Stage]:
        """The stages of the rows that were asked for, each once, in order."""
        return topological(stage for row in self.rows if row.asked for stage in row.stages)


def topological(stages: Iterable[Stage]) -> list[Stage]:
    """The stages and all they need, each once and after what it needs."""
    ordered: dict[str, Stage] = {}

    def visit(stage: Stage) -> None:
        if stage.name not in ordered:
            for needed in stage.needs.values():
                visit(needed)
            ordered[stage.name] = stage

    for stage in stages:
        visit(stage)
    return list(ordered.values())


def plan_table(config: ReproduceConfig) -> TablePlan:
    """The rows of a table with their stages; every name, file and key is looked at."""
    table, scale = paper_tables().table(config.table), read_scale(config.scale)
    metrics = scale.metrics.get(str(config.table), table.metrics)
    controls = [paper_tables().controls[name] for name in scale.controls.get(str(config.table), ())]
    rows = dict(enumerate((*table.rows, *controls), start=1))
    asked = rows if config.rows is None else _numbers("rows", config.rows)
    for number in asked:
        if number not in rows:
            raise InputError(f"rows names {number}; table {config.table} has rows 1 to {len(rows)} here")
    planners = [
        RowPlanner(
            name=config.scale_name,
            scale=scale,
            given=config.given,
            root=config.root,
            seed=seed,
            overrides=config.overrides,
        )
        for seed in config.seed_numbers
    ]

    def planned(number: int, row: Row) -> PlannedRow:
        measured_by: dict[str, tuple[Stage, ...]] = {}
        reasons: dict[str, str] = {}
        here: dict[str, Any] = {}
        for metric in metrics:
            try:
                measured_by[metric] = tuple(planner.measure(row, metric) for planner in planners)
            except LeftOut as left_out:
                reasons[metric] = str(left_out)
        with contextlib.suppress(LeftOut):
            here = planners[0].changed_settings(row)
        return PlannedRow(
            row=row,
            control=number > len(table.rows),
            asked=number in asked,
            here=here,
            measured_by=measured_by,
            reasons=reasons,
        )

    planned_rows = tuple(planned(number, row) for number, row in rows.items())
    return TablePlan(config=config, table=table, note=scale.note, metrics=metrics, rows=planned_rows)


# ------------------------------------------------------------------------------------------------ running


def show(plan: TablePlan) -> None:
    """Print the graph: each stage, whether it is finished, the rows that need it, and its command."""
    stages, num_finished = plan.stages, 0
    rows_of: dict[str, list[str]] = {}
    left_out: dict[str, list[str]] = {}
    for number, row in enumerate(plan.rows, start=1):
        for stage in row.stages if row.asked else ():
            rows_of.setdefault(stage.name, []).append(str(number))
        for metric, reason in row.reasons.items():
            left_out.setdefault(f"no {metric}: {reason}", []).append(str(number))
    for stage in stages:
        finished = stage.is_finished()
        num_finished += finished
        difference = other_run(stage) if finished else None
        state = "finished" if finished else "would run"
        state = state if difference is None else f"holds another run: {difference}"
        print(f"{stage.name}: {state}; rows {', '.join(rows_of[stage.name])}")
        if not finished:
            print(f"  python -m jobs.{stage.job} {shlex.join(stage.argv(plan.config.cluster))}")
    print(f"{len(stages)} stages, {num_finished} of them finished, at {plan.config.root}")
    for what, numbers in left_out.items():
        print(f"rows {', '.join(numbers)}: {what}")


def run_all(plan: TablePlan, start: StartJob) -> dict[str, str]:
    """Run what is not finished; failed stages, and those that need one, by name, each with its reason."""
    lost: dict[str, str] = {}
    for stage in plan.stages:
        needed = next((needed.name for needed in stage.needs.values() if needed.name in lost), None)
        if needed is not None:
            lost[stage.name] = lost[needed]
            print(f"{stage.name}: not run, because {lost[needed]}", flush=True)
        elif not stage.is_finished():
            if not run_stage(stage, stage.argv(plan.config.cluster), plan.config.root, start).finished:
                lost[stage.name] = f"{stage.name} failed"
        elif (difference := other_run(stage)) is not None:
            lost[stage.name] = f"{stage.name} holds another run"
            text = f"error: {stage.output} holds another run, which differs in {difference}; move it away"
            print(text, file=sys.stderr, flush=True)
        else:
            print(f"{stage.name}: finished before; skipped", flush=True)
    return lost

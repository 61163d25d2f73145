"""A table of the paper as a graph of stages: planning it, showing it, and running what is missing."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jobs.stages.naming import other_run
from jobs.stages.paper_tables import Row, Table, paper_tables, read_scale
from jobs.stages.rows import LeftOut, ReproduceConfig, RowPlanner, numbers
from jobs.stages.runner import StartJob, run_stage
from jobs.stages.stage import Stage
from pipeline.errors import InputError


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
    asked = rows if config.rows is None else numbers("rows", config.rows)
    for number in asked:
        if number not in rows:
            raise InputError(f"rows names {number}; table {config.table} has rows 1 to {len(rows)} here")
    planners = [RowPlanner(config=config, scale=scale, seed=seed) for seed in config.seed_numbers]

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
    for what, rows in left_out.items():
        print(f"rows {', '.join(rows)}: {what}")


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

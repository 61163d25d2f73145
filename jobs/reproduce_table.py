"""Runs the rows of one of the paper's Tables 1 to 7 at a scale, and holds ours beside the paper's numbers.

python -m jobs.reproduce_table --table 5 --scale cifar10 --output runs/reproduce --cluster.num_workers 0 \
    --train_source cifar10/train --val_source cifar10/test --teacher cifar10-teacher.safetensors [--dry_run]
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.run_pipeline import (
    ClusterOverride,
    RunStage,
    StageLog,
    ended_by_sigterm,
    failure,
    log_url,
    stage_runner,
)
from jobs.stages.paper_tables import CONTROLS, TABLES, Row
from jobs.stages.results import (
    MAX_SEEDS,
    Cell,
    Line,
    Result,
    markdown,
    read_metric,
    read_training,
    to_json,
    written_into,
)
from jobs.stages.tables import (
    BENCHMARKS,
    HEADERS,
    LeftOut,
    Node,
    Planner,
    Scale,
    Sources,
    in_order,
    why_foreign,
)
from pipeline import artifacts, storage
from pipeline.config import parse, run_job
from pipeline.errors import InputError
from pipeline.training import metrics

SCALES = "jobs/configs/reproduce"


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
        if self.table not in TABLES:
            raise InputError(f"the paper's tables are 1 to 7, and table is {self.table}")
        if (
            len(set(self.seed_numbers)) != len(self.seed_numbers)
            or not 1 <= len(self.seed_numbers) <= MAX_SEEDS
        ):
            raise InputError(
                f"seeds is {self.seeds!r}; give one to {MAX_SEEDS} different numbers, as in 0,1,2"
            )
        if self.address is not None and not self.address.startswith(("http://", "https://")):
            raise InputError(f"address {self.address!r} is no job server; give http://host:8265")
        for job in self.overrides:
            if job not in HEADERS:
                raise InputError(
                    f"overrides names {job}, which is no stage; name one of {', '.join(HEADERS)}"
                )

    @property
    def scale_name(self) -> str:
        """Without the folder and ending of a file."""
        return Path(storage.name(self.scale)).stem

    @property
    def seed_numbers(self) -> tuple[int, ...]:
        """The seeds."""
        return _numbers("seeds", self.seeds)

    @property
    def sources(self) -> Sources:
        """What the user has, under names that hold in every process."""
        given = {
            name: storage.absolute(url)
            for name in ("teacher", "finetune_ids", "imagenet21k", "ade20k", *BENCHMARKS)
            if (url := getattr(self, name)) is not None
        }
        return Sources(
            train=storage.absolute(self.train_source),
            val=storage.absolute(self.val_source),
            benchmarks={name: given.pop(name) for name in BENCHMARKS if name in given},
            **given,
        )


def _numbers(key: str, text: str) -> tuple[int, ...]:
    """`0,1,2` as numbers; InputError for anything else."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise InputError(f"{key} is {text!r}; give numbers with commas between, as in 0,1,2")
    return tuple(int(part) for part in parts)


# ------------------------------------------------------------------------------------------------ planning


@dataclass(frozen=True, kw_only=True)
class PlannedRow:
    """A row with the stages that measure it."""

    row: Row
    control: bool
    asked: bool
    """Named by --rows; the others only show what is there."""
    here: Mapping[str, Any]
    nodes: Mapping[str, tuple[Node, ...]]
    """Column -> the stage that measures it, for every seed."""
    reasons: Mapping[str, str]
    """Column -> why nothing measures it."""

    @property
    def stages(self) -> list[Node]:
        """All stages behind the row, in order."""
        return in_order(node for nodes in self.nodes.values() for node in nodes)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A table at a scale, before anything is run."""

    config: ReproduceConfig
    output: str
    note: str
    metrics: tuple[str, ...]
    rows: tuple[PlannedRow, ...]

    @property
    def stages(self) -> list[Node]:
        """The stages of the rows that were asked for, each once, in order."""
        return in_order(node for row in self.rows if row.asked for node in row.stages)


def read_scale(name: str) -> Scale:
    """A scale that comes along, by its name, or one's own, by its file."""
    file = name if name.endswith((".yaml", ".yml")) else f"{SCALES}/{name}.yaml"
    if not storage.exists(file):
        raise InputError(f"there is no scale {name}; give imagenet1k, cifar10 or a YAML file")
    return parse(Scale, ["--config", file])


def plan_of(config: ReproduceConfig) -> Plan:
    """The rows of a table with their stages; every name, file and key is looked at."""
    table, scale = TABLES[config.table], read_scale(config.scale)
    columns = scale.metrics.get(str(config.table), table.metrics)
    controls = tuple(CONTROLS[name] for name in scale.controls.get(str(config.table), ()))
    rows = (*table.rows, *controls)
    asked = range(1, len(rows) + 1) if config.rows is None else _numbers("rows", config.rows)
    for number in asked:
        if not 1 <= number <= len(rows):
            raise InputError(f"rows names {number}; table {config.table} has rows 1 to {len(rows)} here")
    planners = [
        Planner(config.scale_name, scale, config.sources, seed=seed, overrides=config.overrides)
        for seed in config.seed_numbers
    ]
    return Plan(
        config=config,
        output=storage.absolute(config.output),
        note=scale.note,
        metrics=columns,
        rows=tuple(
            _planned(row, columns, planners, control=number > len(table.rows), asked=number in asked)
            for number, row in enumerate(rows, start=1)
        ),
    )


def _planned(
    row: Row, columns: tuple[str, ...], planners: list[Planner], *, control: bool, asked: bool
) -> PlannedRow:
    nodes: dict[str, tuple[Node, ...]] = {}
    reasons: dict[str, str] = {}
    for metric in columns:
        try:
            nodes[metric] = tuple(planner.measure(row, metric) for planner in planners)
        except LeftOut as left_out:
            reasons[metric] = str(left_out)
    try:
        here = planners[0].here(row)
    except LeftOut:
        here = {}
    return PlannedRow(row=row, control=control, asked=asked, here=here, nodes=nodes, reasons=reasons)


# ------------------------------------------------------------------------------------------------ running


def show(plan: Plan) -> None:
    """Print the graph: each stage, whether it is finished, the rows that need it, and its command."""
    stages = plan.stages
    finished = {node.name for node in stages if node.finished(plan.output)}
    for node in stages:
        needed = [
            number
            for number, row in enumerate(plan.rows, start=1)
            if row.asked and node.name in _by_name(row)
        ]
        state = "would run"
        if node.name in finished:
            foreign = why_foreign(node, plan.output)
            state = "finished" if foreign is None else f"holds another run: {foreign}"
        print(f"{node.name}: {state}; rows {', '.join(map(str, needed))}")
        if node.name not in finished:
            print(f"  python -m jobs.{node.job} {shlex.join(node.argv(plan.output, plan.config.cluster))}")
    print(f"{len(stages)} stages, {len(finished)} of them finished, at {plan.output}")
    left_out: dict[str, list[str]] = {}
    for number, row in enumerate(plan.rows, start=1):
        for metric, reason in row.reasons.items():
            left_out.setdefault(f"no {metric}: {reason}", []).append(str(number))
    for what, numbers in left_out.items():
        print(f"rows {', '.join(numbers)}: {what}")


def _by_name(row: PlannedRow) -> set[str]:
    return {node.name for node in row.stages}


def run_all(plan: Plan, run_stage: RunStage) -> dict[str, str]:
    """Run what is not finished; failed stages, and those that need one, by name, each with its reason."""
    lost: dict[str, str] = {}
    for node in plan.stages:
        needed = next((read.name for read in node.reads.values() if read.name in lost), None)
        if needed is not None:
            lost[node.name] = lost[needed]
            print(f"{node.name}: not run, because {lost[needed]}", flush=True)
        elif (reason := _run(node, plan, run_stage)) is not None:
            lost[node.name] = reason
    return lost


def _run(node: Node, plan: Plan, run_stage: RunStage) -> str | None:
    """Run a stage unless it is finished; why it is of no use, or None."""
    stage, argv = node.stage(plan.output), node.argv(plan.output, plan.config.cluster)
    if node.finished(plan.output):
        if (foreign := why_foreign(node, plan.output)) is not None:
            print(
                f"error: {node.place(plan.output)} holds another run, which differs in {foreign}; "
                "move it away",
                file=sys.stderr,
                flush=True,
            )
            return f"{node.name} holds another run"
        print(f"{node.name}: finished before; skipped", flush=True)
        return None
    print(f"{node.name}: python -m jobs.{node.job} {shlex.join(argv)}", flush=True)
    log = StageLog(log_url(plan.output, node.name), node.name)
    start = time.monotonic()
    try:
        status = run_stage(stage, argv, log.line)
    finally:
        log.close()
    if status != 0 or not node.finished(plan.output):
        print(failure(stage, status, log), file=sys.stderr, flush=True)
        return f"{node.name} failed"
    print(f"{node.name}: finished in {metrics.duration(time.monotonic() - start)}", flush=True)
    return None


def collect(plan: Plan, lost: Mapping[str, str]) -> Result:
    """What is finished of a table, whether it was run now or before."""
    return Result(
        table=TABLES[plan.config.table],
        scale=plan.config.scale_name,
        seeds=plan.config.seed_numbers,
        metrics=plan.metrics,
        note=plan.note,
        overrides=plan.config.overrides,
        lines=tuple(
            Line(
                row=planned.row,
                here=planned.here,
                cells={metric: _cell(metric, planned, plan.output, lost) for metric in plan.metrics},
                stages=tuple(node.name for node in planned.stages),
                trainings={
                    node.name: figures
                    for node in planned.stages
                    if (figures := read_training(node, plan.output))
                },
                control=planned.control,
            )
            for planned in plan.rows
        ),
    )


def _cell(metric: str, planned: PlannedRow, output: str, lost: Mapping[str, str]) -> Cell:
    readings, reason = [], planned.reasons.get(metric)
    for node in planned.nodes.get(metric, ()):
        if node.name in lost:
            reason = lost[node.name]
        elif not node.finished(output):
            reason = "not run"
        else:
            try:
                readings.append(read_metric(metric, planned.row, node, output))
            except InputError as error:
                reason = str(error)
    return Cell(paper=planned.row.paper.get(metric), readings=tuple(readings), reason=reason)


def publish(plan: Plan, result: Result) -> None:
    """Print the table, keep it as JSON beside the stages, and write it into a document where one is named."""
    config = plan.config
    text = markdown(result)
    print(f"\n{text}", flush=True)
    document = storage.read(config.write).decode() if config.write is not None else None
    url = storage.join(plan.output, f"table-{config.table}-{config.scale_name}.json")
    data = {**to_json(result), "code_version": artifacts.code_version()}
    storage.put(url, json.dumps(data, indent=2, ensure_ascii=False).encode() + b"\n")
    if config.write is not None and document is not None:
        storage.put(config.write, written_into(document, result, config.write).encode())
        print(f"written into {config.write}", flush=True)


def reproduce_table(config: ReproduceConfig) -> None:
    """Run a table and show it; SystemExit 1 where a stage failed."""
    plan = plan_of(config)
    if config.write is not None and not storage.exists(config.write):
        raise InputError(f"write names {config.write}, which is not there; name a Markdown file")
    if config.dry_run:
        show(plan)
        return
    files = {node.settings.config for node in plan.stages if node.settings.config is not None}
    places = {"output": plan.output, "train_source": config.sources.train, "val_source": config.sources.val}
    with ended_by_sigterm(), stage_runner(config.address, sorted(files), places) as run_stage:
        lost = run_all(plan, run_stage)
    publish(plan, collect(plan, lost))
    if lost:
        reasons = ", ".join(dict.fromkeys(lost.values()))
        print(f"error: the table is not complete: {reasons}", file=sys.stderr, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    run_job(reproduce_table, ReproduceConfig)

"""Tables 1 to 7 of the paper, as in `jobs/configs/tables.yaml`, and what their rows mean at a scale."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jobs.stages.stage import StageConfig
from pipeline import storage
from pipeline.config import parse
from pipeline.errors import InputError

SCALES = "jobs/configs/reproduce"
TABLES_FILE = Path(__file__).resolve().parents[1] / "configs" / "tables.yaml"
INTERMEDIATE = "intermediate"
"""Stage in recipes: the fine-tuning on ImageNet-21k before that on ImageNet-1k, finetune_classifier too."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One column."""

    title: str
    stage: str
    """Job whose artifact holds it."""
    lower_is_better: bool = False
    percent: bool = True
    """The artifact holds a share; tables show per cent."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line: what is run, and the paper's numbers in the units of its columns."""

    label: str
    recipe: str = "base_300"
    """Size, epochs of pretraining, and `_21k` for an intermediate fine-tuning."""
    teacher: str = "clip"
    """Whose features the tokenizer learns."""
    start: Literal["backbone", "scratch", "tokenizer", "teacher"] = "backbone"
    """What is fine-tuned: the `init` of finetune_classifier."""
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Stage -> dotted key of its config -> value, on top of the recipe."""
    paper: dict[str, float] = field(default_factory=dict)
    """The paper's number by key of a metric."""
    probed: Literal["pretrained", "untrained", "pixels"] = "pretrained"
    """Which of the probe's classifiers the row is; the baselines have nothing but a probe."""


@dataclass(frozen=True, kw_only=True)
class Ordering:
    """A row that is better than another, in some columns."""

    better: str
    worse: str
    metrics: tuple[str, ...]
    said: str
    """Where the paper says so: `cells`, where both numbers stand in the table, or a section of its text."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table of the paper."""

    number: int
    title: str
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]
    default: str
    """Label of the row with the default settings, with which controls are compared."""
    orderings: tuple[Ordering, ...] = ()
    note: str = ""

    def row(self, label: str) -> Row:
        """The row of this label."""
        return next(row for row in self.rows if row.label == label)


@dataclass(frozen=True, kw_only=True)
class PaperTables:
    """All that the file holds."""

    metrics: dict[str, Metric]
    tables: tuple[Table, ...]
    controls: dict[str, Row]
    """Rows that the paper does not have."""

    def table(self, number: int) -> Table:
        """The table of this number."""
        return next(table for table in self.tables if table.number == number)


@functools.cache
def paper_tables() -> PaperTables:
    """The file, read once."""
    return parse(PaperTables, ["--config", str(TABLES_FILE)])


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What the rows of the paper's tables mean on some images, with models of some size."""

    stages: dict[str, StageConfig]
    """Job -> its file and overrides. A job that is neither here nor in a recipe is not run at this scale."""
    recipes: dict[str, dict[str, StageConfig]]
    """Recipe of a row -> job, or `intermediate`, -> its file and overrides, before those of `stages`."""
    teachers: dict[str, dict[str, Any]]
    """Teacher of a row -> dotted keys of `teacher` in train_tokenizer and finetune_classifier."""
    note: str = ""
    """What stands for the paper's models and images here; printed under every table."""
    teacher_from_file: bool = False
    """The weights of the teacher `clip` have to be given as --teacher."""
    online: bool = False
    """Pretraining tokenizes a new crop in every epoch, without token shards."""
    translate: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """Job -> dotted key of a row -> the paper's value -> this scale's, or several keys with theirs, or null
    where nothing corresponds."""
    metrics: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Number of a table -> columns instead of the paper's."""
    controls: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Number of a table -> controls, by name, under the paper's rows."""


def read_scale(name: str) -> Scale:
    """A scale that comes along, by its name, or one's own, by its file."""
    file = name if name.endswith((".yaml", ".yml")) else f"{SCALES}/{name}.yaml"
    if not storage.exists(file):
        raise InputError(f"there is no scale {name}; give imagenet1k, cifar10 or a YAML file")
    return parse(Scale, ["--config", file])

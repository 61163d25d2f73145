"""Tables 1 to 7 of the paper, as `jobs/configs/tables.yaml` states them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.config import parse

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

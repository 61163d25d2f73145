"""What is asked of a table, and the stages that measure each of its rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.stages.naming import JOBS, make_stage
from jobs.stages.paper_tables import INTERMEDIATE, Row, Scale, paper_tables
from jobs.stages.stage import ClusterOverride, Stage, StageConfig, check_address
from pipeline import storage
from pipeline.errors import InputError

BENCHMARKS = ("imagenet_a", "imagenet_r", "imagenet_sketch")
"""Shifted sets of images, by the flag of evaluate_robustness."""

ADE20K = {
    "train_images": "images/training",
    "train_labels": "annotations/training",
    "val_images": "images/validation",
    "val_labels": "annotations/validation",
}
"""Folders of ADE20K as published, by the flag of finetune_segmentation."""

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
        """Option -> absolute URL of the images, labels and weights that the user has."""
        urls: dict[str, str | None] = {option: getattr(self, option) for option in GIVEN}
        return {option: storage.absolute(url) for option, url in urls.items() if url is not None}

    @property
    def scale_name(self) -> str:
        """Without the folder and ending of a file."""
        return Path(storage.name(self.scale)).stem

    @property
    def seed_numbers(self) -> tuple[int, ...]:
        """The seeds."""
        return numbers("seeds", self.seeds)


def numbers(key: str, text: str) -> tuple[int, ...]:
    """`0,1,2` as numbers; InputError for anything else."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise InputError(f"{key} is {text!r}; give numbers with commas between, as in 0,1,2")
    return tuple(int(part) for part in parts)


class LeftOut(Exception):
    """A row, or one column of it, is not run; the message is the reason under the table."""


# ------------------------------------------------------------------------------------------------ rows


@dataclass(frozen=True, kw_only=True)
class RowPlanner:
    """Expands rows into stages, at one scale and with one seed."""

    config: ReproduceConfig
    scale: Scale
    seed: int = 0

    def measure(self, row: Row, metric: str) -> Stage:
        """The stage whose artifact holds a column of a row; LeftOut, with the reason, where none is run."""
        job = paper_tables().metrics[metric].stage
        if row.probed != "pretrained" and job != "probe_linear":
            raise LeftOut("a baseline of the probe")
        match job:
            case "train_tokenizer":
                return self._tokenizer(row)
            case "probe_linear":
                return self._stage(job, row, {"backbone": self._backbone(row), **self._images()})
            case "finetune_classifier":
                return self._classifier(row)
            case "finetune_segmentation":
                return self._segmenter(row)
            case "evaluate_robustness":
                return self._robustness(row, metric)
        raise ValueError(f"no stage measures {metric}")

    def changed_settings(self, row: Row) -> dict[str, Any]:
        """The overrides of a row whose values are others at this scale, as they are here, by dotted key."""
        changed: dict[str, Any] = {}
        for job, keys in row.overrides.items():
            for key, value in keys.items():
                translated = self._translated(job, key, value)
                if translated != {key: value}:
                    changed |= translated
        return changed

    # Each stage, from the first to the last.

    def _prepared(self, option: str) -> Stage:
        return self._stage("prepare_images", None, data={"source": self.config.given[option]})

    def _images(self) -> dict[str, Stage]:
        return {"train": self._prepared("train_source"), "val": self._prepared("val_source")}

    def _tokenizer(self, row: Row) -> Stage:
        needs = {"images": self._prepared("train_source"), "val_images": self._prepared("val_source")}
        return self._stage("train_tokenizer", row, needs, extra=self._teacher(row))

    def _backbone(self, row: Row) -> Stage:
        if row.start != "backbone":
            raise LeftOut("there is no backbone that was pretrained")
        needs = {"images": self._prepared("train_source"), "tokenizer": self._tokenizer(row)}
        if not self.scale.online:
            needs = {"shards": self._stage("precompute_shards", row, needs)}
        return self._stage("pretrain_mim", row, needs)

    def _pretrained(self, row: Row) -> Stage:
        """The backbone, or the classifier of ImageNet-21k that a row's recipe puts in between."""
        if INTERMEDIATE not in self.scale.recipes.get(row.recipe, {}):
            return self._backbone(row)
        self._require("imagenet21k", "ImageNet-21k")
        needs = {"backbone": self._backbone(row), "train": self._prepared("imagenet21k")}
        return self._stage(INTERMEDIATE, row, needs)

    def _classifier(self, row: Row) -> Stage:
        extra = {"subset.ids": ids} if (ids := self.config.given.get("finetune_ids")) is not None else {}
        needs: dict[str, Stage] = {}
        match row.start:
            case "backbone":
                needs["backbone"] = self._pretrained(row)
            case "tokenizer":
                needs["tokenizer"] = self._tokenizer(row)
            case "teacher":
                extra |= self._teacher(row)
        needs |= self._images()
        return self._stage("finetune_classifier", row, needs, extra=extra, flags={"init": row.start})

    def _segmenter(self, row: Row) -> Stage:
        if row.start not in ("backbone", "scratch"):
            raise LeftOut("finetune_segmentation starts from a backbone or from chance")
        self._settings("finetune_segmentation", row)  # LeftOut where the scale does not run it
        ade20k = self._require("ade20k", "ADE20K")
        data = {flag: storage.join(ade20k, folder) for flag, folder in ADE20K.items()}
        needs = {"backbone": self._pretrained(row)} if row.start == "backbone" else {}
        return self._stage("finetune_segmentation", row, needs, data=data, flags={"init": row.start})

    def _robustness(self, row: Row, metric: str) -> Stage:
        self._settings("evaluate_robustness", row)  # LeftOut where the scale does not run it
        if metric in BENCHMARKS:
            self._require(metric, paper_tables().metrics[metric].title.split()[0])
        data = {name: self.config.given[name] for name in BENCHMARKS if name in self.config.given}
        needs = {"classifier": self._classifier(row), "clean": self._prepared("val_source")}
        return self._stage("evaluate_robustness", row, needs, data=data)

    def _stage(
        self,
        key: str,
        row: Row | None,
        needs: Mapping[str, Stage] | None = None,
        *,
        extra: Mapping[str, Any] | None = None,
        flags: Mapping[str, str] | None = None,
        data: Mapping[str, str] | None = None,
    ) -> Stage:
        settings = self._settings(key, row, extra)
        return make_stage(_job(key), settings, self.config.root, flags=flags, data=data, needs=needs)

    def _require(self, option: str, what: str) -> str:
        if option not in self.config.given:
            raise LeftOut(f"needs {what}: give --{option}")
        return self.config.given[option]

    # Settings.

    def _settings(self, key: str, row: Row | None, extra: Mapping[str, Any] | None = None) -> StageConfig:
        """File and overrides of a job or `intermediate`: the scale's, the recipe's, the row's, the user's."""
        recipe: Mapping[str, StageConfig] = {}
        if row is not None:
            if row.recipe not in self.scale.recipes:
                raise LeftOut(f"the scale {self.config.scale_name} has no recipe {row.recipe}")
            recipe = self.scale.recipes[row.recipe]
        if key not in recipe and key not in self.scale.stages:
            raise LeftOut(f"the scale {self.config.scale_name} does not run {key}")
        special, common = recipe.get(key, StageConfig()), self.scale.stages.get(key, StageConfig())
        overrides = {**common.overrides, **special.overrides, **(extra or {})}
        for name, value in (row.overrides.get(key, {}) if row is not None else {}).items():
            overrides |= self._translated(key, name, value)
        if JOBS[_job(key)].seeded:
            overrides["seed"] = self.seed
        return StageConfig(
            config=special.config or common.config,
            overrides={**overrides, **self.config.overrides.get(key, {})},
        )

    def _translated(self, key: str, name: str, value: Any) -> dict[str, Any]:
        """A row's override at this scale; a value that the scale does not mention, and null, stay."""
        values = self.scale.translate.get(key, {}).get(name, {})
        text = value if isinstance(value, str) else json.dumps(value)
        if value is None or text not in values:
            return {name: value}
        translated = values[text]
        if translated is None:
            raise LeftOut(f"{name} {text} has no counterpart at the scale {self.config.scale_name}")
        return dict(translated) if isinstance(translated, Mapping) else {name: translated}

    def _teacher(self, row: Row) -> dict[str, Any]:
        if row.teacher not in self.scale.teachers:
            raise LeftOut(
                f"the scale {self.config.scale_name} has no counterpart of the teacher {row.teacher}"
            )
        keys = dict(self.scale.teachers[row.teacher])
        if row.teacher == "clip":
            if "teacher" in self.config.given:
                keys["teacher.pretrained"] = self.config.given["teacher"]
            elif self.scale.teacher_from_file:
                raise LeftOut("needs the weights of a teacher: give --teacher")
        return keys


def _job(key: str) -> str:
    return "finetune_classifier" if key == INTERMEDIATE else key

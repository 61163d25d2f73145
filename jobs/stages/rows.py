"""From a row of a table to the stages that measure it, at a scale, with what the user has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jobs.stages.naming import JOBS, make_stage
from jobs.stages.paper_tables import INTERMEDIATE, Row, paper_tables
from jobs.stages.stage import Stage, StageConfig
from pipeline import storage
from pipeline.config import parse
from pipeline.errors import InputError

SCALES = "jobs/configs/reproduce"
BENCHMARKS = ("imagenet_a", "imagenet_r", "imagenet_sketch")
"""Shifted sets of images, by the flag of evaluate_robustness."""

ADE20K = {
    "train_images": "images/training",
    "train_labels": "annotations/training",
    "val_images": "images/validation",
    "val_labels": "annotations/validation",
}
"""Folders of ADE20K as published, by the flag of finetune_segmentation."""


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


class LeftOut(Exception):
    """A row, or one column of it, is not run; the message is the reason under the table."""


# ------------------------------------------------------------------------------------------------ rows


@dataclass(frozen=True, kw_only=True)
class RowPlanner:
    """Expands rows into stages, at one scale and with one seed."""

    name: str
    """Of the scale."""
    scale: Scale
    given: Mapping[str, str]
    """Option of reproduce_table -> absolute URL of the images, labels or weights that the user has."""
    root: str
    """Folder of all stages."""
    seed: int = 0
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Job -> dotted key -> value, on top of scale and row."""

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
        return self._stage("prepare_images", None, data={"source": self.given[option]})

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
        extra = {"subset.ids": ids} if (ids := self.given.get("finetune_ids")) is not None else {}
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
        data = {name: self.given[name] for name in BENCHMARKS if name in self.given}
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
        return make_stage(_job(key), settings, self.root, flags=flags, data=data, needs=needs)

    def _require(self, option: str, what: str) -> str:
        if option not in self.given:
            raise LeftOut(f"needs {what}: give --{option}")
        return self.given[option]

    # Settings.

    def _settings(self, key: str, row: Row | None, extra: Mapping[str, Any] | None = None) -> StageConfig:
        """File and overrides of a job or `intermediate`: the scale's, the recipe's, the row's, the user's."""
        recipe: Mapping[str, StageConfig] = {}
        if row is not None:
            if row.recipe not in self.scale.recipes:
                raise LeftOut(f"the scale {self.name} has no recipe {row.recipe}")
            recipe = self.scale.recipes[row.recipe]
        if key not in recipe and key not in self.scale.stages:
            raise LeftOut(f"the scale {self.name} does not run {key}")
        special, common = recipe.get(key, StageConfig()), self.scale.stages.get(key, StageConfig())
        overrides = {**common.overrides, **special.overrides, **(extra or {})}
        for name, value in (row.overrides.get(key, {}) if row is not None else {}).items():
            overrides |= self._translated(key, name, value)
        if JOBS[_job(key)].seeded:
            overrides["seed"] = self.seed
        return StageConfig(
            config=special.config or common.config, overrides={**overrides, **self.overrides.get(key, {})}
        )

    def _translated(self, key: str, name: str, value: Any) -> dict[str, Any]:
        """A row's override at this scale; a value that the scale does not mention, and null, stay."""
        values = self.scale.translate.get(key, {}).get(name, {})
        text = value if isinstance(value, str) else json.dumps(value)
        if value is None or text not in values:
            return {name: value}
        translated = values[text]
        if translated is None:
            raise LeftOut(f"{name} {text} has no counterpart at the scale {self.name}")
        return dict(translated) if isinstance(translated, Mapping) else {name: translated}

    def _teacher(self, row: Row) -> dict[str, Any]:
        if row.teacher not in self.scale.teachers:
            raise LeftOut(f"the scale {self.name} has no counterpart of the teacher {row.teacher}")
        keys = dict(self.scale.teachers[row.teacher])
        if row.teacher == "clip":
            if "teacher" in self.given:
                keys["teacher.pretrained"] = self.given["teacher"]
            elif self.scale.teacher_from_file:
                raise LeftOut("needs the weights of a teacher: give --teacher")
        return keys


def _job(key: str) -> str:
    return "finetune_classifier" if key == INTERMEDIATE else key

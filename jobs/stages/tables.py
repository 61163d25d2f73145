"""From the rows of a table to a graph of stages, each named by what decides its result.

A stage's folder is `<job>-<8 digits>`: a hash of its settings, where these are not the job's defaults, of the
content it is given from outside, and of the names of the stages it reads. Places, workers and threads are no
part of it, so two rows that need the same run share it, and outputs may be moved.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from jobs.run_pipeline import ClusterOverride, Stage, StageConfig, command_line, settings_fingerprint
from jobs.stages.paper_tables import INTERMEDIATE, METRICS, Row
from pipeline import artifacts, storage
from pipeline.config import parse, to_dict
from pipeline.errors import InputError

HEADERS = {
    "prepare_images": "manifest",
    "train_tokenizer": "tokenizer",
    "precompute_shards": "manifest",
    "pretrain_mim": "backbone",
    "probe_linear": "probe",
    "finetune_classifier": "classifier",
    "finetune_segmentation": "segmentation",
    "evaluate_robustness": "robustness",
}
"""Job -> name of the header that is written last."""

SEEDED = (
    "train_tokenizer",
    "pretrain_mim",
    "probe_linear",
    "finetune_classifier",
    "finetune_segmentation",
)
"""Stages that are repeated for every seed; images and crops stay the same."""

BENCHMARKS = ("imagenet_a", "imagenet_r", "imagenet_sketch")

ADE20K = {
    "train_images": "images/training",
    "train_labels": "annotations/training",
    "val_images": "images/validation",
    "val_labels": "annotations/validation",
}
"""Folders of ADE20K as published, by the flag of finetune_segmentation."""

_HOW = (
    "output",
    "cluster",
    "decode_threads",
    "encoder_threads",
    "check_threads",
    "micro_batch_size",
    "images_per_batch",
    "checkpoint_every_s",
    "checkpoint_keep",
    "log_every_steps",
    "num_pictures",
    "cache",
    "dry_run",
    "json",
)
"""Settings of a job that say how and where it runs, not what comes out."""

_NEEDED: dict[str, dict[str, str]] = {
    "finetune_segmentation": {"num_classes": "2"},
    "evaluate_robustness": {"corruptions": "jpeg"},
}
"""What a job has to be told besides places, so that its defaults can be seen; always part of a name."""

_SETTLED = ("lanes", "window", "stored_views")
"""Settings that a job takes from what it finds where they are null, and then keeps to."""

_UNSAID = object()
_TEACHER = "teacher.pretrained"
_SUBSET = "subset.ids"


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
    """Number of a table -> rows of CONTROLS under the paper's."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What the user has."""

    train: str
    val: str
    teacher: str | None = None
    finetune_ids: str | None = None
    imagenet21k: str | None = None
    ade20k: str | None = None
    benchmarks: Mapping[str, str] = field(default_factory=dict)
    """Name of a shifted set -> its folder."""


class LeftOut(Exception):
    """A row, or one column of it, is not run; the message is the reason under the table."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Node:
    """One stage of the graph."""

    job: str
    settings: StageConfig
    flags: Mapping[str, str]
    """What the row decides besides the settings."""
    data: Mapping[str, str]
    """Flag -> a place outside the graph."""
    reads: Mapping[str, Node]
    """Flag -> the stage whose output it names."""
    name: str
    """Its folder."""

    def place(self, output: str) -> str:
        """Where its artifact lies."""
        return storage.join(output, self.name)

    def header(self, output: str) -> str:
        """The file that is there when it is finished."""
        return storage.join(output, self.name, f"{HEADERS[self.job]}.json")

    def finished(self, output: str) -> bool:
        """Its header is there."""
        return storage.exists(self.header(output))

    def stage(self, output: str) -> Stage:
        """The stage with its places filled in."""
        places = {flag: node.place(output) for flag, node in self.reads.items()}
        return Stage(
            name=self.job,
            flags={**self.flags, **self.data, **places, "output": self.place(output)},
            reads=tuple(node.header(output) for node in self.reads.values()),
            writes=(self.header(output),),
            settings=self.settings,
        )

    def argv(self, output: str, cluster: ClusterOverride) -> list[str]:
        """The arguments of its job."""
        return command_line(self.stage(output), cluster)


def in_order(nodes: Iterable[Node]) -> list[Node]:
    """The nodes and all they read, each once and after what it reads."""
    found: dict[str, Node] = {}

    def visit(node: Node) -> None:
        if node.name not in found:
            for read in node.reads.values():
                visit(read)
            found[node.name] = node

    for node in nodes:
        visit(node)
    return list(found.values())


# ------------------------------------------------------------------------------------------------ names


def config_class(job: str) -> type[Any]:
    """The configuration of a job."""
    # Imported one by one: each brings its models, and no table needs all.
    match job:
        case "prepare_images":
            from shards.writer.prepare import PrepareConfig as Config
        case "train_tokenizer":
            from tokenizer.train import TokenizerTrainConfig as Config
        case "precompute_shards":
            from tokenizer.precompute.config import PrecomputeConfig as Config
        case "pretrain_mim":
            from pretrain.train import PretrainConfig as Config
        case "probe_linear":
            from pretrain.evals.probe import ProbeConfig as Config
        case "finetune_classifier":
            from pretrain.finetune.train import FinetuneConfig as Config
        case "finetune_segmentation":
            from pretrain.segment.train import SegmentationConfig as Config
        case "evaluate_robustness":
            from pretrain.evals.robustness import RobustnessConfig as Config
        case _:
            raise InputError(f"there is no stage {job} in a table; name one of {', '.join(HEADERS)}")
    return Config


def make_node(
    job: str,
    settings: StageConfig,
    *,
    flags: Mapping[str, str] | None = None,
    data: Mapping[str, str] | None = None,
    reads: Mapping[str, Node] | None = None,
) -> Node:
    """A stage under the name that follows from what decides its result."""
    flags, data, reads = flags or {}, data or {}, reads or {}
    unnamed = Node(job=job, settings=settings, flags=flags, data=data, reads=reads, name="unnamed")
    decides = {
        "job": job,
        "flags": dict(flags),
        "settings": _said(unnamed),
        "data": {flag: listing_fingerprint(url) for flag, url in data.items()},
        "reads": {flag: node.name for flag, node in reads.items()},
    }
    return dataclasses.replace(unnamed, name=f"{job}-{artifacts.fingerprint(decides)[:8]}")


def resolved(node: Node) -> dict[str, Any]:
    """All settings the job runs with, by dotted key; InputError for a key or value it does not know.

    Its places are stand-ins: what they are does not matter, and equal settings are then looked at once.
    """
    places = dict.fromkeys((*node.data, *node.reads, "output"), "somewhere")
    stage = Stage(name=node.job, flags={**node.flags, **places}, reads=(), writes=(), settings=node.settings)
    argv = command_line(stage, ClusterOverride())
    return _resolved(node.job, tuple(argv), settings_fingerprint(stage, argv))


@functools.cache
def _resolved(job: str, argv: tuple[str, ...], content: str) -> dict[str, Any]:
    del content  # of the file named in argv: part of the key
    return dict(_leaves(to_dict(parse(config_class(job), argv))))


def _said(node: Node) -> dict[str, Any]:
    """Settings that differ from the job's defaults; files named in them count by their content.

    A new setting with a default leaves all names as they are.
    """
    needed = _NEEDED.get(node.job, {})
    bare = dataclasses.replace(node, settings=StageConfig(), flags={**node.flags, **needed})
    defaults = resolved(bare)
    places = {*_HOW, *node.data, *node.reads}
    said = {
        key: value
        for key, value in resolved(node).items()
        if key.split(".")[0] not in places and (key in needed or defaults.get(key, _UNSAID) != value)
    }
    for key in (_TEACHER, _SUBSET):
        if said.get(key) is not None and storage.exists(said[key]):
            said[key] = artifacts.sha256_hex(storage.read(said[key]))
    return said


def why_foreign(node: Node, output: str) -> str | None:
    """How the run that lies in a stage's folder differs from the stage; None where it does not.

    Folders are moved by hand. What is compared is what the run itself says of its settings in run.json; image
    shards and token shards have none. Files named in settings count by content, which the name says.
    """
    asked = resolved(node)
    held = dict(_leaves(artifacts.claimed_config(node.place(output))))
    differing = [
        f"{key}: there {value!r}, asked {asked.get(key)!r}"
        for key, value in held.items()
        if key not in (_TEACHER, _SUBSET)
        and not (key in _SETTLED and asked.get(key) is None)
        and asked.get(key) != value
    ]
    return "; ".join(differing[:4]) or None


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@functools.cache
def listing_fingerprint(url: str) -> str:
    """Fingerprint of the names and sizes below a folder, wherever it lies; of a file, of its name and size.

    A remote folder counts by its URL alone, because listing millions of objects takes minutes. InputError
    where there is nothing.
    """
    if not storage.is_local(url):
        return artifacts.fingerprint({"url": url.rstrip("/")})
    root = storage.absolute(url)
    if (file := storage.stat(root)) is not None:
        return artifacts.fingerprint([[storage.name(root), file.bytes]])
    files = [[os.fsencode(file.url[len(root) :]).hex(), file.bytes] for file in storage.list_files(root)]
    if not files:
        raise InputError(f"there are no files at {url}; name a folder of images")
    return artifacts.fingerprint(files)


# ------------------------------------------------------------------------------------------------ rows


class Planner:
    """Expands rows into stages, at one scale and with one seed."""

    def __init__(
        self,
        name: str,
        scale: Scale,
        sources: Sources,
        *,
        seed: int = 0,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.name, self.scale, self.sources, self.seed = name, scale, sources, seed
        self._overrides = overrides or {}

    def measure(self, row: Row, metric: str) -> Node:
        """The stage whose artifact holds a column of a row; LeftOut, with the reason, where none is run."""
        job = METRICS[metric].stage
        if row.probed != "pretrained" and job != "probe_linear":
            raise LeftOut("a baseline of the probe")
        match job:
            case "train_tokenizer":
                return self._tokenizer(row)
            case "probe_linear":
                return self._probe(row)
            case "finetune_classifier":
                return self._classifier(row)
            case "finetune_segmentation":
                return self._segmenter(row)
            case "evaluate_robustness":
                return self._robustness(row, metric)
        raise ValueError(f"no stage measures {metric}")

    def here(self, row: Row) -> dict[str, Any]:
        """The overrides of a row whose values are others at this scale, as they are here, by dotted key."""
        found: dict[str, Any] = {}
        for job, keys in row.overrides.items():
            for key, value in keys.items():
                translated = self._translated(job, key, value)
                if translated != {key: value}:
                    found |= translated
        return found

    # Each stage, from the first to the last.

    def _prepared(self, source: str) -> Node:
        return make_node("prepare_images", self._settings("prepare_images", None), data={"source": source})

    def _tokenizer(self, row: Row) -> Node:
        return make_node(
            "train_tokenizer",
            self._settings("train_tokenizer", row, self._teacher(row)),
            reads={
                "images": self._prepared(self.sources.train),
                "val_images": self._prepared(self.sources.val),
            },
        )

    def _backbone(self, row: Row) -> Node:
        if row.start != "backbone":
            raise LeftOut("there is no backbone that was pretrained")
        images, tokenizer = self._prepared(self.sources.train), self._tokenizer(row)
        reads = {"images": images, "tokenizer": tokenizer}
        if not self.scale.online:
            settings = self._settings("precompute_shards", row)
            reads = {"shards": make_node("precompute_shards", settings, reads=reads)}
        return make_node("pretrain_mim", self._settings("pretrain_mim", row), reads=reads)

    def _probe(self, row: Row) -> Node:
        reads = {
            "backbone": self._backbone(row),
            "train": self._prepared(self.sources.train),
            "val": self._prepared(self.sources.val),
        }
        return make_node("probe_linear", self._settings("probe_linear", row), reads=reads)

    def _intermediate(self, row: Row) -> Node | None:
        """The classifier of ImageNet-21k that a row's recipe puts in between."""
        if INTERMEDIATE not in self.scale.recipes.get(row.recipe, {}):
            return None
        if self.sources.imagenet21k is None:
            raise LeftOut("needs ImageNet-21k: give --imagenet21k")
        reads = {"backbone": self._backbone(row), "train": self._prepared(self.sources.imagenet21k)}
        return make_node("finetune_classifier", self._settings(INTERMEDIATE, row), reads=reads)

    def _classifier(self, row: Row) -> Node:
        extra: dict[str, Any] = {}
        if self.sources.finetune_ids is not None:
            extra[_SUBSET] = self.sources.finetune_ids
        reads: dict[str, Node] = {}
        match row.start:
            case "backbone":
                reads["backbone"] = self._intermediate(row) or self._backbone(row)
            case "tokenizer":
                reads["tokenizer"] = self._tokenizer(row)
            case "teacher":
                extra |= self._teacher(row)
        reads["train"] = self._prepared(self.sources.train)
        reads["val"] = self._prepared(self.sources.val)
        settings = self._settings("finetune_classifier", row, extra)
        return make_node("finetune_classifier", settings, flags={"init": row.start}, reads=reads)

    def _segmenter(self, row: Row) -> Node:
        if row.start not in ("backbone", "scratch"):
            raise LeftOut("finetune_segmentation starts from a backbone or from chance")
        settings = self._settings("finetune_segmentation", row)
        if self.sources.ade20k is None:
            raise LeftOut("needs ADE20K: give --ade20k")
        data = {flag: storage.join(self.sources.ade20k, folder) for flag, folder in ADE20K.items()}
        reads: dict[str, Node] = {}
        if row.start == "backbone":
            reads["backbone"] = self._intermediate(row) or self._backbone(row)
        return make_node("finetune_segmentation", settings, flags={"init": row.start}, data=data, reads=reads)

    def _robustness(self, row: Row, metric: str) -> Node:
        settings = self._settings("evaluate_robustness", row)
        if metric in BENCHMARKS and metric not in self.sources.benchmarks:
            raise LeftOut(f"needs {METRICS[metric].title.split()[0]}: give --{metric}")
        reads = {"classifier": self._classifier(row), "clean": self._prepared(self.sources.val)}
        return make_node("evaluate_robustness", settings, data=self.sources.benchmarks, reads=reads)

    # Settings.

    def _settings(self, key: str, row: Row | None, extra: Mapping[str, Any] | None = None) -> StageConfig:
        """File and overrides of a job or `intermediate`: the scale's, the recipe's, the row's, the user's."""
        recipe: Mapping[str, StageConfig] = {}
        if row is not None:
            if row.recipe not in self.scale.recipes:
                raise LeftOut(f"the scale {self.name} has no recipe {row.recipe}")
            recipe = self.scale.recipes[row.recipe]
        ours, base = recipe.get(key), self.scale.stages.get(key)
        if ours is None and base is None:
            raise LeftOut(f"the scale {self.name} does not run {key}")
        ours, base = ours or StageConfig(), base or StageConfig()
        overrides = {**base.overrides, **ours.overrides, **(extra or {})}
        for name, value in (row.overrides.get(key, {}) if row is not None else {}).items():
            overrides |= self._translated(key, name, value)
        job = "finetune_classifier" if key == INTERMEDIATE else key
        if job in SEEDED:
            overrides["seed"] = self.seed
        return StageConfig(
            config=ours.config or base.config, overrides={**overrides, **self._overrides.get(key, {})}
        )

    def _translated(self, key: str, name: str, value: Any) -> dict[str, Any]:
        """A row's override at this scale; a value that the scale does not mention, and null, stay."""
        values = self.scale.translate.get(key, {}).get(name, {})
        written = value if isinstance(value, str) else json.dumps(value)
        if value is None or written not in values:
            return {name: value}
        found = values[written]
        if found is None:
            raise LeftOut(f"{name} {written} has no counterpart at the scale {self.name}")
        return dict(found) if isinstance(found, Mapping) else {name: found}

    def _teacher(self, row: Row) -> dict[str, Any]:
        if row.teacher not in self.scale.teachers:
            raise LeftOut(f"the scale {self.name} has no counterpart of the teacher {row.teacher}")
        keys = dict(self.scale.teachers[row.teacher])
        if row.teacher == "clip":
            if self.sources.teacher is not None:
                keys[_TEACHER] = self.sources.teacher
            elif self.scale.teacher_from_file:
                raise LeftOut("needs the weights of a teacher: give --teacher")
        return keys

"""The pipeline's graph, from a folder of images to a report, and its record of what is finished."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from jobs.stages.runner import StartJob, run_stage
from jobs.stages.stage import ClusterOverride, Stage, StageConfig, check_address, headers_fingerprint
from pipeline import artifacts, storage
from pipeline.errors import InputError
from pipeline.training import metrics

RECORD_FILE = "pipeline.json"
RECORD_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """From a folder of images to a pretrained backbone and a report, stage by stage.

    A stage is skipped while its settings, its inputs and its artifact are those of its last run, as recorded
    in pipeline.json. A failed stage ends the run, and the same command goes on from there.
    """

    output: str
    """Folder or URL for everything: image_shards, tokenizer, token_shards, backbone, probe, report, logs."""
    images: str | None = None
    """Your own images, as prepare_images reads them; null draws a labelled set."""
    val_fraction: float = 0.0
    """Part of the images held out for validation and the probe; 0 keeps one dataset, without a probe."""
    online: bool = False
    """Pretrain from image shards and tokenizer, without writing token shards."""
    address: str | None = None
    """Job server of a Ray cluster (http://host:8265) to which stages are submitted; null runs them here."""
    cluster: ClusterOverride = field(default_factory=ClusterOverride)
    """Cluster settings of every stage."""
    draw_images: StageConfig = field(default_factory=StageConfig)
    """The pictures, where there are no images of your own."""
    prepare_images: StageConfig = field(default_factory=StageConfig)
    """Images to image shards."""
    train_tokenizer: StageConfig = field(default_factory=StageConfig)
    """Image shards to a tokenizer."""
    precompute_shards: StageConfig = field(default_factory=StageConfig)
    """Image shards and tokenizer to token shards."""
    pretrain_mim: StageConfig = field(default_factory=StageConfig)
    """Token shards to a backbone."""
    probe_linear: StageConfig = field(default_factory=StageConfig)
    """What a linear classifier makes of the backbone's features."""
    write_report: StageConfig = field(default_factory=StageConfig)
    """The page with curves, codes and predictions."""

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise InputError(
                f"val_fraction is {self.val_fraction}; give 0 for one dataset, or a part below 1"
            )
        check_address(self.address)

    @property
    def root(self) -> str:
        """The output under a name that holds in every process."""
        return storage.absolute(self.output)

    @property
    def image_source(self) -> str:
        """The images under such a name: the user's, or those that draw_images makes."""
        return storage.absolute(self.images) if self.images else storage.join(self.root, "images", "images")


# ------------------------------------------------------------------------------------------------ graph


def left_out_stages(config: PipelineConfig) -> dict[str, str]:
    """Stages that this configuration leaves out, and why."""
    reasons: dict[str, str] = {}
    if config.images is not None:
        reasons["draw_images"] = f"the images are those of {config.images}"
    if config.online:
        reasons["precompute_shards"] = "pretraining tokenizes online"
    if config.val_fraction == 0:
        reasons["probe_linear"] = "no images are held out; give --val_fraction"
    return reasons


def stages(config: PipelineConfig) -> list[Stage]:
    """The stages of a run in order, without those that this configuration leaves out."""

    def at(*parts: str) -> str:
        return storage.join(config.root, *parts)

    split = config.val_fraction > 0
    train = at("image_shards", "train") if split else at("image_shards")
    val = at("image_shards", "val")
    drawing = (at("images", "drawing.json"),) if config.images is None else ()
    train_manifest = storage.join(train, "manifest.json")
    manifests = (train_manifest, storage.join(val, "manifest.json")) if split else (train_manifest,)
    tokenizer_header = at("tokenizer", "tokenizer.json")
    token_manifest = at("token_shards", "manifest.json")
    backbone_header = at("backbone", "backbone.json")

    def stage(job: str, flags: dict[str, str], inputs: tuple[str, ...], *outputs: str) -> Stage:
        settings: StageConfig = getattr(config, job)
        return Stage(
            job=job,
            name=job,
            settings=settings,
            flags=flags,
            inputs=inputs,
            outputs=outputs,
            uses_cluster=job not in ("draw_images", "write_report"),
            echoes=job != "write_report",
        )

    draw = stage("draw_images", {"output": at("images")}, (), *drawing)
    # val_fraction is always passed: the stage's YAML may set another value.
    flags = {"source": config.image_source, "output": at("image_shards")}
    flags["val_fraction"] = str(config.val_fraction)
    prepare = stage("prepare_images", flags, drawing, *manifests)
    flags = {"images": train, "output": at("tokenizer")} | ({"val_images": val} if split else {})
    tokenizer = stage("train_tokenizer", flags, manifests, tokenizer_header)
    encoded = {"images": train, "tokenizer": at("tokenizer")}
    flags = encoded | {"output": at("token_shards")}
    precompute = stage("precompute_shards", flags, (train_manifest, tokenizer_header), token_manifest)
    flags = {"output": at("backbone")} | (encoded if config.online else {"shards": at("token_shards")})
    inputs = precompute.inputs if config.online else precompute.outputs
    pretrain = stage("pretrain_mim", flags, inputs, backbone_header)
    flags = {"backbone": at("backbone"), "train": train, "val": val, "output": at("probe")}
    probe = stage("probe_linear", flags, (backbone_header, *manifests), at("probe", "probe.json"))

    shown = {"images": prepare, "tokenizer": tokenizer, "shards": precompute, "backbone": pretrain}
    shown["probe"] = probe
    left_out = left_out_stages(config)
    run = [stage for stage in (draw, *shown.values()) if stage.name not in left_out]
    report = at("report.html")
    flags = {"output": report, "pipeline_summary": at(RECORD_FILE)}
    flags |= {flag: stage.output for flag, stage in shown.items() if stage in run}
    return [*run, stage("write_report", flags, tuple(url for stage in run for url in stage.outputs), report)]


# ------------------------------------------------------------------------------------------------ record


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """What is known of a stage's last run."""

    settings: str
    """Fingerprint of command line and configuration file."""
    inputs: str
    """Fingerprint of the headers it read."""
    artifact: str | None
    """Fingerprint of the headers it wrote; null when it failed."""
    finished: bool
    seconds: float
    """Wall time of all its attempts with these settings and inputs."""
    steps: int | None
    """The last step in its metrics, for a stage that trains."""


def read_record(output: str) -> dict[str, StageRecord]:
    """The stages' last runs by name; empty for a new output."""
    url = storage.join(output, RECORD_FILE)
    text = storage.read_or_none(url)
    if text is None:
        return {}
    try:
        data = json.loads(text)
    except ValueError as error:
        raise InputError(
            f"{url} is not JSON ({error}); remove it, and finished stages find that out themselves"
        ) from None
    if not isinstance(data, dict) or data.get("format") != RECORD_FORMAT:
        raise InputError(f"{url} is no record of a pipeline of this version; choose another --output")
    return {name: StageRecord(**entry) for name, entry in data["stages"].items()}


def write_record(output: str, record: Mapping[str, StageRecord], left_out: Mapping[str, str]) -> None:
    """Publish the record."""
    data = {
        "format": RECORD_FORMAT,
        "stages": {name: asdict(entry) for name, entry in record.items()},
        "left_out": dict(left_out),
    }
    storage.put(storage.join(output, RECORD_FILE), json.dumps(data, indent=2).encode() + b"\n")


def inputs_fingerprint(stage: Stage, images: str) -> str:
    """Fingerprint of what the stage reads; of a local folder of images, the names, sizes and times.

    A remote folder of images counts by its URL alone, because listing millions of objects takes minutes:
    prepare_images froze its listing in the first run, and another one belongs into another output.
    """
    inputs: list[Any] = [headers_fingerprint((url,)) for url in stage.inputs]
    if stage.job == "prepare_images" and not stage.inputs and storage.is_local(images):
        inputs += [[os.fsencode(file.url).hex(), file.bytes, file.version] for file in _local_files(images)]
    return artifacts.fingerprint(inputs)


def _local_files(images: str) -> list[storage.FileStat]:
    """The files of a folder, a single file, or, for a pattern of files, those of the folder it is in."""
    if (file := storage.stat(images)) is not None:
        return [file]
    folder = images if os.path.isdir(images) else os.path.dirname(re.split(r"[*?\[{]", images)[0])
    return list(storage.list_files(folder))


# ------------------------------------------------------------------------------------------------ running


def run_stages(config: PipelineConfig, start: StartJob) -> None:
    """Run what is not finished, in order; SystemExit with the stage's status (1 or 2) where one fails."""
    record, left_out = read_record(config.root), left_out_stages(config)
    for name, reason in left_out.items():
        print(f"{name}: left out: {reason}", flush=True)
    planned = [(stage, stage.argv(config.cluster)) for stage in stages(config)]
    # All files are read before the first stage starts: a misspelt one shows now, not in an hour.
    fingerprints = {stage.name: stage.settings_fingerprint(argv) for stage, argv in planned}

    for stage, argv in planned:
        settings, inputs = fingerprints[stage.name], inputs_fingerprint(stage, config.image_source)
        last = record.get(stage.name)
        if last is not None and (last.settings, last.inputs) != (settings, inputs):
            last = None
        if last is not None and last.finished and last.artifact == headers_fingerprint(stage.outputs):
            print(f"{stage.name}: finished before, with the same settings and inputs; skipped", flush=True)
            continue
        attempt = run_stage(stage, argv, config.root, start, earlier_s=last.seconds if last else 0.0)
        record[stage.name] = StageRecord(
            settings=settings,
            inputs=inputs,
            artifact=headers_fingerprint(stage.outputs),
            finished=attempt.finished,
            seconds=round(attempt.seconds, 1),
            steps=_last_step(stage),
        )
        write_record(config.root, record, left_out)
        if not attempt.finished:
            sys.exit(2 if attempt.status == 2 else 1)


def _last_step(stage: Stage) -> int | None:
    """The last step in the stage's metrics."""
    steps = [int(entry["step"]) for entry in metrics.read_metrics(stage.output) if "step" in entry]
    return max(steps, default=None)

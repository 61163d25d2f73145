"""What a run has left behind, opened: the input of the report, and its summary as lines of one table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jobs.report_page import Interval, TableRow
from pipeline import artifacts, metrics, storage
from pipeline.errors import InputError
from pretrain.backbone import read_backbone_header
from shards.manifest import Dataset, open_dataset
from tokenizer.artifact import read_tokenizer


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write a report about a pipeline's results, or about any part of them."""

    output: str
    """The page, if it ends in .html; else a folder that gets report.html. An older report is replaced."""
    images: str | None = None
    """Output of prepare_images: one dataset, or train/ and val/."""
    tokenizer: str | None = None
    """Output of train_tokenizer."""
    shards: str | None = None
    """Output of precompute_shards."""
    backbone: str | None = None
    """Output of pretrain_mim."""
    probe: str | None = None
    """Output of probe_linear."""
    pipeline_summary: str | None = None
    """pipeline.json of run_pipeline: seconds and steps per stage, and what was left out."""
    title: str = "BEiT v2 pretraining report"
    """Heading of the page."""
    sample_images: int = 400
    """Stored crops among which patches are grouped by code."""
    codes_per_group: int = 7
    """Codes shown as most consistent, and as many as most used."""
    patches_per_code: int = 12
    """Patches shown of each code."""
    predictions: int = 6
    """Images shown with mask, codes and predictions."""
    seed: int = 0
    """Decides which patches are hidden."""

    def __post_init__(self) -> None:
        for key in ("sample_images", "codes_per_group", "patches_per_code", "predictions"):
            if getattr(self, key) < 1:
                raise InputError(f"--{key} is {getattr(self, key)}; give at least 1")


@dataclass(kw_only=True)
class Findings:
    """Everything that is there, opened, and one line about each thing that is not."""

    images: dict[str, Dataset] = field(default_factory=dict)
    """By split: {"": …}, or {"train": …, "val": …}."""
    tokenizer: dict[str, Any] | None = None
    """Header of the artifact."""
    tokens: Dataset | None = None
    backbone: dict[str, Any] | None = None
    """Header of the artifact."""
    probe: dict[str, Any] | None = None
    """Header of the probe's artifact."""
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name: {"seconds": …, "steps": …, "finished": …}."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Stages the pipeline left out, with its reason."""
    absent: dict[str, str] = field(default_factory=dict)
    """Why an input is not in the report, by the input's name."""
    curves: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Records of metrics.jsonl by input's name."""


def find(config: ReportConfig) -> Findings:
    """Open what the configuration names. Only when none of it is there, this is an InputError."""
    found = Findings()

    def missing(name: str, error: InputError) -> None:
        found.absent[name] = str(error)

    for name in ("images", "tokenizer", "shards", "backbone", "probe", "pipeline_summary"):
        if getattr(config, name) is None:
            found.absent[name] = f"no --{name} was given"
    if config.images is not None:
        try:
            found.images = _open_images(storage.absolute(config.images))
        except InputError as error:
            missing("images", error)
    if config.tokenizer is not None:
        try:
            found.tokenizer = read_tokenizer(storage.absolute(config.tokenizer)).header
        except InputError as error:
            missing("tokenizer", error)
    if config.shards is not None:
        try:
            found.tokens = open_dataset(config.shards, "tokens")
        except InputError as error:
            missing("shards", error)
    if config.backbone is not None:
        try:
            found.backbone = read_backbone_header(storage.absolute(config.backbone))
        except InputError as error:
            missing("backbone", error)
    if config.probe is not None:
        url = storage.absolute(config.probe)
        found.probe = artifacts.read_header(url, "probe")
        if found.probe is None:
            found.absent["probe"] = f"no finished probe at {url}"
    if config.pipeline_summary is not None:
        try:
            _read_pipeline(found, storage.absolute(config.pipeline_summary))
        except InputError as error:
            missing("pipeline_summary", error)
    for name, url in (("tokenizer", config.tokenizer), ("backbone", config.backbone)):
        if url is not None:
            found.curves[name] = metrics.read_metrics(storage.absolute(url))
    if "probe_linear" in found.left_out:
        found.absent["probe"] = found.left_out["probe_linear"]
    if not (found.images or found.tokenizer or found.tokens or found.backbone or found.probe or found.stages):
        raise InputError(f"there is nothing to report on: {'; '.join(found.absent.values())}")
    return found


def _open_images(url: str) -> dict[str, Dataset]:
    splits = [
        split for split in ("train", "val") if storage.exists(storage.join(url, split, "manifest.json"))
    ]
    if splits:
        return {split: open_dataset(storage.join(url, split), "images") for split in splits}
    return {"": open_dataset(url, "images")}


def _read_pipeline(found: Findings, url: str) -> None:
    data = storage_bytes(url)
    if data is None:
        raise InputError(f"there is no pipeline summary at {url}; give the pipeline.json of run_pipeline")
    try:
        summary = json.loads(data)
        found.stages, found.left_out = dict(summary["stages"]), dict(summary.get("left_out", {}))
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{url} is no pipeline summary; give the pipeline.json of run_pipeline") from None


def storage_bytes(url: str) -> bytes | None:
    """An object's bytes, or None where there is none."""
    try:
        return storage.read(url)
    except (FileNotFoundError, NotADirectoryError):
        return None


# ------------------------------------------------------------------------------------------------ summary


def summary_rows(found: Findings) -> list[TableRow]:
    """The lines of the summary, for page and terminal alike."""
    rows: list[TableRow] = []

    def add(group: str, name: str, value: str, note: str = "") -> None:
        rows.append(TableRow(group=group, name=name, value=value, note=note))

    def say_missing(group: str, key: str) -> None:
        rows.append(TableRow(group=group, name="", value="—", note=found.absent[key], missing=True))

    if found.images:
        manifests = [dataset.manifest for dataset in found.images.values()]
        reasons: dict[str, int] = {}
        for manifest in manifests:
            for reason, count in manifest.samples_rejected.items():
                reasons[reason] = reasons.get(reason, 0) + count
        counts = (
            sum(manifest.samples_in for manifest in manifests),
            sum(manifest.samples_written for manifest in manifests),
            sum(reasons.values()),
        )
        splits = ", ".join(
            f"{split} {dataset.manifest.samples_written:,}"
            for split, dataset in found.images.items()
            if split
        )
        add("Images", "in / written / rejected", " / ".join(f"{count:,}" for count in counts), splits)
        if reasons:
            add("", "rejected because", ", ".join(f"{reason} {count:,}" for reason, count in reasons.items()))
    else:
        say_missing("Images", "images")

    if found.tokenizer is not None:
        figures, size = found.tokenizer["metrics"], found.tokenizer["config"]["codebook_size"]
        held_out = any(record["split"] == "val" for record in found.curves.get("tokenizer", []))
        where = "held-out images" if held_out else "training images"
        teacher = found.tokenizer["teacher"].get("name", "the teacher")
        loss = f"{figures['reconstruction_loss']:.4f}"
        add("Tokenizer", "reconstruction loss", loss, f"1 − cosine to {teacher}, {where}")
        usage = figures["codebook_usage"]
        add(
            "Tokenizer",
            "codebook usage",
            f"{100 * usage:.1f} %",
            f"{usage * size:.0f} of {size:,} codes, {where}",
        )
        add("Tokenizer", "perplexity", f"{figures['perplexity']:,.1f}", f"of at most {size:,}, {where}")
    else:
        say_missing("Tokenizer", "tokenizer")

    if found.tokens is not None:
        manifest = found.tokens.manifest
        views = f"{manifest.num_views} view{'s' if manifest.num_views > 1 else ''} of each image"
        add("Token shards", "crops with codes", f"{manifest.samples_written:,}", views)
        if manifest.samples_rejected:
            add("Token shards", "rejected", f"{sum(manifest.samples_rejected.values()):,}")
    else:
        say_missing("Token shards", "shards")

    if found.backbone is not None:
        figures = found.backbone["run"].get("metrics", {})
        last = "mean over the last logged steps"
        for head, suffix in (("main head", ""), ("[CLS] head", "_cls")):
            if (loss := figures.get(f"loss{suffix}")) is not None:
                add("MIM", f"loss, {head}", f"{loss:.3f}", f"cross-entropy on masked patches, {last}")
            if (accuracy := figures.get(f"accuracy{suffix}")) is not None:
                add(
                    "MIM",
                    f"accuracy, {head}",
                    f"{100 * accuracy:.1f} %",
                    f"masked patches whose code was predicted, {last}",
                )
    else:
        say_missing("MIM", "backbone")

    if found.probe is not None:
        for row in probe_intervals(found.probe):
            value = f"{100 * row.value:.1f} % [{100 * row.low:.1f}, {100 * row.high:.1f}]"
            add("Linear probe", row.label, value)
        add("Linear probe", "gain", *probe_verdict(found.probe))
    else:
        say_missing("Linear probe", "probe")

    if found.stages:
        for name, stage in found.stages.items():
            steps = f"{stage['steps']:,} steps" if stage.get("steps") else ""
            add("Stages", name, metrics.duration(float(stage["seconds"])), steps)
        total = sum(float(stage["seconds"]) for stage in found.stages.values())
        add("Stages", "all", metrics.duration(total))
    else:
        say_missing("Stages", "pipeline_summary")
    return rows


def probe_intervals(probe: Mapping[str, Any]) -> list[Interval]:
    """Accuracies of the probe with their confidence intervals, the pretrained backbone first."""
    raise NotImplementedError


def probe_verdict(probe: Mapping[str, Any]) -> tuple[str, str]:
    """The gain in points of accuracy over the better of the two baselines, and whether it can be trusted."""
    raise NotImplementedError

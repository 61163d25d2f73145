"""What a run has left behind, opened: the input of the report, and its summary as lines of one table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline import artifacts, storage
from pipeline.config import URL
from pipeline.errors import InputError
from pipeline.training import metrics
from pretrain.evals import probe
from pretrain.model.artifacts import read_backbone_header
from shards.dataset.dataset import Dataset, open_dataset
from shards.format.manifest import MANIFEST
from tokenizer.model.artifact import read_tokenizer


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write a report about a pipeline's results, or about any part of them."""

    output: str = field(metadata=URL)
    """The page, if it ends in .html; else a folder that gets report.html. An older report is replaced."""
    images: str | None = field(default=None, metadata=URL)
    """Output of prepare_images: one dataset, or train/ and val/."""
    tokenizer: str | None = field(default=None, metadata=URL)
    """Output of train_tokenizer."""
    shards: str | None = field(default=None, metadata=URL)
    """Output of precompute_shards."""
    backbone: str | None = field(default=None, metadata=URL)
    """Output of pretrain_mim."""
    probe: str | None = field(default=None, metadata=URL)
    """Output of probe_linear."""
    pipeline_summary: str | None = field(default=None, metadata=URL)
    """pipeline.json of run_pipeline: seconds and steps per stage, and what was left out."""
    title: str = "BEiT v2 pretraining report"
    """Heading of the page."""
    sample_images: int = 400
    """Stored crops among which patches are grouped by code."""
    codes: int = 12
    """Codes shown with patches: two thirds are the most consistent, the rest the most used."""
    patches_per_code: int = 12
    """Patches shown of each code."""
    predictions: int = 6
    """Images shown with mask, codes and predictions."""
    seed: int = 0
    """Decides which crops and patches are shown, and which patches are hidden."""

    def __post_init__(self) -> None:
        for key in ("sample_images", "codes", "patches_per_code", "predictions"):
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
    """Result of the probe."""
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name: {"seconds": …, "steps": …, "finished": …}."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Stages the pipeline left out, with its reason."""
    absent: dict[str, str] = field(default_factory=dict)
    """Why an input is not in the report, by the input's name."""
    curves: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Records of metrics.jsonl by input's name."""


def collect(config: ReportConfig) -> Findings:
    """Open what the configuration names. Only when none of it is there, this is an InputError."""
    findings = Findings()

    def opened(name: str, read: Callable[[str], Any]) -> Any:
        """What `read` makes of an input; None, with the reason noted, where the input is not there."""
        url = getattr(config, name)
        try:
            if url is None:
                raise InputError(f"no --{name} was given")
            return read(url)
        except InputError as error:
            findings.absent[name] = str(error)
            return None

    findings.images = opened("images", _open_images) or {}
    findings.tokenizer = opened("tokenizer", lambda url: read_tokenizer(url).header)
    findings.tokens = opened("shards", lambda url: open_dataset(url, "tokens"))
    findings.backbone = opened("backbone", read_backbone_header)
    findings.probe = opened("probe", _read_probe)
    summary = opened("pipeline_summary", _read_pipeline) or {"stages": {}}
    findings.stages, findings.left_out = summary["stages"], summary.get("left_out", {})
    if findings.probe is None and config.probe is None and "probe_linear" in findings.left_out:
        findings.absent["probe"] = findings.left_out["probe_linear"]
    if len(findings.absent) == len(_INPUTS):
        raise InputError(f"there is nothing to report on: {'; '.join(findings.absent.values())}")
    for name, url in (("tokenizer", config.tokenizer), ("backbone", config.backbone)):
        if url is not None:
            findings.curves[name] = metrics.read_metrics(url)
    return findings


def _open_images(url: str) -> dict[str, Dataset]:
    splits = [split for split in ("train", "val") if storage.exists(storage.join(url, split, MANIFEST))]
    if splits:
        return {split: open_dataset(storage.join(url, split), "images") for split in splits}
    return {"": open_dataset(url, "images")}


def _read_probe(url: str) -> dict[str, Any]:
    header = artifacts.read_header(url, probe.ARTIFACT)
    if header is None:
        raise InputError(f"there is no finished probe at {url}; give the --output of probe_linear")
    result = header["result"]
    if result["skipped"] is not None:
        raise InputError(f"the probe was skipped: {result['skipped']}")
    return result


def _read_pipeline(url: str) -> dict[str, Any]:
    data = storage.read_or_none(url)
    if data is None:
        raise InputError(f"there is no pipeline summary at {url}; give the pipeline.json of run_pipeline")
    try:
        summary = json.loads(data)
        if isinstance(summary["stages"], dict):
            return summary
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{url} is no pipeline summary; give the pipeline.json of run_pipeline")


# ------------------------------------------------------------------------------------------------ summary

Line = tuple[str, str, str]
"""Name, value, and a note that qualifies the value or says why there is none."""


def summary_rows(findings: Findings) -> list[tuple[str, str, str, str]]:
    """The lines of the summary, each after its group, for page and terminal alike."""
    return [
        (group, *line)
        for key, (group, lines_of) in _INPUTS.items()
        for line in lines_of(findings) or [("—", "", findings.absent.get(key, "nothing is recorded"))]
    ]


def summary_text(rows: Sequence[tuple[str, str, str, str]]) -> str:
    """The summary as text for a terminal."""
    group_width, name_width, value_width, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines, last = [], rows[0][0]
    for number, (group, name, value, note) in enumerate(rows):
        if group != last:
            lines.append("")
        head, last = group if number == 0 or group != last else "", group
        lines.append(f"{head:<{group_width}}  {name:<{name_width}}  {value:<{value_width}}  {note}".rstrip())
    return "\n".join(lines)


def _image_lines(findings: Findings) -> list[Line]:
    manifests = {split: dataset.manifest for split, dataset in findings.images.items()}
    if not manifests:
        return []
    reasons = sum((Counter(manifest.samples_rejected) for manifest in manifests.values()), Counter[str]())
    seen = sum(manifest.samples_in for manifest in manifests.values())
    written = sum(manifest.samples_written for manifest in manifests.values())
    splits = [f"{split} {manifest.samples_written:,}" for split, manifest in manifests.items() if split]
    counts = f"{seen:,} / {written:,} / {reasons.total():,}"
    lines = [("in / written / rejected", counts, ", ".join(splits))]
    if reasons:
        lines.append(("rejected because", _counted(reasons), ""))
    return lines


def _tokenizer_lines(findings: Findings) -> list[Line]:
    if findings.tokenizer is None:
        return []
    figures, size = findings.tokenizer["metrics"], findings.tokenizer["config"]["codebook_size"]
    held_out = any("val_rec_loss" in record for record in findings.curves["tokenizer"])
    where = "held-out images" if held_out else "training images"
    usage, used = figures["codebook_usage"], f"of {size:,} codes, {where}"
    if usage is not None:
        used = f"{round(usage * size):,} {used}"
    teacher = findings.tokenizer["teacher"].get("name") or "the teacher"
    loss = _figure(figures["reconstruction_loss"], ".4f")
    return [
        ("reconstruction loss", loss, f"1 − cosine to {teacher}, {where}"),
        ("codebook usage", "not measured" if usage is None else _percent(usage), used),
        ("perplexity", _figure(figures["perplexity"], ",.1f"), f"of at most {size:,}, {where}"),
    ]


def _token_lines(findings: Findings) -> list[Line]:
    if findings.tokens is None:
        return []
    manifest = findings.tokens.manifest
    views = f"{manifest.num_views} view{'s' if manifest.num_views > 1 else ''} of each image"
    lines = [("crops with codes", f"{manifest.samples_written:,}", views)]
    if reasons := Counter(manifest.samples_rejected):
        lines.append(("rejected", f"{reasons.total():,}", _counted(reasons)))
    return lines


def _mim_lines(findings: Findings) -> list[Line]:
    if findings.backbone is None:
        return []
    figures = findings.backbone["run"].get("metrics", {})
    lines = []
    for head, suffix in (("main head", ""), ("[CLS] head", "_cls")):
        loss, accuracy = figures.get(f"loss{suffix}"), figures.get(f"accuracy{suffix}")
        if loss is not None and accuracy is not None:
            lines.append((f"loss, {head}", f"{loss:.3f}", "cross-entropy per masked patch, last steps"))
            lines.append((f"accuracy, {head}", _percent(accuracy), "masked patches whose code was predicted"))
    return lines or [("backbone", "no figures", "it was not pretrained here")]


def _probe_lines(findings: Findings) -> list[Line]:
    if findings.probe is None:
        return []
    lines = []
    for score in findings.probe["scores"]:
        value = f"{_percent(score['top1'])}  [{100 * score['low']:.1f}, {100 * score['high']:.1f}]"
        lines.append((score["label"], value, "top-1 and its 95 % interval"))
    for comparison in findings.probe["comparisons"]:
        lines.append((f"gain over {comparison['over']}", *comparison_words(comparison)))
    return lines


def _stage_lines(findings: Findings) -> list[Line]:
    lines, total = [], 0.0
    for name, stage in findings.stages.items():
        if name == "write_report":
            continue
        seconds, steps = float(stage["seconds"]), stage.get("steps")
        notes = [] if stage.get("finished", True) else ["did not finish"]
        if steps:
            notes.append(f"{steps:,} steps, {1000 * seconds / steps:,.0f} ms each")
        lines.append((name, metrics.duration(seconds), ", ".join(notes)))
        total += seconds
    if lines:
        lines.append(("all", metrics.duration(total), ""))
    return lines + [(name, "left out", reason) for name, reason in findings.left_out.items()]


_INPUTS: dict[str, tuple[str, Callable[[Findings], list[Line]]]] = {
    "images": ("Images", _image_lines),
    "tokenizer": ("Tokenizer", _tokenizer_lines),
    "shards": ("Token shards", _token_lines),
    "backbone": ("MIM", _mim_lines),
    "probe": ("Linear probe", _probe_lines),
    "pipeline_summary": ("Stages", _stage_lines),
}
"""The inputs of a report, in the order of its summary."""


def comparison_words(comparison: Mapping[str, Any]) -> tuple[str, str]:
    """A comparison of the probe as points of accuracy with their interval, and what that allows to say."""
    low, high = 100 * comparison["low"], 100 * comparison["high"]
    points = f"{100 * comparison['difference']:+.1f} points  [{low:+.1f}, {high:+.1f}]"
    verdict = {
        "gain": "a gain: the interval lies above zero",
        "loss": "a loss: the interval lies below zero",
        "within": "inside the confidence interval: no gain is shown",
    }[comparison["verdict"]]
    return points, verdict


def _counted(reasons: Counter[str]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common())


def _figure(value: float | None, style: str) -> str:
    return "not measured" if value is None else format(value, style)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"

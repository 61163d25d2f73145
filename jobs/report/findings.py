"""What a run has left behind, opened: the input of the report, and its summary as lines of one table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jobs.report.html import TableRow
from pipeline import artifacts, storage
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
    codes: int = 12
    """Codes shown with patches: two thirds are the most consistent, the rest the most used."""
    patches_per_code: int = 12
    """Patches shown of each code."""
    predictions: int = 6
    """Images shown with mask, codes and predictions."""
    seed: int = 0
    """Decides which patches are hidden."""

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


def find(config: ReportConfig) -> Findings:
    """Open what the configuration names. Only when none of it is there, this is an InputError."""
    found = Findings()

    def opened(name: str, read: Callable[[str], Any]) -> Any:
        """What `read` makes of an input; None, with the reason noted, where the input is not there."""
        url = getattr(config, name)
        try:
            if url is None:
                raise InputError(f"no --{name} was given")
            return read(storage.absolute(url))
        except InputError as error:
            found.absent[name] = str(error)
            return None

    found.images = opened("images", _open_images) or {}
    found.tokenizer = opened("tokenizer", lambda url: read_tokenizer(url).header)
    found.tokens = opened("shards", lambda url: open_dataset(url, "tokens"))
    found.backbone = opened("backbone", read_backbone_header)
    found.probe = opened("probe", _read_probe)
    summary = opened("pipeline_summary", _read_pipeline)
    if summary is not None:
        found.stages, found.left_out = summary["stages"], summary.get("left_out", {})
        if found.probe is None and config.probe is None and "probe_linear" in found.left_out:
            found.absent["probe"] = found.left_out["probe_linear"]
    if not any((found.images, found.tokenizer, found.tokens, found.backbone, found.probe, found.stages)):
        raise InputError(f"there is nothing to report on: {'; '.join(found.absent.values())}")
    for name, url in (("tokenizer", config.tokenizer), ("backbone", config.backbone)):
        if url is not None:
            found.curves[name] = metrics.read_metrics(storage.absolute(url))
    return found


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
    data = storage_bytes(url)
    if data is None:
        raise InputError(f"there is no pipeline summary at {url}; give the pipeline.json of run_pipeline")
    try:
        summary = json.loads(data)
        if not isinstance(summary["stages"], dict):
            raise TypeError("stages")
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{url} is no pipeline summary; give the pipeline.json of run_pipeline") from None
    return summary


def storage_bytes(url: str) -> bytes | None:
    """An object's bytes, or None where there is none."""
    try:
        return storage.read(url)
    except (FileNotFoundError, NotADirectoryError):
        return None


# ------------------------------------------------------------------------------------------------ summary


def summary_rows(found: Findings) -> list[TableRow]:
    """The lines of the summary, for page and terminal alike."""
    parts = (
        ("Images", "images", _image_lines(found)),
        ("Tokenizer", "tokenizer", _tokenizer_lines(found)),
        ("Token shards", "shards", _token_lines(found)),
        ("MIM", "backbone", _mim_lines(found)),
        ("Linear probe", "probe", _probe_lines(found)),
        ("Stages", "pipeline_summary", _stage_lines(found)),
    )
    rows = []
    for group, key, lines in parts:
        rows += [TableRow(group=group, name=name, value=value, note=note) for name, value, note in lines]
        if not lines:
            rows.append(TableRow(group=group, name="—", value="", note=found.absent[key]))
    return rows


Lines = list[tuple[str, str, str]]
"""(name, value, note)."""


def _image_lines(found: Findings) -> Lines:
    manifests = {split: dataset.manifest for split, dataset in found.images.items()}
    if not manifests:
        return []
    reasons: Counter[str] = Counter()
    for manifest in manifests.values():
        reasons.update(manifest.samples_rejected)
    counts = (
        sum(manifest.samples_in for manifest in manifests.values()),
        sum(manifest.samples_written for manifest in manifests.values()),
        reasons.total(),
    )
    splits = ", ".join(
        f"{split} {manifest.samples_written:,}" for split, manifest in manifests.items() if split
    )
    lines = [("in / written / rejected", " / ".join(f"{count:,}" for count in counts), splits)]
    if reasons:
        lines.append(("rejected because", ", ".join(f"{why} {n:,}" for why, n in reasons.most_common()), ""))
    return lines


def _tokenizer_lines(found: Findings) -> Lines:
    if found.tokenizer is None:
        return []
    figures, size = found.tokenizer["metrics"], found.tokenizer["config"]["codebook_size"]
    held_out = any("val_rec_loss" in record for record in found.curves["tokenizer"])
    where = "held-out images" if held_out else "training images"
    usage, used = figures["codebook_usage"], f"of {size:,} codes, {where}"
    if usage is not None:
        used = f"{round(usage * size):,} {used}"
    teacher = found.tokenizer["teacher"].get("name") or "the teacher"
    return [
        (
            "reconstruction loss",
            _figure(figures["reconstruction_loss"], ".4f"),
            f"1 − cosine to {teacher}, {where}",
        ),
        ("codebook usage", "not measured" if usage is None else percent(usage), used),
        ("perplexity", _figure(figures["perplexity"], ",.1f"), f"of at most {size:,}, {where}"),
    ]


def _figure(value: float | None, style: str) -> str:
    return "not measured" if value is None else format(value, style)


def _token_lines(found: Findings) -> Lines:
    if found.tokens is None:
        return []
    manifest = found.tokens.manifest
    views = f"{manifest.num_views} view{'s' if manifest.num_views > 1 else ''} of each image"
    lines = [("crops with codes", f"{manifest.samples_written:,}", views)]
    if manifest.samples_rejected:
        why = ", ".join(f"{reason} {count:,}" for reason, count in manifest.samples_rejected.items())
        lines.append(("rejected", f"{sum(manifest.samples_rejected.values()):,}", why))
    return lines


def _mim_lines(found: Findings) -> Lines:
    if found.backbone is None:
        return []
    figures = found.backbone["run"].get("metrics", {})
    lines = []
    for head, suffix in (("main head", ""), ("[CLS] head", "_cls")):
        loss, accuracy = figures.get(f"loss{suffix}"), figures.get(f"accuracy{suffix}")
        if loss is not None and accuracy is not None:
            lines.append((f"loss, {head}", f"{loss:.3f}", "cross-entropy per masked patch, last steps"))
            lines.append((f"accuracy, {head}", percent(accuracy), "masked patches whose code was predicted"))
    return lines or [("backbone", "no figures", "it was not pretrained here")]


def _probe_lines(found: Findings) -> Lines:
    if found.probe is None:
        return []
    lines = []
    for score in found.probe["scores"]:
        value = f"{percent(score['top1'])}  [{100 * score['low']:.1f}, {100 * score['high']:.1f}]"
        lines.append((score["label"], value, "top-1 and its 95 % interval"))
    for comparison in found.probe["comparisons"]:
        lines.append((f"gain over {comparison['over']}", *comparison_words(comparison)))
    return lines


def _stage_lines(found: Findings) -> Lines:
    lines = []
    stages = {name: stage for name, stage in found.stages.items() if name != "write_report"}
    for name, stage in stages.items():
        state = [] if stage.get("finished", True) else ["did not finish"]
        if stage.get("steps"):
            seconds = float(stage["seconds"])
            state.append(f"{stage['steps']:,} steps, {1000 * seconds / stage['steps']:,.0f} ms each")
        lines.append((name, metrics.duration(float(stage["seconds"])), ", ".join(state)))
    if lines:
        total = sum(float(stage["seconds"]) for stage in stages.values())
        lines.append(("all", metrics.duration(total), ""))
    lines += [(name, "left out", reason) for name, reason in found.left_out.items()]
    return lines


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


def percent(share: float) -> str:
    """`12.3 %`."""
    return f"{100 * share:.1f} %"

"""One self-contained HTML page, and one table for the terminal, about everything a run has made so far.

    python -m jobs.write_report --output run/report.html --tokenizer run/tokenizer --backbone run/backbone

Any subset of the inputs will do; what is not there is said, not guessed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from jobs import report_page
from jobs.report_page import Interval, Section, Series, TableRow
from pipeline import artifacts, metrics, storage
from pipeline.config import run_job
from pipeline.errors import InputError
from pretrain.backbone import read_backbone_header
from pretrain.evals import report as pictures
from pretrain.mim import load_mim
from shards.manifest import Dataset, open_dataset
from shards.reader import ShardReader
from shards.summary import summarize
from shards.views import ViewPolicy
from tokenizer.artifact import VisualTokenizer, load_vqkd, read_tokenizer

RIGHT, WRONG = (31, 157, 85), (211, 63, 63)
"""Tints of hidden patches whose code was guessed, and of those whose code was not."""
PICTURE = 184
"""Side of the pictures of predictions, in pixels of the page."""
TILE = 72
"""Side of a patch with its surroundings, in pixels of the page."""


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
    """Decides which images are shown."""

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


def write_report(config: ReportConfig) -> str:
    """Write the page and return its URL. InputError when there is nothing to report on, or the place is taken."""
    url = storage.absolute(config.output)
    if not url.endswith(".html"):
        url = storage.join(url, "report.html")
    if (held := _read_or_none(url)) is not None and report_page.MARK.encode() not in held[:200]:
        raise InputError(f"{url} is there already and is no report; choose another --output")
    found = find(config)
    sections = [
        Section(title="Summary", body=_summary_body(found)),
        Section(title="Training curves", body=_curves_body(found)),
        Section(title="Codebook", body=_codebook_body(config, found)),
        Section(title="Masked patches and predicted codes", body=_predictions_body(config, found)),
        Section(title="Linear probe", body=_probe_body(found)),
        Section(title="Where it comes from", body=_provenance_body(config, found)),
    ]
    lead = (
        "What the tokenizer learned to tell apart, what the backbone learned to predict, and what its features "
        "are worth."
    )
    storage.put(url, report_page.page(config.title, lead, sections).encode())
    return url


def summary_table(config: ReportConfig) -> str:
    """The report's summary as text for a terminal."""
    rows = summary_rows(find(config))
    widths = [max(len(cell) for cell in column) for column in zip(*((r.group, r.name, r.value) for r in rows), strict=True)]
    lines, group = [], ""
    for row in rows:
        if group and row.group != group:
            lines.append("")
        head, group = ("" if row.group == group else row.group), row.group
        line = f"{head:<{widths[0]}}  {row.name:<{widths[1]}}  {row.value:<{widths[2]}}  {row.note}"
        lines.append(line.rstrip())
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ reading


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
    splits = [split for split in ("train", "val") if storage.exists(storage.join(url, split, "manifest.json"))]
    if splits:
        return {split: open_dataset(storage.join(url, split), "images") for split in splits}
    return {"": open_dataset(url, "images")}


def _read_pipeline(found: Findings, url: str) -> None:
    data = _read_or_none(url)
    if data is None:
        raise InputError(f"there is no pipeline summary at {url}; give the pipeline.json of run_pipeline")
    try:
        summary = json.loads(data)
        found.stages, found.left_out = dict(summary["stages"]), dict(summary.get("left_out", {}))
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{url} is no pipeline summary; give the pipeline.json of run_pipeline") from None


def _read_or_none(url: str) -> bytes | None:
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
            f"{split} {dataset.manifest.samples_written:,}" for split, dataset in found.images.items() if split
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
        add("Tokenizer", "codebook usage", f"{100 * usage:.1f} %", f"{usage * size:.0f} of {size:,} codes, {where}")
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
                add("MIM", f"accuracy, {head}", f"{100 * accuracy:.1f} %", f"masked patches whose code was predicted, {last}")
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


def _summary_body(found: Findings) -> str:
    return report_page.summary(summary_rows(found))


# ------------------------------------------------------------------------------------------------ curves


@dataclass(frozen=True, kw_only=True, slots=True)
class _Panel:
    """One chart: what it shows of which record keys."""

    title: str
    keys: tuple[tuple[str, str], ...]
    """(key, label)."""


_PANELS = {
    "tokenizer": (
        _Panel(title="Tokenizer: reconstruction loss", keys=(("rec_loss", "1 − cosine"),)),
        _Panel(title="Tokenizer: commitment loss", keys=(("emb_loss", "commitment"),)),
        _Panel(title="Tokenizer: codebook usage", keys=(("codebook_usage", "codes hit"),)),
        _Panel(title="Tokenizer: perplexity", keys=(("perplexity", "perplexity"),)),
    ),
    "backbone": (
        _Panel(title="MIM: loss", keys=(("loss", "main head"), ("loss_cls", "[CLS] head"))),
        _Panel(title="MIM: accuracy", keys=(("accuracy", "main head"), ("accuracy_cls", "[CLS] head"))),
        _Panel(title="MIM: learning rate", keys=(("lr", "learning rate"),)),
        _Panel(title="MIM: gradient norm", keys=(("grad_norm", "gradient norm"),)),
    ),
}
_SPLITS = {"train": "", "train_epoch": "", "val": ", held out"}


def _curves_body(found: Findings) -> str:
    charts, silent = [], []
    for name, panels in _PANELS.items():
        records = found.curves.get(name, [])
        drawn = [report_page.line_chart(panel.title, _series(panel, records), x_label="step") for panel in panels]
        charts += [chart for chart in drawn if chart]
        if not any(drawn):
            silent.append(found.absent.get(name, f"the {name} has no {metrics.METRICS_FILE}"))
    said = "".join(report_page.paragraph(f"Not shown: {reason}.", muted=True) for reason in silent)
    return (report_page.grid(charts, min_width=400) if charts else "") + said


def _series(panel: _Panel, records: Sequence[Mapping[str, Any]]) -> list[Series]:
    series, color = [], 0
    for key, label in panel.keys:
        for split, suffix in _SPLITS.items():
            points = [(float(r["step"]), float(r[key])) for r in records if r["split"] == split and key in r]
            if points:
                held_out = split == "val"
                # Held-out points of the only curve get a colour of their own; of two curves they share theirs.
                shade = color + (1 if held_out and len(panel.keys) == 1 else 0)
                series.append(Series(label=label + suffix, points=points, color=shade, marked=held_out))
        color += 1
    return series


# ------------------------------------------------------------------------------------------------ codebook


def _codebook_body(config: ReportConfig, found: Findings) -> str:
    if found.tokens is None:
        return report_page.paragraph(f"Not shown: {found.absent['shards']}.", muted=True)
    return _usage_body(found.tokens) + _groups_body(config, found.tokens)


def _usage_body(tokens: Dataset) -> str:
    raise NotImplementedError


def _groups_body(config: ReportConfig, tokens: Dataset) -> str:
    count = min(config.sample_images, tokens.num_samples(0))
    crops, codes = _stored_crops(tokens, count, config.seed)
    assert tokens.manifest.tokenizer is not None
    patch_size = tokens.manifest.tokenizer["patch_size"]
    consistent, used = pictures.group_by_code(
        crops, codes, patch_size=patch_size, num_codes=config.codes_per_group, per_code=config.patches_per_code
    )
    if not consistent:
        few = f"no code has {pictures.MIN_PATCHES} patches in {pictures.MIN_IMAGES} of {count:,} crops"
        return report_page.paragraph(f"No patches grouped by code: {few}.", muted=True)
    parts = [
        "<h3>Patches grouped by code</h3>",
        report_page.paragraph(
            f"Each row is one code: the boxed patches of {patch_size} px, with their surroundings, that the "
            f"tokenizer gave it, from {count:,} stored crops. Likeness is the mean cosine between the patches' "
            "gradient histograms."
        ),
        *(f"<h4>{name}</h4>" + "".join(_group_row(group) for group in groups)
          for name, groups in (("Most consistent", consistent), ("Most used of the others", used)) if groups),
    ]  # fmt: skip
    return "".join(parts)


def _group_row(group: pictures.CodeGroup) -> str:
    strip = np.concatenate([_boxed(tile) for tile in group.tiles], axis=1)
    shown = report_page.image(strip, f"patches of code {group.code}", width=strip.shape[1])
    figures = f"{100 * group.share:.2g} % of patches<br>likeness {group.consistency:.2f}"
    return f'<div class="code"><div><b>code {group.code}</b><span>{figures}</span></div>{shown}</div>'


def _boxed(tile: np.ndarray) -> np.ndarray:
    """A patch with surroundings, enlarged, its own part framed: uint8 [TILE, TILE + 4, 3]."""
    raise NotImplementedError


def _stored_crops(tokens: Dataset, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Crops uint8 [count, S, S, 3] and codes [count, N] of view 0, in the shuffled order of a seed."""
    reader = ShardReader(tokens, batch_size=count, seed=seed)
    batch = next(iter(reader.batches(0)))
    reader.close()
    assert batch.codes is not None
    return batch.pixels, batch.codes.astype(np.int64)


# ------------------------------------------------------------------------------------------------ predictions


def _predictions_body(config: ReportConfig, found: Findings) -> str:
    raise NotImplementedError


# ------------------------------------------------------------------------------------------------ the rest


def _probe_body(found: Findings) -> str:
    raise NotImplementedError


def _provenance_body(config: ReportConfig, found: Findings) -> str:
    raise NotImplementedError


def main(config: ReportConfig) -> None:
    """Entry point of the job."""
    url = write_report(config)
    print(summary_table(config))
    print(f"\nreport: {url}", flush=True)


if __name__ == "__main__":
    run_job(main, ReportConfig)

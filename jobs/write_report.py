"""One self-contained HTML page, and one table for the terminal, about everything a run has made so far.

    python -m jobs.write_report --output run/report.html --tokenizer run/tokenizer --backbone run/backbone

Any subset of the inputs will do; what is not there is said, not guessed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from jobs.report import html as report_page
from jobs.report import pictures
from jobs.report.codebook import usage_body
from jobs.report.findings import Findings, ReportConfig, comparison_words, find, storage_bytes, summary_rows
from jobs.report.html import Interval, Section, Series
from jobs.report.sheets import RED, framed
from pipeline import storage
from pipeline.config import run_job
from pipeline.errors import InputError
from pipeline.training import metrics
from pretrain.evals.codebook import MIN_PATCHES
from pretrain.model.artifacts import load_mim
from shards.dataset.dataset import Dataset
from shards.dataset.summary import code_statistics, count_codes
from shards.pixels.crops import FreshCrops, StoredCrops
from shards.pixels.views import CENTER_FRACTION, ViewPolicy
from shards.reader.reader import Batches, ShardReader
from tokenizer.model.artifact import VisualTokenizer, load_vqkd, read_tokenizer

RIGHT, WRONG = (31, 157, 85), (211, 63, 63)
"""Tints of hidden patches whose code was guessed, and of those whose code was not."""
PICTURE = 224
"""Side of the pictures of predictions, in pixels."""
COUNTED_SAMPLES = 2_000_000
"""In larger datasets codes are counted over the sample only: reading every index file would take minutes."""
TILE = 72
"""Side of a patch with its surroundings, in pixels."""


def write_report(config: ReportConfig) -> str:
    """Write the page and return its URL; InputError when there is nothing to report, or the URL is taken."""
    url = storage.absolute(config.output)
    if not url.endswith(".html"):
        url = storage.join(url, "report.html")
    if (held := storage_bytes(url)) is not None and report_page.MARK.encode() not in held[:200]:
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
    lead = "What the tokenizer tells apart, what the backbone predicts, and what its features are worth."
    storage.put(url, report_page.page(config.title, lead, sections).encode())
    return url


def summary_table(config: ReportConfig) -> str:
    """The report's summary as text for a terminal."""
    rows = summary_rows(find(config))
    widths = [
        max(len(cell) for cell in column)
        for column in zip(*((r.group, r.name, r.value) for r in rows), strict=True)
    ]
    lines, group = [], ""
    for row in rows:
        if group and row.group != group:
            lines.append("")
        head, group = ("" if row.group == group else row.group), row.group
        line = f"{head:<{widths[0]}}  {row.name:<{widths[1]}}  {row.value:<{widths[2]}}  {row.note}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def _summary_body(found: Findings) -> str:
    return report_page.summary(summary_rows(found))


# ------------------------------------------------------------------------------------------------ curves


@dataclass(frozen=True, slots=True)
class _Curve:
    """Which records of metrics.jsonl make a line, and how it is drawn (see `Series`)."""

    split: str
    key: str
    label: str
    color: int = 0
    marked: bool = False
    noisy: bool = True


_PANELS = {
    "tokenizer": {
        "Tokenizer: reconstruction loss": (
            _Curve("train", "rec_loss", "training"),
            _Curve("epoch", "val_rec_loss", "held out", 1, True),
        ),
        "Tokenizer: commitment loss": (
            _Curve("train", "emb_loss", "training"),
            _Curve("epoch", "val_emb_loss", "held out", 1, True),
        ),
        "Tokenizer: codebook usage": (
            _Curve("epoch", "train_codebook_usage", "training", 0, True),
            _Curve("epoch", "val_codebook_usage", "held out", 1, True),
        ),
        "Tokenizer: perplexity": (
            _Curve("epoch", "train_perplexity", "training", 0, True),
            _Curve("epoch", "val_perplexity", "held out", 1, True),
        ),
    },
    "backbone": {
        "MIM: loss": (
            _Curve("train", "loss", "main head"),
            _Curve("train", "loss_cls", "[CLS] head", 1),
        ),
        "MIM: accuracy": (
            _Curve("train", "accuracy", "main head"),
            _Curve("train", "accuracy_cls", "[CLS] head", 1),
        ),
        "MIM: learning rate": (_Curve("train", "lr", "learning rate", noisy=False),),
        "MIM: gradient norm": (_Curve("train", "grad_norm", "gradient norm"),),
    },
}


def _curves_body(found: Findings) -> str:
    charts, silent = [], []
    for name, panels in _PANELS.items():
        records = found.curves.get(name, [])
        drawn = [
            report_page.line_chart(title, _series(curves, records), x_label="step")
            for title, curves in panels.items()
        ]
        charts += [chart for chart in drawn if chart]
        if not any(drawn):
            silent.append(found.absent.get(name, f"the {name} has no {metrics.METRICS_FILE}"))
    said = "".join(_not_shown(reason) for reason in silent)
    return (report_page.grid(charts, min_width=400) if charts else "") + said


def _series(curves: Sequence[_Curve], records: Sequence[Mapping[str, Any]]) -> list[Series]:
    series = []
    for curve in curves:
        points = [
            (float(record["step"]), float(record[curve.key]))
            for record in records
            if record["split"] == curve.split and curve.key in record
        ]
        if points:
            series.append(
                Series(
                    label=curve.label,
                    points=points,
                    color=curve.color,
                    marked=curve.marked,
                    noisy=curve.noisy,
                )
            )
    return series


# ------------------------------------------------------------------------------------------------ codebook


def _codebook_body(config: ReportConfig, found: Findings) -> str:
    if found.tokens is None:
        return _not_shown(found.absent["shards"])
    tokens, count = found.tokens, min(config.sample_images, _smallest_view(found.tokens))
    crops, codes = _stored_crops(tokens, count)
    tokenizer = tokens.manifest.require_tokenizer()
    if tokens.manifest.samples_written <= COUNTED_SAMPLES:
        counts, where = count_codes(tokens), "all stored crops"
    else:
        counts = np.bincount(codes.ravel(), minlength=tokenizer.codebook_size)
        where = f"{count:,} stored crops"
    return usage_body(code_statistics(counts), counts, where) + _groups_body(
        config, crops, codes, tokenizer.patch_size
    )


def _groups_body(config: ReportConfig, crops: np.ndarray, codes: np.ndarray, patch_size: int) -> str:
    num_used = config.codes // 3
    consistent, used = pictures.group_by_code(
        crops,
        codes,
        patch_size=patch_size,
        num_consistent=config.codes - num_used,
        num_used=num_used,
        per_code=config.patches_per_code,
    )
    if not consistent:
        few = f"no code has {MIN_PATCHES} patches in {pictures.MIN_IMAGES} of {len(crops):,} crops"
        return _not_shown(f"patches grouped by code: {few}")
    lead = (
        f"Each row is one code: the boxed patches of {patch_size} px, with their surroundings, that the "
        f"tokenizer gave it, from {len(crops):,} stored crops. Likeness is the mean cosine between gradient "
        "histograms of its patches in two different images; codes of less contrast than the median come last."
    )
    parts = ["<h3>Patches grouped by code</h3>", report_page.paragraph(lead)]
    for name, groups in (("Most consistent", consistent), ("Most used of the others", used)):
        if groups:
            parts.append(f"<h4>{name}</h4>" + "".join(_group_row(group) for group in groups))
    return "".join(parts)


def _group_row(group: pictures.CodeGroup) -> str:
    tiles = "".join(
        report_page.image(_boxed(tile), f"a patch of code {group.code}", width=TILE) for tile in group.tiles
    )
    figures = f"{100 * group.share:.2g} % of patches<br>likeness {group.consistency:.2f}"
    return (
        f'<div class="code"><div><b>code {group.code}</b><span>{figures}</span></div>'
        f'<div class="tiles">{tiles}</div></div>'
    )


def _boxed(tile: np.ndarray) -> np.ndarray:
    """A patch with surroundings, enlarged, its own part framed: uint8 [TILE, TILE, 3]."""
    picture = Image.fromarray(pictures.enlarged(tile, TILE))
    parts = 2 * pictures.CONTEXT + 1
    low, high = TILE * pictures.CONTEXT // parts, TILE * (pictures.CONTEXT + 1) // parts
    framed(picture, (low, low, high, high), RED)
    return np.asarray(picture)


def _stored_crops(tokens: Dataset, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first crops uint8 [count, S, S, 3] and codes [count, N] by sample id, which is a random order."""
    with ShardReader(tokens, StoredCrops(), Batches(count, shuffle=False)) as reader:
        batch = next(iter(reader.batches(0)))
    assert batch.codes is not None
    return batch.pixels, batch.codes.astype(np.int64)


# ------------------------------------------------------------------------------------------------ predictions


@dataclass(frozen=True, kw_only=True)
class _Examples:
    """Images uint8 [n, S, S, 3] with their codes [n, N], and whose they are."""

    images: np.ndarray
    codes: np.ndarray
    origin: str
    tokenizer: str
    """Fingerprint of the artifact whose codes they are."""


def _predictions_body(config: ReportConfig, found: Findings) -> str:
    examples = _examples(config, found)
    if examples is None:
        return _not_shown("codes come from token shards, or from images and a tokenizer; neither is there")
    codebook, size = None, int(examples.codes.max()) + 1
    if found.tokenizer is not None and config.tokenizer is not None:
        vqkd = load_vqkd(read_tokenizer(storage.absolute(config.tokenizer)))
        codebook = vqkd.quantize.codebook.numpy()
    if found.tokens is not None and found.tokens.manifest.tokenizer is not None:
        size = found.tokens.manifest.tokenizer.codebook_size
    colors = pictures.code_colors(codebook, size if codebook is None else len(codebook))
    meaning = "Similar codes have similar colours." if codebook is not None else "Colours are arbitrary."

    reason = _why_no_predictions(config, found, examples)
    if reason is not None:
        cells = []
        for image, codes in zip(examples.images, examples.codes, strict=True):
            panels = (pictures.enlarged(image, PICTURE), pictures.code_map(codes, colors, PICTURE))
            cells.append(_row(panels, ("image", "codes")))
        lead = f"{len(cells)} {examples.origin} and their codes. {meaning}"
        said = report_page.paragraph(f"Predictions are not shown: {reason}.", muted=True)
        return report_page.paragraph(lead) + report_page.grid(cells, min_width=300) + said

    assert config.backbone is not None
    predictions = pictures.predict(
        load_mim(storage.absolute(config.backbone)), examples.images, examples.codes, seed=config.seed
    )
    hits, hits_cls = pictures.accuracy(predictions), pictures.accuracy(predictions, cls_head=True)
    heads = f"{100 * (hits or 0):.1f} % of hidden codes guessed by the main head"
    if hits_cls is not None:
        heads += f", {100 * hits_cls:.1f} % by the [CLS] head"
    lead = (
        f"{len(predictions)} {examples.origin}. The model sees the image with grey patches and guesses the "
        f"codes of what is hidden. {meaning} On these: {heads}."
    )
    key = (
        f'<p class="heads key">Last column:<i style="--c:rgb{RIGHT}"></i>guessed'
        f'<i style="--c:rgb{WRONG}"></i>another code</p>'
    )
    titles = ("image", "what the model sees", "codes", "guessed codes", "right or wrong")
    heading = "".join(f"<div>{title}</div>" for title in titles)
    heading = f'<div class="row heads" style="--columns:{len(titles)}">{heading}</div>'
    rows = []
    for one in predictions:
        panels = (
            pictures.enlarged(one.image, PICTURE),
            pictures.masked_image(one, PICTURE),
            pictures.code_map(one.codes, colors, PICTURE),
            pictures.guess_map(one, colors, PICTURE),
            pictures.verdict_map(one, PICTURE, right=RIGHT, wrong=WRONG),
        )
        rows.append(_row(panels, titles))
    return report_page.paragraph(lead) + key + heading + "".join(rows)


def _examples(config: ReportConfig, found: Findings) -> _Examples | None:
    """Held-out images and their codes if there are any; else stored crops; else the images there are."""
    splits = ["val"] if "val" in found.images else []
    if found.tokens is None:
        splits += [split for split in ("", "train") if split in found.images]
    if splits and found.tokenizer is not None and config.tokenizer is not None:
        tokenizer = VisualTokenizer.load(storage.absolute(config.tokenizer))
        dataset = found.images[splits[0]]
        count = min(config.predictions, dataset.num_samples(0))
        policy = ViewPolicy(image_size=tokenizer.image_size)
        crops = FreshCrops(policy, center_fraction=CENTER_FRACTION, stored_pixels=True)
        with ShardReader(dataset, crops, Batches(count, shuffle=False)) as reader:
            images = next(iter(reader.batches(0))).pixels
        codes = tokenizer.encode(torch.from_numpy(images)).numpy()
        return _Examples(
            images=images,
            codes=codes,
            origin="held-out images" if splits[0] == "val" else "images",
            tokenizer=tokenizer.artifact.fingerprint,
        )
    if found.tokens is not None:
        images, codes = _stored_crops(found.tokens, min(config.predictions, _smallest_view(found.tokens)))
        fingerprint = str(found.tokens.manifest.require_tokenizer().artifact_fingerprint)
        return _Examples(
            images=images, codes=codes, origin="stored crops of the training set", tokenizer=fingerprint
        )
    return None


def _why_no_predictions(config: ReportConfig, found: Findings, examples: _Examples) -> str | None:
    """Why the backbone cannot be asked about these codes; None if it can."""
    if found.backbone is None or config.backbone is None:
        return found.absent["backbone"]
    if found.backbone["mim"] is None:
        return f"the backbone at {config.backbone} holds no pretraining heads"
    trained_on = (found.backbone["tokenizer"] or {}).get("artifact_fingerprint")
    if trained_on != examples.tokenizer:
        return (
            f"the backbone predicts codes of tokenizer {str(trained_on)[:8]}, and these are codes of "
            f"{examples.tokenizer[:8]}; give the tokenizer and the shards that it was pretrained with"
        )
    return None


def _smallest_view(dataset: Dataset) -> int:
    return min(dataset.num_samples(view) for view in range(dataset.num_views))


def _row(panels: Sequence[np.ndarray], titles: Sequence[str]) -> str:
    cells = [
        report_page.image(panel, title, width=PICTURE, photo="codes" not in title)
        for panel, title in zip(panels, titles, strict=True)
    ]
    return f'<div class="row" style="--columns:{len(panels)}">{"".join(cells)}</div>'


# ------------------------------------------------------------------------------------------------ the rest


def _probe_body(found: Findings) -> str:
    if found.probe is None:
        return _not_shown(found.absent["probe"])
    probe = found.probe
    lead = (
        f"Top-1 accuracy of a linear classifier on frozen features: {probe['num_classes']} classes, "
        f"{probe['num_train']:,} training and {probe['num_val']:,} held-out images. Whiskers are 95 % "
        "intervals; gains are compared image by image, which is sharper than comparing whiskers."
    )
    bars = [
        Interval(label=score["label"], value=score["top1"], low=score["low"], high=score["high"])
        for score in probe["scores"]
    ]
    said = []
    for comparison in probe["comparisons"]:
        points, verdict = comparison_words(comparison)
        sentence = f"{comparison['of']} over {comparison['over']}: {points}, {verdict}."
        said.append(f'<p class="verdict">{report_page.escape(sentence)}</p>')
    chart = report_page.interval_chart(bars, reference=("largest class", probe["largest_class"]))
    return report_page.paragraph(lead) + chart + "".join(said)


def _provenance_body(config: ReportConfig, found: Findings) -> str:
    """Fingerprints and resolved configurations of all that was opened."""
    rows = [(f"images {split}".strip(), dataset.fingerprint, "") for split, dataset in found.images.items()]
    if found.tokens is not None:
        rows.append(("token shards", found.tokens.fingerprint, ""))
    headers = {"tokenizer": found.tokenizer, "backbone": found.backbone}
    for name, header in headers.items():
        if header is not None:
            rows.append((name, str(header.get("fingerprint", "")), str(header.get("code_version", ""))))
    parts = [report_page.table(("artifact", "fingerprint", "code version"), rows)]
    for name, header in headers.items():
        if header is not None:
            shown = {key: value for key, value in header.items() if key != "files"}
            text = json.dumps(shown, indent=2, sort_keys=True)
            parts.append(report_page.details(f"{name}: header", f"<pre>{report_page.escape(text)}</pre>"))
    for name, dataset in {**found.images, "tokens": found.tokens}.items():
        if dataset is not None:
            text = json.dumps(dataset.manifest.recipe.to_json(), indent=2, sort_keys=True)
            title = f"{name or 'images'}: recipe"
            parts.append(report_page.details(title, f"<pre>{report_page.escape(text)}</pre>"))
    return "".join(parts)


def _not_shown(reason: str) -> str:
    return report_page.paragraph(f"Not shown: {reason}.", muted=True)


def main(config: ReportConfig) -> None:
    """Entry point of the job."""
    url = write_report(config)
    print(summary_table(config))
    print(f"\nreport: {url}", flush=True)


if __name__ == "__main__":
    run_job(main, ReportConfig)

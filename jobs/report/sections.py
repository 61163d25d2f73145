"""The sections of the report about a run, as HTML: each shows what is there, and says why the rest is not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from jobs.report import html, pictures
from jobs.report.codebook import CODE_WORDS, code_rows, picture_rows, usage_body
from jobs.report.findings import Findings, ReportConfig, comparison_words, summary_rows
from pipeline.training.metrics import METRICS_FILE
from pretrain.evals.codebook import MIN_PATCHES, Likeness, show_codes
from pretrain.model.artifacts import load_mim
from shards.dataset.codes import code_statistics, count_codes, draw_sample
from shards.dataset.dataset import Dataset
from shards.pixels.crops import FreshCrops
from shards.pixels.views import CENTER_FRACTION, ViewPolicy, decode_crop
from shards.reader.reader import Batches, ShardReader
from tokenizer.model.artifact import VisualTokenizer, load_vqkd, read_tokenizer

COUNTED_CROPS = 2_000_000
"""In larger datasets codes are counted over the sample only: reading every index file would take minutes."""
MIN_IMAGES = 6
"""A code from fewer images of the sample is not shown with its patches."""

CURVES = {
    "tokenizer": {
        "Tokenizer: reconstruction loss": (("training", "rec_loss"), ("held out", "val_rec_loss")),
        "Tokenizer: commitment loss": (("training", "emb_loss"), ("held out", "val_emb_loss")),
        "Tokenizer: codebook usage": (
            ("training", "train_codebook_usage"),
            ("held out", "val_codebook_usage"),
        ),
        "Tokenizer: perplexity": (("training", "train_perplexity"), ("held out", "val_perplexity")),
    },
    "backbone": {
        "MIM: loss": (("main head", "loss"), ("[CLS] head", "loss_cls")),
        "MIM: accuracy": (("main head", "accuracy"), ("[CLS] head", "accuracy_cls")),
        "MIM: learning rate": (("learning rate", "lr"),),
        "MIM: gradient norm": (("gradient norm", "grad_norm"),),
    },
}
"""Charts by input and title: the label of each line, and its key in the records of metrics.jsonl."""


def report_sections(config: ReportConfig, findings: Findings) -> dict[str, str]:
    """All sections by title, in the order of the page."""
    return {
        "Summary": html.table(("", "", "", ""), summary_rows(findings)),
        "Training curves": _curves(findings),
        "Codebook": _codebook(config, findings),
        "Masked patches and predicted codes": _predictions(config, findings),
        "Linear probe": _probe(findings),
        "Where it comes from": _provenance(findings),
    }


def _not_shown(reason: str) -> str:
    return html.paragraph(f"Not shown: {reason}.", "muted")


def _curves(findings: Findings) -> str:
    charts, silent = [], []
    for name, titles in CURVES.items():
        records = findings.curves.get(name, [])
        drawn = [
            html.line_chart(title, {label: _points(records, key) for label, key in lines}, x_label="step")
            for title, lines in titles.items()
        ]
        charts += filter(None, drawn)
        if not any(drawn):
            silent.append(_not_shown(findings.absent.get(name, f"the {name} has no {METRICS_FILE}")))
    return (html.grid(charts, min_width=400) if charts else "") + "".join(silent)


def _points(records: Sequence[Mapping[str, Any]], key: str) -> html.Points:
    # Figures of whole epochs are named after their split.
    split = "epoch" if key.startswith(("train_", "val_")) else "train"
    return [(line["step"], line[key]) for line in records if key in line and line["split"] == split]


# ------------------------------------------------------------------------------------------------ codes


def _codebook(config: ReportConfig, findings: Findings) -> str:
    if findings.tokens is None:
        return _not_shown(findings.absent["shards"])
    tokens, sample = findings.tokens, draw_sample(findings.tokens, config.sample_images, seed=config.seed)
    tokenizer = tokens.manifest.require_tokenizer()
    if tokens.manifest.samples_written <= COUNTED_CROPS:
        counts, where = count_codes(tokens), "all stored crops"
    else:
        counts = np.bincount(sample.codes.ravel(), minlength=tokenizer.codebook_size)
        where = f"{len(sample.codes):,} stored crops"
    usage = usage_body(code_statistics(counts), counts, where)

    likeness = Likeness(sample.codes, tokenizer.codebook_size, tokenizer.patch_size)
    likeness.add_all(sample)
    ranked, num_used = likeness.ranked(MIN_IMAGES), config.codes // 3
    if not ranked:
        few = f"no code has {MIN_PATCHES} patches in {MIN_IMAGES} of {len(sample.codes):,} crops"
        return usage + _not_shown(f"patches grouped by code: {few}")
    consistent, rest = np.split(np.array(ranked), [config.codes - num_used])
    used = sorted(sorted(rest.tolist()), key=lambda code: -likeness.patches_per_code[code])[:num_used]
    parts = [f"<h3>Patches grouped by code</h3>{html.paragraph(f'Each row is one code. {CODE_WORDS}')}"]
    for name, codes in (("Most consistent", consistent.tolist()), ("Most used of the others", used)):
        shown = show_codes(
            sample, likeness, codes, patches_per_code=config.patches_per_code, seed=config.seed
        )
        if shown:
            parts.append(f"<h4>{name}</h4>{code_rows(tokens, shown)}")
    return usage + "".join(parts)


# ------------------------------------------------------------------------------------------------ predictions


@dataclass(frozen=True, kw_only=True)
class _Examples:
    """Images uint8 [n, S, S, 3] with their codes [n, N], and whose they are."""

    images: np.ndarray
    codes: np.ndarray
    origin: str
    tokenizer: str
    """Fingerprint of the artifact whose codes they are."""


def _predictions(config: ReportConfig, findings: Findings) -> str:
    examples = _examples(config, findings)
    if examples is None:
        return _not_shown("codes come from token shards, or from images and a tokenizer; neither is there")
    codebook, size = None, int(examples.codes.max()) + 1
    if findings.tokenizer is not None and config.tokenizer is not None:
        codebook = load_vqkd(read_tokenizer(config.tokenizer)).quantize.codebook.numpy()
        size = len(codebook)
    elif findings.tokens is not None:
        size = findings.tokens.manifest.require_tokenizer().codebook_size
    colors = pictures.code_colors(codebook, size)
    meaning = "Colours are arbitrary." if codebook is None else "Similar codes have similar colours."
    lead, key = f"{len(examples.images)} {examples.origin}", ""
    reason = _why_no_predictions(config, findings, examples)
    if reason is not None or config.backbone is None:
        lead += f" and their codes. {meaning} Predictions are not shown: {reason}."
        rows = [
            {"image": image, "codes": pictures.code_map(codes, colors)}
            for image, codes in zip(examples.images, examples.codes, strict=True)
        ]
    else:
        made = pictures.predict(load_mim(config.backbone), examples.images, examples.codes, seed=config.seed)
        heads = f"{100 * made.accuracy(made.guess):.1f} % of hidden codes guessed by the main head"
        if made.guess_cls is not None:
            heads += f", {100 * made.accuracy(made.guess_cls):.1f} % by the [CLS] head"
        lead += ". The model sees the image with grey patches and guesses the codes of what is hidden. "
        lead += f"{meaning} On these: {heads}."
        key = (
            f'<p class="heads">Last column: <i style="--c:rgb{pictures.RIGHT}"></i>guessed '
            f'<i style="--c:rgb{pictures.WRONG}"></i>another code</p>'
        )
        rows = [
            {
                "image": image,
                "what the model sees": pictures.masked_image(image, mask),
                "codes": pictures.code_map(codes, colors),
                "guessed codes": pictures.guess_map(mask, codes, guess, colors),
                "right or wrong": pictures.verdict_map(image, mask, codes == guess),
            }
            for image, mask, codes, guess in zip(made.images, made.mask, made.codes, made.guess, strict=True)
        ]
    return html.paragraph(lead) + key + picture_rows(rows)


def _examples(config: ReportConfig, findings: Findings) -> _Examples | None:
    """Held-out images and their codes if there are any; else stored crops; else the images there are."""
    splits = ["val"] if "val" in findings.images else []
    if findings.tokens is None:
        splits += [split for split in ("", "train") if split in findings.images]
    if splits and findings.tokenizer is not None and config.tokenizer is not None:
        tokenizer = VisualTokenizer.load(config.tokenizer)
        images = _first_images(findings.images[splits[0]], config.predictions, tokenizer.image_size)
        return _Examples(
            images=images,
            codes=tokenizer.encode(torch.from_numpy(images)).numpy(),
            origin="held-out images" if splits[0] == "val" else "images",
            tokenizer=tokenizer.artifact.fingerprint,
        )
    if findings.tokens is None:
        return None
    sample = draw_sample(findings.tokens, config.predictions, seed=config.seed)
    return _Examples(
        images=np.stack([decode_crop(place.read()) for place in sample.places]),
        codes=sample.codes.astype(np.int64),
        origin="stored crops of the training set",
        tokenizer=str(findings.tokens.manifest.require_tokenizer().artifact_fingerprint),
    )


def _first_images(dataset: Dataset, count: int, image_size: int) -> np.ndarray:
    """The first images by sample id, which is a random order: uint8 [count or fewer, S, S, 3]."""
    crops = FreshCrops(ViewPolicy(image_size=image_size), center_fraction=CENTER_FRACTION, stored_pixels=True)
    size = min(count, dataset.num_samples(0))
    with ShardReader(dataset, crops, Batches(size, shuffle=False)) as reader:
        return next(iter(reader.batches(0))).pixels


def _why_no_predictions(config: ReportConfig, findings: Findings, examples: _Examples) -> str | None:
    """Why the backbone cannot be asked about these codes; None if it can."""
    if findings.backbone is None:
        return findings.absent["backbone"]
    if findings.backbone["mim"] is None:
        return f"the backbone at {config.backbone} holds no pretraining heads"
    trained_on = (findings.backbone["tokenizer"] or {}).get("artifact_fingerprint")
    if trained_on != examples.tokenizer:
        return (
            f"the backbone predicts codes of tokenizer {str(trained_on)[:8]}, and these are codes of "
            f"{examples.tokenizer[:8]}; give the tokenizer and the shards that it was pretrained with"
        )
    return None


# ------------------------------------------------------------------------------------------------ the rest


def _probe(findings: Findings) -> str:
    if findings.probe is None:
        return _not_shown(findings.absent["probe"])
    probe = findings.probe
    lead = (
        f"Top-1 accuracy of a linear classifier on frozen features: {probe['num_classes']} classes, "
        f"{probe['num_train']:,} training and {probe['num_val']:,} held-out images. The largest class holds "
        f"{100 * probe['largest_class']:.1f} % of these. Gains are compared image by image, which is sharper "
        "than comparing the intervals of two classifiers."
    )
    verdicts = []
    for comparison in probe["comparisons"]:
        words = f"{comparison['of']} over {comparison['over']}: {', '.join(comparison_words(comparison))}."
        verdicts.append(html.paragraph(words, "verdict"))
    return html.paragraph(lead) + "".join(verdicts)


def _provenance(findings: Findings) -> str:
    """Fingerprints and resolved configurations of all that was opened."""
    datasets = {f"images {split}".strip(): dataset for split, dataset in findings.images.items()}
    if findings.tokens is not None:
        datasets["token shards"] = findings.tokens
    headers = {"tokenizer": findings.tokenizer, "backbone": findings.backbone}
    rows = [(name, dataset.fingerprint, "") for name, dataset in datasets.items()]
    texts = {f"{name}: recipe": dataset.manifest.recipe.to_json() for name, dataset in datasets.items()}
    for name, header in headers.items():
        if header is not None:
            rows.append((name, str(header.get("fingerprint", "")), str(header.get("code_version", ""))))
            texts[f"{name}: header"] = {key: value for key, value in header.items() if key != "files"}
    parts = [html.table(("artifact", "fingerprint", "code version"), rows)]
    for title, value in texts.items():
        text = json.dumps(value, indent=2, sort_keys=True)
        parts.append(html.details(title, f"<pre>{html.escape(text)}</pre>"))
    return "".join(parts)

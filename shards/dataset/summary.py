"""What a finished dataset holds, in numbers and in words: sizes, counts, use of the codes, one sample."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from shards.dataset.codes import CodeCount, CodeStatistics, add_codes, code_statistics
from shards.dataset.dataset import Dataset, open_table
from shards.dataset.parts import Part, PartKind, parts, views_in_words
from shards.format.index import codes_of
from shards.format.manifest import Manifest

EPOCHS = (300, 1600)
"""The paper's pretraining lengths (Tables 9 and 10)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRow:
    """One stored sample as its index row describes it; `grid` are its codes, row by row."""

    key: str
    source: str
    source_width: int
    source_height: int
    image_bytes: int
    label: int | None
    crop: dict[str, int] | None
    hflip: bool | None
    grid: list[list[int]] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class PartSummary:
    """One part of a dataset, finished or not; `place` is relative to it. Counts are 0 until it is finished.

    Bytes are those of its own objects, so a code layer has none of tars.
    """

    place: str
    kind: PartKind
    finished: bool
    first_view: int | None
    views: int
    tokenizer: str | None
    crops: int
    tar_bytes: int
    index_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetSummary:
    """A finished dataset in numbers. Bytes are those of the objects; a tar indexed in place counts once.

    `manifest` has the counts, over all views; `labelled` counts stored samples of view 0 by label. `codes`
    are those of the tokenizer it was opened with, `parts` everything that lies there.
    """

    url: str
    fingerprint: str
    manifest: Manifest
    labelled: dict[int, int]
    tar_bytes: int
    index_bytes: int
    rejects_bytes: int
    codes: CodeStatistics | None
    example: SampleRow | None
    parts: tuple[PartSummary, ...]

    def to_json(self) -> dict[str, Any]:
        """The numbers, and of the manifest what it says of the samples."""
        value, manifest = dataclasses.asdict(self), self.manifest.to_json()
        del value["manifest"]
        views = {"views": self.manifest.num_views, "samples": list(self.manifest.written_per_view)}
        return {**value, **views, **{name: manifest[name] for name in _FROM_MANIFEST}}


_FROM_MANIFEST = (
    "kind", "format_version", "inputs", "tokenizer", "recipe", "shards_per_view", "samples_in",
    "samples_written", "samples_rejected", "class_names",
)  # fmt: skip


def summarize(dataset: Dataset) -> DatasetSummary:
    """Everything about a dataset, from its manifest and one pass over its index files, checked by hash."""
    manifest = dataset.manifest
    counts = None if manifest.tokenizer is None else np.zeros(manifest.tokenizer.codebook_size, np.int64)
    labelled: Counter[int] = Counter()
    tar_bytes = index_bytes = rejects_bytes = 0
    last_tar = ""
    for view in range(dataset.num_views):
        for shard in dataset.shards(view):
            tar_bytes += 0 if shard.tar == last_tar else shard.tar_bytes
            last_tar = shard.tar  # ranges of one tar indexed in place follow each other
            index_bytes += shard.index_bytes
            rejects_bytes += shard.rejects_bytes or 0
            columns = ("label",) if counts is None else ("codes", "label")
            table = dataset.read_index(view, shard.number, columns)
            if counts is not None:
                add_codes(counts, codes_of(table), shard)
            if view == 0:
                labelled.update(table.column("label").drop_null().to_numpy().tolist())
    return DatasetSummary(
        url=dataset.url,
        fingerprint=dataset.fingerprint,
        manifest=manifest,
        labelled=dict(sorted(labelled.items())),
        tar_bytes=tar_bytes,
        index_bytes=index_bytes,
        rejects_bytes=rejects_bytes,
        codes=None if counts is None else code_statistics(counts),
        example=_example(dataset),
        parts=tuple(_part(dataset.url, part) for part in parts(dataset.url)),
    )


def _part(root: str, part: Part) -> PartSummary:
    table = open_table(part.url) if part.finished else None
    return PartSummary(
        place="base" if part.url == root else part.url.removeprefix(f"{root}/"),
        kind=part.kind,
        finished=part.finished,
        first_view=part.first_view,
        views=part.num_views,
        tokenizer=part.tokenizer,
        crops=0 if table is None else table.manifest.samples_written,
        tar_bytes=0 if table is None or part.kind == "codes" else table.total("tar_bytes"),
        index_bytes=0 if table is None else table.total("index_bytes"),
    )


def _example(dataset: Dataset) -> SampleRow | None:
    """The first stored sample; None where nothing was stored."""
    filled = np.flatnonzero(dataset.shard_sizes(0))
    if not len(filled):
        return None
    [row] = dataset.read_index(0, int(filled[0])).slice(0, 1).to_pylist()
    names = [entry.name for entry in dataclasses.fields(SampleRow) if entry.name != "grid"]
    grid = None if "codes" not in row else np.reshape(row["codes"], dataset.manifest.grid).tolist()
    return SampleRow(**{name: row.get(name) for name in names}, grid=grid)


# ------------------------------------------------------------------------------------------------ in words


def in_words(summary: DatasetSummary) -> str:
    """The summary for people: one fact per line, the grid as a table."""
    manifest = summary.manifest
    written, rejected = manifest.samples_written, sum(manifest.samples_rejected.values())
    reasons = ", ".join(f"{reason} {number:,}" for reason, number in manifest.samples_rejected.items())
    per_view = " + ".join(f"{number:,}" for number in manifest.written_per_view)
    lines = _facts(
        ("dataset", summary.url),
        ("kind", f"{manifest.kind}, format version {manifest.format_version}"),
        ("fingerprint", summary.fingerprint),
        *(("made from", f"{name} {value}") for name, value in manifest.inputs.items()),
        ("views", f"{manifest.num_views} of {manifest.shards_per_view:,} shards each, samples {per_view}"),
        ("samples", f"{manifest.samples_in:,} in = {written:,} written + {rejected:,} rejected"),
        ("rejected", reasons or "none"),
        ("labels", _labels_in_words(summary)),
        ("tars", _size(summary.tar_bytes, written)),
        ("index", _size(summary.index_bytes, written)),
        ("rejects", _size(summary.rejects_bytes, rejected)),
    )
    if len(summary.parts) > 1:
        lines += ["", "parts", *(f"  {part.place:<20}{_part_in_words(part)}" for part in summary.parts)]
    if manifest.tokenizer is not None:
        lines += ["", *_leaves("tokenizer", manifest.tokenizer.to_json())]
    lines += ["", *_leaves("recipe", manifest.recipe.to_json())]
    if summary.codes is not None:
        lines += ["", *_codes_in_words(summary.codes, manifest.num_views)]
    if summary.example is not None:
        lines += ["", *_example_in_words(summary.example)]
    return "\n".join(lines)


def _facts(*facts: tuple[str, str]) -> list[str]:
    return [f"{name:<14}{value}" for name, value in facts]


def _size(num_bytes: int, samples: int) -> str:
    each = f", {num_bytes / samples:,.0f} bytes per sample" if samples and num_bytes else ""
    return f"{num_bytes:,} bytes{each}"


def _labels_in_words(summary: DatasetSummary) -> str:
    if not summary.labelled:
        return "none"
    numbers = summary.labelled.values()
    names = summary.manifest.class_names
    named = "" if names is None else f" of {len(names)} named"
    return (
        f"{sum(numbers):,} samples in {len(numbers):,}{named} classes, "
        f"{min(numbers):,} to {max(numbers):,} samples each"
    )


def _part_in_words(part: PartSummary) -> str:
    if part.first_view is None:
        return "not begun"
    what = views_in_words(part.first_view, part.views)
    if part.kind == "codes":
        what = f"codes of {what} by tokenizer {(part.tokenizer or '')[:8]}"
    if not part.finished:
        return f"{what}, unfinished: readers do not see it"
    tars = f"{part.tar_bytes:,} bytes of tars, " if part.tar_bytes else ""
    each = f", {part.index_bytes / part.crops:,.0f} per crop" if part.crops else ""
    return f"{what}, {part.crops:,} crops, {tars}{part.index_bytes:,} of index{each}"


def _leaves(path: str, value: Any) -> list[str]:
    """`path.key value`, a line for each value of a nested JSON object."""
    if not isinstance(value, dict) or not value:
        return [f"{path:<34}{json.dumps(value)}"]
    return [line for key, inner in sorted(value.items()) for line in _leaves(f"{path}.{key}", inner)]


def _codes_in_words(codes: CodeStatistics, views: int) -> list[str]:
    def shares(counts: tuple[CodeCount, ...]) -> str:
        each = (f"{count.code} ({100 * count.patches / codes.patches:.3g} %)" for count in counts)
        return ", ".join(each) or "none"

    every = "in every epoch" if views == 1 else f"in one epoch of {views}"
    times = ", ".join(f"{epochs / views:,.4g} times in {epochs:,} epochs" for epochs in EPOCHS)
    more = ", …" if codes.num_dead > len(codes.dead) else ""
    listed = f": {', '.join(map(str, codes.dead))}{more}" if codes.dead else ""
    return _facts(
        ("patches", f"{codes.patches:,} in all views"),
        ("usage", f"{100 * codes.usage:.1f} % of {codes.codebook_size:,} codes"),
        ("perplexity", f"{codes.perplexity:,.1f} of at most {codes.codebook_size:,}"),
        ("most used", shares(codes.most_used)),
        ("least used", shares(codes.least_used)),
        ("dead codes", f"{codes.num_dead:,}{listed}"),
        ("each crop", f"seen {every}: {times}"),
    )


def _example_in_words(sample: SampleRow) -> list[str]:
    size = f"{sample.source_width} x {sample.source_height}"
    label = "none" if sample.label is None else sample.label
    made = f"{sample.image_bytes:,} bytes from {sample.source} ({size})"
    lines = _facts(("sample", f"{sample.key}, {made}, label {label}"))
    if sample.crop is not None:
        sides = ", ".join(f"{side} {pixels}" for side, pixels in sample.crop.items())
        lines += _facts(("crop", f"{sides}{', mirrored' if sample.hflip else ''}"))
    if sample.grid is not None:
        width = max(len(str(code)) for row in sample.grid for code in row)
        lines += ["codes", *(f"  {' '.join(f'{code:>{width}}' for code in row)}" for row in sample.grid)]
    return lines

"""What a finished dataset holds, in numbers: sizes, counts, how its codes are used, one sample's grid.

Index files are read one at a time, so memory does not grow with the number of samples.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.errors import InputError
from shards.dataset.dataset import Dataset
from shards.dataset.parts import Part, PartKind, open_part, parts, views_in_words
from shards.format.index import codes_of
from shards.format.manifest import Kind, ShardInfo

LISTED_CODES = 8
"""So many of the most and of the least used codes, and of the dead ones, are listed."""
EPOCHS = (300, 1600)
"""The paper's pretraining lengths (Tables 9 and 10)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeCount:
    """One code and how many patches carry it."""

    code: int
    patches: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeStatistics:
    """How the patches of all stored views use the codebook.

    `usage` is the share of codes that occur at all (paper, Table 4); `perplexity` the exponential of the
    entropy of code frequencies, codebook_size at most. `least_used` are codes that occur.
    """

    codebook_size: int
    patches: int
    usage: float
    perplexity: float
    most_used: tuple[CodeCount, ...]
    least_used: tuple[CodeCount, ...]
    num_dead: int
    dead: tuple[int, ...]


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
    grid: tuple[tuple[int, ...], ...] | None


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

    `samples` are those of each view; `labelled` counts stored samples of view 0 by label. `samples_in` =
    `samples_written` + the sum of `samples_rejected`, over all views. `codes` are those of the tokenizer it
    was opened with, `parts` everything that lies there.
    """

    url: str
    kind: Kind
    format_version: int
    fingerprint: str
    inputs: dict[str, str]
    tokenizer: dict[str, Any] | None
    recipe: dict[str, Any]
    views: int
    shards_per_view: int
    samples: tuple[int, ...]
    samples_in: int
    samples_written: int
    samples_rejected: dict[str, int]
    class_names: tuple[str, ...] | None
    labelled: dict[int, int]
    tar_bytes: int
    index_bytes: int
    rejects_bytes: int
    codes: CodeStatistics | None
    example: SampleRow | None
    parts: tuple[PartSummary, ...]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def count_codes(dataset: Dataset, views: Sequence[int] | None = None) -> np.ndarray:
    """How many patches of some views, or of all, carry each code: int64 [codebook_size]."""
    counts = np.zeros(codebook_size(dataset), np.int64)
    for view in range(dataset.num_views) if views is None else views:
        for shard in dataset.shards(view):
            add_codes(counts, codes_of(dataset.read_index(view, shard.number, ("codes",))), shard)
    return counts


def codebook_size(dataset: Dataset) -> int:
    """K of a token dataset's tokenizer."""
    tokenizer = dataset.manifest.tokenizer
    if tokenizer is None:
        raise ValueError(f"{dataset.url} holds images, which have no codes")
    return tokenizer.codebook_size


def add_codes(counts: np.ndarray, codes: np.ndarray, shard: ShardInfo) -> None:
    """Count a shard's codes into int64 [codebook_size]; InputError for one beyond the codebook."""
    require_codes(codes, len(counts), shard)
    counts += np.bincount(codes.ravel(), minlength=len(counts))


def require_codes(codes: np.ndarray, codebook_size: int, shard: ShardInfo) -> None:
    """InputError where a shard holds a code beyond the codebook."""
    largest = int(codes.max(initial=0))
    if largest >= codebook_size:
        raise InputError(
            f"{shard.index} of shard {shard.name} holds code {largest}, but the codebook has "
            f"{codebook_size} codes; verify the dataset"
        )


def code_statistics(counts: np.ndarray) -> CodeStatistics:
    """Statistics of code counts, int64 [codebook_size]; equally frequent codes are listed by number."""
    dead = np.flatnonzero(counts == 0)
    ascending = np.argsort(counts, kind="stable")
    descending = np.argsort(-counts, kind="stable")
    used = len(counts) - len(dead)
    return CodeStatistics(
        codebook_size=len(counts),
        patches=int(counts.sum()),
        usage=used / len(counts),
        perplexity=perplexity(counts),
        most_used=_listed(counts, descending[: min(LISTED_CODES, used)]),
        least_used=_listed(counts, ascending[len(dead) : len(dead) + LISTED_CODES]),
        num_dead=len(dead),
        dead=tuple(dead[:LISTED_CODES].tolist()),
    )


def perplexity(counts: np.ndarray) -> float:
    """exp(entropy) of the frequencies that counts stand for; 0 where nothing was counted."""
    total = counts.sum()
    if total == 0:
        return 0.0
    share = counts[counts > 0] / total
    return float(np.exp(-(share * np.log(share)).sum()))


def summarize(dataset: Dataset) -> DatasetSummary:
    """Everything about a dataset, from its manifest and one pass over its index files, checked by hash."""
    manifest, tokens = dataset.manifest, dataset.kind == "tokens"
    columns = ("codes", "label") if tokens else ("label",)
    counts = np.zeros(codebook_size(dataset) if tokens else 0, np.int64)
    labelled: dict[int, int] = {}
    tar_bytes = index_bytes = rejects_bytes = 0
    last_foreign = ""
    for view in range(dataset.num_views):
        for shard in dataset.shards(view):
            if shard.tar != last_foreign:  # ranges of one tar indexed in place follow each other
                tar_bytes += shard.tar_bytes
                last_foreign = shard.tar if shard.in_place else ""
            index_bytes += shard.index_bytes
            rejects_bytes += shard.rejects_bytes or 0
            table = dataset.read_index(view, shard.number, columns)
            if tokens:
                add_codes(counts, codes_of(table), shard)
            if view == 0:
                labels = table.column("label").drop_null().to_numpy()
                for label, number in zip(*np.unique(labels, return_counts=True), strict=True):
                    labelled[int(label)] = labelled.get(int(label), 0) + int(number)
    return DatasetSummary(
        url=dataset.url,
        kind=dataset.kind,
        format_version=manifest.format_version,
        fingerprint=dataset.fingerprint,
        inputs=manifest.inputs,
        tokenizer=None if manifest.tokenizer is None else manifest.tokenizer.to_json(),
        recipe=manifest.recipe.to_json(),
        views=dataset.num_views,
        shards_per_view=dataset.num_shards,
        samples=manifest.written_per_view,
        samples_in=manifest.samples_in,
        samples_written=manifest.samples_written,
        samples_rejected=manifest.samples_rejected,
        class_names=manifest.class_names,
        labelled=dict(sorted(labelled.items())),
        tar_bytes=tar_bytes,
        index_bytes=index_bytes,
        rejects_bytes=rejects_bytes,
        codes=code_statistics(counts) if tokens else None,
        example=_example(dataset),
        parts=tuple(_part(dataset.url, part) for part in parts(dataset.url)),
    )


# ------------------------------------------------------------------------------------------------ as text


def as_text(summary: DatasetSummary) -> str:
    """The summary for people: one fact per line, the grid as a table."""
    written, rejected = summary.samples_written, sum(summary.samples_rejected.values())
    reasons = ", ".join(f"{reason} {number:,}" for reason, number in summary.samples_rejected.items())
    facts = [
        ("dataset", summary.url),
        ("kind", f"{summary.kind}, format version {summary.format_version}"),
        ("fingerprint", summary.fingerprint),
        *(("made from", f"{name} {value}") for name, value in summary.inputs.items()),
        (
            "views",
            f"{summary.views} of {summary.shards_per_view:,} shards each, samples " + _per_view(summary),
        ),
        ("samples", f"{summary.samples_in:,} in = {written:,} written + {rejected:,} rejected"),
        ("rejected", reasons or "none"),
        ("labels", _labels(summary)),
        ("tars", _size(summary.tar_bytes, written)),
        ("index", _size(summary.index_bytes, written)),
        ("rejects", _size(summary.rejects_bytes, rejected)),
    ]
    lines = [f"{name:<14}{value}" for name, value in facts]
    if len(summary.parts) > 1:
        lines += ["", "parts", *(f"  {part.place:<20}{_part_in_words(part)}" for part in summary.parts)]
    if summary.tokenizer is not None:
        lines += ["", *_leaves("tokenizer", summary.tokenizer)]
    lines += ["", *_leaves("recipe", summary.recipe)]
    if summary.codes is not None:
        lines += ["", *_codes_in_words(summary.codes), _epochs_in_words(summary.views)]
    if summary.example is not None:
        lines += ["", *_example_in_words(summary.example)]
    return "\n".join(lines)


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


def _per_view(summary: DatasetSummary) -> str:
    return " + ".join(f"{number:,}" for number in summary.samples)


def _labels(summary: DatasetSummary) -> str:
    if not summary.labelled:
        return "none"
    numbers = summary.labelled.values()
    named = f" of {len(summary.class_names)} named" if summary.class_names is not None else ""
    return (
        f"{sum(numbers):,} samples in {len(numbers):,}{named} classes, "
        f"{min(numbers):,} to {max(numbers):,} samples each"
    )


def _size(num_bytes: int, samples: int) -> str:
    each = f", {num_bytes / samples:,.0f} bytes per sample" if samples and num_bytes else ""
    return f"{num_bytes:,} bytes{each}"


def _leaves(path: str, value: Any) -> list[str]:
    """`path.key value`, a line for each value of a nested JSON object."""
    if not isinstance(value, dict) or not value:
        return [f"{path:<34}{json.dumps(value)}"]
    return [line for key, inner in sorted(value.items()) for line in _leaves(f"{path}.{key}", inner)]


def _codes_in_words(codes: CodeStatistics) -> list[str]:
    def share(count: CodeCount) -> str:
        return f"{count.code} ({100 * count.patches / codes.patches:.3g} %)"

    more = ", …" if codes.num_dead > len(codes.dead) else ""
    listed = f": {', '.join(map(str, codes.dead))}{more}" if codes.dead else ""
    facts = [
        ("patches", f"{codes.patches:,} in all views"),
        ("usage", f"{100 * codes.usage:.1f} % of {codes.codebook_size:,} codes"),
        ("perplexity", f"{codes.perplexity:,.1f} of at most {codes.codebook_size:,}"),
        ("most used", ", ".join(map(share, codes.most_used)) or "none"),
        ("least used", ", ".join(map(share, codes.least_used)) or "none"),
        ("dead codes", f"{codes.num_dead:,}{listed}"),
    ]
    return [f"{name:<14}{value}" for name, value in facts]


def _epochs_in_words(views: int) -> str:
    shown = ", ".join(f"{epochs / views:,.4g} times in {epochs:,} epochs" for epochs in EPOCHS)
    every = "in every epoch" if views == 1 else f"in one epoch of {views}"
    return f"{'each crop':<14}seen {every}: {shown}"


def _example_in_words(sample: SampleRow) -> list[str]:
    made = (
        f"{sample.image_bytes:,} bytes from {sample.source} ({sample.source_width} x {sample.source_height})"
    )
    lines = [f"{'sample':<14}{sample.key}, {made}, label {'none' if sample.label is None else sample.label}"]
    if sample.crop is not None:
        place = ", ".join(f"{side} {pixels}" for side, pixels in sample.crop.items())
        lines.append(f"{'crop':<14}{place}{', mirrored' if sample.hflip else ''}")
    if sample.grid is not None:
        width = max(len(str(code)) for row in sample.grid for code in row)
        lines += ["codes", *(f"  {' '.join(f'{code:>{width}}' for code in row)}" for row in sample.grid)]
    return lines


# ------------------------------------------------------------------------------------------------ inside


def _listed(counts: np.ndarray, codes: np.ndarray) -> tuple[CodeCount, ...]:
    return tuple(CodeCount(code=int(code), patches=int(counts[code])) for code in codes)


def _part(root: str, part: Part) -> PartSummary:
    table = open_part(part) if part.finished else None
    return PartSummary(
        place="base" if part.url == root else part.url.removeprefix(f"{root}/"),
        kind=part.kind,
        finished=part.finished,
        first_view=part.first_view,
        views=part.num_views,
        tokenizer=part.tokenizer,
        crops=0 if part.manifest is None else part.manifest.samples_written,
        tar_bytes=0 if table is None or part.kind == "codes" else table.total("tar_bytes"),
        index_bytes=0 if table is None else table.total("index_bytes"),
    )


def _example(dataset: Dataset) -> SampleRow | None:
    """The first stored sample; None where nothing was stored."""
    first: ShardInfo | None = next((shard for shard in dataset.shards(0) if shard.samples), None)
    if first is None:
        return None
    [row] = dataset.read_index(0, first.number).slice(0, 1).to_pylist()
    grid: tuple[tuple[int, ...], ...] | None = None
    if dataset.kind == "tokens":
        grid = tuple(tuple(codes) for codes in np.reshape(row["codes"], dataset.manifest.grid).tolist())
    return SampleRow(
        key=row["key"],
        source=row["source"],
        source_width=row["source_width"],
        source_height=row["source_height"],
        image_bytes=row["image_bytes"],
        label=row["label"],
        crop=row.get("crop"),
        hflip=row.get("hflip"),
        grid=grid,
    )

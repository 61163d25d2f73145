"""The plan of a dataset, frozen before its first shard, and the work items that follow from it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from pipeline.artifacts import canonical_json, fingerprint
from shards.format.build import MAX_SHARD_SAMPLES
from shards.format.index import FORMAT_VERSION
from shards.format.manifest import Kind, Recipe, TokenizerSpec, shard_name
from shards.format.records import MAX_SAMPLE_ID, MAX_VIEWS


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One unit of work: the samples of one view with ids in [first_id, end_id), `samples` of them."""

    view: int
    number: int
    first_id: int
    end_id: int
    samples: int

    @property
    def name(self) -> str:
        return shard_name(self.view, self.number)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides the bytes of a dataset, frozen before its first shard.

    Range i holds the ids [first_ids[i], first_ids[i + 1]); the same ranges hold for every view. `samples`
    says how many samples must come out of each range, written or rejected; None means every id. (Token
    datasets plan with `Dataset.id_ranges` of their images, whose ids have gaps where images were rejected.)
    `inputs` are fingerprints by name, `recipe` whatever else decides the bytes; both are compared on a rerun
    and copied into the manifest, as are class names, tokenizer, and `details`: anything else worth saying.
    """

    kind: Kind
    inputs: dict[str, str]
    first_ids: tuple[int, ...]
    views: int
    recipe: Recipe = field(default_factory=Recipe)
    tokenizer: TokenizerSpec | None = None
    class_names: tuple[str, ...] | None = None
    details: dict[str, Any] = field(default_factory=dict)
    samples: tuple[int, ...] | None = None
    first_view: int = 0

    def __post_init__(self) -> None:
        ids = np.array(self.first_ids, np.int64)
        sizes = np.diff(ids)
        counts = sizes if self.samples is None else np.array(self.samples, np.int64)
        if len(sizes) < 1 or sizes.min() < 1 or ids[0] < 0 or ids[-1] > MAX_SAMPLE_ID:
            raise ValueError("first_ids must be at least two ascending ids, the last one the end")
        if counts.shape != sizes.shape or counts.min() < 0 or (counts > sizes).any():
            raise ValueError("samples must give, for each range, a number that its ids can hold")
        if counts.max() > MAX_SHARD_SAMPLES:
            raise ValueError(f"a range of {counts.max()} samples; a shard holds at most {MAX_SHARD_SAMPLES}")
        if self.views < 1 or self.first_view < 0 or self.first_view + self.views > MAX_VIEWS:
            raise ValueError(f"views must be within 0 to {MAX_VIEWS - 1}, and at least one")
        if (self.kind == "images") != (self.tokenizer is None):
            raise ValueError(f"a plan of {self.kind} {'has no' if self.tokenizer else 'needs a'} tokenizer")

    def require_tokenizer(self) -> TokenizerSpec:
        """The tokenizer that makes the codes of a plan of tokens or codes."""
        if self.tokenizer is None:
            raise ValueError("a plan of images has no tokenizer")
        return self.tokenizer

    @property
    def num_ranges(self) -> int:
        return len(self.first_ids) - 1

    @property
    def num_items(self) -> int:
        return self.num_ranges * self.views

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.to_json())

    @property
    def plan_prefix(self) -> str:
        return self.fingerprint[:8]

    @property
    def samples_per_view(self) -> int:
        """Samples that must come out of one view, written or rejected."""
        return self.first_ids[-1] - self.first_ids[0] if self.samples is None else sum(self.samples)

    def ranges_in_words(self) -> str:
        largest = int(np.diff(np.array(self.first_ids, np.int64)).max())
        ids = f"{self.first_ids[0]} to {self.first_ids[-1]}"
        return f"{self.samples_per_view} samples in {self.num_ranges} ranges of at most {largest} ids, {ids}"

    def to_json(self) -> dict[str, Any]:
        """Ranges are stored as runs of equal sizes: uniform ones take no room, however many they are."""
        tokenizer = {} if self.tokenizer is None else {"tokenizer": self.tokenizer.to_json()}
        sizes = np.diff(np.array(self.first_ids, np.int64)).tolist()
        return {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "inputs": self.inputs,
            "recipe": self.recipe.to_json(),
            "header": {"class_names": self.class_names, **tokenizer, **self.details},
            "first_view": self.first_view,
            "views": self.views,
            "first_id": self.first_ids[0],
            "range_ids": _runs(sizes),
            "range_samples": None if self.samples is None else _runs(self.samples),
        }

    def to_bytes(self) -> bytes:
        return canonical_json(self.to_json()) + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> Plan:
        value = json.loads(data)
        if value["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"plan of format version {value['format_version']}; this program writes {FORMAT_VERSION}"
            )
        sizes = _unrolled(value["range_ids"])
        samples, details = value["range_samples"], dict(value["header"])
        tokenizer, class_names = details.pop("tokenizer", None), details.pop("class_names", None)
        return cls(
            kind=value["kind"],
            inputs=value["inputs"],
            recipe=Recipe.from_json(value["recipe"]),
            tokenizer=None if tokenizer is None else TokenizerSpec.from_json(tokenizer),
            class_names=None if class_names is None else tuple(class_names),
            details=details,
            first_view=value["first_view"],
            views=value["views"],
            first_ids=tuple(itertools.accumulate(sizes, initial=value["first_id"])),
            samples=None if samples is None else tuple(_unrolled(samples)),
        )


def _runs(values: Iterable[int]) -> list[list[int]]:
    """`[[value, repeats], …]`."""
    return [[value, sum(1 for _ in group)] for value, group in itertools.groupby(values)]


def _unrolled(runs: Iterable[Sequence[int]]) -> Iterator[int]:
    return itertools.chain.from_iterable(itertools.repeat(value, repeats) for value, repeats in runs)


def items(plan: Plan) -> Iterator[Item]:
    """Every work item, view by view and in order of ids, made one at a time."""
    for view in range(plan.first_view, plan.first_view + plan.views):
        for number in range(plan.num_ranges):
            yield item_at(plan, view, number)


def item_at(plan: Plan, view: int, number: int) -> Item:
    """The work item of one view and range."""
    first_id, end_id = plan.first_ids[number : number + 2]
    samples = end_id - first_id if plan.samples is None else plan.samples[number]
    return Item(view=view, number=number, first_id=first_id, end_id=end_id, samples=samples)

"""Image shards from any source: each file is decoded once, to prove it readable, and stored untouched.

The write pass is that of `shards.writer.commit`; what is special here is the frozen listing of the sources.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline import artifacts, storage
from pipeline.cluster.config import ClusterConfig
from pipeline.cluster.items import map_items
from pipeline.config import ASIDE, PLACE, identity
from pipeline.errors import InputError
from pipeline.training.metrics import Progress
from shards.format.build import MAX_SHARD_BYTES, MAX_SHARD_SAMPLES, BuiltShard, ForeignTar, build_shard
from shards.format.manifest import MANIFEST, Manifest, Recipe
from shards.format.plan import Item, Plan
from shards.format.records import RejectedSample, StoredSample
from shards.pixels.decode import DecodeConfig, Rejected, decode, decode_config_of, decode_image, decode_recipe
from shards.sources.listing import LabelRule, SourceConfig, list_sources, read_sources
from shards.sources.table import (
    SOURCES,
    Source,
    Sources,
    freeze,
    load_rows,
    load_sources,
    rows_of,
    split_by_content,
    with_hashes,
)
from shards.sources.tars import check_unchanged
from shards.writer import commit

SPLITS = ("train", "val")

_READ_THREADS = 8
_HASHED_IN_PROCESS_BYTES = 256 << 20  # a second or two: less than it takes to start workers
_TAR_OVERHEAD_BYTES = 1024  # a header, and padding to whole blocks


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Turn images into image shards.

    Images come from a folder, WebDataset tars or Parquet files. What cannot be read is set aside with its
    reason and counted; running the same command again does only what is missing.
    """

    source: str
    """Folder of images; .tar or .parquet file, a folder of them or a pattern such as s3://b/x-{000..009}.tar."""
    output: str = field(metadata=PLACE)
    """Where the dataset goes; with val_fraction, the two datasets train/ and val/."""
    val_fraction: float = 0.0
    """Share of images set apart as val/, chosen by their content so that duplicates stay together."""
    labels: LabelRule = "folder"
    """What labels an image of a folder: the folder it lies in, the topmost of those, or nothing. For tars and
    Parquet files: none ignores their labels."""
    seed: int = 0
    """Draws the order of an image folder, and the split."""
    image_column: str = "image"
    """Parquet: the column of encoded images, or of structs with such bytes."""
    label_column: str | None = None
    """Parquet: the column of labels; null takes label where there is one."""
    max_shard_samples: int = MAX_SHARD_SAMPLES
    """A shard holds no more images than this."""
    max_shard_bytes: int = MAX_SHARD_BYTES
    """A shard holds no more bytes than this, unless a single image does."""
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    """How image files become pixels."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig, metadata=ASIDE)
    """Where the work runs."""

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise InputError(f"val_fraction is {self.val_fraction}; give 0 (one dataset) to less than 1")
        if self.labels not in ("folder", "top_folder", "none"):
            raise InputError(f"labels is {self.labels}; give folder, top_folder or none")
        if not 0 <= self.seed < 1 << 63:
            raise InputError(f"seed is {self.seed}; give 0 to 2^63 - 1")
        if not 1 <= self.max_shard_samples <= MAX_SHARD_SAMPLES:
            raise InputError(f"max_shard_samples is {self.max_shard_samples}; give 1 to {MAX_SHARD_SAMPLES}")
        if not 1 <= self.max_shard_bytes <= MAX_SHARD_BYTES:
            raise InputError(f"max_shard_bytes is {self.max_shard_bytes}; give 1 to {MAX_SHARD_BYTES}")


def prepare_images(config: PrepareConfig) -> None:
    """Write the image dataset, or the two of a split, and say what became of every source.

    A finished one of the same settings is left as it is. InputError, with nothing written, for a source that
    is missing or empty and for an output that holds something else.
    """
    # Decoding needs no GPU; none is reserved where there are some.
    config = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, use_gpu=False))
    splits = _start_splits(config, storage.absolute(config.output))
    unfinished = [split for split in splits if not storage.exists(storage.join(split.root, MANIFEST))]
    if unfinished:
        _write_shards(config, unfinished)
    for split in splits:
        if split not in unfinished:
            print(f"{split.root} is finished already", flush=True)
        decode_stored = functools.partial(decode_image, config=config.decode)
        _print_account(split.root, commit.finish(split.root, split.plan, decode_stored))


def _start_splits(config: PrepareConfig, output: str) -> list[Split]:
    """The one dataset or the two of a split, listed and planned; the listing is held no longer than that."""
    sources = _frozen_sources(config, output)
    if config.val_fraction == 0:
        return [_start(config, output, sources)]
    splits: list[Split] = []
    chosen = split_by_content(sources, config.val_fraction, config.seed)
    for name, split_sources in zip(SPLITS, chosen, strict=True):
        root = storage.join(output, name)
        frozen = freeze(storage.join(root, SOURCES), split_sources)
        _check_origin(root, frozen, split_sources.origin)
        splits.append(_start(config, root, frozen))
    return splits


# ------------------------------------------------------------------------------------------------ sources


def _frozen_sources(config: PrepareConfig, output: str) -> Sources:
    """The listing this output was begun with; on the first run it is made and frozen.

    A split is a function of this listing, contents hashed, so it cannot come out differently on a rerun.
    """
    url = storage.join(output, SOURCES)
    listing = SourceConfig(
        url=config.source,
        labels=config.labels,
        seed=config.seed,
        image_column=config.image_column,
        label_column=config.label_column,
    )
    origin = {**listing.origin, "val_fraction": config.val_fraction}
    sources = load_sources(url)
    if sources is None:
        other_file = next(storage.list_files(output), None)
        if other_file is not None and not storage.exists(url):
            raise InputError(f"{output} already holds something else; choose another output or empty it")
        sources = dataclasses.replace(list_sources(listing, config.cluster), origin=origin)
        print(f"found {len(sources):,} sources at {origin['url']}", flush=True)
        if config.val_fraction > 0:
            sources = _hashed(config, sources)
            # raises for an empty split before anything is written
            split_by_content(sources, config.val_fraction, config.seed)
        sources = freeze(url, sources)
    _check_origin(output, sources, origin)
    return sources


def _check_origin(root: str, sources: Sources, origin: dict[str, Any]) -> None:
    differing = artifacts.differences(sources.origin, origin)
    if differing:
        raise InputError(
            f"{root} was begun with other images, which differ in {'; '.join(differing[:4])}; choose another "
            "output, or repeat the settings it was begun with"
        )


@dataclass(frozen=True, kw_only=True)
class _Range:
    """Sources to hash: some rows of the listing, small enough to travel."""

    first_id: int
    rows: list[Source] = field(repr=False)


def _hashed(config: PrepareConfig, sources: Sources) -> Sources:
    """The sources with the content hash of every image that can be read."""
    if sources.kind == "parquet":
        return sources  # hashed when they were listed
    hashes: list[bytes | None] = [None] * len(sources)
    first_ids = plan_ranges(sources, config)
    ranges = (
        _Range(first_id=first, rows=rows_of(sources.table.slice(first, end - first)))
        for first, end in itertools.pairwise(first_ids)
    )
    progress = Progress("hashing", len(sources), "images")
    cluster = config.cluster
    if int(sources.table.column("bytes").to_numpy().sum()) <= _HASHED_IN_PROCESS_BYTES:
        cluster = dataclasses.replace(cluster, num_workers=0)
    for first_id, of_range in map_items(ranges, functools.partial(_Hasher, config), cluster):
        hashes[first_id : first_id + len(of_range)] = of_range
        progress.update(len(of_range))
    progress.close()
    return with_hashes(sources, hashes)


class _Hasher:
    """Hashes the contents of a range of sources."""

    def __init__(self, config: PrepareConfig) -> None:
        self._column, self._max_file_bytes = config.image_column, config.decode.max_file_bytes
        self._pool = ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="read")

    def __call__(self, item: _Range) -> tuple[int, list[bytes | None]]:
        images = read_sources(
            item.rows, image_column=self._column, max_file_bytes=self._max_file_bytes, pool=self._pool
        )
        hashes = [None if isinstance(image, Rejected) else hashlib.sha256(image).digest() for image in images]
        return item.first_id, hashes


# ------------------------------------------------------------------------------------------------ datasets


def plan_ranges(sources: Sources, config: PrepareConfig) -> tuple[int, ...]:
    """First ids of the shards, and the end: as many images as fit both limits, never of two tars.

    Of a tar indexed in place, what lies between the images counts too: a shard is read in one request.
    """
    table = sources.table
    num_bytes = table.column("bytes").to_numpy()
    cuts = [len(table)]
    if sources.kind == "tars":
        files = table.column("path").combine_chunks().dictionary_encode().indices.to_numpy()
        cuts = [*(np.flatnonzero(np.diff(files)) + 1).tolist(), len(table)]
        reached = table.column("offset").to_numpy() + num_bytes
        steps = np.empty_like(reached)
        for first, end in itertools.pairwise([0, *cuts]):
            steps[first:end] = np.diff(np.maximum.accumulate(reached[first:end]), prepend=0)
        ends = np.cumsum(np.maximum(steps, 0))
    else:
        unread = ~np.array(table.column("reject_reason").is_null())
        unread |= num_bytes > config.decode.max_file_bytes
        ends = np.cumsum(np.where(unread, 0, num_bytes) + _TAR_OVERHEAD_BYTES)
    first_ids, position = [0], 0
    for cut in cuts:
        while position < cut:
            begun = int(ends[position - 1]) if position else 0
            fitting = int(np.searchsorted(ends, begun + config.max_shard_bytes, side="right"))
            position = min(cut, position + config.max_shard_samples, max(fitting, position + 1))
            first_ids.append(position)
    return tuple(first_ids)


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """A dataset in the making, the only one or train or val: where it goes, and its plan."""

    root: str
    plan: Plan


@dataclass(frozen=True, kw_only=True)
class Work:
    """One shard of one split, by the split's number."""

    split: int
    item: Item


def _start(config: PrepareConfig, root: str, sources: Sources) -> Split:
    """The dataset with its plan, a function of the frozen listing and the settings, written beside it."""
    plan = Plan(
        kind="images",
        inputs={"sources": sources.fingerprint},
        recipe=Recipe(decode=decode_recipe(config.decode), image_column=config.image_column),
        first_ids=plan_ranges(sources, config),
        views=1,
        class_names=sources.class_names,
        details={"source": {"kind": sources.kind, **sources.origin}},
    )
    plan = commit.start(root, plan, beside=(SOURCES, commit.RUN_CONFIG))
    commit.record_run(root, identity(config))
    return Split(root=root, plan=plan)


def _write_shards(config: PrepareConfig, splits: list[Split]) -> None:
    """All splits in one pass: starting workers takes seconds, and is paid once."""
    todo = [commit.Unfinished(split.root, split.plan) for split in splits]
    work = (Work(split=number, item=item) for number, items in enumerate(todo) for item in items)
    total = sum(split.plan.first_ids[-1] for split in splits)
    done = total - sum(items.samples for items in todo)
    progress = Progress("preparing", total, "images", done=done)
    rejected = 0
    for samples, rejects in map_items(work, functools.partial(Preparer, splits), config.cluster):
        rejected += rejects
        progress.update(samples + rejects, rejected=rejected)
    progress.close(rejected=rejected)


class Preparer:
    """Writes the shard of one id range: read, decode to prove, build, commit. Returns (written, rejected)."""

    def __init__(self, splits: Sequence[Split]) -> None:
        self._splits = splits
        self._pool = ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="read")

    def __call__(self, work: Work) -> tuple[int, int]:
        root, plan, item = self._splits[work.split].root, self._splits[work.split].plan, work.item
        rows = load_rows(storage.join(root, SOURCES), item.first_id, item.end_id)
        receipt = commit.commit(root, plan, item, make_item(plan, item, rows, self._pool))
        return receipt.shard.samples, sum(receipt.rejected.values())


def make_item(plan: Plan, item: Item, rows: list[Source], pool: ThreadPoolExecutor) -> BuiltShard:
    """The objects of one id range, whose sources are `rows`: read, decoded to prove them readable, built."""
    decode_config = decode_config_of(plan.recipe.require_decode())
    column = plan.recipe.image_column or "image"
    images = read_sources(rows, image_column=column, max_file_bytes=decode_config.max_file_bytes, pool=pool)
    in_place = plan.details["source"]["kind"] == "tars"
    samples: list[StoredSample] = []
    rejects: list[RejectedSample] = []
    for sample_id, (source, image) in enumerate(zip(rows, images, strict=True), item.first_id):
        try:
            if isinstance(image, Rejected):
                raise image
            decoded = decode(image, decode_config)
        except Rejected as error:
            rejects.append(
                RejectedSample(
                    sample_id=sample_id, source=source.name, reason=error.reason, message=error.message
                )
            )
            continue
        height, width = decoded.pixels.shape[:2]
        samples.append(
            StoredSample(
                sample_id=sample_id,
                view=0,
                image=image,
                extension=decoded.extension,
                source=source.name,
                source_width=width,
                source_height=height,
                label=source.label,
                image_offset=source.offset if in_place else None,
            )
        )
    foreign = None
    if in_place:
        tar = check_unchanged(rows[0].url, rows[0].version)
        foreign = ForeignTar(url=tar.url, bytes=tar.bytes, version=tar.version)
    return build_shard(samples, rejects, grid=None, codebook_size=None, foreign=foreign)


def _print_account(root: str, manifest: Manifest) -> None:
    reasons = Counter(manifest.samples_rejected)
    named = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common())
    rejected = f"{reasons.total():,} rejected" + (f" ({named})" if named else "")
    print(
        f"{root}: {manifest.samples_in:,} in = {manifest.samples_written:,} written + {rejected}", flush=True
    )
    if reasons:
        print(f"what was rejected, and why: {storage.join(root, 'rejects')}/*.parquet", flush=True)
    if manifest.samples_written == 0:
        print(f"warning: no image could be read; {root} is an empty dataset", flush=True)

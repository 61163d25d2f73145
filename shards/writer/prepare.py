"""Image shards from any source: each file is decoded once, to prove it readable, and stored untouched.

The write pass is that of `shards.writer.commit`; what is special here is the frozen listing of the sources.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
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
from shards.format.manifest import MANIFEST, Manifest, Recipe, read_manifest
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

PARTS = ("train", "val")

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

    @property
    def sources(self) -> SourceConfig:
        return SourceConfig(
            url=self.source,
            labels=self.labels,
            seed=self.seed,
            image_column=self.image_column,
            label_column=self.label_column,
        )


def prepare_images(config: PrepareConfig) -> None:
    """Write the image dataset, or the two of a split, and say what became of every source.

    A finished one of the same settings is left as it is. InputError, with nothing written, for a source that
    is missing or empty and for an output that holds something else.
    """
    # Decoding needs no GPU; none is reserved where there are some.
    config = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, use_gpu=False))
    parts = _begun_parts(config, storage.absolute(config.output))
    unfinished = [part for part in parts if not storage.exists(storage.join(part.root, MANIFEST))]
    if unfinished:
        _write_shards(config, unfinished)
    for part in parts:
        if part in unfinished:
            manifest = commit.finish(
                part.root, part.plan, functools.partial(decode_image, config=config.decode)
            )
        else:
            manifest = read_manifest(part.root)
            print(f"{part.root} is finished already", flush=True)
        _print_account(part.root, manifest)


def _begun_parts(config: PrepareConfig, output: str) -> list[Part]:
    """The one dataset or the two of a split, listed and planned; the listing is held no longer than that."""
    sources = _frozen_sources(config, output)
    if config.val_fraction == 0:
        return [_begin(config, output, sources)]
    parts: list[Part] = []
    for name, chosen in zip(PARTS, split_by_content(sources, config.val_fraction, config.seed), strict=True):
        root = storage.join(output, name)
        frozen = freeze(storage.join(root, SOURCES), chosen)
        _check_origin(root, frozen, chosen.origin)
        parts.append(_begin(config, root, frozen))
    return parts


# ------------------------------------------------------------------------------------------------ sources


def _frozen_sources(config: PrepareConfig, output: str) -> Sources:
    """The listing this output was begun with; on the first run it is made and frozen.

    A split is a function of this listing, contents hashed, so it cannot come out differently on a rerun.
    """
    url = storage.join(output, SOURCES)
    origin = {**config.sources.origin, "val_fraction": config.val_fraction}
    sources = load_sources(url)
    if sources is None:
        stranger = next(storage.list_files(output), None)
        if stranger is not None and not storage.exists(url):
            raise InputError(f"{output} already holds something else; choose another output or empty it")
        sources = dataclasses.replace(list_sources(config.sources, config.cluster), origin=origin)
        print(f"found {len(sources):,} sources at {origin['url']}", flush=True)
        if config.val_fraction > 0:
            sources = _hashed(config, sources)
            split_by_content(
                sources, config.val_fraction, config.seed
            )  # an empty part is said before writing
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
    for first_id, found in map_items(ranges, functools.partial(_Hasher, config), cluster):
        hashes[first_id : first_id + len(found)] = found
        progress.update(len(found))
    progress.close()
    return with_hashes(sources, hashes)


class _Hasher:
    """Hashes the contents of a range of sources."""

    def __init__(self, config: PrepareConfig) -> None:
        self._config = config
        self._pool = ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="read")

    def __call__(self, item: _Range) -> tuple[int, list[bytes | None]]:
        images = _images(item.rows, self._config, self._pool)
        hashes = [None if isinstance(image, Rejected) else hashlib.sha256(image).digest() for image in images]
        return item.first_id, hashes


def _images(
    rows: list[Source], config: PrepareConfig, pool: ThreadPoolExecutor
) -> Iterator[bytes | Rejected]:
    return read_sources(
        rows, image_column=config.image_column, max_file_bytes=config.decode.max_file_bytes, pool=pool
    )


# ------------------------------------------------------------------------------------------------ one dataset


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
        ends = np.cumsum(_steps(table.column("offset").to_numpy() + num_bytes, cuts))
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


def _steps(ends: np.ndarray, cuts: Sequence[int]) -> np.ndarray:
    """How far each row lies beyond those before it, in bytes; `cuts` are the ends of the tars, as rows."""
    steps = np.empty_like(ends)
    for first, end in itertools.pairwise([0, *cuts]):
        reached = np.maximum.accumulate(ends[first:end])
        steps[first:end] = np.diff(reached, prepend=0)
    return np.maximum(steps, 0)


def plan_dataset(config: PrepareConfig, sources: Sources) -> Plan:
    """The plan of an image dataset: a function of the frozen listing and the settings."""
    return Plan(
        kind="images",
        inputs={"sources": sources.fingerprint},
        recipe=Recipe(decode=decode_recipe(config.decode), image_column=config.image_column),
        first_ids=plan_ranges(sources, config),
        views=1,
        class_names=sources.class_names,
        details={"source": {"kind": sources.kind, **sources.origin}},
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """A dataset in the making: where it goes, and its plan."""

    root: str
    plan: Plan


@dataclass(frozen=True, kw_only=True)
class Work:
    """One shard of one part, by the part's number."""

    part: int
    item: Item


def _begin(config: PrepareConfig, root: str, sources: Sources) -> Part:
    plan = commit.start(root, plan_dataset(config, sources), beside=(SOURCES, commit.RUN_CONFIG))
    commit.record_run(root, identity(config))
    return Part(root=root, plan=plan)


def _write_shards(config: PrepareConfig, parts: list[Part]) -> None:
    """All parts in one pass: starting workers takes seconds, and is paid once."""
    todo = [commit.unfinished(part.root, part.plan) for part in parts]
    work = (Work(part=number, item=item) for number, items in enumerate(todo) for item in items)
    total = sum(part.plan.first_ids[-1] for part in parts)
    done = total - sum(items.samples for items in todo)
    progress = Progress("preparing", total, "images", done=done)
    rejected = 0
    for samples, rejects in map_items(work, functools.partial(Preparer, parts), config.cluster):
        rejected += rejects
        progress.update(samples + rejects, rejected=rejected)
    progress.close(rejected=rejected)


class Preparer:
    """Writes the shard of one id range: read, decode to prove, build, commit. Returns (written, rejected)."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._pool = ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="read")

    def __call__(self, work: Work) -> tuple[int, int]:
        part, item = self._parts[work.part], work.item
        rows = load_rows(storage.join(part.root, SOURCES), item.first_id, item.end_id)
        receipt = commit.commit(part.root, part.plan, item, make_item(part.plan, item, rows, self._pool))
        return receipt.samples, sum(receipt.rejected.values())


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
            samples.append(_sample(sample_id, source, image, decode_config, in_place))
        except Rejected as rejected:
            reason, message = rejected.reason, rejected.message
            rejects.append(
                RejectedSample(sample_id=sample_id, source=source.name, reason=reason, message=message)
            )
    foreign = None
    if in_place:
        tar = check_unchanged(rows[0].url, rows[0].version)
        foreign = ForeignTar(url=tar.url, bytes=tar.bytes, version=tar.version)
    return build_shard(samples, rejects, grid=None, codebook_size=None, foreign=foreign)


def _sample(
    sample_id: int, source: Source, image: bytes | Rejected, config: DecodeConfig, in_place: bool
) -> StoredSample:
    """The sample, its image decoded once and found readable; raises Rejected."""
    if isinstance(image, Rejected):
        raise image
    decoded = decode(image, config)
    height, width = decoded.pixels.shape[:2]
    return StoredSample(
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

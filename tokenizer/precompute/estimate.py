"""What a precompute pass would take, before it starts: crops, bytes, requests, hours, cache, epochs per crop.

Counts follow from the plan; sizes and times are measured on a few of the images. Nothing is written.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from pipeline import storage
from pipeline.artifacts import differences
from pipeline.config import absolute_places
from pipeline.errors import InputError
from pipeline.training.metrics import duration
from shards.dataset.dataset import Dataset, ShardTable, open_dataset, open_table
from shards.dataset.images import ImageSample, read_rows
from shards.dataset.parts import read_plan, views_in_words
from shards.format.plan import Plan
from shards.format.records import RejectedSample
from shards.pixels.decode import decode_config_of
from shards.pixels.views import decode_crop
from shards.reader.order import DEFAULT_LANES
from tokenizer.model.artifact import VisualTokenizer
from tokenizer.precompute.run import Cropper, PrecomputeConfig, WritePass, planned_passes

EPOCHS = (300, 800, 1600)
"""The paper's pretraining lengths."""
SAMPLED = 16
SAMPLED_SHARDS = 4
CPU_BATCH = 8
"""Crops in the timed forward pass of a CPU, whose rate hardly depends on it; a GPU gets a whole batch."""
TOKEN_ROW_BYTES, LAYER_ROW_BYTES = 72, 14
"""Bytes of an index row beside its codes, compressed, in shards of 4,000: half of a token row is a hash."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A pass in numbers. Times are of one crop: `prepare_s` in core-seconds, `encode_s` on the `device`."""

    what: str
    views: int
    """That are written, or whose codes are."""
    views_in_all: int
    """Of the dataset once the pass is finished."""
    crops: int
    shards: int
    shards_done: int
    """Committed by an earlier attempt."""
    sampled: int
    """Crops that were measured."""
    crop_bytes: float
    tar_bytes_per_view: int
    index_bytes_per_view: int
    tar_bytes: int
    index_bytes: int
    read_bytes: int
    """Fetched by the workers."""
    read_requests: int
    """GET and HEAD."""
    write_requests: int
    """PUT."""
    device: str
    prepare_s: float
    encode_s: float | None
    """None where no such device is at hand."""
    workers: int
    cores_per_worker: int
    core_hours: float
    gpu_hours: float | None
    hours: float | None
    """With the configured workers."""
    cache_bytes_least: int
    """Of a training node: the shards that are open at once."""
    cache_bytes_one_view: int
    cache_bytes_all_views: int
    epochs_per_crop: dict[str, float]
    """How often a run of so many epochs sees each crop."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def dry_run(config: PrecomputeConfig) -> Estimate:
    """Measure a few crops and work out the rest; refuses what the pass itself would refuse.

    No cluster is started or asked: the device is this machine's, unless a pass was begun with another.
    """
    config = absolute_places(config)
    passes = planned_passes(config, _device(config))
    for one in passes:
        _refuse_another_plan(one)
    plan = passes[0].plan
    encode, tokenizer, layer = plan.recipe["encode"], plan.header["tokenizer"], plan.kind == "codes"
    sample = _Sample(config, plan)
    sizes = np.array([len(jpeg) for jpeg in sample.jpegs])

    # Bytes and requests.
    views = sum(one.plan.views for one in passes)
    views_in_all = views if layer else plan.first_view + plan.views
    per_view = _per_view(plan)
    shards, done = sum(one.plan.num_items for one in passes), sum(_num_done(one) for one in passes)
    area = math.prod(tokenizer["grid"])
    if layer:
        pixels = open_table(config.output)
        tar_each = pixels.total("tar_bytes") / max(1, pixels.manifest.samples_written)
    else:
        tar_each = float(np.mean([_padded(128 + 2 * area) + _padded(size) for size in sizes]))
    # Codes of the fewest bits that hold them, and in every shard the two bytes each of those that occur.
    codebook_size, rows = tokenizer["codebook_size"], per_view / plan.num_ranges
    index_each = area * math.ceil(math.log2(max(2, codebook_size))) / 8
    index_each += 2 * min(codebook_size, rows * area) / rows + (LAYER_ROW_BYTES if layer else TOKEN_ROW_BYTES)
    view_bytes = round(per_view * tar_each)
    reads, puts, read_bytes = _requests(config, passes, tar_each)

    # Time, for what is not done yet: the slowest of the threads that prepare, the encoder, the cores of both.
    left = per_view * views * (1 - done / shards)
    workers = max(1, config.cluster.num_workers)
    # Of this machine, as with a Ray that the job starts; on a running cluster an actor takes one.
    cores = config.cluster.cpus_per_worker or max(1, len(os.sched_getaffinity(0)) // workers)
    on_gpu, encode_s = encode["device"] == "cuda", sample.encode_s
    core_s, gpu_hours, hours = sample.prepare_s, None, None
    if encode_s is not None:
        if on_gpu:
            gpu_hours = left * encode_s / 3600
        else:
            core_s += encode_s * min(encode["threads"], cores)
        slowest = max(sample.prepare_s / min(config.decode_threads, cores), encode_s, core_s / cores)
        hours = left * slowest / workers / 3600
    return Estimate(
        what=_what(config, plan),
        views=views,
        views_in_all=views_in_all,
        crops=per_view * views,
        shards=shards,
        shards_done=done,
        sampled=len(sizes),
        crop_bytes=float(sizes.mean()),
        tar_bytes_per_view=0 if layer else view_bytes,
        index_bytes_per_view=round(per_view * index_each),
        tar_bytes=0 if layer else view_bytes * views,
        index_bytes=round(per_view * views * index_each),
        read_bytes=read_bytes,
        read_requests=reads,
        write_requests=puts,
        device=encode["device"],
        prepare_s=sample.prepare_s,
        encode_s=encode_s,
        workers=workers,
        cores_per_worker=cores,
        core_hours=left * core_s / 3600,
        gpu_hours=gpu_hours,
        hours=hours,
        cache_bytes_least=round(view_bytes * min(1.0, DEFAULT_LANES / plan.num_ranges)),
        cache_bytes_one_view=view_bytes,
        cache_bytes_all_views=view_bytes * views_in_all,
        epochs_per_crop={str(epochs): epochs / views_in_all for epochs in EPOCHS},
    )


def as_text(estimate: Estimate) -> str:
    """The estimate for people, one fact per line."""
    e = estimate
    bytes_of_what = f"{_size(e.index_bytes_per_view)} of index"
    if e.tar_bytes:
        bytes_of_what = f"{_size(e.tar_bytes_per_view)} of tars and {bytes_of_what}"
    total = e.tar_bytes + e.index_bytes
    per_crop = f"{1000 * e.prepare_s:.1f} core-ms to prepare"
    if e.encode_s is not None:
        per_crop += f", {1000 * e.encode_s:.2f} ms on {e.device} to encode"
    else:
        per_crop += f"; encoding was not measured: this process has no {e.device}"
    hours = [f"{e.core_hours:,.3g} core-hours"]
    if e.gpu_hours is not None:
        hours.append(f"{e.gpu_hours:,.3g} GPU-hours")
    lasts = "unknown" if e.hours is None else duration(3600 * e.hours)
    seen = ", ".join(f"{times:,.4g} times in {epochs} epochs" for epochs, times in e.epochs_per_crop.items())
    facts = [
        ("dry run", e.what),
        ("crops", f"{e.crops:,} in {e.shards:,} shards, {e.shards_done:,} of them committed already"),
        ("measured on", f"{e.sampled} crops of {e.crop_bytes:,.0f} bytes each; {per_crop}"),
        ("bytes", f"{_size(total)}: {bytes_of_what} per view"),
        ("reads", f"{_size(e.read_bytes)} in {e.read_requests:,} GET and HEAD requests"),
        ("writes", f"{_size(total)} in {e.write_requests:,} PUT requests"),
        ("still takes", f"{' and '.join(hours)}, if nothing waits for storage"),
        ("that lasts", f"{lasts} with {e.workers} x {e.cores_per_worker} cores"),
        (
            "cache",
            f"training opens {_size(e.cache_bytes_least)} of shards at a time; an epoch reads a view, "
            f"{_size(e.cache_bytes_one_view)}; {_size(e.cache_bytes_all_views)} hold all {e.views_in_all}, "
            "so that nothing is fetched twice",
        ),
        ("each crop", f"is seen {seen}"),
        ("written", "nothing: this was a dry run"),
    ]
    return "\n".join(f"{name:<13}{value}" for name, value in facts)


# ------------------------------------------------------------------------------------------------ measuring


class _Sample:
    """A few crops of a pass, from all over the dataset: their JPEGs, and seconds for each."""

    def __init__(self, config: PrecomputeConfig, plan: Plan) -> None:
        self.jpegs: list[bytes] = []
        pixels: list[np.ndarray] = []
        seconds: list[float] = []
        prepare = _preparation(config, plan)
        stored = plan.kind == "codes"
        for image in _some_images(open_dataset(config.output if stored else config.images or "")):
            began = time.perf_counter()
            made = prepare(image)
            if made is not None:
                seconds.append(time.perf_counter() - began)
                self.jpegs.append(made[0])
                pixels.append(made[1])
        if not pixels:
            raise InputError("none of the images that were tried can be stored; look at the image shards")
        self.prepare_s = float(np.mean(seconds[1:] or seconds))  # the first call warms up
        self.encode_s = _encode_s(config, plan, np.stack(pixels))


def _preparation(
    config: PrecomputeConfig, plan: Plan
) -> Callable[[ImageSample], tuple[bytes, np.ndarray] | None]:
    """What a worker does with an image, or a stored crop: (JPEG, pixels); None where it is rejected."""
    if plan.kind == "codes":
        return lambda crop: (crop.image, decode_crop(crop.image))
    policy = config.views.resolve(plan.header["tokenizer"]["image_size"])
    crop = Cropper(policy=policy, decode=decode_config_of(plan.recipe["decode"]))

    def prepare(image: ImageSample) -> tuple[bytes, np.ndarray] | None:
        made = crop(plan.first_view, image)
        return None if isinstance(made, RejectedSample) else (made[0].image, made[1])

    return prepare


def _some_images(dataset: Dataset) -> Iterator[ImageSample]:
    """The first few images, or crops, of a few shards; few bytes are read."""
    filled = np.flatnonzero(dataset.shard_sizes(0))
    chosen = filled[np.linspace(0, len(filled) - 1, min(SAMPLED_SHARDS, len(filled))).astype(int)]
    for number in chosen.tolist():
        shard, each = dataset.shard(0, number), math.ceil(SAMPLED / len(chosen))
        # Twice as many ids, because there are gaps where images were rejected.
        end_id = min(shard.end_id, shard.first_id + 2 * each)
        yield from islice(read_rows(shard, shard.first_id, end_id), each)


def _encode_s(config: PrecomputeConfig, plan: Plan, crops: np.ndarray) -> float | None:
    """Seconds of the encoder's forward pass per crop, on the plan's device; None where it is not here."""
    encode = plan.recipe["encode"]
    on_gpu = encode["device"] == "cuda"
    if on_gpu and not torch.cuda.is_available():
        return None
    size = encode["batch_size"] if on_gpu else min(encode["batch_size"], CPU_BATCH)
    threads = torch.get_num_threads()
    try:
        if not on_gpu:
            torch.set_num_threads(encode["threads"])
        tokenizer = VisualTokenizer.load(
            config.tokenizer, device=encode["device"], precision=encode["precision"], batch_size=size
        )
        batch = torch.from_numpy(np.resize(crops, (size, *crops.shape[1:])))
        tokenizer.encode(batch).cpu()
        runs = 3 if on_gpu else 1
        began = time.perf_counter()
        for _ in range(runs):
            tokenizer.encode(batch).cpu()
        return (time.perf_counter() - began) / (runs * size)
    finally:
        torch.set_num_threads(threads)


def _device(config: PrecomputeConfig) -> str:
    held = None if config.code_layer else read_plan(config.output)
    if held is not None and config.cluster.num_workers > 0 and "encode" in held.recipe:
        return held.recipe["encode"]["device"]
    return "cuda" if config.cluster.use_gpu is not False and torch.cuda.is_available() else "cpu"


# ------------------------------------------------------------------------------------------------ counting


def _requests(config: PrecomputeConfig, passes: list[WritePass], tar_each: float) -> tuple[int, int, int]:
    """(GET and HEAD, PUT) requests and bytes that the workers read, for work that nobody began yet.

    Per shard: its receipt is asked for by driver, worker and at the end, where tar and index are asked for
    their sizes; the worker reads index and bytes of its inputs and puts tar, index, receipt.
    """
    reads = puts = read_bytes = 0
    for one in passes:
        plan = one.plan
        if plan.kind == "codes":
            inputs, objects = 2 * plan.num_items, 2
            read_bytes += round(_per_view(plan) * plan.views * tar_each)
        else:
            assert config.images is not None
            images = open_table(config.images)
            edges, _ = images.id_ranges()
            overlaps = len(np.union1d(edges, plan.first_ids)) - 1
            foreign = images.shard(0, 0).is_foreign
            inputs, objects = (3 if foreign else 2) * overlaps * plan.views, 3
            read_bytes += plan.views * (_foreign_bytes(images) if foreign else images.total("tar_bytes"))
        # Plan, manifest and table, and 16 crops of the decode probe with their indexes.
        reads += (
            5 * plan.num_items + inputs + 8 + (0 if plan.kind == "codes" else 2 * min(16, plan.num_items))
        )
        puts += objects * plan.num_items + 5
    return reads, puts, read_bytes


def _foreign_bytes(images: ShardTable) -> int:
    """Bytes of the tars that were indexed in place, each once: ranges of one tar follow each other."""
    return sum({shard.tar: shard.tar_bytes for shard in images.shards(0)}.values())


def _per_view(plan: Plan) -> int:
    return plan.first_ids[-1] - plan.first_ids[0] if plan.samples is None else sum(plan.samples)


def _padded(payload: float) -> int:
    """Bytes of a member in a tar: header and payload, in blocks of 512."""
    return 512 + 512 * math.ceil(payload / 512)


def _num_done(one: WritePass) -> int:
    """Shards with a receipt; a listing is enough for an estimate."""
    folder = storage.join(one.root, "receipts", one.plan.plan8)
    return sum(1 for _ in storage.list_files(folder))


def _refuse_another_plan(one: WritePass) -> None:
    held = read_plan(one.root)
    if held is not None and held.fingerprint != one.plan.fingerprint:
        differing = differences(held.to_json(), one.plan.to_json())
        raise InputError(
            f"{one.root} was begun with another plan, which differs in {'; '.join(differing[:6])}; choose "
            "another output, or repeat the inputs and settings it was begun with"
        )


def _what(config: PrecomputeConfig, plan: Plan) -> str:
    images = f"{_per_view(plan):,} images"
    if plan.kind == "codes":
        tokenizer = plan.header["tokenizer"]["fingerprint"][:8]
        return f"codes of tokenizer {tokenizer} for the crops at {config.output}"
    views = views_in_words(plan.first_view, plan.views)
    where = "added to" if plan.first_view else "written to"
    return f"{views} of {images}, {where} {config.output}"


def _size(num_bytes: float) -> str:
    """`1.23 GB`; 1 kB is 1,000 bytes, as disks and clouds count."""
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6), ("kB", 3)):
        if num_bytes >= 10**power:
            return f"{num_bytes / 10**power:,.3g} {unit}"
    return f"{num_bytes:,.0f} bytes"

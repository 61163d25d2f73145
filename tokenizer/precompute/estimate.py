"""What a precompute pass would take: a few crops are made and encoded, and the rest is multiplied.

Counts follow from the plan. Nothing is written, and no cluster is started or asked.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from dataclasses import dataclass

import numpy as np
import torch

from pipeline import storage
from pipeline.config import absolute_places
from pipeline.errors import InputError
from pipeline.training.metrics import duration
from shards.dataset.dataset import Dataset, open_dataset
from shards.dataset.parts import PLAN, read_plan, views_in_words
from shards.dataset.rows import read_rows
from shards.format.plan import Plan
from shards.format.records import RejectedSample
from shards.pixels.views import decode_crop
from shards.writer.commit import same_plan
from tokenizer.precompute.config import PrecomputeConfig
from tokenizer.precompute.items import CropEncoder, Cropper
from tokenizer.precompute.plans import planned_passes

EPOCHS = (300, 800, 1600)
"""The paper's pretraining lengths."""
SAMPLED_SHARDS, SAMPLED_PER_SHARD = 4, 4
CPU_BATCH = 8
"""Crops in the timed forward pass of a CPU, whose rate hardly depends on it; a GPU gets a whole batch."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Figures of a few crops."""

    sampled: int
    """Crops that were measured."""
    crop_bytes: float
    device: str
    prepare_s: float
    """Core-seconds to decode, crop and encode as JPEG, per crop."""
    encode_s: float | None
    """Seconds of the encoder on the device, per crop; None where this machine has no such device."""


@dataclass(frozen=True, kw_only=True)
class Estimate(Measured):
    """A pass in numbers."""

    what: str
    views: int
    """Views this pass writes, or encodes for a code layer."""
    views_in_all: int
    """Views of the dataset once the pass is finished."""
    crops: int
    shards: int
    shards_done: int
    """Shards that an earlier attempt committed."""
    tar_bytes: int
    """Bytes of the tars that are written; 0 for a code layer."""
    read_bytes: int
    """Bytes that the workers fetch."""
    workers: int
    cores_per_worker: int
    """Cores per worker if this job starts Ray; on an existing cluster an actor reserves one."""
    core_hours: float
    gpu_hours: float | None
    hours: float | None
    """Hours with the configured workers."""
    cache_bytes_one_view: int
    """Bytes of the tars of one view, which is what an epoch of training reads."""
    cache_bytes_all_views: int
    epochs_per_crop: dict[str, float]
    """Number of times that a run of so many epochs sees each crop."""


def estimate_pass(config: PrecomputeConfig) -> Estimate:
    """Measure a few crops and work out the rest; refuses what the pass itself would refuse.

    The device is this machine's, unless a pass was begun with another.
    """
    config = absolute_places(config)
    passes = planned_passes(config, _device(config))
    shards = done = 0
    for root, plan in ((write_pass.root, write_pass.plan) for write_pass in passes):
        if (stored := storage.read_or_none(storage.join(root, PLAN))) is not None:
            same_plan(root, stored, plan)
        shards += plan.num_items
        done += sum(1 for _ in storage.list_files(storage.join(root, "receipts", plan.plan_prefix)))
    plan = passes[0].plan
    layer, encode = plan.kind == "codes", plan.recipe.require_encode()
    images = open_dataset(config.output if layer else config.images or "")
    views, per_view = sum(write_pass.plan.views for write_pass in passes), plan.samples_per_view
    views_in_all = views if layer else plan.first_view + plan.views
    sample = _measure(config, plan, images)
    encode_s = sample.encode_s
    # Of tars that were indexed in place several shards may name one.
    source_bytes = sum({shard.tar: shard.tar_bytes for shard in images.shards(0)}.values())
    # A tar holds JPEG and codes of a crop in blocks of 512 bytes, each after a header of one block.
    payloads = (sample.crop_bytes, 128 + 2 * math.prod(plan.require_tokenizer().grid))
    view_bytes = per_view * sum(512 + 512 * math.ceil(payload / 512) for payload in payloads)
    view_bytes = source_bytes if layer else view_bytes

    # Time for what is not done yet: the slowest of the threads that prepare, the encoder, the cores of both.
    left = per_view * views * (1 - done / shards)
    workers = max(1, config.cluster.num_workers)
    cores = config.cluster.cpus_per_worker or max(1, len(os.sched_getaffinity(0)) // workers)
    core_s, gpu_hours, hours = sample.prepare_s, None, None
    if encode_s is not None:
        if encode.device == "cuda":
            gpu_hours = left * encode_s / 3600
        else:
            core_s += encode_s * min(encode.threads, cores)
        slowest = max(sample.prepare_s / min(config.decode_threads, cores), encode_s, core_s / cores)
        hours = left * slowest / workers / 3600
    if layer:
        tokenizer = plan.require_tokenizer().fingerprint[:8]
        what = f"codes of tokenizer {tokenizer} for the crops at {config.output}"
    else:
        where = "added to" if plan.first_view else "written to"
        what = f"{views_in_words(plan.first_view, views)} of {per_view:,} images, {where} {config.output}"
    return Estimate(
        **dataclasses.asdict(sample),
        what=what,
        views=views,
        views_in_all=views_in_all,
        crops=per_view * views,
        shards=shards,
        shards_done=done,
        tar_bytes=0 if layer else view_bytes * views,
        read_bytes=source_bytes * views,
        workers=workers,
        cores_per_worker=cores,
        core_hours=left * core_s / 3600,
        gpu_hours=gpu_hours,
        hours=hours,
        cache_bytes_one_view=view_bytes,
        cache_bytes_all_views=view_bytes * views_in_all,
        epochs_per_crop={str(epochs): epochs / views_in_all for epochs in EPOCHS},
    )


def in_words(estimate: Estimate) -> str:
    """The estimate for people, one fact per line."""
    e = estimate
    encoding = f"{1000 * e.encode_s:.2f} ms on {e.device}" if e.encode_s else f"unknown without {e.device}"
    gpu = "" if e.gpu_hours is None else f" and {e.gpu_hours:,.3g} GPU-hours"
    lasts = "unknown" if e.hours is None else duration(3600 * e.hours)
    seen = ", ".join(f"{times:,.4g} times in {epochs} epochs" for epochs, times in e.epochs_per_crop.items())
    facts = {
        "dry run": e.what,
        "crops": f"{e.crops:,} in {e.shards:,} shards, {e.shards_done:,} of them committed already",
        "measured on": f"{e.sampled} crops of {e.crop_bytes:,.0f} bytes each; "
        f"{1000 * e.prepare_s:.1f} core-ms to prepare, encoding {encoding}",
        "reads": _size(e.read_bytes),
        "writes": f"{_size(e.tar_bytes)} of tars" if e.tar_bytes else "index files alone",
        "still takes": f"{e.core_hours:,.3g} core-hours{gpu}, if nothing waits for storage",
        "that lasts": f"{lasts} with {e.workers} x {e.cores_per_worker} cores",
        "cache": f"an epoch of training reads a view, {_size(e.cache_bytes_one_view)}; "
        f"{_size(e.cache_bytes_all_views)} hold all {e.views_in_all}, so that nothing is fetched twice",
        "each crop": f"is seen {seen}",
        "written": "nothing: this was a dry run",
    }
    return "\n".join(f"{name:<13}{fact}" for name, fact in facts.items())


def _measure(config: PrecomputeConfig, plan: Plan, dataset: Dataset) -> Measured:
    """Crops of a few shards from all over the dataset, prepared and encoded as by a worker."""
    crop = None if plan.kind == "codes" else Cropper.of(plan)
    sizes, pixels, seconds = list[int](), list[np.ndarray](), list[float]()
    filled = np.flatnonzero(dataset.shard_sizes(0))
    for place in np.linspace(0, len(filled) - 1, min(SAMPLED_SHARDS, len(filled))):
        shard = dataset.shard(0, int(filled[int(place)]))
        for image in read_rows(shard, range(min(shard.samples, SAMPLED_PER_SHARD))):
            began = time.perf_counter()
            made = None if crop is None else crop(plan.first_view, image)
            if isinstance(made, RejectedSample):
                continue
            sizes.append(len(image.image if made is None else made.sample.image))
            pixels.append(decode_crop(image.image) if made is None else made.pixels)
            seconds.append(time.perf_counter() - began)
    if not pixels:
        raise InputError("none of the images that were tried can be stored; look at the image shards")
    encode, encode_s = plan.recipe.require_encode(), None
    if encode.device == "cpu" or torch.cuda.is_available():
        size = min(encode.batch_size, CPU_BATCH) if encode.device == "cpu" else encode.batch_size
        recipe = dataclasses.replace(plan.recipe, encode=dataclasses.replace(encode, batch_size=size))
        encoder = CropEncoder(dataclasses.replace(plan, recipe=recipe), config.tokenizer)
        batch = np.resize(np.stack(pixels), (size, *pixels[0].shape))
        encoder.encode(batch)  # warms up
        began = time.perf_counter()
        encoder.encode(batch)
        encode_s = (time.perf_counter() - began) / size
    return Measured(
        sampled=len(pixels),
        crop_bytes=float(np.mean(sizes)),
        device=encode.device,
        prepare_s=float(np.mean(seconds[1:] or seconds)),  # the first call warms up
        encode_s=encode_s,
    )


def _device(config: PrecomputeConfig) -> str:
    stored = None if config.code_layer else read_plan(config.output)
    if stored is not None and config.cluster.num_workers > 0 and stored.recipe.encode is not None:
        return stored.recipe.encode.device
    return "cuda" if config.cluster.use_gpu is not False and torch.cuda.is_available() else "cpu"


def _size(num_bytes: float) -> str:
    """`1.23 GB`; 1 kB is 1,000 bytes, as disks and clouds count."""
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6), ("kB", 3)):
        if num_bytes >= 10**power:
            return f"{num_bytes / 10**power:,.3g} {unit}"
    return f"{num_bytes:,.0f} bytes"

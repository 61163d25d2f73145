"""The write pass of the token shards (stage one's product): crop, store, decode what was stored, tokenize.

One work item is one (view, range of sample ids). The codes belong to exactly the pixels that are stored,
because it is the stored JPEG that is decoded and encoded (FORMAT.md, guarantee *pairing*).
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from typing import TypeVar

import numpy as np
import torch

from pipeline import storage
from pipeline.cluster import ClusterConfig, device_type, map_items
from pipeline.config import identity, to_dict
from pipeline.errors import InputError
from pipeline.metrics import Progress
from pipeline.optim import Precision
from shards.build import build_shard
from shards.commit import commit, finish, pending, receipt, record_run, start
from shards.decode import Rejected, decode_config_of, decode_image
from shards.images import ImageSample, read_images, sample_ids
from shards.manifest import Dataset, Manifest, open_dataset
from shards.plan import Item, Plan
from shards.samples import RejectedSample, StoredSample
from shards.views import ViewPolicy, decode_crop, encode_crop, render, view_at
from tokenizer.artifact import VisualTokenizer, describe, read_tokenizer

T = TypeVar("T")

BATCHES_AHEAD = 2
CROP_BYTES_PER_PIXEL = 23_600 / 224**2
"""Measured on ImageNet crops at quality 95, 4:2:0."""


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig:
    """Write token shards: fixed crops of every image, each paired with its grid of codes.

    A rerun does only what is missing; a finished output is left alone.
    """

    images: str
    """Image shards, the output of prepare_images."""
    tokenizer: str
    """Tokenizer artifact, the output of train_tokenizer."""
    output: str
    """Where the token shards go: a folder or any fsspec URL."""
    views: ViewPolicy = ViewPolicy()
    """Which crops; views_per_image is the number that is stored of each image."""
    batch_size: int = 64
    """Crops per forward pass; every batch is padded to this size, so results do not depend on the rest."""
    precision: Precision = "auto"
    """Compute type of the encoder; similarities to the codebook are fp32 in any case."""
    samples_per_shard: int = 4000
    """At most so many crops in a shard; fewer where they would exceed 100 MB."""
    decode_threads: int = 2
    """Threads per worker that decode, crop and encode JPEG while the encoder runs."""
    encoder_threads: int = 2
    """CPU threads of the encoder; part of the plan, because sums may round otherwise with another number."""
    cluster: ClusterConfig = ClusterConfig()
    """Ray actors that share the shards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemReport:
    """What one work item did."""

    written: int
    rejected: int
    seconds: float
    wait_s: float
    """Time in which the encoder waited for crops."""


def precompute_shards(config: PrecomputeConfig) -> Manifest:
    """Write all missing shards, then the manifest. Returns the manifest of the finished dataset."""
    config = storage.absolute_places(config, "images", "tokenizer", "output")
    root = config.output
    images = open_dataset(config.images, "images")
    plan = start(root, _plan(config, images))
    record_run(root, identity(config, ("output", "cluster")))
    todo = list(pending(root, plan))
    _announce(plan, images, todo)

    progress = Progress("precompute", sum(item.samples for item in todo), "images")
    shards, rejected, busy_s, wait_s = 0, 0, 0.0, 0.0
    for report in map_items(todo, functools.partial(ShardWriter, config, plan), config.cluster):
        shards, rejected = shards + 1, rejected + report.rejected
        busy_s, wait_s = busy_s + report.seconds, wait_s + report.wait_s
        progress.update(
            report.written + report.rejected,
            shards=f"{shards}/{len(todo)}",
            rejected=rejected,
            encoder_waited=f"{100 * wait_s / max(busy_s, 1e-9):.0f} %",
        )
    if todo:
        progress.close(shards=f"{shards}/{len(todo)}", rejected=rejected)
    return finish(root, plan, decode_crop)


class ShardWriter:
    """Makes and commits one shard per call; lives in an actor and holds the tokenizer.

    Calls come from two threads, so that one item reads and writes while the other encodes; the encoder
    itself runs one batch at a time.
    """

    def __init__(self, config: PrecomputeConfig, plan: Plan) -> None:
        encode = plan.recipe["encode"]
        if encode["device"] == "cuda" and not torch.cuda.is_available():
            raise InputError(
                "the plan says cuda, but this worker sees no GPU; give cluster.use_gpu true, or false for CPU"
            )
        if encode["device"] == "cpu":
            torch.set_num_threads(encode["threads"])
        self._config = config
        self._plan = plan
        self._root = config.output
        self._images = open_dataset(config.images, "images")
        self._tokenizer = VisualTokenizer.load(
            config.tokenizer,
            device=encode["device"],
            precision=encode["precision"],
            batch_size=encode["batch_size"],
        )
        self._decode = decode_config_of(plan.recipe["decode"])
        self._policy = config.views.resolve(self._tokenizer.image_size)
        self._encoder = threading.Lock()
        self._threads = ThreadPoolExecutor(max(1, config.decode_threads), thread_name_prefix="crop")

    def __call__(self, item: Item) -> ItemReport:
        began = time.monotonic()
        held = receipt(self._root, self._plan, item)
        if held is not None:
            return ItemReport(
                written=held.samples, rejected=sum(held.rejected.values()), seconds=0.0, wait_s=0.0
            )
        samples: list[StoredSample] = []
        rejects: list[RejectedSample] = []
        wait_s = 0.0
        # Source images are read shard by shard and dropped after cropping: what stays are the crops.
        sources = read_images(self._images, item.first_id, item.end_id)
        crops = _in_order_ahead(
            self._threads,
            functools.partial(self._crop, item.view),
            sources,
            ahead=BATCHES_AHEAD * self._config.batch_size,
        )
        batch: list[tuple[StoredSample, np.ndarray]] = []
        while True:
            asked = time.monotonic()
            crop = next(crops, None)
            wait_s += time.monotonic() - asked
            if isinstance(crop, RejectedSample):
                rejects.append(crop)
            elif crop is not None:
                batch.append(crop)
            if batch and (crop is None or len(batch) == self._config.batch_size):
                samples += self._tokenize(batch)
                batch = []
            if crop is None:
                break
        grid, codebook_size = (self._tokenizer.grid, self._tokenizer.grid), self._tokenizer.codebook_size
        built = build_shard(samples, rejects, grid=grid, codebook_size=codebook_size)
        commit(self._root, self._plan, item, built)
        return ItemReport(
            written=len(samples), rejected=len(rejects), seconds=time.monotonic() - began, wait_s=wait_s
        )

    def _crop(self, view: int, image: ImageSample) -> tuple[StoredSample, np.ndarray] | RejectedSample:
        """The crop as it will be stored, and the pixels a reader of it will see."""
        try:
            pixels = decode_image(image.image, self._decode)
        except Rejected as error:
            return RejectedSample(
                sample_id=image.sample_id, source=image.source, reason=error.reason, message=error.message
            )
        height, width = pixels.shape[:2]
        where = view_at(self._policy, image.sample_id, view, height=height, width=width)
        jpeg = encode_crop(render(pixels, where, self._policy.interpolation), self._policy.jpeg_quality)
        sample = StoredSample(
            sample_id=image.sample_id,
            view=view,
            image=jpeg,
            extension="jpg",
            source=image.source,
            source_width=width,
            source_height=height,
            label=image.label,
            crop=where.crop,
            hflip=where.hflip,
            jitter=where.jitter,
        )
        return sample, decode_crop(jpeg)

    def _tokenize(self, batch: list[tuple[StoredSample, np.ndarray]]) -> list[StoredSample]:
        pixels = torch.from_numpy(np.stack([crop for _, crop in batch]))
        with self._encoder:
            codes = self._tokenizer.encode(pixels).cpu().numpy()
        grids = codes.astype(np.uint16).reshape(len(batch), self._tokenizer.grid, self._tokenizer.grid)
        return [
            dataclasses.replace(sample, codes=grid) for (sample, _), grid in zip(batch, grids, strict=True)
        ]


def _plan(config: PrecomputeConfig, images: Dataset) -> Plan:
    """Everything that decides the bytes of the output, and the id range of each shard."""
    device = device_type(config.cluster)
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if device == "cuda" else "fp32"
    artifact = read_tokenizer(config.tokenizer)
    policy = config.views.resolve(artifact.config.image_size)
    if policy.views_per_image < 1:
        raise InputError(f"views.views_per_image is {policy.views_per_image}; store 1 view or more")
    recipe = {
        "views": to_dict(policy),
        # Crop boxes are in the coordinates of the decoder that prepared the images: it is not a setting here.
        "decode": images.manifest.recipe["decode"],
        "encode": {
            "device": device,
            "precision": precision,
            "batch_size": config.batch_size,
            "threads": config.encoder_threads,
        },
        "libraries": {name: metadata.version(name) for name in ("numpy", "pillow", "simplejpeg", "torch")},
    }
    tokenizer = describe(artifact, precision)
    most = int(100e6 / (policy.side**2 * CROP_BYTES_PER_PIXEL))
    first_ids, samples = _ranges(images, max(1, min(config.samples_per_shard, most)))
    return Plan(
        kind="tokens",
        inputs={"images": images.fingerprint, "tokenizer": tokenizer["fingerprint"]},
        recipe=recipe,
        first_ids=first_ids,
        samples=samples,
        views=policy.views_per_image,
        header={"class_names": images.manifest.class_names, "tokenizer": tokenizer},
    )


def _ranges(images: Dataset, samples_per_shard: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Id ranges of at most `samples_per_shard` samples, and how many each holds.

    Small image shards are taken together, so that objects stay large; a shard with more samples is cut.
    """
    edges, sizes = images.id_ranges()
    first_ids: list[int] = []
    samples: list[int] = []
    for number, (first_id, size) in enumerate(zip(edges[:-1], sizes, strict=True)):
        if size > samples_per_shard:
            ids = sample_ids(images.shard(0, number))
            cuts = range(0, size, -(-size // -(-size // samples_per_shard)))
            first_ids += [first_id, *(int(ids[cut]) for cut in cuts[1:])]
            samples += [min(cuts.step, size - cut) for cut in cuts]
        elif samples and samples[-1] + size <= samples_per_shard:
            samples[-1] += size
        else:
            first_ids.append(first_id)
            samples.append(size)
    return (*first_ids, edges[-1]), tuple(samples)


def _announce(plan: Plan, images: Dataset, todo: list[Item]) -> None:
    crops = images.num_samples(0) * plan.views
    size = crops * plan.recipe["views"]["image_size"] ** 2 * CROP_BYTES_PER_PIXEL / 1e9
    held = plan.num_items - len(todo)
    print(
        f"{images.num_samples(0):,} images x {plan.views} views = {crops:,} crops, about {size:.2f} GB, in "
        f"{plan.num_items} shards ({held} committed already); a run of E epochs sees each crop "
        f"E/{plan.views} times",
        flush=True,
    )


def _in_order_ahead(pool: ThreadPoolExecutor, function, items: Iterator, *, ahead: int) -> Iterator:
    """`map` in order on a thread pool, with at most `ahead` results waiting: bounded memory."""
    running: deque[Future] = deque()
    try:
        for item in items:
            running.append(pool.submit(function, item))
            if len(running) >= ahead:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for future in running:
            future.cancel()

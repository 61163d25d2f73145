"""Images/s of the precompute pass against the encoder's forward pass alone, on the same batches.

python -m benchmarks.precompute --images FOLDER [--encoder base] [--num_images 192]

One line of JSON. Each round writes the images into an output of its own, shard after shard; after each shard
comes the yardstick on the very crops that it stored, in the same process: a machine whose speed changes from
minute to minute changes both. `ratio` is the median over all shards of yardstick / shard, reading, cropping,
JPEG, hashing and commit included, and should be 0.95 or more for the base encoder. `set_up_s` is what a pass
costs besides, whatever its length: plan, loading the tokenizer, manifest. In a pass one shard's first batch
is cropped while the last one's is encoded; here it is waited for.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from benchmarks.timing import emit
from pipeline import storage
from pipeline.cluster.config import ClusterConfig
from pipeline.config import run_job
from shards.dataset.rows import read_rows
from shards.format.plan import Item, Plan
from shards.pixels.views import decode_crop
from shards.writer.commit import finish, pending, receipt, start
from shards.writer.prepare import PrepareConfig, prepare_images
from tokenizer.model.artifact import VisualTokenizer, save_tokenizer
from tokenizer.model.teacher import build_teacher
from tokenizer.model.teacher_config import TeacherConfig
from tokenizer.model.vqkd import VQKD, VQKDConfig
from tokenizer.precompute.config import PrecomputeConfig
from tokenizer.precompute.items import ItemWriter
from tokenizer.precompute.plans import planned_passes


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Time the precompute pass; the tokenizer has random weights, which cost the same."""

    images: str
    """Folder of images, such as photographs of full size."""
    encoder: Literal["base", "small"] = "base"
    """Size of the encoder."""
    num_images: int = 192
    """So many images are used."""
    batch_size: int = 32
    """Crops per forward pass."""
    samples_per_shard: int = 64
    """Crops per shard, a multiple of the batch size."""
    decode_threads: int = 2
    """Threads that decode and crop while the encoder runs."""
    rounds: int = 5
    """How often all images are written."""


def main(config: BenchmarkConfig) -> None:
    """Prepare, tokenize, and print the figures."""
    shards_s, forward_s, set_up_s = list[float](), list[float](), list[float]()
    with tempfile.TemporaryDirectory() as folder:
        _link_images(config, os.path.join(folder, "source"))
        here = ClusterConfig(num_workers=0)
        images, tokenizer_url = os.path.join(folder, "images"), os.path.join(folder, "tokenizer")
        prepare_images(PrepareConfig(source=os.path.join(folder, "source"), output=images, cluster=here))
        _save_random_tokenizer(config, tokenizer_url)
        tokenizer = VisualTokenizer.load(
            tokenizer_url, device=_device(), precision="auto", batch_size=config.batch_size
        )
        for number in range(config.rounds):
            settings = PrecomputeConfig(
                images=images,
                tokenizer=tokenizer_url,
                output=os.path.join(folder, f"tokens-{number}"),
                batch_size=config.batch_size,
                samples_per_shard=config.samples_per_shard,
                decode_threads=config.decode_threads,
                encoder_threads=_threads(),
                cluster=here,
            )
            began = time.perf_counter()
            [work] = planned_passes(settings, _device())
            plan = start(work.root, work.plan)
            writer = ItemWriter(settings, plan, work.root)
            set_up_s.append(time.perf_counter() - began)
            for item in pending(work.root, plan):
                began = time.perf_counter()
                writer(item)
                shards_s.append(time.perf_counter() - began)
                forward_s.append(_forward_s(tokenizer, _stored_crops(work.root, plan, item)))
            began = time.perf_counter()
            finish(work.root, plan, decode_crop)
            set_up_s[-1] += time.perf_counter() - began
    ratios = [forward / shard for forward, shard in zip(forward_s, shards_s, strict=True)]
    total = config.rounds * config.num_images
    emit(
        f"precompute, {config.encoder} encoder, {tokenizer.image_size} px",
        images=total,
        batch_size=config.batch_size,
        device=f"{_device()}, {_threads()} threads, {platform.machine()}",
        pass_images_per_s=total / sum(shards_s),
        forward_images_per_s=total / sum(forward_s),
        ratio=statistics.median(ratios),
        ratio_of_sums=sum(forward_s) / sum(shards_s),
        set_up_s=statistics.median(set_up_s),
        ratios=ratios,
    )


def _link_images(config: BenchmarkConfig, folder: str) -> None:
    os.makedirs(folder)
    urls = [file.url for file in storage.list_files(storage.absolute(config.images))]
    for number, url in enumerate(urls[: config.num_images]):
        os.symlink(url, os.path.join(folder, f"{number:05d}{os.path.splitext(url)[1]}"))


def _save_random_tokenizer(config: BenchmarkConfig, url: str) -> None:
    torch.manual_seed(0)
    model_config = VQKDConfig(encoder=config.encoder, decoder_depth=1, kmeans_init=False)
    teacher = build_teacher(TeacherConfig(), model_config.image_size, model_config.patch_size)
    unmeasured = {name: math.nan for name in ("reconstruction_loss", "codebook_usage", "perplexity")}
    save_tokenizer(url, VQKD(model_config, teacher.dim), teacher=teacher, metrics=unmeasured, inputs={})


def _stored_crops(root: str, plan: Plan, item: Item) -> torch.Tensor:
    """The crops of a shard that was just committed, uint8 [n, S, S, 3]."""
    written = receipt(root, plan, item)
    assert written is not None
    return torch.from_numpy(
        np.stack([decode_crop(crop.image) for crop in read_rows(written.shard.resolved(root))])
    )


def _forward_s(tokenizer: VisualTokenizer, crops: torch.Tensor) -> float:
    began = time.perf_counter()
    tokenizer.encode(crops).cpu()
    return time.perf_counter() - began


def _threads() -> int:
    return os.cpu_count() or 1


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    run_job(main, BenchmarkConfig)

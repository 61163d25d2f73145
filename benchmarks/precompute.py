"""Images/s of the whole precompute pass against the encoder's forward pass alone, on the same batches.

python -m benchmarks.precompute --images FOLDER [--encoder base] [--num_images 128]

One line of JSON. Each round runs the pass into an output of its own and then the yardstick, in the same
process, on the very crops that the pass stored; `ratio` is the median over the rounds of pass / yardstick and
should be 0.95 or more for the base encoder.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from pipeline import storage
from pipeline.cluster import ClusterConfig
from pipeline.config import run_job
from shards.manifest import open_dataset
from shards.prepare import PrepareConfig, prepare_images
from shards.reader import ShardReader
from tokenizer.artifact import VisualTokenizer, save_tokenizer
from tokenizer.precompute import PrecomputeConfig, precompute_shards
from tokenizer.teacher import TeacherConfig, build_teacher
from tokenizer.vqkd import VQKD, VQKDConfig


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Time the precompute pass; the tokenizer has random weights, which cost the same."""

    images: str
    """Folder of images, such as photographs of full size."""
    encoder: Literal["base", "small"] = "base"
    """Size of the encoder."""
    num_images: int = 128
    """So many images are used."""
    batch_size: int = 16
    """Crops per forward pass."""
    decode_threads: int = 2
    """Threads that decode and crop while the encoder runs."""
    rounds: int = 3
    """Rounds of pass and yardstick; medians count."""


def main(config: BenchmarkConfig) -> None:
    """Prepare, tokenize, and print the figures."""
    with tempfile.TemporaryDirectory() as folder:
        _link_images(config, os.path.join(folder, "source"))
        here = ClusterConfig(num_workers=0)
        images, tokens = os.path.join(folder, "images"), os.path.join(folder, "tokens")
        prepare_images(PrepareConfig(source=os.path.join(folder, "source"), output=images, cluster=here))
        tokenizer_url = os.path.join(folder, "tokenizer")
        _save_random_tokenizer(config, tokenizer_url)
        threads = os.cpu_count() or 1

        passes, yardsticks = [], []
        crops = np.empty((0, 0, 0, 3), np.uint8)
        for number in range(config.rounds):
            tokens = os.path.join(folder, f"tokens-{number}")
            began = time.perf_counter()
            precompute_shards(
                PrecomputeConfig(
                    images=images,
                    tokenizer=tokenizer_url,
                    output=tokens,
                    batch_size=config.batch_size,
                    samples_per_shard=64,
                    decode_threads=config.decode_threads,
                    encoder_threads=threads,
                    cluster=here,
                )
            )
            passes.append(time.perf_counter() - began)
            crops = _stored_crops(tokens)
            tokenizer = VisualTokenizer.load(
                tokenizer_url, device=_device(), precision="auto", batch_size=config.batch_size
            )
            yardsticks.append(_forward_s(tokenizer, crops, config.batch_size))
    ratios = [yardstick / whole for yardstick, whole in zip(yardsticks, passes, strict=True)]
    print(
        json.dumps(
            {
                "case": f"precompute, {config.encoder} encoder, {crops.shape[1]} px",
                "images": len(crops),
                "batch_size": config.batch_size,
                "device": f"{_device()}, {threads} threads, {platform.machine()}",
                "pass_images_per_s": round(len(crops) / statistics.median(passes), 2),
                "forward_images_per_s": round(len(crops) / statistics.median(yardsticks), 2),
                "ratio": round(statistics.median(ratios), 3),
                "ratios": [round(ratio, 3) for ratio in ratios],
            }
        )
    )


def _link_images(config: BenchmarkConfig, folder: str) -> None:
    os.makedirs(folder)
    found = [file.url for file in storage.list_files(storage.absolute(config.images))]
    for number, url in enumerate(found[: config.num_images]):
        os.symlink(url, os.path.join(folder, f"{number:05d}{os.path.splitext(url)[1]}"))


def _save_random_tokenizer(config: BenchmarkConfig, url: str) -> None:
    torch.manual_seed(0)
    model_config = VQKDConfig(encoder=config.encoder, decoder_depth=1, kmeans_init=False)
    teacher = build_teacher(TeacherConfig(), model_config.image_size, model_config.patch_size)
    unmeasured = {
        "reconstruction_loss": float("nan"),
        "codebook_usage": float("nan"),
        "perplexity": float("nan"),
    }
    save_tokenizer(url, VQKD(model_config, teacher.dim), teacher=teacher, metrics=unmeasured, inputs={})


def _stored_crops(url: str) -> np.ndarray:
    dataset = open_dataset(url, "tokens")
    reader = ShardReader(dataset, batch_size=dataset.num_samples(0), shuffle=False)
    [batch] = reader.batches(0)
    reader.close()
    return batch.pixels


def _forward_s(tokenizer: VisualTokenizer, crops: np.ndarray, batch_size: int) -> float:
    batches = torch.from_numpy(crops).split(batch_size)
    tokenizer.encode(batches[0])
    began = time.perf_counter()
    for batch in batches:
        tokenizer.encode(batch).cpu()
    return time.perf_counter() - began


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    run_job(main, BenchmarkConfig)

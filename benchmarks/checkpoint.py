"""What a checkpoint costs the training that goes on while it is written.

python -m benchmarks.checkpoint [--size base] [--every_s 600]

One line of JSON. Steps of masked image modelling on random images are timed without a checkpoint and from the
moment one is begun until it is published; `extra_s` is what these steps took longer, and `share` is that of
`every_s`, which should be below 0.02.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from benchmarks.timing import emit
from pipeline.config import run_job
from pipeline.training.checkpoints import CheckpointStore, TrainState
from pipeline.training.optim import OptimConfig, autocast, build_optimizer, resolve_precision
from pretrain.masking import MaskConfig, draw_block_masks
from pretrain.model.mim import MIM, MIMConfig, masked_patches, mim_loss
from pretrain.model.size import BackboneSize

CODEBOOK_SIZE = 8192


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Time checkpoints of a model with its optimizer."""

    size: Literal["small", "base", "large"] = "base"
    """The model."""
    batch_size: int = 4
    """Images per step."""
    every_s: float = 600.0
    """Seconds of training per checkpoint."""
    checkpoints: int = 3
    """How many are written, one after the other; the median counts."""


def main(config: BenchmarkConfig) -> None:
    """Train on random images, now and then with a checkpoint in flight."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve_precision("auto", device)
    torch.manual_seed(0)
    size = BackboneSize(size=config.size).resolve(image_size=224, patch_size=16)
    model = MIM(size, MIMConfig(), CODEBOOK_SIZE).to(device)
    optimizer = build_optimizer(model, OptimConfig(), 2048)
    pixels = torch.rand(config.batch_size, 3, 224, 224, device=device)
    codes = torch.randint(CODEBOOK_SIZE, (config.batch_size, 196), device=device)
    mask = torch.from_numpy(
        draw_block_masks(np.arange(config.batch_size), MaskConfig().resolve((14, 14)), seed=0, epoch=0).mask
    )
    masked = masked_patches(mask).to(device)
    mask = mask.to(device)

    def step_s() -> float:
        began = time.perf_counter()
        with autocast(device, dtype):
            loss = mim_loss(model(pixels, mask, masked), codes)
            objective = loss.objective(len(masked))
        objective.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    step_s()
    plain = statistics.median(step_s() for _ in range(5))
    blocked, extra = [], []
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(folder)
        for number in range(config.checkpoints):
            began = time.perf_counter()
            store.save(
                TrainState(step=number), {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            )
            blocked.append(time.perf_counter() - began)
            steps = 0
            while store.is_writing:
                step_s()
                steps += 1
            store.wait()
            extra.append(time.perf_counter() - began - steps * plain)
        latest = store.latest()
    assert latest is not None
    num_bytes = sum(t.numel() * t.element_size() for t in latest[1]["model"].values()) * 3
    emit(
        f"checkpoint, {config.size} model with AdamW, local disk",
        device=f"{device.type}, {torch.get_num_threads()} threads, {platform.machine()}",
        gigabytes=num_bytes / 1e9,
        step_s=plain,
        blocked_s=statistics.median(blocked),
        extra_s=statistics.median(extra),
        every_s=config.every_s,
        share=statistics.median(extra) / config.every_s,
    )


if __name__ == "__main__":
    run_job(main, BenchmarkConfig)

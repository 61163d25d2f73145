"""A tiny image dataset and a tiny tokenizer, trained once for the tests that need one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.cluster.config import ClusterConfig
from pipeline.training.optim import OptimConfig
from shards.pixels.views import ViewPolicy
from shards.writer.prepare import PrepareConfig, prepare_images
from tokenizer.config import TokenizerTrainConfig
from tokenizer.model.artifact import METRICS, save_tokenizer
from tokenizer.model.teacher import build_teacher
from tokenizer.model.teacher_config import TeacherConfig
from tokenizer.model.vqkd import VQKD, VQKDConfig
from tokenizer.train import train_tokenizer

IN_PROCESS = ClusterConfig(num_workers=0)
NUM_IMAGES = 40
"""Of which one is broken."""


@pytest.fixture(scope="session")
def image_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """39 pictures of stripes in two classes, in shards of 16, and one reject."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:40, :48]
    for number in range(NUM_IMAGES):
        folder = root / "source" / f"class-{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        stripes = ((x * (number % 2) + y) // (2 + number % 5) % 2)[..., None] * rng.uniform(80, 220, 3)
        pixels = np.clip(stripes + rng.normal(20, 5, (40, 48, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.jpg", quality=95)
    (root / "source" / "class-0" / "000.jpg").write_bytes(b"no image")
    output = str(root / "shards")
    prepare_images(
        PrepareConfig(source=str(root / "source"), output=output, max_shard_samples=16, cluster=IN_PROCESS)
    )
    return output


@pytest.fixture(scope="session")
def tokenizer_config(image_shards: str) -> Callable[..., TokenizerTrainConfig]:
    """`tokenizer_config(output, …)`: seconds of training on a 4 x 4 grid."""

    def make(
        output: Path | str, *, num_workers: int = 0, address: str | None = None, **changes: Any
    ) -> TokenizerTrainConfig:
        config = TokenizerTrainConfig(
            images=image_shards,
            val_images=image_shards,
            output=str(output),
            model=VQKDConfig(
                image_size=32,
                patch_size=8,
                width=32,
                depth=2,
                heads=2,
                decoder_depth=1,
                codebook_size=16,
                code_dim=8,
            ),
            views=ViewPolicy(scale=(0.5, 1.0), views_per_image=0),
            optim=OptimConfig(peak_lr=1e-3, betas=(0.9, 0.99), warmup_epochs=0.5, clip_grad_norm=None),
            epochs=2,
            batch_size=8,
            log_every_steps=1,
            cluster=ClusterConfig(num_workers=num_workers, address=address),
        )
        return dataclasses.replace(config, **changes)

    return make


@pytest.fixture(scope="session")
def tokenizer_url(
    tokenizer_config: Callable[..., TokenizerTrainConfig], tmp_path_factory: pytest.TempPathFactory
) -> str:
    """A trained tokenizer of 16 codes."""
    output = str(tmp_path_factory.mktemp("tokenizer") / "out")
    train_tokenizer(tokenizer_config(output))
    return output


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., str]:
    """`make_tokenizer(url, image_size=32, patch_size=16, …)`: random weights and 32 codes, in no time."""

    def make(url: Path | str, **model: int) -> str:
        torch.manual_seed(7)
        config = VQKDConfig(
            **{"image_size": 32, "patch_size": 16, **model},  # type: ignore[arg-type]
            width=32,
            depth=1,
            heads=2,
            decoder_depth=1,
            codebook_size=32,
            code_dim=8,
            kmeans_init=False,
        )
        teacher = build_teacher(TeacherConfig(), config.image_size, config.patch_size)
        unmeasured = {str(name): float("nan") for name in METRICS}
        save_tokenizer(str(url), VQKD(config, teacher.dim), teacher=teacher, metrics=unmeasured, inputs={})
        return str(url)

    return make


@pytest.fixture(scope="session")
def other_tokenizer_url(make_tokenizer: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer of 32 codes on a 2 x 2 grid, for the same image size as `tokenizer_url`."""
    return make_tokenizer(tmp_path_factory.mktemp("other-tokenizer") / "out")

"""Tiny labelled datasets, a backbone, and a fine-tuning that takes a second."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from pipeline.cluster.config import ClusterConfig
from pipeline.training.optim import OptimConfig
from pretrain.finetune.augment import AugmentConfig
from pretrain.finetune.config import FinetuneConfig
from pretrain.finetune.start import Goal
from pretrain.finetune.train import finetune_classifier
from pretrain.model.artifacts import save_backbone
from pretrain.model.backbone import Backbone, BackboneConfig
from shards.format.build import build_shard
from shards.format.plan import Plan
from shards.format.records import RejectedSample, StoredSample
from shards.pixels.decode import DecodeConfig, decode_image
from shards.pixels.views import ViewPolicy, encode_crop
from shards.writer.commit import commit, finish, pending, start

SIDE, PATCH = 16, 4
NAMES = ("ant", "bee", "cat", "dog")
SMALL = BackboneConfig(image_size=SIDE, patch_size=PATCH, width=32, depth=2, heads=2)
PLAIN = AugmentConfig(rand_augment=None, erase_prob=0.0, mixup=0.0, cutmix=0.0)
IN_PROCESS = ClusterConfig(num_workers=0)

Make = Callable[..., FinetuneConfig]


def write_images(
    root: Path, labels: Sequence[int | None], names: Sequence[str] | None = NAMES, seed: int = 0
) -> str:
    """A dataset with one image per label: red, green, blue or grey stripes.

    Without labels, its only image was rejected.
    """
    rejects = [] if labels else [RejectedSample(sample_id=0, source="0.jpg", reason="truncated", message="")]
    first_ids = (0, len(labels) or 1) if len(labels) < 8 else (0, 5, len(labels))
    class_names = None if names is None else tuple(names)
    inputs = {"source": f"{seed}-{list(labels)}"}
    plan = Plan(kind="images", inputs=inputs, first_ids=first_ids, views=1, class_names=class_names)
    start(str(root), plan)
    for item in pending(str(root), plan):
        samples = [make_sample(i, labels[i], seed) for i in range(item.first_id, item.end_id) if labels]
        commit(str(root), plan, item, build_shard(samples, rejects, grid=None, codebook_size=None))
    finish(str(root), plan, lambda data: decode_image(data, DecodeConfig()))
    return str(root)


def make_sample(sample_id: int, label: int | None, seed: int) -> StoredSample:
    rng = np.random.default_rng([seed, sample_id])
    y, x = np.mgrid[:20, :20]
    stripes = (y * (sample_id % 3) + x) // 3 % 2
    colour = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.5, 0.5, 0.5]])[(label or 0) % 4]
    pixels = 40 + (100 + 60 * stripes[..., None]) * colour + rng.normal(0, 8, (20, 20, 3))
    return StoredSample(
        sample_id=sample_id,
        view=0,
        image=encode_crop(np.clip(pixels, 0, 255).astype(np.uint8), 95),
        extension="jpg",
        source=f"{sample_id}.jpg",
        source_width=20,
        source_height=20,
        label=label,
    )


@pytest.fixture(scope="package")
def train(tmp_path_factory: pytest.TempPathFactory) -> str:
    """8 images of 4 classes."""
    return write_images(tmp_path_factory.mktemp("data") / "train", [0, 1, 2, 3] * 2)


@pytest.fixture(scope="package")
def val(tmp_path_factory: pytest.TempPathFactory) -> str:
    """11 other images; the number divides by nothing."""
    return write_images(tmp_path_factory.mktemp("data") / "val", [i % 4 for i in range(11)], seed=1)


@pytest.fixture(scope="package")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Fresh weights, but positions that are not zero."""
    torch.manual_seed(0)
    model = Backbone(SMALL)
    torch.nn.init.normal_(model.rel_pos_bias.relative_position_bias_table, std=0.5)
    url = str(tmp_path_factory.mktemp("backbone") / "out")
    save_backbone(url, model)
    return url


@pytest.fixture(scope="package")
def make_config(train: str, val: str, backbone: str) -> Make:
    """`make_config(output, …)`: a second of fine-tuning."""

    def make(output: Path | str, **changes: Any) -> FinetuneConfig:
        settings: dict[str, Any] = {
            "train": train,
            "val": val,
            "output": str(output),
            "backbone": backbone,
            "drop_path": 0.1,
            "layer_decay": 0.9,
            "views": ViewPolicy(scale=(0.7, 1.0), views_per_image=0),
            "optim": OptimConfig(peak_lr=3e-3, min_lr=1e-5, warmup_epochs=1, clip_grad_norm=1.0),
            "epochs": 3,
            "batch_size": 4,
            "decode_threads": 1,
            "log_every_steps": 1,
            "cluster": IN_PROCESS,
        }
        return FinetuneConfig(**{**settings, **changes})

    return make


@pytest.fixture(scope="package")
def straight(make_config: Make, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished run of three epochs with all augmentation."""
    output = str(tmp_path_factory.mktemp("straight") / "out")
    finetune_classifier(make_config(output))
    return output


def goal_of(**changes: Any) -> Goal:
    settings: dict[str, Any] = {
        "num_classes": 4,
        "class_names": NAMES,
        "image_size": None,
        "pooling": "mean",
        "drop_path": 0.0,
        "head_init_scale": 1.0,
        "new_head": False,
    }
    return Goal(**{**settings, **changes})


def weights_of(output: str | Path, folder: str = "") -> dict[str, Tensor]:
    return safetensors.torch.load_file(Path(output) / folder / "classifier.safetensors")


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def pictures(size: int = SIDE, num: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, 3, size, size), dtype=torch.uint8, generator=generator)

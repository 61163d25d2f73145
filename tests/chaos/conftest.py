"""Both training loops with everything they read, and processes that begin quickly."""

from __future__ import annotations

import dataclasses
import multiprocessing
import random
from collections.abc import Callable
from typing import Any

import pytest

from pipeline.cluster.config import ClusterConfig
from pipeline.training.optim import OptimConfig
from pretrain.config import PretrainConfig
from pretrain.masking import MaskConfig
from pretrain.model.mim import MIMConfig, PatchAggregationConfig
from pretrain.model.size import BackboneSize
from pretrain.train import pretrain_mim
from shards.pixels.views import ViewPolicy
from shards.writer.prepare import PrepareConfig, prepare_images
from tests.pipeline.gloo_group import PRELOADED
from tokenizer.config import TokenizerTrainConfig
from tokenizer.model.vqkd import VQKDConfig
from tokenizer.precompute.config import PrecomputeConfig
from tokenizer.precompute.run import precompute_shards
from tokenizer.train import train_tokenizer

Run = Callable[[Any], None]
HERE = ClusterConfig(num_workers=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One of the two training loops, with everything it reads."""

    train: Run
    config: Any
    weights: str


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stage]:
    """Both loops on 48 small pictures, with enough steps to be killed in."""
    from PIL import Image

    root = tmp_path_factory.mktemp("stages")
    (root / "pictures").mkdir()
    generator = random.Random(0)
    for number in range(48):
        picture = Image.effect_noise((48, 48), generator.uniform(10, 90)).convert("RGB")
        picture.save(root / "pictures" / f"{number:02d}.png")
    images, tokenizer, shards = (str(root / name) for name in ("images", "tokenizer", "shards"))
    prepare_images(PrepareConfig(source=str(root / "pictures"), output=images, cluster=HERE))
    stage_one = TokenizerTrainConfig(
        images=images,
        val_images=images,
        output=tokenizer,
        model=VQKDConfig(
            image_size=32, patch_size=8, width=32, depth=1, heads=2, codebook_size=16, code_dim=8
        ),
        views=ViewPolicy(image_size=32, views_per_image=0),
        epochs=8,
        batch_size=8,
        log_every_steps=2,
        checkpoint_every_s=0.0,
        cluster=HERE,
    )
    train_tokenizer(stage_one)
    precompute_shards(
        PrecomputeConfig(
            images=images,
            tokenizer=tokenizer,
            output=shards,
            samples_per_shard=16,
            batch_size=8,
            cluster=HERE,
        )
    )
    stage_two = PretrainConfig(
        shards=shards,
        output=str(root / "backbone"),
        backbone=BackboneSize(width=32, depth=2, heads=2, drop_path=0.1),
        mim=MIMConfig(patch_aggregation=PatchAggregationConfig(layer=1, head_depth=1)),
        mask=MaskConfig(),
        optim=OptimConfig(warmup_epochs=1),
        epochs=12,
        batch_size=8,
        log_every_steps=4,
        checkpoint_every_s=0.0,
        cluster=HERE,
    )
    return {
        "tokenizer": Stage(train=train_tokenizer, config=stage_one, weights="tokenizer.safetensors"),
        "backbone": Stage(train=pretrain_mim, config=stage_two, weights="backbone.safetensors"),
    }


@pytest.fixture(scope="module")
def processes() -> Any:
    """New processes that have the slow imports behind them already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context

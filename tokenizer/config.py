"""Settings of the tokenizer's training. Defaults are the paper's (§2.2, Table 8)."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.config import ASIDE, PLACE, PLACES
from pipeline.training.config import TrainingConfig
from pipeline.training.optim import (
    OptimConfig,
)
from shards.dataset.corpus import SubsetConfig
from shards.pixels.views import ViewPolicy
from shards.reader.disk_cache import CacheConfig
from tokenizer.model.teacher_config import TeacherConfig
from tokenizer.model.vqkd import VQKDConfig


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainConfig(TrainingConfig):
    """Train a visual tokenizer (VQ-KD) on image shards. Defaults are the paper's Table 8.

    A killed run started again with the same settings goes on from its last checkpoint; a finished one is
    left alone.
    """

    images: str = field(metadata=PLACES)
    """Image shards to train on, the output of prepare_images; or several, with commas between."""
    val_images: str | None = field(default=None, metadata=PLACE)
    """Image shards for the loss, usage and perplexity after each epoch, on centre crops."""
    model: VQKDConfig = VQKDConfig()
    """The tokenizer."""
    teacher: TeacherConfig = TeacherConfig()
    """The frozen model whose patch features the codes must predict."""
    views: ViewPolicy = ViewPolicy(scale=(0.08, 1.0), views_per_image=0)
    """Crops to train on; a new one of every image in every epoch."""
    subset: SubsetConfig = field(default=SubsetConfig(), metadata=ASIDE)
    """Part of the images to train on instead of all."""
    optim: OptimConfig = OptimConfig(
        peak_lr=5e-5, lr_batch_size=128, betas=(0.9, 0.99), weight_decay=1e-4, clip_grad_norm=None
    )
    """AdamW and its schedule."""
    epochs: int = 100
    """Passes over the images."""
    batch_size: int = 512
    cache: CacheConfig = field(default=CacheConfig(), metadata=ASIDE)
    """Where shards of a remote store are kept while they are read."""
    lanes: int | None = None
    """Lanes of the order; null takes 64, or what the cache has room for as it begins, and keeps to it."""
    window: int | None = None
    """Shards per window of the order; null as with lanes."""

    def __post_init__(self) -> None:
        self.require_positive("epochs", "batch_size", "log_every_steps")
        self.views.resolve(self.model.image_size)

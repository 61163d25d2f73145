"""Settings of masked image modelling. Defaults are the paper's base model, 1600 epochs (§2.3, Table 9)."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.config import ASIDE, PLACE, PLACES
from pipeline.errors import InputError
from pipeline.training.config import TrainingConfig
from pipeline.training.optim import (
    OptimConfig,
)
from pretrain.masking import MaskConfig
from pretrain.model.mim import MIMConfig
from pretrain.model.size import BackboneSize
from shards.dataset.corpus import SubsetConfig
from shards.pixels.views import ViewPolicy
from shards.reader.disk_cache import CacheConfig


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingConfig):
    """Pretrain a ViT by masked image modelling. Defaults are the paper's base model, 1600 epochs (Table 9).

    Give `shards` (precomputed codes), or `images` and `tokenizer` (codes made online). Image size, patch
    size, grid and codebook come from there and cannot disagree. A killed run started again with the same
    settings goes on from its last checkpoint; a finished one is left alone.
    """

    shards: str | None = field(default=None, metadata=PLACES)
    """Token shards, the output of precompute_shards; or several of one tokenizer, with commas between."""
    codes: str | None = None
    """A code layer of the token shards, named by the first 8 digits of its tokenizer; null is their own."""
    stored_views: int | None = None
    """Reads the first so many of the stored views; null takes those that are there when the run begins, and
    keeps to them."""
    images: str | None = field(default=None, metadata=PLACES)
    """Online mode: image shards, the output of prepare_images; or several, with commas between."""
    tokenizer: str | None = field(default=None, metadata=PLACE)
    """Online mode: the tokenizer artifact."""
    views: ViewPolicy = ViewPolicy(views_per_image=0)
    """Online mode: crops; views_per_image 0 draws a new one of every image in every epoch."""
    subset: SubsetConfig = field(default=SubsetConfig(), metadata=ASIDE)
    """Part of the samples instead of all."""
    backbone: BackboneSize = BackboneSize(drop_path=0.1)
    """The model that is pretrained."""
    mim: MIMConfig = MIMConfig()
    """The heads that pretrain it."""
    mask: MaskConfig = MaskConfig()
    """Which patches are masked."""
    optim: OptimConfig = OptimConfig()
    """AdamW and its schedule."""
    epochs: int = 1600
    """Passes over the samples; each pass sees one view of every image."""
    batch_size: int = 2048
    cache: CacheConfig = field(default=CacheConfig(), metadata=ASIDE)
    """Where shards of a remote store are kept while they are read."""
    lanes: int | None = None
    """Lanes of the order; null takes 64, or what the cache has room for as it begins, and keeps to it."""
    window: int | None = None
    """Shards per window of the order; null as with lanes."""

    def __post_init__(self) -> None:
        self.require_positive("epochs", "batch_size", "log_every_steps")
        online = self.images is not None or self.tokenizer is not None
        if (self.shards is None) != online or (online and None in (self.images, self.tokenizer)):
            raise InputError("give either --shards (precomputed codes), or --images and --tokenizer (online)")
        if online and (self.codes, self.stored_views) != (None, None):
            raise InputError("--codes and --stored_views choose among stored codes and views; give --shards")

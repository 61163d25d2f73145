"""Settings of the fine-tuning job. Defaults are those of the base model (Table 10)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipeline.config import ASIDE, PLACE, PLACES
from pipeline.errors import InputError
from pipeline.training.config import TrainingConfig
from pipeline.training.optim import OptimConfig
from pretrain.finetune.augment import AugmentConfig
from pretrain.model.classifier import Pooling
from pretrain.model.size import BackboneSize
from shards.dataset.corpus import SubsetConfig
from shards.pixels.views import ViewPolicy
from tokenizer.model.teacher_config import TeacherConfig


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainingConfig):
    """Fine-tune a pretrained backbone on labelled images. Defaults: base model, 300 epochs (Table 10).

    Train and val are image shards with labels. The result, the best of all epochs on val, is a classifier
    artifact, and may itself be the --backbone of another run (intermediate fine-tuning). A killed run started
    again with the same settings goes on from its last checkpoint; a finished one is left alone.
    """

    train: str = field(metadata=PLACES)
    """Image shards to train on, an output of prepare_images; several with commas between them."""
    subset: SubsetConfig = field(default=SubsetConfig(), metadata=ASIDE)
    """Part of the images of train instead of all: some classes, or a frozen list."""
    output: str = field(metadata=PLACE)
    """Where the classifier goes: a folder or any fsspec URL; last/ in it is that of the last epoch."""
    val: str | None = field(default=None, metadata=PLACE)
    """Image shards the accuracy is measured on after each epoch; null: none, the last epoch is the result."""
    init: Literal["backbone", "scratch", "tokenizer", "teacher"] = "backbone"
    """What it starts from: a pretrained backbone or classifier, chance, the encoder of a visual tokenizer, or
    a teacher's own network (Table 6)."""
    backbone: str | None = field(default=None, metadata=PLACE)
    """With init backbone: an output of pretrain_mim or finetune_classifier."""
    tokenizer: str | None = field(default=None, metadata=PLACE)
    """With init tokenizer: an output of train_tokenizer."""
    teacher: TeacherConfig = TeacherConfig()
    """With init teacher: a network of timm or open_clip and its weights."""
    scratch: BackboneSize = BackboneSize()
    """With init scratch: the shape."""
    patch_size: int = 16
    """With init scratch or teacher: pixels a side of a patch."""
    image_size: int | None = None
    """Pixels a side of what the model sees, a multiple of the patch size; null: as in pretraining, or 224."""
    pooling: Pooling = "mean"
    """mean: a new norm of the mean of the patches, as published; cls: [CLS] after the pretrained norm."""
    new_head: bool = False
    """Start with a fresh head where a classifier is fine-tuned on as many classes as it has."""
    head_init_scale: float = 0.001
    """Factor on the first weights of a fresh head."""
    drop_path: float = 0.1
    """Stochastic depth of the last block."""
    layer_decay: float = 0.65
    """Factor on the learning rate from one block to the block below it."""
    views: ViewPolicy = ViewPolicy(scale=(0.08, 1.0), views_per_image=0)
    """Crops to train on; a new one of every image in every epoch."""
    augment: AugmentConfig = AugmentConfig()
    """What then happens to crops and labels."""
    center_fraction: float | None = None
    """Side of the evaluation crop over the shorter side of the image; null: 0.875 below 384 pixels, 1 from
    there."""
    optim: OptimConfig = OptimConfig(peak_lr=5e-4, min_lr=1e-6, warmup_epochs=20.0, clip_grad_norm=None)
    """AdamW and its schedule; the learning rate is the head's."""
    epochs: int = 100
    """Passes over the training images."""
    batch_size: int = 1024

    def __post_init__(self) -> None:
        self.require_positive("epochs", "batch_size", "log_every_steps")
        if not 0.0 < self.layer_decay <= 1.0:
            raise InputError(f"layer_decay is {self.layer_decay}; give more than 0, at most 1")
        if self.center_fraction is not None and not 0.0 < self.center_fraction <= 1.0:
            raise InputError(f"center_fraction is {self.center_fraction}; give more than 0, at most 1")
        places = {"backbone": self.backbone, "tokenizer": self.tokenizer}
        for name, place in places.items():
            if (self.init == name) != (place is not None):
                raise InputError(
                    f"init is {self.init}, and --{name} is {place or 'not given'}; give --{name} with init "
                    f"{name}, and with no other"
                )

"""Settings of the segmentation job. Defaults are the published ADE20K configuration (reference.md §6.5)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from pipeline.config import ASIDE, PLACE
from pipeline.errors import InputError
from pipeline.training.config import TrainingConfig
from pretrain.model.size import BackboneSize
from pretrain.segment.label_maps import CropPolicy, LabelRules
from pretrain.segment.upernet import UperNetConfig


@dataclass(frozen=True, kw_only=True)
class PolyOptimConfig:
    """AdamW with layer-wise rates and a polynomial schedule. Defaults: base size."""

    peak_lr: float = 5e-5
    """Learning rate of the head after warm-up; not scaled by the batch size."""
    min_lr: float = 0.0
    """Learning rate at the end."""
    warmup_steps: int = 1500
    """Steps of linear warm-up."""
    warmup_ratio: float = 1e-6
    """Share of the learning rate at the first step."""
    power: float = 1.0
    """Exponent of the decay; 1 is a straight line."""
    layer_decay: float = 0.75
    """Factor on the learning rate from one block to the block below it."""
    weight_decay: float = 0.05
    """Constant decay; not on biases, norms, scales and [CLS]."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    clip_grad_norm: float | None = None
    """Largest gradient norm; null leaves gradients alone."""

    def __post_init__(self) -> None:
        if self.peak_lr <= 0 or self.min_lr < 0:
            raise InputError(
                f"optim.peak_lr {self.peak_lr} must be positive and optim.min_lr {self.min_lr} not negative"
            )
        if not 0 < self.layer_decay <= 1:
            raise InputError(f"optim.layer_decay is {self.layer_decay}; give more than 0, at most 1")


def poly_schedule(config: PolyOptimConfig, steps: int) -> Callable[[int], float]:
    """Learning rate as a function of the step: a power of the share that is left, times a linear warm-up.

    The reference's numbers: step 0 has warmup_ratio of its rate, and the last step lies one short of min_lr.
    """

    def lr(step: int) -> float:
        rate = config.min_lr + (config.peak_lr - config.min_lr) * (1.0 - step / steps) ** config.power
        if step < config.warmup_steps:
            rate *= 1.0 - (1.0 - step / config.warmup_steps) * (1.0 - config.warmup_ratio)
        return rate

    return lr


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig(TrainingConfig):
    """Train UperNet on folders of images and label maps, and measure mIoU. Defaults: ADE20K, base size.

    An image and its label map have the same name but for the extension, in the same subfolder; label maps are
    grey or palette images (PNG) whose values are classes. A killed run started again with the same settings
    goes on from its last checkpoint; a finished one is left alone. The last line printed is `mIoU …`.
    """

    train_images: str = field(metadata=PLACE)
    """Images to train on: a folder or any fsspec URL."""
    train_labels: str = field(metadata=PLACE)
    """Their label maps."""
    val_images: str = field(metadata=PLACE)
    """Images on which mIoU is measured."""
    val_labels: str = field(metadata=PLACE)
    """Their label maps."""
    num_classes: int
    """Classes to tell apart: label values 0 to num_classes - 1; with reduce_zero_label 1 to num_classes."""
    backbone: str | None = field(default=None, metadata=PLACE)
    """The backbone artifact, the output of pretrain_mim; with init scratch only its shape counts."""
    init: Literal["backbone", "scratch"] = "backbone"
    """Where the backbone's weights come from: the artifact, or chance."""
    scratch: BackboneSize = BackboneSize()
    """Shape of a random backbone when no artifact gives one."""
    patch_size: int = 16
    """Pixels a side of a patch of such a backbone."""
    ignore_index: int = 255
    """Label value of pixels that count nowhere."""
    reduce_zero_label: bool = False
    """Label 0 counts nowhere, and label 1 is the first class, as in ADE20K."""
    class_names: tuple[str, ...] | None = field(default=None, metadata=ASIDE)
    """Names of the classes, for the table of results."""
    drop_path: float = 0.15
    """Stochastic depth of the last block."""
    head: UperNetConfig = UperNetConfig()
    """What is put on the backbone."""
    crops: CropPolicy = CropPolicy()
    """Resizing and augmentation."""
    optim: PolyOptimConfig = PolyOptimConfig()
    """AdamW and its schedule."""
    steps: int = 160_000
    """Optimizer steps."""
    batch_size: int = 16
    """Crops per optimizer step, over all workers."""
    micro_batch_size: int | None = None
    """Crops per forward pass and worker, over which batch norm averages; null takes them all at once."""
    window_stride: int | None = None
    """Pixels between windows at evaluation; null is two thirds of a crop (341 of 512)."""
    evaluate_every_steps: int | None = field(default=None, metadata=ASIDE)
    """Steps between evaluations; null evaluates at the end only."""
    num_pictures: int = field(default=16, metadata=ASIDE)
    """Pictures of the final predictions on val: image, truth, prediction side by side."""
    check_threads: int = field(default=8, metadata=ASIDE)
    """Threads that decode all images and label maps once, before training."""
    checkpoint_every_s: float = field(default=600.0, metadata=ASIDE)
    """Seconds between checkpoints; one is also written on SIGTERM, and before the last evaluation."""
    checkpoint_keep: int = field(default=2, metadata=ASIDE)
    """How many of the newest checkpoints stay."""
    log_every_steps: int = field(default=50, metadata=ASIDE)

    def __post_init__(self) -> None:
        self.require_positive("num_classes", "steps", "batch_size", "micro_batch_size", "log_every_steps")
        self.require_positive("evaluate_every_steps", "decode_threads", "check_threads")
        if min(self.seed, self.num_pictures) < 0:
            raise InputError("seed and num_pictures must be at least 0")
        if self.init == "backbone" and self.backbone is None:
            raise InputError("give --backbone, the output of pretrain_mim, or --init scratch")
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise InputError(f"{len(self.class_names)} class_names for num_classes {self.num_classes}")
        workers = max(self.cluster.num_workers, 1)
        if self.batch_size % workers:
            raise InputError(
                f"batch_size {self.batch_size} does not divide by {workers} workers; "
                "their batch norm needs equal shares"
            )
        if self.stride < 1 or self.stride > self.crops.size:
            raise InputError(
                f"window_stride is {self.window_stride}; give 1 to crops.size {self.crops.size} pixels"
            )
        share = self.batch_size // workers
        if workers * (share // self.num_passes(share)) < 2:
            raise InputError(
                f"batch_size {self.batch_size} and micro_batch_size {self.micro_batch_size} leave single "
                "crops; batch norm needs two or more in a forward pass over all workers"
            )

    @property
    def stride(self) -> int:
        """Pixels between evaluation windows."""
        return max(1, self.crops.size * 2 // 3) if self.window_stride is None else self.window_stride

    @property
    def rules(self) -> LabelRules:
        """What label values mean."""
        return LabelRules(
            num_classes=self.num_classes,
            ignore_index=self.ignore_index,
            reduce_zero_label=self.reduce_zero_label,
        )

    def num_passes(self, share: int) -> int:
        """Forward passes in which a worker takes its share of a batch."""
        return 1 if self.micro_batch_size is None else math.ceil(share / self.micro_batch_size)

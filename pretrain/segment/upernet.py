"""UperNet (arXiv 1807.10221) on a plain ViT, as BEiT v2 segments (paper §3.4; reference.md §6.5).

Four blocks' patches become a feature pyramid; a pyramid pooling module and a feature pyramid network join its
levels; a second, small head helps training. Names inside the heads are those of the published checkpoints.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.training.worker import Worker
from pretrain.model.classifier import Classifier

CLASSIFIER_STD = 0.01

# Shapes below: B images, S pixels and G patches a side, D the backbone's width, E head channels, C classes.


@dataclass(frozen=True, kw_only=True)
class UperNetConfig:
    """The heads. Defaults are the published ones, for any width and depth."""

    layers: tuple[int, int, int, int] | None = None
    """Blocks that give the four levels, from 1; null: 1/3, 1/2, 2/3 and all of them (4, 6, 8, 12)."""
    channels: int | None = None
    """Channels of the decode head; null is the backbone's width (768 base, 1024 large)."""
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    """Cells a side into which the pyramid pooling module averages."""
    dropout: float = 0.1
    """Share of channels dropped before the classifiers."""
    auxiliary_channels: int = 256
    """Channels of the auxiliary head."""
    auxiliary_weight: float = 0.4
    """Weight of its loss; 0 leaves the head out."""

    def __post_init__(self) -> None:
        if min(self.channels or 1, self.auxiliary_channels, *(self.pool_scales or (0,))) < 1:
            raise InputError("head.channels, head.auxiliary_channels and head.pool_scales must be at least 1")
        if not 0 <= self.dropout < 1 or self.auxiliary_weight < 0:
            raise InputError(
                f"head.dropout is {self.dropout}, head.auxiliary_weight {self.auxiliary_weight}; "
                "give 0 up to below 1, and 0 or more"
            )

    def levels(self, depth: int) -> tuple[int, int, int, int]:
        """The blocks that give the four levels of a backbone of this depth."""
        if self.layers is None:
            return max(1, round(depth / 3)), max(1, round(depth / 2)), max(1, round(2 * depth / 3)), depth
        if list(self.layers) != sorted(self.layers) or self.layers[0] < 1 or self.layers[-1] > depth:
            raise InputError(
                f"head.layers is {list(self.layers)}; give four blocks of 1 to {depth}, in ascending order"
            )
        return self.layers


@dataclass(frozen=True)
class SegmenterOutput:
    """Logits of the decode head [B, C, 4 G, 4 G] and, in training, of the auxiliary head [B, C, G, G]."""

    decode: Tensor
    auxiliary: Tensor | None


class ConvBlock(nn.Module):
    """Convolution without bias, batch norm, ReLU; the size stays."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class FeaturePyramid(nn.Module):
    """Four maps of one size to strides of a quarter, a half, one and two patches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, last, half = (nn.ConvTranspose2d(width, width, 2, 2) for _ in range(3))
        self.fpn1 = nn.Sequential(first, nn.BatchNorm2d(width), nn.GELU(), last)
        self.fpn2 = half

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Four [B, D, G, G] -> [B, D, 4 G, 4 G], [B, D, 2 G, 2 G], [B, D, G, G], [B, D, G // 2, G // 2]."""
        return [self.fpn1(maps[0]), self.fpn2(maps[1]), maps[2], F.max_pool2d(maps[3], 2)]


class PyramidPooling(nn.ModuleList):
    """The map's average over grids of cells, each convolved and spread again over the map."""

    def __init__(self, pool_scales: tuple[int, ...], in_channels: int, channels: int) -> None:
        super().__init__(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvBlock(in_channels, channels, 1))
            for scale in pool_scales
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, D, h, w] -> one [B, E, h, w] per scale."""
        return [_resize(pool(x), x.shape[-2:]) for pool in self]


class UperHead(nn.Module):
    """Pyramid pooling on the coarsest level, then top-down sums, then all levels joined at the finest."""

    def __init__(self, width: int, channels: int, num_classes: int, config: UperNetConfig) -> None:
        super().__init__()
        self.psp_modules = PyramidPooling(config.pool_scales, width, channels)
        self.bottleneck = ConvBlock(width + len(config.pool_scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvBlock(width, channels, 1) for _ in range(3))
        self.fpn_convs = nn.ModuleList(ConvBlock(channels, channels, 3) for _ in range(3))
        self.fpn_bottleneck = ConvBlock(4 * channels, channels, 3)
        self.dropout = nn.Dropout2d(config.dropout)
        self.conv_seg = _classifier(channels, num_classes)

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Four levels [B, D, …], finest first -> logits [B, C, h, w] at the finest."""
        laterals = [conv(level) for conv, level in zip(self.lateral_convs, levels[:3], strict=True)]
        laterals.append(self.bottleneck(torch.cat([levels[3], *self.psp_modules(levels[3])], dim=1)))
        for i in (2, 1, 0):
            laterals[i] = laterals[i] + _resize(laterals[i + 1], laterals[i].shape[-2:])
        outputs = [conv(lateral) for conv, lateral in zip(self.fpn_convs, laterals[:3], strict=True)]
        outputs.append(laterals[3])
        size = outputs[0].shape[-2:]
        joined = self.fpn_bottleneck(torch.cat([_resize(x, size) for x in outputs], dim=1))
        return self.conv_seg(self.dropout(joined))


class FCNHead(nn.Module):
    """One convolution and a classifier on the third level."""

    def __init__(self, width: int, num_classes: int, config: UperNetConfig) -> None:
        super().__init__()
        self.convs = nn.Sequential(ConvBlock(width, config.auxiliary_channels, 3))
        self.dropout = nn.Dropout2d(config.dropout)
        self.conv_seg = _classifier(config.auxiliary_channels, num_classes)

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Logits [B, C, G, G]."""
        return self.conv_seg(self.dropout(self.convs(levels[2])))


class Segmenter(nn.Module):
    """UperNet on a ViT built for square crops; the ViT's last norm and head are removed."""

    def __init__(self, backbone: Classifier, config: UperNetConfig, num_classes: int) -> None:
        super().__init__()
        sizes = backbone.config.backbone
        if sizes.grid[0] < 2:
            raise InputError(
                f"crops of {sizes.image_size} pixels hold one patch of {sizes.patch_size}; give "
                "crops.size two patches or more"
            )
        self.config = config
        self.num_classes = num_classes
        self.layers = config.levels(sizes.depth)
        self.backbone = backbone
        # Parameters without gradients would stop DistributedDataParallel.
        backbone.norm = backbone.fc_norm = None
        backbone.head = nn.Identity()
        del backbone.blocks[self.layers[-1] :]
        self.fpn = FeaturePyramid(sizes.width)
        self.decode_head = UperHead(sizes.width, config.channels or sizes.width, num_classes, config)
        self.auxiliary_head = (
            FCNHead(sizes.width, num_classes, config) if config.auxiliary_weight > 0 else None
        )

    def forward(self, pixels: Tensor) -> SegmenterOutput:
        """Logits of normalised crops [B, 3, S, S], coarser than the pixels."""
        maps = [
            patches.transpose(1, 2).unflatten(2, self.backbone.config.backbone.grid)
            for patches in self.backbone.patch_features(pixels, self.layers)
        ]
        levels = self.fpn(maps)
        auxiliary = self.auxiliary_head(levels) if self.auxiliary_head is not None and self.training else None
        return SegmenterOutput(decode=self.decode_head(levels), auxiliary=auxiliary)

    def segment(self, pixels: Tensor) -> Tensor:
        """Logits float32 [B, C, S, S] of normalised crops [B, 3, S, S], by the decode head."""
        return _resize(self(pixels).decode.float(), pixels.shape[-2:])


@dataclass(frozen=True)
class SegmentationLoss:
    """Scalars over all labelled pixels: summed cross-entropies of both heads, how many the decode head has
    right, and how many there are."""

    decode: Tensor
    auxiliary: Tensor
    correct: Tensor
    labelled: Tensor

    def sums(self) -> Tensor:
        """The four as float64 [4], to be added up."""
        scalars = (self.decode, self.auxiliary, self.correct, self.labelled)
        return torch.stack([scalar.detach().double() for scalar in scalars])


def segmentation_loss(output: SegmenterOutput, classes: Tensor, *, ignored: int) -> SegmentationLoss:
    """Cross-entropy of logits, enlarged to the labels int64 [B, S, S], where these are not `ignored`."""

    def loss_of(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, classes, ignore_index=ignored, reduction="sum")

    size = classes.shape[-2:]
    decode = _resize(output.decode.float(), size)
    loss, auxiliary = loss_of(decode), decode.new_zeros(())
    if output.auxiliary is not None:
        auxiliary = loss_of(_resize(output.auxiliary.float(), size))
    return SegmentationLoss(
        decode=loss,
        auxiliary=auxiliary,
        correct=(decode.detach().argmax(dim=1) == classes).sum(),
        labelled=(classes != ignored).sum(),
    )


# ------------------------------------------------------------------------------------------------ windows


def slide_logits(
    segment: Callable[[Tensor], Tensor], pixels: Tensor, *, window: int, stride: int, batch: int = 8
) -> Tensor:
    """Logits [C, H, W] of a normalised image [3, H, W] of any size: the mean over overlapping windows.

    segment: windows [n, 3, window, window] -> logits [n, C, window, window]. Windows lie `stride` apart, the
    last ones at the far border; a smaller image is filled up with the mean colour.
    """
    height, width = pixels.shape[-2:]
    padded = F.pad(pixels, (0, max(window - width, 0), 0, max(window - height, 0)))
    tops, lefts = (window_starts(side, window, stride) for side in padded.shape[-2:])
    places = list(itertools.product(tops, lefts))
    total = torch.empty(0)
    counts = padded.new_zeros(padded.shape[-2:])
    for first in range(0, len(places), batch):
        some = places[first : first + batch]
        windows = [padded[:, top : top + window, left : left + window] for top, left in some]
        logits = segment(torch.stack(windows))
        if first == 0:
            total = logits.new_zeros((logits.shape[1], *padded.shape[-2:]))
        for (top, left), window_logits in zip(some, logits, strict=True):
            total[:, top : top + window, left : left + window] += window_logits
            counts[top : top + window, left : left + window] += 1
    return total.div_(counts)[:, :height, :width]


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side of at least `window` pixels: every `stride`, the last at the end."""
    last = length - window
    return [*range(0, last, stride), last]


# ------------------------------------------------------------------------------------------------ batch norm


def synchronize_batch_norm(model: nn.Module, worker: Worker) -> None:
    """Replace the batch norms inside a model by ones over all workers, where there are several."""
    if worker.world_size == 1:
        return
    if worker.device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                synchronized = CPUSyncBatchNorm(child.num_features, worker)
                synchronized.load_state_dict(child.state_dict())
                setattr(module, name, synchronized)


class CPUSyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all workers, for the CPU, where torch has none."""

    def __init__(self, num_features: int, worker: Worker) -> None:
        super().__init__(num_features)
        self._worker = worker

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        dims = (0, 2, 3)
        x = input.float()
        count = self._worker.sum(x.new_tensor(x.numel() / x.shape[1]))
        mean = self._sum(x.sum(dims)) / count
        centred = x - mean[:, None, None]
        variance = self._sum(centred.square().sum(dims)) / count
        with torch.no_grad():
            assert self.running_mean is not None and self.running_var is not None
            assert self.num_batches_tracked is not None and self.momentum is not None
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked.add_(1)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return centred * scale[:, None, None] + self.bias[:, None, None]

    def _sum(self, x: Tensor) -> Tensor:
        summed: Any = _SumOverWorkers.apply(x, self._worker)
        return summed


class _SumOverWorkers(torch.autograd.Function):
    """The sum over all workers; gradients are summed over them likewise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, worker: Worker) -> Tensor:
        ctx.worker = worker
        return worker.sum(x.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.worker.sum(gradients[0].contiguous().clone()), None


def _classifier(channels: int, num_classes: int) -> nn.Conv2d:
    layer = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(layer.weight, std=CLASSIFIER_STD)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def _resize(x: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)

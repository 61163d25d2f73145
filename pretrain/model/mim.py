"""Masked image modelling with patch aggregation (paper §2.3, Figure 3): the student, its heads, its losses.

The student sees masked images and predicts the visual token of every masked patch; a shallow second head
sees the final [CLS] with patches of an early layer, which pushes what is global into [CLS].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import InputError
from pretrain.model.backbone import Backbone, BackboneConfig, init_module, transformer_blocks
from tokenizer.model.vit import LAYER_NORM_EPS, drop_path_rates, rescale_residual_branches

LOSS_SUMS = ("loss", "loss_cls", "correct", "correct_cls")
"""Names of `MIMLoss.sums`, in the order in which checkpoints hold them."""

# Shapes below: B images, N patches, T = N + 1 tokens, D width, K codes, M masked patches of the whole batch.


@dataclass(frozen=True, kw_only=True)
class PatchAggregationConfig:
    """The second head, which must make do with [CLS] and the patches of an early layer."""

    layer: int | None = 9
    """Block, counted from 1, whose patches it sees (paper: 9 of 12, 21 of 24); null is no second head."""
    head_depth: int = 2
    """Its Transformer blocks."""
    share_mim_head: bool = True
    """One final norm and one classifier for both heads; otherwise the second has its own."""


@dataclass(frozen=True, kw_only=True)
class MIMConfig:
    """Heads on top of the backbone for pretraining."""

    patch_aggregation: PatchAggregationConfig = field(default_factory=PatchAggregationConfig)
    """The second head."""
    cls_head_init: Literal["official", "trunc_normal"] = "official"
    """Start of the second head's blocks: torch's linear layers, as published, or like all others."""


@dataclass(frozen=True)
class MIMOutput:
    """Logits [M, K] of both heads for the masked patches, image by image.

    `masked` [M] are their flat indices; `logits_cls` is None without patch aggregation.
    """

    logits: Tensor
    logits_cls: Tensor | None
    masked: Tensor


@dataclass(frozen=True)
class MIMLoss:
    """Sums over the masked patches of one (micro-)batch on one rank.

    Sums, because slices and micro-batches may differ in size: whoever joins them divides once, by the masked
    patches of all. `loss` and `loss_cls` carry gradients; the figures of an absent second head are zero.
    """

    loss: Tensor
    loss_cls: Tensor
    correct: Tensor
    correct_cls: Tensor
    num_masked: int

    def objective(self, global_num_masked: int, world_size: int = 1) -> Tensor:
        """This part's share of the mean loss over `global_num_masked` patches, to be differentiated.

        Adding up over the micro-batches of all ranks gives the mean over the global batch; `world_size`
        undoes the division of data parallelism, which averages gradients over ranks.
        """
        return (self.loss + self.loss_cls) * (world_size / global_num_masked)

    def sums(self) -> dict[str, Tensor]:
        """What is added up over micro-batches and ranks for `mim_figures`, by the names of `LOSS_SUMS`."""
        return dict(zip(LOSS_SUMS, (self.loss, self.loss_cls, self.correct, self.correct_cls), strict=True))


class MIM(Backbone):
    """The backbone with its pretraining heads."""

    def __init__(self, config: BackboneConfig, mim_config: MIMConfig, codebook_size: int) -> None:
        super().__init__(config)
        self.mim_config = mim_config
        self.codebook_size = codebook_size
        self.lm_head = nn.Linear(config.width, codebook_size)
        init_module(self.lm_head)

        self.cls_pt_layers: nn.ModuleList | None = None
        self.cls_pt_norm: nn.LayerNorm | None = None
        self.cls_pt_lm_head: nn.Linear | None = None
        aggregation = mim_config.patch_aggregation
        if aggregation.layer is None:
            return
        self.cls_pt_layers = _aggregation_blocks(config, aggregation, aggregation.layer)
        if mim_config.cls_head_init == "trunc_normal":
            self.cls_pt_layers.apply(init_module)
        rescale_residual_branches(self.cls_pt_layers, first=aggregation.layer + 1)
        if not aggregation.share_mim_head:
            self.cls_pt_norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
            self.cls_pt_lm_head = nn.Linear(config.width, codebook_size)
            init_module(self.cls_pt_lm_head)

    def forward(self, pixels: Tensor, mask: Tensor, masked: Tensor | None = None) -> MIMOutput:
        """Logits of both heads for normalised pixels [B, 3, S, S] and mask [B, N] bool (True = masked).

        `masked` [M] is `masked_patches(mask)`; giving it, computed where the mask was made, spares the
        device a synchronisation in every step.
        """
        if masked is None:
            masked = masked_patches(mask)
        relative_bias = self.rel_pos_bias()
        x = early = self.embed(pixels, mask)
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, relative_bias)
            if number == self.mim_config.patch_aggregation.layer:
                early = x
        logits = self.lm_head(self.norm(_select(x, masked)))
        if self.cls_pt_layers is None:
            return MIMOutput(logits, None, masked)

        # [CLS] crosses over as it is: the final norm belongs to the heads.
        aggregated = torch.cat([x[:, :1], early[:, 1:]], dim=1)
        for block in self.cls_pt_layers:
            aggregated = block(aggregated, relative_bias)
        norm = self.norm if self.cls_pt_norm is None else self.cls_pt_norm
        head = self.lm_head if self.cls_pt_lm_head is None else self.cls_pt_lm_head
        return MIMOutput(logits, head(norm(_select(aggregated, masked))), masked)


def masked_patches(mask: Tensor) -> Tensor:
    """Flat indices [M] int64 of the masked patches of mask [B, N], image by image."""
    return mask.flatten().nonzero().squeeze(1)


def mim_loss(output: MIMOutput, codes: Tensor) -> MIMLoss:
    """Cross-entropy of both heads against codes [B, N], any integer type, over masked patches (Eq. 3)."""
    target = codes.flatten()[output.masked].long()
    loss, correct = _cross_entropy(output.logits, target)
    if output.logits_cls is None:
        loss_cls, correct_cls = torch.zeros_like(loss), torch.zeros_like(correct)
    else:
        loss_cls, correct_cls = _cross_entropy(output.logits_cls, target)
    return MIMLoss(loss, loss_cls, correct, correct_cls, num_masked=len(target))


def mim_figures(sums: Mapping[str, float], count: float, *, aggregated: bool) -> dict[str, float]:
    """Cross-entropy and accuracy, means over `count` masked patches, from the added-up `MIMLoss.sums`.

    `aggregated`: the model has a second head.
    """
    figures = {
        "loss_total": (sums["loss"] + sums["loss_cls"]) / count,
        "loss": sums["loss"] / count,
        "accuracy": sums["correct"] / count,
    }
    if aggregated:
        figures |= {
            "loss_cls": sums["loss_cls"] / count,
            "accuracy_cls": sums["correct_cls"] / count,
        }
    return figures


def _aggregation_blocks(
    config: BackboneConfig, aggregation: PatchAggregationConfig, layer: int
) -> nn.ModuleList:
    """The second head's blocks; their stochastic depth continues that of the layer they branch from."""
    head_depth = aggregation.head_depth
    if not 1 <= layer <= config.depth:
        raise InputError(
            f"patch_aggregation.layer is {layer}, but the backbone has {config.depth} blocks; "
            f"choose 1 to {config.depth}, or null for no aggregation"
        )
    if head_depth < 1:
        raise InputError(f"patch_aggregation.head_depth is {head_depth}; choose at least 1, or layer null")
    rates = drop_path_rates(config.drop_path, max(config.depth, layer + head_depth))
    return transformer_blocks(config, rates[layer : layer + head_depth])


def _select(tokens: Tensor, masked: Tensor) -> Tensor:
    """Rows of tokens [B, T, D] at flat patch indices [M] -> [M, D]. Norm and classifier see only these."""
    num_patches = tokens.shape[1] - 1
    rows = masked + masked // num_patches + 1  # a [CLS] stands before each image's patches
    return tokens.flatten(0, 1)[rows]


def _cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy in fp32, whatever precision the logits have, and the number of correct ones."""
    loss = F.cross_entropy(logits.float(), target, reduction="sum")
    return loss, (logits.detach().argmax(dim=1) == target).sum()

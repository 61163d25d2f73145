"""The fine-tuning ViT (paper §3, reference.md §6.1): relative positions per block, pooled patches, a head.

Parameter names are those of the published fine-tuned checkpoints, which are also timm's. The VQ-KD encoder
can be fine-tuned as the same class: absolute positions, no relative ones, no layer scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pretrain.model.backbone import BackboneConfig, check_pixels, normalize_images, transformer_blocks
from pretrain.model.positions import (
    RelativePositionBias,
    gather_bias,
    num_displacements,
    relative_position_index,
    resize_absolute_positions,
    resize_position_table,
    table_grid,
)
from tokenizer.model.vit import (
    LAYER_NORM_EPS,
    Block,
    PatchEmbed,
    drop_path_rates,
    init_linear,
    rescale_residual_branches,
)

Pooling = Literal["mean", "cls"]
RelativePositions = Literal["per_block", "shared", "none"]

TABLE = "relative_position_bias_table"
SHARED_TABLE = f"rel_pos_bias.{TABLE}"

# What a pretrained state holds and a classifier has no use for; the index is a function of the grid.
_PRETRAINING_ONLY = ("mask_token", "lm_head.", "cls_pt_", "rel_pos_bias.", "norm.")

# Shapes below: B images, S pixels a side, N patches, T = N + 1 tokens ([CLS] first), D width, C classes.


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """Everything that decides a classifier's tensors. `backbone.drop_path` is honoured in training."""

    backbone: BackboneConfig
    """Sizes and pixels; its image size may differ from the one it was pretrained at."""
    num_classes: int
    """Outputs of the head; 0 leaves the head out, and the logits are the pooled features."""
    pooling: Pooling = "mean"
    """mean: a norm of the mean of the patches, as published; cls: [CLS] after the final norm."""
    head_init_scale: float = 0.001
    """Factor on the head's first weights."""
    absolute_positions: bool = False
    """Learned absolute positions, as in the VQ-KD encoder."""
    relative_positions: RelativePositions = "per_block"
    """A table in every block, one that all share as in pretraining, or none."""

    def __post_init__(self) -> None:
        if self.num_classes < 0:
            raise InputError(
                f"num_classes is {self.num_classes}; choose the number of classes, or 0 for none"
            )


class Classifier(nn.Module):
    """ViT with relative positions and a linear classifier on the pooled patches, or on [CLS]."""

    position_index: Tensor
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        backbone = config.backbone
        width = backbone.width
        self.patch_embed = PatchEmbed(backbone.patch_size, 3, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed: nn.Parameter | None = None
        if config.absolute_positions:
            self.pos_embed = nn.Parameter(torch.zeros(1, backbone.num_patches + 1, width))
        self.rel_pos_bias: RelativePositionBias | None = None
        if config.relative_positions == "shared":
            self.rel_pos_bias = RelativePositionBias(backbone.grid, backbone.heads)
        self.blocks = transformer_blocks(backbone, drop_path_rates(backbone.drop_path, backbone.depth))
        if config.relative_positions == "per_block":
            for block in self.blocks:
                assert isinstance(block, Block)
                # In the attention because that is its published place; the bias is gathered here, with one
                # index for all blocks.
                table = torch.zeros(num_displacements(backbone.grid), backbone.heads)
                block.attn.register_parameter(TABLE, nn.Parameter(table))
            self.register_buffer("position_index", relative_position_index(backbone.grid), persistent=False)
        self.norm: nn.LayerNorm | None = None
        self.fc_norm: nn.LayerNorm | None = None
        if config.pooling == "mean":
            self.fc_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        else:
            self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(width, config.num_classes) if config.num_classes else nn.Identity()
        self.register_buffer("pixel_mean", torch.tensor(backbone.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(backbone.std).view(1, 3, 1, 1), persistent=False)
        self._init_weights()

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits [B, C] of normalised pixels [B, 3, S, S]."""
        return self.head(self.pooled(pixels))

    def pooled(self, pixels: Tensor) -> Tensor:
        """Input of the head [B, D]: the norm of the patches' mean, or [CLS] after the norm."""
        x = self.layer_outputs(pixels)[-1]
        return self._last_norm(x[:, 1:].mean(dim=1) if self.config.pooling == "mean" else x[:, 0])

    def forward_tokens(self, pixels: Tensor) -> Tensor:
        """All tokens [B, T, D] after the last norm, [CLS] first.

        With mean pooling that norm was trained on means of patches; it is applied to each token here, as the
        published code does.
        """
        return self._last_norm(self.layer_outputs(pixels)[-1])

    def patch_features(self, pixels: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Patches [B, N, D] after each of these blocks, counted from 1, without a norm: for dense heads."""
        depth = self.config.backbone.depth
        if not layers or not all(1 <= layer <= depth for layer in layers):
            raise ValueError(f"layers {list(layers)} are not among the blocks 1 to {depth}")
        outputs = self.layer_outputs(pixels, until=max(layers))
        return [outputs[layer - 1][:, 1:] for layer in layers]

    def layer_outputs(self, pixels: Tensor, until: int | None = None) -> list[Tensor]:
        """Tokens [B, T, D] after each block, or after each of the first `until`, before any norm."""
        check_pixels(pixels, self.config.backbone.image_size)
        x = self.patch_embed(pixels)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias()
        outputs: list[Tensor] = []
        for block in self.blocks[:until]:
            assert isinstance(block, Block)
            if self.config.relative_positions == "per_block":
                bias = gather_bias(block.attn.get_parameter(TABLE), self.position_index)
            x = block(x, bias)
            outputs.append(x)
        return outputs

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, S, S] or [B, S, S, 3] -> float32 [B, 3, S, S], as in pretraining."""
        return normalize_images(images, self.pixel_mean, self.pixel_std)

    def _last_norm(self, x: Tensor) -> Tensor:
        norm = self.norm if self.fc_norm is None else self.fc_norm
        assert norm is not None
        return norm(x)

    def _init_weights(self) -> None:
        """Published start: normal of std 0.02, cut at 2 and so practically nowhere, unlike in pretraining.

        Convolutions keep torch's default, tables start at zero.
        """
        for positions in (self.cls_token, self.pos_embed):
            if positions is not None:
                nn.init.trunc_normal_(positions, std=0.02)
        self.apply(init_linear)
        rescale_residual_branches(self.blocks)
        if isinstance(self.head, nn.Linear):
            with torch.no_grad():
                self.head.weight.mul_(self.config.head_init_scale)


def classifier_from_backbone(state: Mapping[str, Tensor], config: ClassifierConfig) -> dict[str, Tensor]:
    """The complete state of a `Classifier` of this config that starts from pretrained weights.

    Its image size may differ from the pretraining's, whose grid is read off the state. As in the published
    code: the shared position table is copied into every block, tables are resized where the grid differs,
    heads and mask token are left behind. With mean pooling the pretrained final norm is dropped, too, and
    fc_norm starts as one and zero; with [CLS] pooling the norm stays. The head starts fresh, drawn from
    torch's generator. A state that was fine-tuned before (intermediate fine-tuning) keeps its own tables and
    fc_norm, and its head if that has as many classes.

    Raises InputError that names the first tensor that is missing, of another shape, or left over.
    """
    with torch.device("meta"):  # names and shapes only
        expected = Classifier(config).state_dict()
    fresh = _fresh_head(config)
    grid = config.backbone.grid[0]
    shared = _to_grid(state[SHARED_TABLE], grid) if SHARED_TABLE in state else None
    converted: dict[str, Tensor] = {}
    for key, shape in ((key, tensor.shape) for key, tensor in expected.items()):
        tensor = state.get(key)
        if key.endswith(TABLE):
            tensor = shared if tensor is None else _to_grid(tensor, grid)
            # Blocks must not share memory: each table is trained on its own.
            tensor = None if tensor is None else tensor.clone()
        elif key == "pos_embed" and tensor is not None:
            tensor = resize_absolute_positions(tensor, grid)
        elif key in fresh and (tensor is None or tensor.shape != shape):
            tensor = fresh[key]
        if tensor is None or tensor.shape != shape:
            given = "absent" if tensor is None else "x".join(map(str, tensor.shape))
            raise InputError(
                f"{key} is {given} in the weights, but {'x'.join(map(str, shape))} in the classifier; "
                "the backbone's config and its weights do not belong together"
            )
        converted[key] = tensor
    for key in state:
        known = key in converted or key.startswith((*_PRETRAINING_ONLY, "head.", "fc_norm."))
        if not known and not key.endswith("relative_position_index"):
            raise InputError(f"the weights hold {key}, which a classifier of this config does not have")
    return converted


def _fresh_head(config: ClassifierConfig) -> dict[str, Tensor]:
    """Start values of what pretraining does not have: head and, with mean pooling, fc_norm."""
    width = config.backbone.width
    fresh: dict[str, Tensor] = {}
    if config.pooling == "mean":
        fresh |= {"fc_norm.weight": torch.ones(width), "fc_norm.bias": torch.zeros(width)}
    if config.num_classes:
        weight = torch.empty(config.num_classes, width)
        nn.init.trunc_normal_(weight, std=0.02).mul_(config.head_init_scale)
        fresh |= {"head.weight": weight, "head.bias": torch.zeros(config.num_classes)}
    return fresh


def _to_grid(table: Tensor, grid: int) -> Tensor:
    return resize_position_table(table, table_grid(table.shape[0]), grid)

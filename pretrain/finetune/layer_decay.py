"""Layer-wise learning rates (Tables 10 and 11): the further from the head a layer is, the less it moves."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.training.optim import decays

# Names of modules before the first block: here, in timm, and in open_clip.
_STEM = {"patch_embed", "cls_token", "mask_token", "pos_embed", "reg_token", "norm_pre"} | {
    *("conv1", "class_embedding", "positional_embedding", "ln_pre")
}
_BLOCK = re.compile(r"(?:^|\.)(?:res)?blocks\.(\d+)\.")


def layerwise_groups(model: nn.Module, *, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups of a ViT, each with its `lr_scale` and with or without decay.

    Layer 0 is the stem (patches, [CLS], absolute positions), block i counted from 1 is layer i, and what
    follows the last block is layer depth + 1 with a scale of 1, the norm and a shared position table
    included; every layer below has `layer_decay` times the scale of the one above. No decay as in
    `pipeline.training.optim.decays` (reference.md §6.1): the tables of relative positions are decayed.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    last = 1 + max((_block(name) for name, _ in named), default=0)
    groups: dict[tuple[int, bool], list[Tensor]] = {}
    for name, parameter in named:
        # open_clip's name for pos_embed
        decayed = decays(name, parameter) and not name.endswith("positional_embedding")
        groups.setdefault((_layer(name, last), decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if decayed else 0.0,
            "lr_scale": layer_decay ** (last - layer),
        }
        for (layer, decayed), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def set_layerwise_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def _layer(name: str, last: int) -> int:
    if not _STEM.isdisjoint(name.split(".")):
        return 0
    return _block(name) or last


def _block(name: str) -> int:
    """Number of the block a parameter is in, counted from 1; 0 outside of all."""
    match = _BLOCK.search(name)
    return int(match.group(1)) + 1 if match else 0

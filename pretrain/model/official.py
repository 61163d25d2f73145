"""Published pretraining and fine-tuned state dicts as our models, and ours in the published layouts.

Names are the same everywhere (reference.md §7). Pretraining has one position table that all blocks share,
fine-tuning one in every block; both published layouts hold the index of the tables, which we compute.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.tensorfile import as_float32, common_size, count_numbered, match
from pretrain.model.backbone import HEAD_PREFIXES, IMAGENET_MEAN, IMAGENET_STD, Backbone, BackboneConfig
from pretrain.model.classifier import SHARED_TABLE, TABLE, Classifier, ClassifierConfig
from pretrain.model.mim import MIM, MIMConfig, PatchAggregationConfig
from pretrain.model.positions import (
    relative_position_index,
    resize_absolute_positions,
    resize_position_table,
    table_grid,
)
from tokenizer.model.official import HEAD_DIM, PER_CHANNEL

INDEX = "relative_position_index"

Rgb = tuple[float, float, float]
ModelT = TypeVar("ModelT", bound=nn.Module)

# Shapes below: T = N + 1 tokens ([CLS] first), R rows of a relative-position table, H heads.


def kind_of(names: Iterable[str]) -> Literal["pretraining", "classifier"] | None:
    """Kind of the state dict with these names; None if it is no BEiT."""
    names = list(names)
    if not any(name.startswith("blocks.") for name in names):
        return None
    if any(name.startswith(("mask_token", *HEAD_PREFIXES)) for name in names):
        return "pretraining"
    if any(name.startswith(("head.", "fc_norm.")) or name.endswith(f".attn.{TABLE}") for name in names):
        return "classifier"
    return "pretraining" if any(name.startswith("rel_pos_bias.") for name in names) else None


# ------------------------------------------------------------------------------------------------ in


def backbone_from_official(
    tensors: Mapping[str, Tensor],
    url: str,
    *,
    heads: int | None = None,
    layer: int | None = None,
    mean: Rgb = IMAGENET_MEAN,
    std: Rgb = IMAGENET_STD,
) -> Backbone:
    """The pretrained model with exactly these weights: a `MIM` if they hold heads, else a `Backbone`.

    Sizes are read off the tensors. Not in them, and so taken as published: the block the second head
    branches from (`layer`, counted from 1; null is the third from the end: 9 of 12, 21 of 24), and how images
    were normalised. Raises InputError that names the first key that is missing, misshapen or left over.
    """
    config = _backbone_config(tensors, url, heads, mean, std)
    kind = "pretraining model"
    if not any(name.startswith(HEAD_PREFIXES) for name in tensors):
        return _filled(lambda: Backbone(config), config, tensors, url, kind)
    codebook_size = common_size(tensors, url, [("lm_head.weight", 0), ("lm_head.bias", 0)])
    mim_config = _mim_config(tensors, config, layer)
    return _filled(lambda: MIM(config, mim_config, codebook_size), config, tensors, url, kind)


def classifier_from_official(
    tensors: Mapping[str, Tensor],
    url: str,
    *,
    heads: int | None = None,
    mean: Rgb = IMAGENET_MEAN,
    std: Rgb = IMAGENET_STD,
) -> Classifier:
    """The fine-tuned model with exactly these weights: mean pooling if they hold `fc_norm`, else [CLS].

    Sizes are read off the tensors, heads off the position tables; a model with absolute positions only (a
    fine-tuned VQ-KD encoder) has none, and its heads are `heads`, or width / 64. Raises InputError that names
    the first key that is missing, misshapen or left over.
    """
    backbone = _backbone_config(tensors, url, heads, mean, std)
    num_classes = 0
    if any(name.startswith("head.") for name in tensors):
        num_classes = common_size(tensors, url, [("head.weight", 0), ("head.bias", 0)])
    per_block = any(name.startswith("blocks.") and name.endswith(TABLE) for name in tensors)
    config = ClassifierConfig(
        backbone=backbone,
        num_classes=num_classes,
        pooling="cls" if any(name.startswith("norm.") for name in tensors) else "mean",
        absolute_positions="pos_embed" in tensors,
        relative_positions="per_block" if per_block else "shared" if SHARED_TABLE in tensors else "none",
    )
    return _filled(lambda: Classifier(config), backbone, tensors, url, "classifier")


def _backbone_config(
    tensors: Mapping[str, Tensor], url: str, heads: int | None, mean: Rgb, std: Rgb
) -> BackboneConfig:
    """The configuration that fits the tensors' shapes."""
    width = common_size(tensors, url, PER_CHANNEL, prefix="blocks.0")
    patch_size = common_size(tensors, url, [("patch_embed.proj.weight", 2), ("patch_embed.proj.weight", 3)])
    if "pos_embed" in tensors and not any(name.endswith(TABLE) for name in tensors):
        grid = math.isqrt(max(common_size(tensors, url, [("pos_embed", 1)]) - 1, 0))
        table_heads = heads or max(1, width // HEAD_DIM)
    else:
        rows, table_heads = (common_size(tensors, url, [(f".{TABLE}", axis)]) for axis in (0, 1))
        try:
            grid = table_grid(rows)
        except InputError as error:
            raise InputError(f"{url}: {error}; check the file") from None
        if width % max(table_heads, 1) or heads not in (None, table_heads):
            asked = f"which do not divide the width of {width}" if heads is None else f"not {heads}"
            raise InputError(
                f"{url}: its position tables are for {table_heads} heads, {asked}; "
                "check the file, or leave --heads out"
            )
    has_scales = any(name.startswith("blocks.") and ".gamma_" in name for name in tensors)
    return BackboneConfig(
        image_size=grid * patch_size,
        patch_size=patch_size,
        width=width,
        depth=count_numbered(tensors, "blocks."),
        heads=table_heads,
        mlp_ratio=common_size(tensors, url, [(".mlp.fc1.bias", 0), (".mlp.fc1.weight", 0)]) / width,
        # Its first value left no trace; zero or not is what counts from here on.
        layer_scale_init=(1e-5 if width >= 1024 else 0.1) if has_scales else 0.0,
        mean=mean,
        std=std,
    )


def _mim_config(tensors: Mapping[str, Tensor], config: BackboneConfig, layer: int | None) -> MIMConfig:
    if not (head_depth := count_numbered(tensors, "cls_pt_layers.")):
        return MIMConfig(patch_aggregation=PatchAggregationConfig(layer=None))
    aggregation = PatchAggregationConfig(
        layer=max(1, config.depth - 3) if layer is None else layer,
        head_depth=head_depth,
        share_mim_head=not any(name.startswith(("cls_pt_norm.", "cls_pt_lm_head.")) for name in tensors),
    )
    return MIMConfig(patch_aggregation=aggregation)


def _filled(
    make: Callable[[], ModelT], config: BackboneConfig, tensors: Mapping[str, Tensor], url: str, kind: str
) -> ModelT:
    """The model that `make` builds, with these weights: built for real only once names and shapes agree.

    Indices of position tables, which follow from the grid, must have its shape and are left out.
    """
    with torch.device("meta"):
        expected = make().state_dict()
        index = relative_position_index(config.grid)
    indices = {key: index for key in tensors if key.endswith(f".{INDEX}")}
    match({**expected, **indices}, tensors, url, f"a {kind} of {config.depth} blocks of {config.width}")
    model = make()
    model.load_state_dict(as_float32({key: tensors[key] for key in expected}), assign=True)
    return model.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------ out


def at_image_size(
    tensors: Mapping[str, Tensor], config: BackboneConfig, image_size: int | None
) -> tuple[dict[str, Tensor], BackboneConfig]:
    """The same model for images of another size: position tables [R, H] and absolute positions resized.

    None keeps its own size.
    """
    if image_size is None or image_size == config.image_size:
        return dict(tensors), config
    resized_config = dataclasses.replace(config, image_size=image_size)
    grid_from, grid_to = config.grid[0], resized_config.grid[0]
    resized: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key.endswith(TABLE):
            resized[key] = resize_position_table(tensor, grid_from, grid_to)
        elif key == "pos_embed":
            resized[key] = resize_absolute_positions(tensor, grid_to)
        else:
            resized[key] = tensor
    return resized, resized_config


def official_pretraining(tensors: Mapping[str, Tensor], config: BackboneConfig) -> dict[str, Tensor]:
    """A `MIM`'s state in the published pretraining layout: with the shared table's index."""
    index = relative_position_index(config.grid)
    return {**tensors, f"rel_pos_bias.{INDEX}": index}


def per_block_tables(tensors: Mapping[str, Tensor], config: BackboneConfig) -> dict[str, Tensor]:
    """A backbone's or classifier's state in the fine-tuning layout, without indices: timm's layout, too.

    The table that all blocks share is copied into each, mask token and pretraining heads are left out; a
    state that has its tables there, or none, stays as it is.
    """
    kept = {
        key: tensor
        for key, tensor in tensors.items()
        if not key.startswith(("mask_token", "rel_pos_bias.", *HEAD_PREFIXES))
    }
    if SHARED_TABLE in tensors:
        for number in range(config.depth):
            kept[f"blocks.{number}.attn.{TABLE}"] = tensors[SHARED_TABLE].clone()
    return kept


def official_finetuning(tensors: Mapping[str, Tensor], config: BackboneConfig) -> dict[str, Tensor]:
    """`per_block_tables` with the index beside every table, as the published fine-tuned files have it."""
    converted = per_block_tables(tensors, config)
    for key in [key for key in converted if key.endswith(f".{TABLE}")]:
        converted[f"{key.removesuffix(TABLE)}{INDEX}"] = relative_position_index(config.grid)
    return converted

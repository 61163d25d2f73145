"""Backbones and classifiers for timm and transformers, with a model card: conversions of names and configs.

Neither library is imported: what they read is tensors, one JSON file and their own naming rules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pretrain.model.backbone import BackboneConfig
from pretrain.model.classifier import TABLE, ClassifierConfig, Pooling, RelativePositions
from pretrain.model.official import at_image_size, per_block_tables
from tokenizer.model.vit import LAYER_NORM_EPS

_TIMM_NAMES = {
    (16, 768, 12, 12, 4.0): "beitv2_base_patch16_224",
    (16, 1024, 24, 16, 4.0): "beitv2_large_patch16_224",
}
"""timm's models by patch size, width, depth, heads and MLP ratio."""

_CROP_FRACTION = 0.875
"""Centre crop of an image whose shorter side was resized: 224 of 256, as published."""

# Names of a block's tensors in transformers, as its hub has them: version 4's, which version 5 renames.
_TRANSFORMERS_BLOCK = {
    "gamma_1": "lambda_1",
    "gamma_2": "lambda_2",
    "norm1.weight": "layernorm_before.weight",
    "norm1.bias": "layernorm_before.bias",
    "norm2.weight": "layernorm_after.weight",
    "norm2.bias": "layernorm_after.bias",
    "attn.proj.weight": "attention.output.dense.weight",
    "attn.proj.bias": "attention.output.dense.bias",
    "attn.q_bias": "attention.attention.query.bias",
    "attn.v_bias": "attention.attention.value.bias",
    f"attn.{TABLE}": f"attention.attention.relative_position_bias.{TABLE}",
    "mlp.fc1.weight": "intermediate.dense.weight",
    "mlp.fc1.bias": "intermediate.dense.bias",
    "mlp.fc2.weight": "output.dense.weight",
    "mlp.fc2.bias": "output.dense.bias",
}
_TRANSFORMERS_REST = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
    "fc_norm.weight": "pooler.layernorm.weight",
    "fc_norm.bias": "pooler.layernorm.bias",
}


@dataclass(frozen=True, kw_only=True)
class VisionModel:
    """What is common to backbone and classifier once every block has its own position table."""

    tensors: dict[str, Tensor]
    """In the fine-tuning layout, without indices."""
    config: BackboneConfig
    pooling: Pooling
    """cls: the final norm on every token, features are [CLS]; mean: a norm on the mean of the patches."""
    num_classes: int
    """0 for a backbone."""
    absolute_positions: bool
    relative_positions: RelativePositions
    """Never shared."""
    class_names: tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Tensors and JSON files for another library, and how they are loaded there."""

    tensors: dict[str, Tensor]
    configs: dict[str, dict[str, Any]]
    """By file name."""
    library: str
    loading: str
    """Python; `FOLDER` stands for where the files are."""


def vision_model_of_backbone(
    tensors: Mapping[str, Tensor], config: BackboneConfig, image_size: int | None
) -> VisionModel:
    """A pretrained backbone without its heads, for images of another size if one is given."""
    resized, config = at_image_size(tensors, config, image_size)
    return VisionModel(
        tensors=per_block_tables(resized, config),
        config=config,
        pooling="cls",
        num_classes=0,
        absolute_positions=False,
        relative_positions="per_block",
        class_names=None,
    )


def vision_model_of_classifier(
    tensors: Mapping[str, Tensor],
    config: ClassifierConfig,
    class_names: Sequence[str] | None,
    image_size: int | None,
) -> VisionModel:
    """A classifier with its head, for images of another size if one is given."""
    resized, backbone = at_image_size(tensors, config.backbone, image_size)
    return VisionModel(
        tensors=per_block_tables(resized, backbone),
        config=backbone,
        pooling=config.pooling,
        num_classes=config.num_classes,
        absolute_positions=config.absolute_positions,
        relative_positions="none" if config.relative_positions == "none" else "per_block",
        class_names=None if class_names is None else tuple(class_names),
    )


# ------------------------------------------------------------------------------------------------ timm


def to_timm(model: VisionModel) -> Exported:
    """For `timm.create_model("local-dir:FOLDER", pretrained=True)`, or any `Beit` of these arguments.

    [CLS] pooling is timm's `global_pool="token"`, whose final norm is on every token as in pretraining.
    """
    config = model.config
    size = (config.patch_size, config.width, config.depth, config.heads, config.mlp_ratio)
    arguments: dict[str, Any] = {
        "img_size": config.image_size,
        "global_pool": "avg" if model.pooling == "mean" else "token",
    }
    architecture = _TIMM_NAMES.get(size)
    if architecture is None or model.absolute_positions or model.relative_positions == "none":
        architecture = "beitv2_base_patch16_224"
        arguments |= {
            "patch_size": config.patch_size,
            "embed_dim": config.width,
            "depth": config.depth,
            "num_heads": config.heads,
            "mlp_ratio": config.mlp_ratio,
            "init_values": config.layer_scale_init,  # timm drops a None
            "use_abs_pos_emb": model.absolute_positions,
            "use_rel_pos_bias": model.relative_positions == "per_block",
        }
    description = {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "num_features": config.width,
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        "pretrained_cfg": {
            "num_classes": model.num_classes,
            "input_size": [3, config.image_size, config.image_size],
            "fixed_input_size": True,
            "pool_size": None,
            "crop_pct": _CROP_FRACTION,
            "interpolation": "bicubic",
            "mean": list(config.mean),
            "std": list(config.std),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    if model.class_names is not None:
        description["label_names"] = list(model.class_names)
    loading = 'import timm\n\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True).eval()\n' + (
        "logits = model(pixels)" if model.num_classes else "tokens = model.forward_features(pixels)"
    )
    return Exported(
        tensors=model.tensors, configs={"config.json": description}, library="timm", loading=loading
    )


# ----------------------------------------------------------------------------------------------- transformers


def to_transformers(model: VisionModel) -> Exported:
    """For `from_pretrained` of `BeitModel`, or of `BeitForImageClassification` where there is a head."""
    config = model.config
    is_classifier = model.num_classes > 0
    kind = "BeitForImageClassification" if is_classifier else "BeitModel"
    description: dict[str, Any] = {
        "architectures": [kind],
        "model_type": "beit",
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": int(config.width * config.mlp_ratio),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "layer_norm_eps": LAYER_NORM_EPS,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "use_mask_token": False,
        "use_absolute_position_embeddings": model.absolute_positions,
        "use_relative_position_bias": model.relative_positions == "per_block",
        "use_shared_relative_position_bias": False,
        "layer_scale_init_value": config.layer_scale_init,
        "use_mean_pooling": model.pooling == "mean",
        "dtype": "float32",
    }
    if is_classifier:
        names = model.class_names or [f"LABEL_{number}" for number in range(model.num_classes)]
        description["id2label"] = {str(number): name for number, name in enumerate(names)}
        description["label2id"] = {name: number for number, name in enumerate(names)}
    resize = round(config.image_size / _CROP_FRACTION)
    preprocessing = {
        "image_processor_type": "BeitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": resize},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": config.image_size, "width": config.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
        "do_reduce_labels": False,
    }
    loading = f'from transformers import {kind}\n\nmodel = {kind}.from_pretrained("FOLDER").eval()\n' + (
        "logits = model(pixels).logits" if is_classifier else "tokens = model(pixels).last_hidden_state"
    )
    return Exported(
        tensors=_transformers_names(model, "beit." if is_classifier else ""),
        configs={"config.json": description, "preprocessor_config.json": preprocessing},
        library="transformers",
        loading=loading,
    )


def _transformers_names(model: VisionModel, prefix: str) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for key, tensor in model.tensors.items():
        if key in ("head.weight", "head.bias"):
            renamed[key.replace("head", "classifier")] = tensor
        elif found := re.fullmatch(r"blocks\.(\d+)\.(.+)", key):
            place = f"{prefix}encoder.layer.{found[1]}."
            if found[2] == "attn.qkv.weight":
                for name, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                    renamed[f"{place}attention.attention.{name}.weight"] = part.clone()
            else:
                renamed[place + _TRANSFORMERS_BLOCK[found[2]]] = tensor
        else:
            renamed[prefix + _TRANSFORMERS_REST[key]] = tensor
    return renamed


# ------------------------------------------------------------------------------------------------ model card


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a model card says of a model, beside how it is loaded."""

    title: str
    what: str
    """Some sentences."""
    library: str | None
    """Of the hub's vocabulary; None for files no hub library reads."""
    task: str
    """Of the hub's vocabulary, such as image-feature-extraction."""
    sizes: Mapping[str, Any]
    provenance: Mapping[str, Any]
    metrics: Mapping[str, Any]
    loading: str
    """Python."""


def model_card(facts: CardFacts) -> str:
    """README.md of an export, in the hub's form. The licence is the user's to fill in, as the data are."""
    front = [*([f"library_name: {facts.library}"] if facts.library else []), f"pipeline_tag: {facts.task}"]
    lines = [
        "---",
        *front,
        "tags: [beit, beit-v2, masked-image-modeling]",
        "license:  # yours to fill in: it depends on the data and the weights this came from",
        "---",
        "",
        f"# {facts.title}",
        "",
        facts.what,
        "",
        "From the folder that holds this one, with normalised images `pixels` (float [B, 3, S, S]):",
        "",
        "```python",
        facts.loading,
        "```",
        "",
        *_table("Model", facts.sizes),
        *_table("Where it comes from", facts.provenance),
        *_table("Figures", facts.metrics),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _table(title: str, rows: Mapping[str, Any]) -> list[str]:
    shown = {name: value for name, value in rows.items() if value is not None}
    if not shown:
        return []
    cells = [f"| {name} | {_cell(value)} |" for name, value in shown.items()]
    return [f"## {title}", "", "| | |", "|---|---|", *cells, ""]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value).replace("|", "\\|").replace("\n", " ")

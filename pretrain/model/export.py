"""Backbones and classifiers for timm and transformers, with a model card: conversions of names and configs.

Neither library is imported: what they read is tensors, one JSON file and their own naming rules.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pretrain.model.backbone import BackboneConfig
from pretrain.model.classifier import TABLE, ClassifierConfig
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
    """A backbone or a classifier in the layout that both libraries share: a position table in every block."""

    tensors: dict[str, Tensor]
    """Weights in the fine-tuning layout, without indices."""
    config: ClassifierConfig
    """Sizes; a backbone has no classes and [CLS] pooling."""
    class_names: Sequence[str] | None = None
    """Names of the outputs in their order, where they are known."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Files for another program, and how they are loaded there."""

    states: Mapping[str, Mapping[str, Tensor]]
    """Weights under that program's names, by file name without its ending."""
    loading: str
    """Python that loads the model; `FOLDER` stands for where the files are."""
    library: str | None = None
    """Library of the hub's vocabulary; None for the official layouts."""
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """JSON files by name."""


def vision_model(
    tensors: Mapping[str, Tensor],
    config: BackboneConfig | ClassifierConfig,
    *,
    class_names: Sequence[str] | None = None,
    image_size: int | None = None,
) -> VisionModel:
    """A backbone without its pretraining heads, or a classifier; for images of another size, if given."""
    if isinstance(config, BackboneConfig):
        config = ClassifierConfig(backbone=config, num_classes=0, pooling="cls")
    resized, backbone = at_image_size(tensors, config.backbone, image_size)
    relative = "none" if config.relative_positions == "none" else "per_block"
    config = dataclasses.replace(config, backbone=backbone, relative_positions=relative)
    return VisionModel(tensors=per_block_tables(resized, backbone), config=config, class_names=class_names)


# ------------------------------------------------------------------------------------------------ timm


def to_timm(model: VisionModel) -> Exported:
    """For `timm.create_model("local-dir:FOLDER", pretrained=True)`, or any `Beit` of these arguments.

    [CLS] pooling is timm's `global_pool="token"`, whose final norm is on every token as in pretraining.
    """
    config, num_classes = model.config.backbone, model.config.num_classes
    size = (config.patch_size, config.width, config.depth, config.heads, config.mlp_ratio)
    arguments: dict[str, Any] = {
        "img_size": config.image_size,
        "global_pool": "avg" if model.config.pooling == "mean" else "token",
    }
    architecture = _TIMM_NAMES.get(size)
    if architecture is None or model.config.absolute_positions or model.config.relative_positions == "none":
        architecture = "beitv2_base_patch16_224"
        arguments |= {
            "patch_size": config.patch_size,
            "embed_dim": config.width,
            "depth": config.depth,
            "num_heads": config.heads,
            "mlp_ratio": config.mlp_ratio,
            "init_values": config.layer_scale_init,  # timm drops a None
            "use_abs_pos_emb": model.config.absolute_positions,
            "use_rel_pos_bias": model.config.relative_positions == "per_block",
        }
    description = {
        "architecture": architecture,
        "num_classes": num_classes,
        "num_features": config.width,
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        "pretrained_cfg": {
            "num_classes": num_classes,
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
        "logits = model(pixels)" if num_classes else "tokens = model.forward_features(pixels)"
    )
    return Exported(
        states={"model": model.tensors},
        configs={"config.json": description},
        library="timm",
        loading=loading,
    )


# ----------------------------------------------------------------------------------------------- transformers


def to_transformers(model: VisionModel) -> Exported:
    """For `from_pretrained` of `BeitModel`, or of `BeitForImageClassification` where there is a head."""
    config, num_classes = model.config.backbone, model.config.num_classes
    kind = "BeitForImageClassification" if num_classes else "BeitModel"
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
        "use_absolute_position_embeddings": model.config.absolute_positions,
        "use_relative_position_bias": model.config.relative_positions == "per_block",
        "use_shared_relative_position_bias": False,
        "layer_scale_init_value": config.layer_scale_init,
        "use_mean_pooling": model.config.pooling == "mean",
        "dtype": "float32",
    }
    if num_classes:
        names = model.class_names or [f"LABEL_{number}" for number in range(num_classes)]
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
        "logits = model(pixels).logits" if num_classes else "tokens = model(pixels).last_hidden_state"
    )
    return Exported(
        states={"model": _transformers_names(model, "beit." if num_classes else "")},
        configs={"config.json": description, "preprocessor_config.json": preprocessing},
        library="transformers",
        loading=loading,
    )


def _transformers_names(model: VisionModel, prefix: str) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for key, tensor in model.tensors.items():
        if key in ("head.weight", "head.bias"):
            renamed[key.replace("head", "classifier")] = tensor
        elif match := re.fullmatch(r"blocks\.(\d+)\.(.+)", key):
            place, name = f"{prefix}encoder.layer.{match[1]}.", match[2]
            if name == "attn.qkv.weight":
                for projection, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                    renamed[f"{place}attention.attention.{projection}.weight"] = part.clone()
            else:
                renamed[place + _TRANSFORMERS_BLOCK[name]] = tensor
        else:
            renamed[prefix + _TRANSFORMERS_REST[key]] = tensor
    return renamed


# ------------------------------------------------------------------------------------------------ model card


def model_card(
    title: str, text: str, loading: str, front: Mapping[str, str], header: Mapping[str, Any]
) -> str:
    """README.md of an export, in the hub's form. The licence is the user's to fill in, as the data are.

    front: lines of the hub's vocabulary, such as library_name; header: of the artifact, shown as it is.
    """
    lines = [
        "---",
        *(f"{name}: {value}" for name, value in front.items()),
        "tags: [beit, beit-v2, masked-image-modeling]",
        "license:  # yours to fill in: it depends on the data and the weights this came from",
        "---",
        "",
        f"# {title}",
        "",
        text,
        "",
        "From the folder that holds this one, with normalised images `pixels` (float [B, 3, S, S]):",
        "",
        *("```python", loading, "```"),
        "",
        "## Where it comes from",
        "",
        *("```json", json.dumps(header, indent=2, sort_keys=True, ensure_ascii=False), "```"),
    ]
    return "\n".join(lines) + "\n"

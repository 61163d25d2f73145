"""Teachers: frozen networks (or HOG) whose patch features VQ-KD learns to predict (§2.2).

A teacher is an argument of the training loop, never part of the tokenizer's state.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import artifacts
from pipeline.errors import InputError
from tokenizer.model.hog import Hog
from tokenizer.model.teacher_config import (
    Rgb,
    TeacherConfig,
    as_rgb,
    is_file,
    load_strictly,
    no_such_model,
    no_weights,
    read_state_dict,
    require_weights,
)
from tokenizer.model.vqkd import channels_first


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{list(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Teacher(nn.Module):
    """A frozen teacher behind one call: uint8 images in, one feature vector per patch out."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, body: nn.Module, *, name: str, image_size: int, input_size: int, mean: Rgb, std: Rgb
    ) -> None:
        super().__init__()
        self.body = body.eval().requires_grad_(False)
        self.name = name
        self.image_size = image_size
        self.input_size = input_size
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        identity = {"name": name, "input_size": input_size, "mean": list(mean), "std": list(std)}
        self.fingerprint = artifacts.fingerprint({**identity, "tensors": hash_tensors(body.state_dict())})
        with torch.no_grad():
            shape = tuple(body(torch.zeros(1, 3, input_size, input_size)).shape)
        if len(shape) != 3:
            raise InputError(f"teacher {name} gives a {list(shape)} tensor, not tokens; choose a ViT")
        self.dim = shape[2]
        """Length of a feature vector (T)."""
        self.grid = math.isqrt(shape[1])
        """Feature vectors along one side."""
        if self.grid**2 != shape[1]:
            raise InputError(f"teacher {name} gives {shape[1]} tokens, not a square grid; choose another")

    @property
    def spec(self) -> dict[str, Any]:
        """The teacher as the tokenizer artifact records it."""
        return {name: getattr(self, name) for name in ("name", "dim", "input_size", "fingerprint")}

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode, whatever is asked."""
        del mode
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Features of uint8 images [B, 3, S, S] or [B, S, S, 3] -> [B, N, T] float32, N = grid^2 row by row.

        The same crop the tokenizer sees, resized on the device if the teacher takes another size.
        """
        images = channels_first(pixels, self.image_size).float() / 255.0
        if self.input_size != self.image_size:
            size = (self.input_size, self.input_size)
            images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0.0, 1.0)
        return self.body((images - self.mean) / self.std).float()


def build_teacher(
    config: TeacherConfig, image_size: int, patch_size: int, device: torch.device | str = "cpu"
) -> Teacher:
    """The teacher of a configuration, for a tokenizer of this image and patch size.

    InputError when the model or its weights cannot be had, or its grid is not the tokenizer's.
    """
    grid = image_size // patch_size
    library, _, model_name = config.name.partition(":")
    match library:
        case "hog":
            teacher = _hog(config, image_size, grid)
        case "open_clip" if model_name:
            teacher = _open_clip(config, model_name, image_size)
        case "timm" if model_name:
            teacher = _timm(config, model_name, image_size)
        case _:
            raise InputError(
                f"unknown teacher {config.name!r}; use hog, open_clip:<model> (open_clip:ViT-B-16) "
                "or timm:<model> (timm:vit_base_patch16_224)"
            )
    if teacher.grid != grid:
        patch = teacher.input_size // teacher.grid
        raise InputError(
            f"teacher {config.name} at input size {teacher.input_size} has a grid of "
            f"{teacher.grid}x{teacher.grid}, the tokenizer of {grid}x{grid} ({image_size} / {patch_size}); "
            f"set the teacher's input_size to {grid * patch}, or choose image_size and patch_size for "
            f"{teacher.grid}x{teacher.grid}"
        )
    return teacher.to(device)


# ------------------------------------------------------------------------------------------------ hog


def _hog(config: TeacherConfig, image_size: int, grid: int) -> Teacher:
    if not (config.pretrained is config.mean is config.std is None) or config.model_kwargs:
        raise InputError("teacher hog takes no pretrained, mean, std or model_kwargs; leave them out")
    input_size = config.input_size or image_size
    if input_size % grid:
        raise InputError(
            f"teacher hog cannot cut input_size {input_size} into {grid}x{grid} patches; "
            f"take a multiple of {grid}"
        )
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    body = Hog(input_size // grid)
    return Teacher(body, name="hog", image_size=image_size, input_size=input_size, mean=mean, std=std)


# ------------------------------------------------------------------------------------------------ open_clip


class ClipTokens(nn.Module):
    """Patch tokens of a CLIP image tower in its joint space: ln_post on all tokens, no [CLS], times proj."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] -> [B, N, T]."""
        outputs = self.visual.forward_intermediates(  # type: ignore[operator]
            images, indices=1, normalize_intermediates=True, intermediates_only=True, output_fmt="NLC"
        )
        tokens = outputs["image_intermediates"][-1]
        proj = self.visual.proj
        return tokens if proj is None else tokens @ proj


def _open_clip(config: TeacherConfig, model_name: str, image_size: int) -> Teacher:
    import open_clip
    from open_clip.model import resize_pos_embed
    from open_clip.transformer import VisionTransformer

    if config.model_kwargs:
        raise InputError("model_kwargs are for timm teachers; leave them out for open_clip")
    if model_name not in open_clip.list_models():
        near = [
            known for known in open_clip.list_models() if known.lower().startswith(model_name.lower()[:5])
        ]
        raise no_such_model(config, "open_clip", near)
    weights = require_weights(config)
    tag = None if is_file(weights) else weights
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    if tag is not None and tag not in tags:
        raise InputError(
            f"open_clip:{model_name} has no weights {tag!r}; it has {', '.join(tags) or 'none'}, "
            "or give the path or URL of a .safetensors or .pt file"
        )
    known = open_clip.get_pretrained_cfg(model_name, tag) if tag else {}
    try:
        model = open_clip.create_model(
            model_name,
            pretrained=tag,
            precision="fp32",
            force_quick_gelu=config.force_quick_gelu or bool(known.get("quick_gelu")),
            force_image_size=config.input_size,
            pretrained_text=False,
        )
    except Exception as error:
        raise no_weights(config, error) from error
    visual = model.visual
    if not isinstance(visual, VisionTransformer) or visual.attn_pool is not None:
        raise InputError(
            f"open_clip:{model_name} has no plain ViT image tower; use timm:<model> for its weights"
        )
    if tag is None:
        tensors = read_state_dict(weights)
        if not any(name.startswith("visual.") for name in tensors):
            tensors = {f"visual.{name}": tensor for name, tensor in tensors.items()}
        resize_pos_embed(tensors, model)
        image = {n.removeprefix("visual."): t for n, t in tensors.items() if n.startswith("visual.")}
        load_strictly(visual, image, config)
    return Teacher(
        ClipTokens(visual),
        name=config.name,
        image_size=image_size,
        input_size=int(visual.conv1.stride[0] * visual.grid_size[0]),
        mean=config.mean or as_rgb(known.get("mean") or open_clip.OPENAI_DATASET_MEAN),
        std=config.std or as_rgb(known.get("std") or open_clip.OPENAI_DATASET_STD),
    )


# ------------------------------------------------------------------------------------------------ timm


class TimmTokens(nn.Module):
    """Patch tokens of a timm ViT after its final norm, without [CLS] and registers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] -> [B, N, T]."""
        tokens: Tensor = self.model.forward_features(images)  # type: ignore[operator]
        fc_norm = getattr(self.model, "fc_norm", None)
        # Mean-pooled models (BEiT, MAE fine-tuned) keep their final norm behind the pooling.
        if fc_norm is not None and isinstance(getattr(self.model, "norm", None), nn.Identity):
            tokens = fc_norm(tokens)
        prefix: int = getattr(self.model, "num_prefix_tokens", 0)
        return tokens[:, prefix:]


def _timm(config: TeacherConfig, model_name: str, image_size: int) -> Teacher:
    import timm
    from timm.data.config import resolve_model_data_config

    if config.force_quick_gelu:
        raise InputError("force_quick_gelu is for open_clip teachers; leave it out for timm")
    architecture, _, tag = model_name.partition(".")
    if not timm.is_model(architecture):
        raise no_such_model(config, "timm", timm.list_models(f"{architecture[:12]}*"))
    weights = require_weights(config) if config.pretrained is not None or not tag else tag
    from_file = config.pretrained is not None and is_file(weights)
    kwargs = {**config.model_kwargs, "num_classes": 0}
    if not from_file and config.input_size is not None:
        kwargs["img_size"] = config.input_size
    model_name = architecture if from_file else f"{architecture}.{weights}"
    try:
        model: Any = timm.create_model(model_name, pretrained=not from_file, **kwargs)
    except TypeError as error:
        raise InputError(f"{config.name} refuses model_kwargs {config.model_kwargs}: {error}") from error
    except Exception as error:
        raise no_weights(config, error) from error
    if from_file:
        tensors = read_state_dict(weights)
        heads = ("head.", "head_dist.")
        load_strictly(model, {n: t for n, t in tensors.items() if not n.startswith(heads)}, config)
        if config.input_size is not None:
            if not hasattr(model, "set_input_size"):
                raise InputError(f"timm:{architecture} has one input size; leave input_size out")
            model.set_input_size(img_size=config.input_size)
    data = resolve_model_data_config(model)
    patch_embed = getattr(model, "patch_embed", None)
    native = getattr(patch_embed, "img_size", None) or data["input_size"][-2:]
    return Teacher(
        TimmTokens(model),
        name=config.name,
        image_size=image_size,
        input_size=int(native[0]),
        mean=config.mean or as_rgb(data["mean"]),
        std=config.std or as_rgb(data["std"]),
    )

"""Which teacher, and its weights: the settings, and reading and fitting the file that they name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from pipeline import storage
from pipeline.errors import InputError
from pipeline.tensorfile import WRAPPERS, read_tensors

CHECKPOINT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")

Rgb = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Which features the tokenizer learns to predict. The default needs no weights."""

    name: str = "hog"
    """hog (hand-crafted, not semantic: edges and textures), open_clip:<model> (the paper's teacher is
    open_clip:ViT-B-16 with pretrained openai) or timm:<model> (timm:vit_base_patch16_224 with dino)."""
    pretrained: str | None = None
    """Weights: a tag of the library (downloaded), or a path or URL of a .safetensors or .pt state dict."""
    input_size: int | None = None
    """Side of the teacher's input, in pixels; images are resized to it. null: the model's own. Its grid of
    patches must be the tokenizer's."""
    mean: Rgb | None = None
    """Input mean per channel, for images in [0, 1]; null: the one the model was trained with."""
    std: Rgb | None = None
    """Input standard deviation per channel; null: the one the model was trained with."""
    force_quick_gelu: bool = False
    """open_clip only: for OpenAI's weights from a file (a tag knows by itself)."""
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    """timm only: arguments of the model's constructor, e.g. img_size, patch_size, depth of your own ViT."""


def with_absolute_weights(config: TeacherConfig) -> TeacherConfig:
    """The same teacher, its weights named so that any process finds them."""
    if config.pretrained is None or not is_file(config.pretrained):
        return config
    return dataclasses.replace(config, pretrained=storage.absolute(config.pretrained))


def require_weights(config: TeacherConfig) -> str:
    """The tag, path or URL of the weights; InputError where none is given."""
    if config.pretrained is None:
        raise InputError(
            f"teacher {config.name} needs weights: set pretrained to a tag, or to a .safetensors or .pt file"
        )
    return config.pretrained


def no_such_model(config: TeacherConfig, library: str, near: Sequence[str]) -> InputError:
    """The error for a name that a library does not know, with those near it."""
    return InputError(f"{library} has no model {config.name!r}; near it: {', '.join(near[:8]) or 'none'}")


def is_file(pretrained: str) -> bool:
    """True for a path or URL, false for a tag of a library."""
    return "/" in pretrained or pretrained.endswith(CHECKPOINT_SUFFIXES)


def no_weights(config: TeacherConfig, error: Exception) -> InputError:
    """The error for weights that a library could not get."""
    return InputError(
        f"teacher {config.name} with pretrained {config.pretrained!r} could not be made: "
        f"{_one_line(error)}; without a network, give pretrained a file"
    )


def read_state_dict(url: str) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, or of a .pt file with nothing but tensors; InputError otherwise."""
    tensors = read_tensors(url, wrappers=(*WRAPPERS, "teacher")).tensors
    return {name.removeprefix("module.").removeprefix("backbone."): value for name, value in tensors.items()}


def load_strictly(model: nn.Module, tensors: dict[str, Tensor], config: TeacherConfig) -> None:
    """Load tensors that fit the model exactly; InputError where they do not."""
    try:
        model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=True)
    except RuntimeError as error:
        raise InputError(
            f"{config.pretrained} does not fit {config.name}: {_one_line(error)}; "
            "check the model's name and model_kwargs"
        ) from None


def as_rgb(values: Sequence[float]) -> Rgb:
    """Three numbers, one per channel."""
    red, green, blue = values
    return float(red), float(green), float(blue)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]

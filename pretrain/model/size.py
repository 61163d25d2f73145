"""The user's part of a backbone's shape: a size by name (Table 9), and what should differ from it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import InputError
from pretrain.model.backbone import BackboneConfig

SizeName = Literal["tiny", "small", "base", "large"]

_SIZES = {
    "tiny": BackboneConfig(width=192, depth=12, heads=3),
    "small": BackboneConfig(width=384, depth=12, heads=6),
    "base": BackboneConfig(width=768, depth=12, heads=12),
    "large": BackboneConfig(width=1024, depth=24, heads=16, layer_scale_init=1e-5),
}


@dataclass(frozen=True, kw_only=True)
class BackboneSize:
    """The user's part of a `BackboneConfig`: a size by name, and what should differ from it.

    Image size, patch size and grid are the tokenizer's and arrive through `resolve`.
    """

    size: SizeName = "base"
    """Width x depth x heads: tiny 192x12x3, small 384x12x6, base 768x12x12, large 1024x24x16."""
    width: int | None = None
    """Channels of a token; null is the named size's."""
    depth: int | None = None
    """Transformer blocks; null is the named size's."""
    heads: int | None = None
    """Attention heads; null is the named size's."""
    layer_scale_init: float | None = None
    """First value of the layer scales; null is 0.1, for large 1e-5 (Table 9); 0 leaves them out."""
    drop_path: float = 0.0
    """Stochastic depth of the last block (Table 9: 0 for 300 epochs, 0.1 for 1600)."""

    def resolve(self, *, image_size: int, patch_size: int) -> BackboneConfig:
        """The complete config for images and patches of this size; InputError when it cannot be built."""
        if self.size not in _SIZES:
            raise InputError(f"no backbone size {self.size!r}; choose one of {', '.join(_SIZES)}")
        sizes = {name: getattr(self, name) for name in ("width", "depth", "heads", "layer_scale_init")}
        given = {name: value for name, value in sizes.items() if value is not None}
        shape = {"image_size": image_size, "patch_size": patch_size, "drop_path": self.drop_path}
        return dataclasses.replace(_SIZES[self.size], **shape, **given)

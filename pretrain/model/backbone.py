"""The student ViT of BEiT v2 (paper §2.3, Table 9): [CLS], layer scale, one shared relative-position table.

Parameter names are those of the published pretraining checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pretrain.model.positions import RelativePositionBias
from tokenizer.model.vit import LAYER_NORM_EPS, Block, PatchEmbed, drop_path_rates, rescale_residual_branches

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

INIT_STD = 0.02
INIT_TRUNCATE_AT = 0.02  # one sigma: what is drawn has a standard deviation of 0.0108 (reference.md §3)

# Tensors of a MIM model that its backbone has no use for.
HEAD_PREFIXES = ("lm_head.", "cls_pt_")

# Shapes below: B images, S pixels a side, G patches a side, N = G * G patches, T = N + 1 tokens ([CLS]
# first), D width, H heads.


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Everything that decides a backbone's tensors and what it expects to see."""

    image_size: int = 224
    """Pixels a side."""
    patch_size: int = 16
    """Pixels a side of a patch."""
    width: int = 768
    """Channels of a token."""
    depth: int = 12
    """Transformer blocks."""
    heads: int = 12
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Hidden channels of an MLP over `width`."""
    layer_scale_init: float = 0.1
    """First value of the per-channel scale of every branch; 0 leaves the scales out."""
    drop_path: float = 0.0
    """Stochastic depth of the last block; it grows linearly from 0 at the first."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Per-channel mean, in [0, 1], subtracted from images."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Per-channel standard deviation by which images are then divided."""

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise InputError(f"backbone.{name} is {getattr(self, name)}; it must be at least 1")
        if self.image_size % self.patch_size:
            raise InputError(
                f"image_size {self.image_size} does not divide by patch_size {self.patch_size}; change either"
            )
        if self.width % self.heads:
            raise InputError(
                f"backbone.width {self.width} does not divide by {self.heads} heads; change either"
            )
        if not 0.0 <= self.drop_path < 1.0:
            raise InputError(f"backbone.drop_path is {self.drop_path}; choose a rate from 0 up to below 1")
        if min(self.std) <= 0.0:
            raise InputError(f"the image std is {list(self.std)}; every channel needs a positive one")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and per row."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def num_patches(self) -> int:
        """N, patches of an image."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Features:
    """Features of images after the final norm: cls [B, D] and patches [B, N, D]."""

    cls: Tensor
    patches: Tensor


class Backbone(nn.Module):
    """ViT with one relative-position table added in every block, and no absolute positions.

    `MIM` extends it rather than holding it, so that its parameters keep their published, flat names.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embed = PatchEmbed(config.patch_size, 3, width)
        self.rel_pos_bias = RelativePositionBias(config.grid, config.heads)
        self.blocks = transformer_blocks(config, drop_path_rates(config.drop_path, config.depth))
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        # On the model's device, where making them anew for every batch would wait for the GPU.
        self.register_buffer("pixel_mean", torch.tensor(config.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(config.std).view(1, 3, 1, 1), persistent=False)

        init_trunc_normal(self.cls_token)
        init_trunc_normal(self.mask_token)
        self.apply(init_module)
        rescale_residual_branches(self.blocks)

    def embed(self, pixels: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens [B, T, D] of normalised pixels [B, 3, S, S]; the mask token where mask [B, N] bool holds."""
        check_pixels(pixels, self.config.image_size)
        x = self.patch_embed(pixels)
        if mask is not None:
            x = torch.where(mask[:, :, None], self.mask_token, x)
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)

    def features(self, pixels: Tensor) -> Features:
        """Features of normalised pixels [B, 3, S, S], nothing masked, after the final norm."""
        x = self.norm(self.layer_outputs(pixels)[-1])
        return Features(cls=x[:, 0], patches=x[:, 1:])

    def layer_outputs(self, pixels: Tensor) -> list[Tensor]:
        """Tokens [B, T, D] after each of the blocks, before any final norm."""
        relative_bias = self.rel_pos_bias()
        x = self.embed(pixels)
        outputs: list[Tensor] = []
        for block in self.blocks:
            x = block(x, relative_bias)
            outputs.append(x)
        return outputs

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, S, S] or [B, S, S, 3] -> float32 [B, 3, S, S], as in its training."""
        return normalize_images(images, self.pixel_mean, self.pixel_std)


def transformer_blocks(config: BackboneConfig, rates: Sequence[float]) -> nn.ModuleList:
    """Blocks of this width, one for each rate of stochastic depth."""
    return nn.ModuleList(
        Block(
            config.width,
            config.heads,
            mlp_ratio=config.mlp_ratio,
            layer_scale_init=config.layer_scale_init,
            drop_path=rate,
        )
        for rate in rates
    )


def check_pixels(pixels: Tensor, image_size: int) -> None:
    """ValueError unless pixels are [B, 3, S, S] of this size."""
    expected = (3, image_size, image_size)
    if pixels.shape[1:] != expected:
        raise ValueError(f"pixels are {tuple(pixels.shape[1:])} each, the model was built for {expected}")


def normalize_images(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] or [B, S, S, 3] -> float32 [B, 3, S, S]; mean and std [1, 3, 1, 1] in [0, 1]."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"expected a batch of uint8 images, got {images.dtype} {tuple(images.shape)}")
    if images.shape[1] != 3:
        images = images.permute(0, 3, 1, 2)
    return (images.float() / 255.0 - mean) / std


def init_trunc_normal(tensor: Tensor) -> None:
    """Fill with a normal of std 0.02 cut at one sigma, the start of every BEiT weight.

    By the inverse distribution function: torch's own draws again whatever falls outside, which at one sigma
    took 20 s for 100 M weights, against 1 s.
    """
    bound = math.erf(INIT_TRUNCATE_AT / INIT_STD / math.sqrt(2.0))
    with torch.no_grad():
        tensor.uniform_(-bound, bound).erfinv_().mul_(INIT_STD * math.sqrt(2.0))
        tensor.clamp_(-INIT_TRUNCATE_AT, INIT_TRUNCATE_AT)


def init_module(module: nn.Module) -> None:
    """Start values of one Linear or convolution: truncated normal weights, zero biases."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        init_trunc_normal(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

"""The Transformer block that every model here is made of, and the plain ViT of the VQ-KD encoder and decoder.

Parameter names follow the published BEiT v2 checkpoints, which are also timm's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-6

# Shapes below: B images, N patches, T = N + 1 tokens ([CLS] first), D width, H heads.


class Attention(nn.Module):
    """Multi-head self-attention with a query and a value bias and no key bias.

    Softmax is invariant to a key bias, so the published models leave it out.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, relative_bias: Tensor | None = None) -> Tensor:
        """x [B, T, D], relative_bias [1, H, T, T] added to the logits -> [B, T, D]."""
        batch, tokens, width = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = qkv.view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mask = None if relative_bias is None else relative_bias.to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm block; with `layer_scale_init` each branch has a learned per-channel scale (gamma)."""

    gamma_1: nn.Parameter | None
    gamma_2: nn.Parameter | None

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        layer_scale_init: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.drop_path = drop_path
        if layer_scale_init:
            self.gamma_1 = nn.Parameter(torch.full((width,), layer_scale_init))
            self.gamma_2 = nn.Parameter(torch.full((width,), layer_scale_init))
        else:
            self.gamma_1 = self.gamma_2 = None

    def forward(self, x: Tensor, relative_bias: Tensor | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        x = x + self._branch(self.attn(self.norm1(x), relative_bias), self.gamma_1)
        return x + self._branch(self.mlp(self.norm2(x)), self.gamma_2)

    def _branch(self, out: Tensor, gamma: Tensor | None) -> Tensor:
        out = out if gamma is None else gamma * out
        return drop_path(out, self.drop_path) if self.training else out


def drop_path(x: Tensor, rate: float) -> Tensor:
    """Stochastic depth: drop a sample's whole branch with probability `rate`, scale the others by 1/keep."""
    if rate == 0.0:
        return x
    keep = x.new_empty((x.shape[0], *[1] * (x.ndim - 1))).bernoulli_(1.0 - rate)
    return x * keep / (1.0 - rate)


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Linearly increasing rates, 0 at the first block and `rate` at the last."""
    return torch.linspace(0.0, rate, depth, device="cpu").tolist()


class PatchEmbed(nn.Module):
    """Non-overlapping patches to vectors: one strided convolution, flattened row by row."""

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, S, S] -> [B, N, D]."""
        return self.proj(x).flatten(2).transpose(1, 2)


@dataclass(frozen=True, kw_only=True)
class TransformerSize:
    """Width, depth and heads of one Transformer."""

    width: int
    depth: int
    heads: int


class VisionTransformer(nn.Module):
    """ViT with absolute positions, as VQ-KD uses it twice (reference: mean-pooling variant without a head).

    The encoder reads images; the decoder reads codes as a grid x grid image of `code_dim` channels with
    patches of 1. No layer scale, no relative positions; [CLS] takes part in attention and is then dropped.
    """

    def __init__(self, size: TransformerSize, *, grid: int, patch_size: int, in_channels: int) -> None:
        super().__init__()
        width = size.width
        self.patch_embed = PatchEmbed(patch_size, in_channels, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, grid * grid + 1, width))
        self.blocks = nn.ModuleList(Block(width, size.heads) for _ in range(size.depth))
        self.fc_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_linear)
        rescale_residual_branches(self.blocks)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, S, S] -> normalised patch features [B, N, D]."""
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.fc_norm(x[:, 1:])


def init_linear(module: nn.Module, *, std: float = 0.02, truncate_at: float = 2.0) -> None:
    """Truncated normal weights (cut at an absolute value, not in sigmas) and zero biases for a Linear.

    Convolutions keep torch's default, as in the reference VQ-KD.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=std, a=-truncate_at, b=truncate_at)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def rescale_residual_branches(blocks: nn.ModuleList, first: int = 1) -> None:
    """Divide what block i adds to the residual stream by sqrt(2 i), counting from `first` (BEiT's init)."""
    with torch.no_grad():
        for i, block in enumerate(blocks, start=first):
            assert isinstance(block, Block)
            block.attn.proj.weight.div_(math.sqrt(2.0 * i))
            block.mlp.fc2.weight.div_(math.sqrt(2.0 * i))

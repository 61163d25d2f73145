"""The paper's models written out literally: a state's tensors, one head, patch and code at a time.

reference.md §1, §3, §4. Slow and obvious, to hold the real models against.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


def norm(x: Tensor, state: State, name: str) -> Tensor:
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    return (x - mean) / (variance + 1e-6).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x: Tensor, state: State, name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def block(x: Tensor, state: State, name: str, heads: int, bias: Tensor | None = None) -> Tensor:
    width = x.shape[-1]
    depth = width // heads
    q, k, v = (norm(x, state, f"{name}.norm1") @ state[f"{name}.attn.qkv.weight"].T).split(width, dim=-1)
    q, v = q + state[f"{name}.attn.q_bias"], v + state[f"{name}.attn.v_bias"]
    mixed = []
    for head in range(heads):
        part = slice(head * depth, (head + 1) * depth)
        logits = (q[..., part] * depth**-0.5) @ k[..., part].transpose(1, 2)
        logits = logits if bias is None else logits + bias[head]
        mixed.append(logits.softmax(-1) @ v[..., part])
    x = x + state.get(f"{name}.gamma_1", 1.0) * linear(torch.cat(mixed, -1), state, f"{name}.attn.proj")
    hidden = linear(norm(x, state, f"{name}.norm2"), state, f"{name}.mlp.fc1")
    hidden = 0.5 * hidden * (1.0 + torch.erf(hidden / math.sqrt(2.0)))
    return x + state.get(f"{name}.gamma_2", 1.0) * linear(hidden, state, f"{name}.mlp.fc2")


def embed(images: Tensor, state: State, name: str) -> Tensor:
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    side = weight.shape[-1]
    tokens = []
    for y in range(0, images.shape[2], side):
        for x in range(0, images.shape[3], side):
            tokens.append(images[:, :, y : y + side, x : x + side].flatten(1) @ weight.flatten(1).T + bias)
    return torch.stack(tokens, dim=1)


def with_cls(x: Tensor, token: Tensor) -> Tensor:
    return torch.cat([token.expand(len(x), 1, -1), x], dim=1)


def position_bias(table: Tensor, grid: int) -> Tensor:
    """[H, T, T] by a loop over pairs of tokens."""
    index = torch.zeros(grid**2 + 1, grid**2 + 1, dtype=torch.int64)
    last = len(table) - 1
    for query in range(grid**2):
        index[0, query + 1], index[query + 1, 0] = last - 2, last - 1
        for key in range(grid**2):
            dy, dx = query // grid - key // grid, query % grid - key % grid
            index[query + 1, key + 1] = (dy + grid - 1) * (2 * grid - 1) + dx + grid - 1
    index[0, 0] = last
    return table[index].permute(2, 0, 1)


class ClipTower(nn.Module):
    """A CLIP image tower with its published names, over torch's own attention."""

    def __init__(self, size: int, patch: int, width: int, heads: int, out: int) -> None:
        super().__init__()
        self.heads = heads
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((size // patch) ** 2 + 1, width))
        self.proj = nn.Parameter(torch.randn(width, out))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        layer = nn.Module()
        layer.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        layer.ln_1, layer.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        layer.mlp = nn.Module()
        layer.mlp.c_fc, layer.mlp.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList([layer])

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = self.ln_pre(with_cls(x, self.class_embedding) + self.positional_embedding)
        for layer in self.transformer.resblocks:  # type: ignore[union-attr]
            y = layer.ln_1(x)
            x = x + layer.attn(y, y, y, need_weights=False)[0]
            y = layer.mlp.c_fc(layer.ln_2(x))
            x = x + layer.mlp.c_proj(y * (1.702 * y).sigmoid())
        return self.ln_post(x)[:, 1:] @ self.proj


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def slow_kmeans(tokens: Tensor, drawn: list[int]) -> Tensor:
    means = tokens[drawn].clone()
    for _ in range(10):
        nearest = (tokens @ means.T).argmax(-1)
        for code in nearest.unique().tolist():
            means[code] = unit(tokens[nearest == code].mean(0))
    return means


def slow_vqkd(state: State, pixels: Tensor, target: Tensor, drawn: list[int], *, training: bool) -> State:
    """Every value the fixtures hold; in training the codebook of `state` moves."""
    x = with_cls(embed(pixels, state, "encoder.patch_embed.proj"), state["encoder.cls_token"][0])
    x = x + state["encoder.pos_embed"]
    for i in range(2):
        x = block(x, state, f"encoder.blocks.{i}", heads=3)
    values = {"encoder_features": norm(x[:, 1:], state, "encoder.fc_norm")}
    hidden = linear(values["encoder_features"], state, "encode_task_layer.0").tanh()
    features = values["to_quantizer"] = linear(hidden, state, "encode_task_layer.2")
    z = values["z_l2"] = unit(features)
    flat = z.detach().flatten(0, 1)
    values["codebook_before"] = state["quantize.embedding.weight"].clone()
    if not state["quantize.embedding.initted"]:
        state["quantize.embedding.weight"] = slow_kmeans(flat, drawn)
        state["quantize.embedding.initted"] = torch.ones(1)
    codebook = state["quantize.embedding.weight"]
    codes = ((flat[:, None] - codebook[None]) ** 2).sum(-1).argmin(-1)
    chosen = codebook[codes].view_as(z)
    quantized = z + (chosen - z).detach()
    counts = torch.bincount(codes, minlength=len(codebook)).float()
    state["quantize.cluster_size"] = 0.99 * state["quantize.cluster_size"] + 0.01 * counts
    if training:
        moved = codebook.clone()
        for code in counts.nonzero().flatten().tolist():
            moved[code] = unit(0.99 * codebook[code] + 0.01 * unit(flat[codes == code].mean(0)))
        state["quantize.embedding.weight"] = moved
    batch, patches, dim = z.shape
    image = values["quantized_bchw"] = quantized.transpose(1, 2).reshape(batch, dim, 3, patches // 3)
    x = with_cls(embed(image, state, "decoder.patch_embed.proj"), state["decoder.cls_token"][0])
    x = x + state["decoder.pos_embed"]
    for i in range(2):
        x = block(x, state, f"decoder.blocks.{i}", heads=2)
    decoded = values["decoder_features"] = norm(x[:, 1:], state, "decoder.fc_norm")
    rec = values["rec"] = linear(
        linear(decoded, state, "decode_task_layer.0").tanh(), state, "decode_task_layer.2"
    )
    values["emb_loss"] = ((chosen - z) ** 2).mean()
    values["rec_loss"] = (1.0 - (unit(rec) * unit(target)).sum(-1)).mean()
    values["total_loss"] = values["emb_loss"] + values["rec_loss"]
    values |= {
        "codes": codes.view(batch, patches),
        "codebook_after": state["quantize.embedding.weight"].clone(),
    }
    values["usage_cluster_size_after"] = state["quantize.cluster_size"].clone()
    return values


def slow_mim(state: State, images: Tensor, mask: Tensor, codes: Tensor, layer: int) -> State:
    x = embed(images, state, "patch_embed.proj")
    x = torch.where(mask[:, :, None], state["mask_token"], x)
    x = with_cls(x, state["cls_token"][0])
    bias = position_bias(state["rel_pos_bias.relative_position_bias_table"], 3)
    early = x
    for i in range(3):
        x = block(x, state, f"blocks.{i}", 2, bias)
        early = x if i + 1 == layer else early
    aggregated = torch.cat([x[:, :1], early[:, 1:]], dim=1)
    for i in range(3):
        aggregated = block(aggregated, state, f"cls_pt_layers.{i}", 2, bias)
    values: State = {"labels": codes[mask], "total_loss": torch.zeros(())}
    for head, (tokens, prefix) in enumerate(((x, ""), (aggregated, "cls_pt_")), start=1):
        features = values[f"patch_features{head}"] = norm(tokens[:, 1:], state, f"{prefix}norm")
        logits = values[f"logits{head}_masked"] = linear(features[mask], state, f"{prefix}lm_head")
        loss = values[f"loss{head}"] = -logits.log_softmax(-1)[torch.arange(len(logits)), codes[mask]].mean()
        values[f"acc{head}"] = (logits.argmax(-1) == codes[mask]).float().mean()
        values["total_loss"] = values["total_loss"] + loss
    return values

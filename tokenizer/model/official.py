"""The published `vqkd_encoder_*` state dicts and our tokenizer, each as the other (reference.md §7).

Names are the same; what differs is two unused tensors that the official strict loader wants to see.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.tensorfile import as_float32, common_size, count_numbered, match
from tokenizer.model.vqkd import VQKD, VQKDConfig

DROPPED = ("teacher", "scaling", "loss")
"""Prefixes of what training checkpoints hold besides the model; the official loader leaves it out, too."""

HEAD_DIM = 64
"""Width of an attention head in every published model."""

UNUSED = ("quantize.embedding.cluster_size", "quantize.embedding.embed_avg")
"""Left from a VQ-VAE style moving average that the official code never runs."""

_TEACHERS = {512: "open_clip:ViT-B-16", 768: "timm:vit_base_patch16_224.dino"}
"""The two published kinds by the dimension of what they predict: CLIP projects to 512, DINO has its width."""

PER_CHANNEL = (
    (".norm1.weight", 0),
    (".norm2.weight", 0),
    (".attn.q_bias", 0),
    (".attn.proj.bias", 0),
    (".mlp.fc2.bias", 0),
)
"""Tensors of a block with one value per channel, and their axis."""


def is_tokenizer(names: Iterable[str]) -> bool:
    """Whether these are names of a VQ-KD tokenizer."""
    return any(name.startswith(("quantize.", "encode_task_layer.", "decode_task_layer.")) for name in names)


def vqkd_from_official(tensors: Mapping[str, Tensor], url: str, *, heads: int | None = None) -> VQKD:
    """The tokenizer with exactly these weights, in evaluation mode.

    Every size is read off the tensors, except the number of heads, which leaves no trace in them: `heads` of
    the encoder, else width / 64 as in every published file; the decoder's heads are as wide as the encoder's.
    Raises InputError that names the first key that is missing, misshapen or left over, or when the codebook
    was never started.
    """
    config, target_dim = vqkd_config(tensors, url, heads)
    with torch.device("meta"):  # names and shapes only
        model = VQKD(config, target_dim)
    expected = model.state_dict()
    codebook = expected["quantize.embedding.weight"]
    unused = {"quantize.embedding.cluster_size": codebook[:, 0], "quantize.embedding.embed_avg": codebook}
    present = {key: tensor for key, tensor in unused.items() if key in tensors}
    size = config.encoder_size
    what = f"a tokenizer of {size.depth} blocks of {size.width} with {config.codebook_size} codes"
    match({**expected, **present}, tensors, url, what)
    model.load_state_dict(as_float32({key: tensors[key] for key in expected}), assign=True)
    if model.quantize.needs_kmeans:
        raise InputError(
            f"{url}: quantize.embedding.initted is 0, so its codebook was never started; give a trained one"
        )
    return model.eval().requires_grad_(False)


def official_vqkd(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of our tokenizer as the official strict loader accepts it: with the unused tensors.

    Nothing reads those; they get the statistics and the codes that are in use.
    """
    cluster_size, codebook = tensors["quantize.cluster_size"], tensors["quantize.embedding.weight"]
    return {**tensors, UNUSED[0]: cluster_size.clone(), UNUSED[1]: codebook.clone()}


def published_teacher(target_dim: int) -> dict[str, Any]:
    """A teacher block like `Teacher.spec`, as far as the dimension of its features tells who it was."""
    return {
        "name": _TEACHERS.get(target_dim, "unknown"),
        "dim": target_dim,
        "input_size": None,
        "fingerprint": None,
    }


def vqkd_config(tensors: Mapping[str, Tensor], url: str, heads: int | None) -> tuple[VQKDConfig, int]:
    """The configuration that fits the tensors' shapes, and the teacher's dimension."""
    patch_size = common_size(
        tensors, url, [("encoder.patch_embed.proj.weight", 2), ("encoder.patch_embed.proj.weight", 3)]
    )
    num_tokens = common_size(tensors, url, [("encoder.pos_embed", 1), ("decoder.pos_embed", 1)])
    grid = math.isqrt(max(num_tokens - 1, 0))
    if grid * grid + 1 != num_tokens:
        raise InputError(
            f"{url}: encoder.pos_embed is for {num_tokens} tokens, which is no square grid and a [CLS]; "
            "check the file"
        )
    codebook_size = common_size(
        tensors,
        url,
        [("quantize.embedding.weight", 0), ("quantize.cluster_size", 0), *((key, 0) for key in UNUSED)],
    )
    code_dim = common_size(
        tensors,
        url,
        [
            ("quantize.embedding.weight", 1),
            ("encode_task_layer.2.weight", 0),
            ("encode_task_layer.2.bias", 0),
            ("decoder.patch_embed.proj.weight", 1),
        ],
    )
    target_dim = common_size(
        tensors, url, [("decode_task_layer.2.weight", 0), ("decode_task_layer.2.bias", 0)]
    )
    width = common_size(tensors, url, PER_CHANNEL, prefix="encoder.blocks.0")
    decoder_width = common_size(tensors, url, PER_CHANNEL, prefix="decoder.blocks.0")
    if heads is None and width % HEAD_DIM:
        raise InputError(
            f"{url}: its encoder is {width} wide, which is no multiple of {HEAD_DIM}, and weights do not "
            "tell the number of attention heads; give --heads"
        )
    head_dim = HEAD_DIM if heads is None else max(width // max(heads, 1), 1)
    config = VQKDConfig(
        image_size=grid * patch_size,
        patch_size=patch_size,
        width=width,
        depth=count_numbered(tensors, "encoder.blocks."),
        heads=width // head_dim if heads is None else heads,
        decoder_depth=count_numbered(tensors, "decoder.blocks."),
        decoder_width=decoder_width,
        decoder_heads=max(1, decoder_width // head_dim),
        codebook_size=codebook_size,
        code_dim=code_dim,
    )
    return config, target_dim

"""VQ-KD held against a run of the reference: every intermediate, losses, gradients, codebook, three steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.reference.fixtures import GRADIENTS, Checks, Fixture, divisors, gradients_of, nearest
from pipeline.errors import InputError
from pipeline.tensorfile import count_numbered
from pipeline.training.optim import OptimConfig
from pipeline.training.worker import Worker
from tokenizer.model.official import UNUSED, vqkd_config
from tokenizer.model.quantizer import CodeUsage, l2_normalize
from tokenizer.model.vqkd import VQKD, VQKDConfig, VQKDOutput

ALONE = Worker()
TEACHER = "teacher_model.visual."
NOT_OURS = (TEACHER, "scaling_layer.", *UNUSED)


class _Case:
    """A fixture's arrays and weights, and our model built to fit them."""

    def __init__(self, fixture: Fixture) -> None:
        self.io, self.meta = fixture.arrays("_train_io.npz"), fixture.meta()
        weights = fixture.tensors("init")
        self.state = {key: tensor for key, tensor in weights.items() if not key.startswith(NOT_OURS)}
        self.shift, self.scale = weights["scaling_layer.shift"], weights["scaling_layer.scale"]
        self.tower = {key.removeprefix(TEACHER): t for key, t in weights.items() if key.startswith(TEACHER)}
        config, self.target_dim = vqkd_config(self.state, fixture.stem, heads=1)
        config = config.resolved()

        # Head counts leave no trace in weights: those count that reproduce the reference best.
        def encoded(heads: int) -> Tensor:
            return self.model(replace(config, heads=heads)).encoder(self.io["preprocessed"])

        def decoded(heads: int) -> Tensor:
            return self.model(replace(config, decoder_heads=heads)).decoder(self.io["quantized_bchw"])

        def predicted(heads: int) -> Tensor:
            return clip_tokens(self.tower, self.io["teacher_input"], heads)

        heads = nearest(divisors(config.encoder_size.width), encoded, self.io["encoder_features"])
        decoder_heads = nearest(divisors(config.decoder_size.width), decoded, self.io["decoder_features"])
        self.config = replace(config, heads=heads, decoder_heads=decoder_heads)
        self.teacher_heads = nearest(divisors(len(self.tower["proj"])), predicted, self.io["target"])

    def model(self, config: VQKDConfig | None = None) -> VQKD:
        """Ours, in the fixture's initial state and training mode."""
        model = VQKD(config or self.config, self.target_dim)
        model.load_state_dict(self.state)
        return model.train()

    def teacher_input(self, pixels: Tensor) -> Tensor:
        """Input of the teacher for pixels [B, 3, S, S] in [-1, 1]."""
        return ((pixels + 1.0) / 2.0 - self.shift) / self.scale

    @torch.no_grad()
    def start_codebook_(self, model: VQKD, pixels: Tensor) -> None:
        """K-means from the tokens that the reference drew; nothing where the codebook needs no start."""
        if model.quantize.needs_kmeans:
            tokens = l2_normalize(model.encode_features(pixels).flatten(0, 1))
            drawn = self.meta.get("randperm_first", [])
            if len(drawn) != self.config.codebook_size or max(drawn) >= len(tokens):
                raise InputError(f"`randperm_first` does not list {self.config.codebook_size} of the tokens")
            model.quantize.kmeans_init_(tokens, ALONE, start=tokens[torch.tensor(drawn)])


def check_vqkd(fixture: Fixture, checks: Checks) -> None:
    """Every quantity of a `vqkd_*` fixture; sizes come from its weights, heads by trial."""
    case = _Case(fixture)
    io, pixels = case.io, case.io["preprocessed"]
    model = case.model()
    waits = model.quantize.needs_kmeans
    case.start_codebook_(model, pixels)
    rows = {
        "teacher_input": case.teacher_input(pixels),
        "target": clip_tokens(case.tower, io["teacher_input"], case.teacher_heads),
        "preprocessed": _to_unit_range(io["images"]),
        **_quantities(model, case),
    }
    del rows["usage_cluster_size_after"]
    heads = f"encoder heads {case.config.heads}, decoder heads {case.config.decoder_heads}, by trial"
    notes = {"encoder_features": heads, "codes": "k-means start" if waits else ""}
    for name, value in rows.items():
        checks.compare(name, value, io[name], notes.get(name, ""))

    # Straight-through gradients, then what the codebook makes of the step.
    out: VQKDOutput = model(pixels, io["target"])
    out.loss.backward()
    ours, gradients = gradients_of(model), fixture.tensors("grads")
    checks.compare_all("gradients", ours, gradients)
    norm = nn.utils.get_total_norm(list(ours.values()))
    checks.compare("gradient norm", norm, torch.tensor(case.meta["grad_norm"]), tolerance=GRADIENTS)
    assert out.code_sums is not None
    model.quantize.update_(out.code_sums, ALONE)
    codebook, usage = model.quantize.codebook, model.quantize.cluster_size
    checks.compare("codebook_after, one EMA update", codebook, io["codebook_after"])
    checks.compare("usage_cluster_size_after", usage, io["usage_cluster_size_after"])
    checks.leave(io.keys() - {"images", "codebook_after"})

    # Evaluation, in the state the reference evaluated: its k-means start needs an update of the codebook.
    state = "after one update of the codebook" if waits else "before the codebook's update"
    values = _quantities((model if waits else case.model()).eval(), case)
    for name, theirs in fixture.arrays("_eval_io.npz").items():
        if name in values:
            checks.compare(f"evaluation {name}", values[name], theirs, state if name == "codes" else "")
        else:
            checks.leave([f"evaluation {name}"])

    # Optimizer steps as in the recipe, each on its own images, codebook updates included.
    model = case.model()

    def losses(step: Mapping[str, Any]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step["image_seed"])
        pixels = _to_unit_range(torch.rand(io["images"].shape, generator=generator))
        case.start_codebook_(model, pixels)
        target = clip_tokens(case.tower, case.teacher_input(pixels), case.teacher_heads)
        out: VQKDOutput = model(pixels, target)
        assert out.code_sums is not None
        model.quantize.update_(out.code_sums, ALONE)
        return {"total": out.loss, "quant": out.emb_loss, "rec": out.rec_loss}

    checks.compare_steps(model, OptimConfig(weight_decay=1e-4, betas=(0.9, 0.99)), case.meta, losses)
    after = {key: t for key, t in fixture.tensors("after3").items() if not key.startswith(NOT_OURS)}
    checks.compare_all("three steps: weights and codebook", model.state_dict(), after, gradients)


@torch.no_grad()
def _quantities(model: VQKD, case: _Case) -> dict[str, Tensor]:
    """Everything a forward pass computes, by the names of the fixtures."""
    pixels = case.io["preprocessed"]
    features = model.encode_features(pixels)
    quantized = model.quantize(features)
    image = quantized.quantized.transpose(1, 2).unflatten(2, (case.config.grid, case.config.grid))
    out: VQKDOutput = model(pixels, case.io["target"])
    # Evaluation changes no state here; what it does to the reference's statistics follows from the codes.
    usage = CodeUsage(model.quantize.codebook_size)
    usage.add(out.codes)
    decay = model.quantize.decay
    return {
        "encoder_features": model.encoder(pixels),
        "to_quantizer": features,
        "z_l2": l2_normalize(features),
        "codebook_before": case.state["quantize.embedding.weight"],
        "codes": out.codes,
        "quantized_bchw": image,
        "decoder_features": model.decoder(image),
        "rec": model.decode(quantized.quantized),
        "emb_loss": out.emb_loss,
        "rec_loss": out.rec_loss,
        "total_loss": out.loss,
        "usage_cluster_size_after": decay * model.quantize.cluster_size + (1.0 - decay) * usage.counts,
    }


@torch.no_grad()
def clip_tokens(tower: Mapping[str, Tensor], images: Tensor, heads: int) -> Tensor:
    """Patch features [B, N, T] of a CLIP image tower for images [B, 3, S, S] (reference.md §1.5)."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], tower[f"{name}.weight"], tower[f"{name}.bias"])

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, tower[f"{name}.weight"], tower[f"{name}.bias"])

    kernel = tower["conv1.weight"]
    x = F.conv2d(images, kernel, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    batch, width = x.shape[0], x.shape[2]
    x = torch.cat([tower["class_embedding"].expand(batch, 1, width), x], dim=1)
    x = norm(x + tower["positional_embedding"], "ln_pre")
    for i in range(count_numbered(tower, "transformer.resblocks.")):
        block = f"transformer.resblocks.{i}"
        weight, bias = tower[f"{block}.attn.in_proj_weight"], tower[f"{block}.attn.in_proj_bias"]
        qkv = F.linear(norm(x, f"{block}.ln_1"), weight, bias)
        q, k, v = qkv.view(batch, -1, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + linear(mixed, f"{block}.attn.out_proj")
        hidden = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        x = x + linear(hidden * torch.sigmoid(1.702 * hidden), f"{block}.mlp.c_proj")
    return norm(x, "ln_post")[:, 1:] @ tower["proj"]


def _to_unit_range(images: Tensor) -> Tensor:
    """Images in [0, 1] to [-1, 1] as the reference does it, by way of 0 to 255."""
    return images * 255.0 / 127.5 - 1.0

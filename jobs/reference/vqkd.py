"""VQ-KD held against a run of the reference: every intermediate, losses, gradients, codebook, three steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.reference.fixtures import (
    FORWARD,
    GRADIENTS,
    WEIGHTS,
    Checks,
    Fixture,
    gradients_of,
    relative_difference,
)
from pipeline.errors import InputError
from pipeline.tensorfile import count_numbered
from pipeline.training.optim import OptimConfig, build_optimizer, set_lr
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
        self.io, self.meta = fixture.arrays("train_io"), fixture.meta()
        weights = fixture.tensors("init")
        self.state = {key: tensor for key, tensor in weights.items() if not key.startswith(NOT_OURS)}
        self.shift, self.scale = weights["scaling_layer.shift"], weights["scaling_layer.scale"]
        self.tower = {key.removeprefix(TEACHER): t for key, t in weights.items() if key.startswith(TEACHER)}
        config, self.target_dim = vqkd_config(self.state, fixture.stem, heads=1)
        io, width, decoder_width = self.io, config.encoder_size.width, config.decoder_size.width

        # Head counts leave no trace in weights: those count that reproduce the reference best.
        def encoded(heads: int) -> Tensor:
            return self.model(replace(config, heads=heads, decoder_heads=1)).encoder(io["preprocessed"])

        def decoded(heads: int) -> Tensor:
            return self.model(replace(config, heads=1, decoder_heads=heads)).decoder(io["quantized_bchw"])

        def predicted(heads: int) -> Tensor:
            return clip_tokens(self.tower, io["teacher_input"], heads)

        heads = _best_heads(width, encoded, io["encoder_features"])
        decoder_heads = _best_heads(decoder_width, decoded, io["decoder_features"])
        self.config = replace(config, heads=heads, decoder_heads=decoder_heads)
        self.teacher_heads = _best_heads(self.tower["proj"].shape[0], predicted, io["target"])

    def model(self, config: VQKDConfig | None = None) -> VQKD:
        """Ours, in the fixture's initial state and training mode."""
        model = VQKD(config or self.config, self.target_dim)
        model.load_state_dict(self.state)
        return model.train()

    def teacher_input(self, pixels: Tensor) -> Tensor:
        """Input of the teacher for pixels [B, 3, S, S] in [-1, 1]."""
        return ((pixels + 1.0) / 2.0 - self.shift) / self.scale

    def target(self, teacher_input: Tensor) -> Tensor:
        """Features [B, N, T] of the fixture's own teacher."""
        return clip_tokens(self.tower, teacher_input, self.teacher_heads)

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
    checks.compare("teacher_input", case.teacher_input(pixels), io["teacher_input"], FORWARD)
    checks.compare("target", case.target(io["teacher_input"]), io["target"], FORWARD)
    checks.compare("preprocessed", _to_unit_range(io["images"]), pixels, FORWARD)
    model = case.model()
    waits = model.quantize.needs_kmeans
    case.start_codebook_(model, pixels)
    heads = f"encoder heads {case.config.heads}, decoder heads {case.config.decoder_heads}, by trial"
    notes = {"encoder_features": heads, "codes": "k-means start" if waits else ""}
    for name, value in _quantities(model, case).items():
        if name != "usage_cluster_size_after":
            checks.compare(name, value, io[name], FORWARD, notes.get(name, ""))

    # Straight-through gradients, then what the codebook makes of the step.
    out: VQKDOutput = model(pixels, io["target"])
    out.loss.backward()
    ours, gradients = gradients_of(model), fixture.tensors("grads")
    checks.compare_all("gradients", ours, gradients, GRADIENTS)
    norm = nn.utils.get_total_norm(list(ours.values()))
    checks.compare("gradient norm", norm, torch.tensor(case.meta["grad_norm"]), GRADIENTS)
    assert out.code_sums is not None
    model.quantize.update_(out.code_sums, ALONE)
    codebook, usage = model.quantize.codebook, model.quantize.cluster_size
    checks.compare("codebook_after, one EMA update", codebook, io["codebook_after"], FORWARD)
    checks.compare("usage_cluster_size_after", usage, io["usage_cluster_size_after"], FORWARD)
    checks.leave(io.keys() - {"images", "codebook_after"})

    # Evaluation, in the state the reference evaluated: its k-means start needs an update of the codebook.
    state = "after one update of the codebook" if waits else "before the codebook's update"
    values = _quantities((model if waits else case.model()).eval(), case)
    for name, theirs in fixture.arrays("eval_io").items():
        if name in values:
            note = state if name == "codes" else ""
            checks.compare(f"evaluation {name}", values[name], theirs, FORWARD, note)
        else:
            checks.leave([f"evaluation {name}"])
    after = {key: t for key, t in fixture.tensors("after3").items() if not key.startswith(NOT_OURS)}
    _check_steps(case, after, gradients, checks)


@torch.no_grad()
def _quantities(model: VQKD, case: _Case) -> dict[str, Tensor]:
    """Everything a forward pass computes, by the names of the fixtures."""
    pixels = case.io["preprocessed"]
    features = model.encode_features(pixels)
    quantized = model.quantize(features)
    image = _as_image(quantized.quantized)
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


def _check_steps(
    case: _Case, after: Mapping[str, Tensor], gradients: Mapping[str, Tensor], checks: Checks
) -> None:
    """Optimizer steps as in the recipe, each on its own images, codebook updates included."""
    model = case.model()
    optimizer = build_optimizer(model, OptimConfig(weight_decay=1e-4, betas=(0.9, 0.99)), batch_size=1)
    figures: dict[str, list[Tensor]] = {"total": [], "quant": [], "rec": [], "grad_norm": []}
    for step, rate in zip(case.meta["three_steps"], case.meta["lrs"], strict=True):
        generator = torch.Generator().manual_seed(step["image_seed"])
        pixels = _to_unit_range(torch.rand(case.io["images"].shape, generator=generator))
        case.start_codebook_(model, pixels)
        out: VQKDOutput = model(pixels, case.target(case.teacher_input(pixels)))
        optimizer.zero_grad()
        out.loss.backward()
        norm = nn.utils.get_total_norm(list(gradients_of(model).values()))
        set_lr(optimizer, rate)
        optimizer.step()
        assert out.code_sums is not None
        model.quantize.update_(out.code_sums, ALONE)
        for values, value in zip(figures.values(), (out.loss, out.emb_loss, out.rec_loss, norm), strict=True):
            values.append(value.detach())
    checks.compare_steps(case.meta["three_steps"], figures)
    name = "three steps: weights and codebook"
    checks.compare_all(name, model.state_dict(), after, WEIGHTS, gradients=gradients)


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


@torch.no_grad()
def _best_heads(width: int, compute: Callable[[int], Tensor], expected: Tensor) -> int:
    """The number of heads, among those that a width allows, whose result is nearest to the expected one."""
    allowed = [heads for heads in range(1, width + 1) if width % heads == 0]
    return min(allowed, key=lambda heads: relative_difference(compute(heads), expected))


def _to_unit_range(images: Tensor) -> Tensor:
    """Images in [0, 1] to [-1, 1] as the reference does it, by way of 0 to 255."""
    return images * 255.0 / 127.5 - 1.0


def _as_image(tokens: Tensor) -> Tensor:
    """[B, N, D] -> [B, D, G, G]."""
    grid = round(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).unflatten(2, (grid, grid))

"""VQ-KD held against a run of the reference: every intermediate, losses, gradients, codebook, three steps."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.reference.fixtures import (
    FORWARD,
    GRADIENTS,
    WEIGHTS,
    Checks,
    Fixture,
    FixtureError,
    best_by_trial,
    counts_in,
    divisors,
    grid_of,
    load_exactly,
    need,
    num_blocks,
    numbers_of,
    recipe,
    relative_difference,
)
from pipeline.training.optim import build_optimizer, set_lr
from pipeline.training.worker import Worker
from tokenizer.model.quantizer import CodeUsage, l2_normalize
from tokenizer.model.vqkd import VQKD, VQKDConfig

ALONE = Worker()

# Two tensors of a quantizer that the reference never reads, and its teacher, which is no part of ours.
UNUSED = ("quantize.embedding.cluster_size", "quantize.embedding.embed_avg")
TEACHER = ("teacher_model.", "scaling_layer.")

DINO_TO_CLIP = {
    r"^patch_embed\.proj": "conv1",
    r"^cls_token$": "class_embedding",
    r"^pos_embed$": "positional_embedding",
    r"^blocks\.": "transformer.resblocks.",
    r"\.norm(\d)\.": r".ln_\1.",
    r"\.attn\.qkv\.": ".attn.in_proj_",
    r"\.attn\.proj\.": ".attn.out_proj.",
    r"\.mlp\.fc1\.": ".mlp.c_fc.",
    r"\.mlp\.fc2\.": ".mlp.c_proj.",
    r"^norm\.": "ln_post.",
}
"""One family of names for both teachers."""

COMPARED = {
    "images", "preprocessed", "teacher_input", "target", "encoder_features", "to_quantizer", "z_l2",
    "codebook_before", "quantized_bchw", "codes", "emb_loss", "codebook_after", "usage_cluster_size_after",
    "decoder_features", "rec", "rec_loss", "total_loss",
}  # fmt: skip


def check_vqkd(fixture: Fixture, checks: Checks) -> None:
    """Every quantity of a `vqkd_*` fixture; sizes come from its weights, heads by trial."""
    case = _Case(fixture)
    io = case.io
    note = f"encoder heads {case.config.heads}, decoder heads {case.config.decoder_heads}, by trial"
    pixels, target = case.pixels, need(io, "target")

    # The teacher's side, then ours from the images to a prediction of it.
    if case.teacher:
        teacher_input = case.teacher_input(pixels)
        checks.close("teacher_input", teacher_input, need(io, "teacher_input"), FORWARD)
        checks.close("target", case.teacher_features(teacher_input), target, FORWARD)
    model = case.model()
    checks.close("preprocessed", to_unit_range(need(io, "images")), pixels, FORWARD)
    with torch.no_grad():
        encoded = model.encoder(pixels)
        features = model.encode_features(pixels)
    checks.close("encoder_features", encoded, need(io, "encoder_features"), FORWARD, note)
    checks.close("to_quantizer", features, need(io, "to_quantizer"), FORWARD)
    checks.close("z_l2", l2_normalize(features), need(io, "z_l2"), FORWARD)
    before, waits = need(io, "codebook_before"), model.quantize.needs_kmeans
    if not waits or not before.any():
        checks.close("codebook_before", case.state["quantize.embedding.weight"], before, FORWARD)
    case.start_codebook_(model, features)
    if waits and before.any():
        checks.close("codebook_before", model.quantize.codebook, before, FORWARD, "after k-means")
    with torch.no_grad():
        quantized = model.quantize(features)
        image = _as_image(quantized.quantized)
        decoded = model.decoder(image)
        predicted = model.decode_task_layer(decoded)
    codes = need(io, "codes").flatten()
    checks.equal("codes", quantized.codes.flatten(), codes, "k-means start" if waits else "")
    checks.close("quantized_bchw", image, need(io, "quantized_bchw"), FORWARD)
    checks.close("decoder_features", decoded, need(io, "decoder_features"), FORWARD)
    checks.close("rec", predicted, need(io, "rec"), FORWARD)

    # Losses and straight-through gradients, then what the codebook makes of the step.
    out = model(pixels, target)
    for name, value in (("emb_loss", out.emb_loss), ("rec_loss", out.rec_loss), ("total_loss", out.loss)):
        checks.close(name, value, need(io, name), FORWARD)
    out.loss.backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    checks.all_close("gradients", ours, fixture.tensors("grads"), GRADIENTS)
    if "grad_norm" in case.meta:
        norm = torch.nn.utils.get_total_norm(list(ours.values()))
        checks.close("gradient norm", norm, torch.tensor(case.meta["grad_norm"]), GRADIENTS)
    assert out.code_sums is not None
    model.quantize.update_(out.code_sums, ALONE)
    checks.close(
        "codebook_after, one EMA update", model.quantize.codebook, need(io, "codebook_after"), FORWARD
    )
    usage = need(io, "usage_cluster_size_after")
    checks.close("usage_cluster_size_after", model.quantize.cluster_size, usage, FORWARD)
    checks.leave(sorted(io.keys() - COMPARED))

    _check_evaluation(case, model, checks)
    _check_steps(case, checks)


def _check_evaluation(case: _Case, updated: VQKD, checks: Checks) -> None:
    """Evaluation mode, in the state the reference evaluated: before or after one update of the codebook."""
    expected, initial = case.fixture.arrays("eval"), case.model()
    with torch.no_grad():
        case.start_codebook_(initial, initial.encode_features(case.pixels))
    models = {"before the codebook's update": initial, "after one update of the codebook": updated}
    candidates = {state: _evaluated(model, case) for state, model in models.items()}

    def difference(state: str) -> float:
        found = candidates[state]
        return max(
            relative_difference(v.flatten(), need(expected, name).flatten()) for name, v in found.items()
        )

    state = min(candidates, key=difference)
    for name, value in candidates[state].items():
        if name == "codes":
            checks.equal("evaluation codes", value.flatten(), expected[name].flatten(), state)
        else:
            checks.close(f"evaluation {name}", value, expected[name], FORWARD)
    checks.leave(f"evaluation {name}" for name in sorted(expected.keys() - candidates[state].keys()))


@torch.no_grad()
def _evaluated(model: VQKD, case: _Case) -> dict[str, Tensor]:
    """What evaluation gives, by the names of the fixtures."""
    out = model.eval()(case.pixels, need(case.io, "target"))
    quantized = model.quantize(model.encode_features(case.pixels)).quantized
    # Here evaluation changes no state; what it does to the reference's statistics follows from the codes.
    usage = CodeUsage(model.quantize.codebook_size)
    usage.add(out.codes)
    decay = model.quantize.decay
    return {
        "codes": out.codes,
        "emb_loss": out.emb_loss,
        "rec_loss": out.rec_loss,
        "total_loss": out.loss,
        "quantized_bchw": _as_image(quantized),
        "rec": model.decode(quantized),
        "usage_cluster_size_after": decay * model.quantize.cluster_size + (1.0 - decay) * usage.counts,
    }


def _check_steps(case: _Case, checks: Checks) -> None:
    """Optimizer steps as in the recipe, each on its own images, codebook updates included."""
    steps, rates = case.meta.get("three_steps"), case.meta.get("lrs")
    after = {key: tensor for key, tensor in case.fixture.tensors("after3").items() if _is_ours(key)}
    if not steps or not rates or len(steps) != len(rates) or not after:
        checks.fail("three steps", "meta has no `three_steps` and `lrs` of one length, or there is no after3")
        return
    model = case.model().train()
    optimizer = build_optimizer(
        model,
        recipe(case.meta, weight_decay=1e-4, betas=(0.9, 0.99)),
        batch_size=1,
    )
    losses: dict[str, list[Tensor]] = {"total": [], "quant": [], "rec": []}
    norms: list[Tensor] = []
    for step, rate in zip(steps, rates, strict=True):
        images, target = case.images_of(step)
        pixels = to_unit_range(images)
        if model.quantize.needs_kmeans:
            with torch.no_grad():
                case.start_codebook_(model, model.encode_features(pixels))
        out = model(pixels, target)
        optimizer.zero_grad()
        out.loss.backward()
        norms.append(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
        set_lr(optimizer, rate)
        optimizer.step()
        model.quantize.update_(out.code_sums, ALONE)
        for name, value in (("total", out.loss), ("quant", out.emb_loss), ("rec", out.rec_loss)):
            losses[name].append(value.detach())
    for name, values in losses.items():
        if all(name in step for step in steps):
            checks.close(f"three steps: {name} loss", torch.stack(values), numbers_of(steps, name), FORWARD)
    if all("grad_norm" in step for step in steps):
        checks.close(
            "three steps: gradient norms", torch.stack(norms), numbers_of(steps, "grad_norm"), GRADIENTS
        )
    counted = counts_in(case.fixture.tensors("grads"))
    state = model.state_dict()
    checks.all_close("three steps: weights and codebook", state, after, WEIGHTS, counted=counted)


class _Case:
    """A fixture's arrays and weights, and our model built to fit them."""

    def __init__(self, fixture: Fixture) -> None:
        self.fixture = fixture
        self.io, self.meta = fixture.arrays("io"), fixture.meta()
        everything = fixture.tensors("init")
        self.state = {key: tensor for key, tensor in everything.items() if _is_ours(key)}
        self.teacher = {key: tensor for key, tensor in everything.items() if key.startswith(TEACHER)}
        self.pixels = need(self.io, "preprocessed")
        self.initted = bool(need(self.state, "quantize.embedding.initted").item())
        self.target_dim = need(self.state, "decode_task_layer.2.weight").shape[0]
        self.config = self._config()
        side = self.config.image_size
        if self.pixels.shape[1:] != (3, side, side):
            raise FixtureError(
                f"images of shape {list(self.pixels.shape)} do not fit weights for {side}x{side} pixels"
            )
        self._find_heads()
        if self.teacher:
            self._tower = clip_names(self.teacher)
            width = need(self._tower, "class_embedding").shape[-1]
            self._teacher_heads = best_by_trial(divisors(width), self._teacher_difference)

    def model(self) -> VQKD:
        """Ours, in the fixture's initial state and training mode."""
        model = VQKD(self.config, self.target_dim)
        load_exactly(model, self.state)
        return model.train()

    def start_codebook_(self, model: VQKD, features: Tensor) -> None:
        """K-means from the tokens that the reference drew; nothing where the codebook needs no start."""
        if not model.quantize.needs_kmeans:
            return
        tokens = features.flatten(0, 1)
        drawn = self._drawn_tokens(len(tokens))
        model.quantize.kmeans_init_(tokens, ALONE, start=l2_normalize(tokens)[drawn])

    def images_of(self, step: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Images [B, 3, S, S] in [0, 1] and teacher's features [B, N, T] of one optimizer step."""
        images, target = need(self.io, "images"), need(self.io, "target")
        if "image_seed" not in step:
            return images, target
        if not self.teacher:
            raise FixtureError(
                "the steps have images of their own, but the weights hold no teacher to see them"
            )
        generator = torch.Generator().manual_seed(step["image_seed"])
        drawn = torch.rand(images.shape, generator=generator)
        return drawn, self.teacher_features(self.teacher_input(to_unit_range(drawn)))

    def teacher_input(self, pixels: Tensor) -> Tensor:
        """What the fixture's teacher is given for pixels [B, 3, S, S] in [-1, 1]."""
        shift, scale = (need(self.teacher, f"scaling_layer.{name}") for name in ("shift", "scale"))
        return ((pixels + 1.0) / 2.0 - shift) / scale

    def teacher_features(self, images: Tensor) -> Tensor:
        """Patch features [B, N, T] of the fixture's own teacher."""
        return teacher_tokens(self._tower, images, self._teacher_heads)

    def _config(self) -> VQKDConfig:
        """Sizes read off the weights; heads stand in none of them and are 1 for the time being."""
        state = self.state
        width, _, patch_size, _ = need(state, "encoder.patch_embed.proj.weight").shape
        codebook_size, code_dim = need(state, "quantize.embedding.weight").shape
        grid = grid_of(need(state, "encoder.pos_embed").shape[1])
        return VQKDConfig(
            image_size=grid * patch_size,
            patch_size=patch_size,
            width=width,
            depth=num_blocks(state, "encoder.blocks."),
            heads=1,
            decoder_width=need(state, "decoder.patch_embed.proj.weight").shape[0],
            decoder_depth=num_blocks(state, "decoder.blocks."),
            decoder_heads=1,
            codebook_size=codebook_size,
            code_dim=code_dim,
            ema_decay=self.meta.get("decay", 0.99),
            beta=self.meta.get("beta", 1.0),
            kmeans_init=not self.initted,
        )

    def _find_heads(self) -> None:
        """Head counts of encoder and decoder, each by what it makes of the reference's own input."""
        encoder, decoder = self.config.encoder_size, self.config.decoder_size

        @torch.no_grad()
        def encoder_difference(heads: int) -> float:
            self.config = dataclasses.replace(self.config, heads=heads)
            return relative_difference(self.model().encoder(self.pixels), need(self.io, "encoder_features"))

        @torch.no_grad()
        def decoder_difference(heads: int) -> float:
            self.config = dataclasses.replace(self.config, decoder_heads=heads)
            decoded = self.model().decoder(need(self.io, "quantized_bchw"))
            return relative_difference(decoded, need(self.io, "decoder_features"))

        heads = best_by_trial(divisors(encoder.width), encoder_difference)
        decoder_heads = best_by_trial(divisors(decoder.width), decoder_difference)
        self.config = dataclasses.replace(self.config, heads=heads, decoder_heads=decoder_heads)

    def _drawn_tokens(self, num_tokens: int) -> Tensor:
        """Indices [K] of the tokens k-means starts from: the only list of that length in the meta file."""
        count = self.config.codebook_size
        for value in self.meta.values():
            if isinstance(value, list) and len(value) == count and all(type(i) is int for i in value):
                if not all(0 <= index < num_tokens for index in value):
                    raise FixtureError(f"k-means starts from tokens that {num_tokens} tokens do not have")
                return torch.tensor(value)
        raise FixtureError(f"meta lists no {count} tokens for k-means to start from")

    def _teacher_difference(self, heads: int) -> float:
        found = teacher_tokens(self._tower, need(self.io, "teacher_input"), heads)
        return relative_difference(found, need(self.io, "target"))


def to_unit_range(images: Tensor) -> Tensor:
    """Images in [0, 1], or [0, 255], to [-1, 1]: the range the reference guesses from a batch's maximum."""
    return images * (255.0 if images.max() <= 1.0 else 1.0) / 127.5 - 1.0


@torch.no_grad()
def teacher_tokens(tower: Mapping[str, Tensor], images: Tensor, heads: int) -> Tensor:
    """Patch features [B, N, T] of a CLIP or DINO tower, for normalised images [B, 3, S, S].

    reference.md §1.5, written out over tensors in CLIP's names: fixtures hold towers that no list knows.
    """
    is_clip = "ln_pre.weight" in tower
    eps = 1e-5 if is_clip else 1e-6

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], need(tower, f"{name}.weight"), need(tower, f"{name}.bias"), eps)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, need(tower, f"{name}.weight"), need(tower, f"{name}.bias"))

    kernel = need(tower, "conv1.weight")
    x = F.conv2d(images, kernel, tower.get("conv1.bias"), stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    batch, width = x.shape[0], x.shape[2]
    x = torch.cat([need(tower, "class_embedding").expand(batch, 1, width), x], dim=1)
    x = x + need(tower, "positional_embedding")
    if is_clip:
        x = norm(x, "ln_pre")
    for i in range(num_blocks(tower, "transformer.resblocks.")):
        block = f"transformer.resblocks.{i}"
        weight, bias = (need(tower, f"{block}.attn.in_proj_{name}") for name in ("weight", "bias"))
        qkv = F.linear(norm(x, f"{block}.ln_1"), weight, bias)
        q, k, v = qkv.view(batch, -1, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + linear(mixed, f"{block}.attn.out_proj")
        hidden = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        hidden = hidden * torch.sigmoid(1.702 * hidden) if is_clip else F.gelu(hidden)
        x = x + linear(hidden, f"{block}.mlp.c_proj")
    x = norm(x, "ln_post")[:, 1:]
    return x @ tower["proj"] if "proj" in tower else x


def clip_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The teacher's tensors under the names of a CLIP image tower."""
    prefix = "teacher_model.visual." if any(".visual." in key for key in state) else "teacher_model."
    found = {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
    for dino, clip in DINO_TO_CLIP.items():
        found = {re.sub(dino, clip, key): tensor for key, tensor in found.items()}
    return found


def _is_ours(key: str) -> bool:
    return not key.startswith(TEACHER) and key not in UNUSED


def _as_image(tokens: Tensor) -> Tensor:
    """[B, N, D] -> [B, D, G, G]."""
    grid = grid_of(tokens.shape[1] + 1)
    return tokens.transpose(1, 2).unflatten(2, (grid, grid))

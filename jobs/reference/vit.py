"""MIM and fine-tuning models held against runs of the reference: logits, losses, gradients, three steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from jobs.reference.fixtures import (
    FORWARD,
    GRADIENTS,
    WEIGHTS,
    Checks,
    Fixture,
    best_by_trial,
    counts_in,
    divisors,
    load_exactly,
    need,
    num_blocks,
    numbers_of,
    recipe,
    relative_difference,
)
from pipeline.training.optim import build_optimizer, set_lr
from pretrain.model.backbone import BackboneConfig, relative_position_index
from pretrain.model.classifier import (
    SHARED_TABLE,
    TABLE,
    Classifier,
    ClassifierConfig,
    Pooling,
    RelativePositions,
    classifier_from_backbone,
)
from pretrain.model.mim import MIM, MIMConfig, PatchAggregationConfig, masked_patches, mim_loss

INDEX = "relative_position_index"

MIM_COMPARED = {
    "images", "mask", "tokens", "labels", "total_loss",
    *(f"{name}{head}" for name in ("loss", "acc", "patch_features") for head in (1, 2)),
    "logits1_masked", "logits2_masked",
}  # fmt: skip
FINETUNE_COMPARED = {"images", "logits", "pooled", "all_tokens"}


def check_mim(fixture: Fixture, checks: Checks) -> None:
    """Every quantity of a `mim_*` fixture; sizes come from its weights, the early layer by trial."""
    io, meta, state = fixture.arrays("io"), fixture.meta(), fixture.tensors("init")
    images, mask = need(io, "images"), need(io, "mask").flatten(1).bool()
    codes = need(io, "tokens").flatten(1)
    index = state.pop(f"rel_pos_bias.{INDEX}", None)
    depth = num_blocks(state, "blocks.")

    def difference(layer: int) -> float:
        """How far the second head is from the reference's when it branches off after this block."""
        with torch.no_grad():
            logits = build_mim(state, images, layer)(images, mask).logits_cls
        assert logits is not None
        return relative_difference(logits, need(io, "logits2_masked"))

    has_second_head = num_blocks(state, "cls_pt_layers.") > 0
    layer = best_by_trial(range(1, depth + 1), difference) if has_second_head else None
    note = f"second head from layer {layer}, by trial" if has_second_head else "no second head"
    if "cls_pt_lm_head.weight" in state:
        note += ", with a norm and classifier of its own"
    model = build_mim(state, images, layer)
    if index is not None:
        checks.equal(INDEX, model.rel_pos_bias.relative_position_index, index)

    # What both classifiers see of every patch, and what they say of the masked ones.
    for head, features in enumerate(_head_inputs(model, images, mask), start=1):
        if (name := f"patch_features{head}") in io:
            checks.close(name, features.view_as(io[name]), io[name], FORWARD)
    output = model(images, mask)
    loss = mim_loss(output, codes)
    count = loss.num_masked
    labels = codes.flatten()[output.masked]
    checks.equal("labels", labels, need(io, "labels"))
    checks.close("logits1_masked", output.logits, need(io, "logits1_masked"), FORWARD)
    checks.close("loss1", loss.loss / count, need(io, "loss1"), FORWARD)
    if "acc1" in io:
        checks.close("acc1", loss.correct / count, io["acc1"], FORWARD)
    if output.logits_cls is not None:
        checks.close("logits2_masked", output.logits_cls, need(io, "logits2_masked"), FORWARD, note)
        checks.close("loss2", loss.loss_cls / count, need(io, "loss2"), FORWARD)
        if "acc2" in io:
            checks.close("acc2", loss.correct_cls / count, io["acc2"], FORWARD)
    total = loss.objective(count)
    checks.close("total_loss", total, need(io, "total_loss"), FORWARD, note)
    checks.leave(sorted(io.keys() - MIM_COMPARED))

    total.backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients = fixture.tensors("grads")
    checks.all_close("gradients", ours, gradients, GRADIENTS)

    # Optimizer steps with clipping, all on the one batch.
    steps, rates = meta.get("three_steps"), meta.get("lrs")
    after = {key: t for key, t in fixture.tensors("after3").items() if not key.endswith(INDEX)}
    if not steps or not rates or len(steps) != len(rates) or not after:
        checks.fail("three steps", "meta has no `three_steps` and `lrs` of one length, or there is no after3")
        return
    model = build_mim(state, images, layer)
    optimizer = build_optimizer(
        model,
        recipe(meta, weight_decay=0.05, betas=(0.9, 0.999)),
        batch_size=1,
    )
    totals: list[Tensor] = []
    norms: list[Tensor] = []
    for rate in rates:
        set_lr(optimizer, rate)
        optimizer.zero_grad()
        loss = mim_loss(model(images, mask), codes)
        total = loss.objective(loss.num_masked)
        total.backward()
        totals.append(total.detach())
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), meta.get("clip") or float("inf")))
        optimizer.step()
    checks.close("three steps: total loss", torch.stack(totals), numbers_of(steps, "total"), FORWARD)
    if all("grad_norm" in step for step in steps):
        checks.close(
            "three steps: gradient norms", torch.stack(norms), numbers_of(steps, "grad_norm"), GRADIENTS
        )
    checks.all_close("three steps: weights", model.state_dict(), after, WEIGHTS, counted=counts_in(gradients))


def build_mim(state: Mapping[str, Tensor], images: Tensor, layer: int | None) -> MIM:
    """Our model with these weights, second head after block `layer`; everything else is read off them."""
    aggregation = PatchAggregationConfig(
        layer=layer,
        head_depth=max(num_blocks(state, "cls_pt_layers."), 1),
        share_mim_head="cls_pt_lm_head.weight" not in state,
    )
    heads = need(state, SHARED_TABLE).shape[1]
    config = backbone_sizes(state, images, heads)
    model = MIM(config, MIMConfig(patch_aggregation=aggregation), need(state, "lm_head.weight").shape[0])
    load_exactly(model, state)
    return model


def backbone_sizes(state: Mapping[str, Tensor], images: Tensor, heads: int) -> BackboneConfig:
    """The config of a ViT with these weights, for these images [B, 3, S, S]."""
    width, _, patch_size, _ = need(state, "patch_embed.proj.weight").shape
    gamma = state.get("blocks.0.gamma_1")
    return BackboneConfig(
        image_size=images.shape[-1],
        patch_size=patch_size,
        width=width,
        depth=num_blocks(state, "blocks."),
        heads=heads,
        mlp_ratio=need(state, "blocks.0.mlp.fc1.weight").shape[0] / width,
        # The value is overwritten by the weights; what counts is whether there is a scale.
        layer_scale_init=0.0 if gamma is None else 0.1,
    )


@torch.no_grad()
def _head_inputs(model: MIM, images: Tensor, mask: Tensor) -> list[Tensor]:
    """What each head's classifier is given for every patch [B * N, D]."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0])

    classifiers = {model.lm_head, *([model.cls_pt_lm_head] if model.cls_pt_lm_head is not None else [])}
    handles = [classifier.register_forward_pre_hook(keep) for classifier in classifiers]
    model(images, mask, masked_patches(torch.ones_like(mask)))
    for handle in handles:
        handle.remove()
    return seen


def check_finetune(fixture: Fixture, checks: Checks) -> None:
    """Pooled features, all tokens and logits of a `finetune_*` fixture.

    The weights may be those of a pretraining run: they are then converted as for fine-tuning.
    """
    io, state = fixture.arrays("io"), fixture.tensors("init")
    images = need(io, "images")
    indices = {key: state.pop(key) for key in [key for key in state if key.endswith(INDEX)]}
    has_head = "head.weight" in state
    tables = [tensor for key, tensor in state.items() if key.endswith(TABLE)]
    note = ""
    if tables:
        heads = tables[0].shape[1]
    else:
        width = need(state, "patch_embed.proj.weight").shape[0]
        heads = best_by_trial(divisors(width), lambda heads: _pooled_difference(state, io, heads))
        note = f"{heads} heads, by trial"
    model = build_classifier(state, images, heads)
    ours = relative_position_index(model.config.backbone.grid)
    for key, index in indices.items():
        if index.shape == ours.shape:
            checks.equal(key, ours, index)
        else:
            checks.leave([f"{key}, of the grid before it was resized"])
    with torch.no_grad():
        tokens = model.forward_tokens(images)
        expected = need(io, "all_tokens")
        if has_head and expected.shape[-1] == model.config.num_classes != tokens.shape[-1]:
            tokens, note = model.head(tokens), "; ".join(filter(None, [note, "through the head"]))
        checks.close(
            "pooled", model.pooled(images), need(io, "pooled"), FORWARD, f"{model.config.pooling} pooling"
        )
        checks.close("all_tokens", tokens, expected, FORWARD, note)
        if has_head:
            checks.close("logits", model(images), need(io, "logits"), FORWARD)
        elif "logits" in io:
            checks.fail("logits", "the weights hold no head")
    checks.leave(sorted(io.keys() - FINETUNE_COMPARED))


def build_classifier(state: Mapping[str, Tensor], images: Tensor, heads: int) -> Classifier:
    """Our fine-tuning model with these weights, of fine-tuning or pretraining, for images [B, 3, S, S]."""
    pretrained = "lm_head.weight" in state or "mask_token" in state
    pooling: Pooling = "cls" if "norm.weight" in state and not pretrained else "mean"
    relative: RelativePositions = "none"
    if any(key.endswith(TABLE) for key in state):
        relative = "shared" if SHARED_TABLE in state and not pretrained else "per_block"
    config = ClassifierConfig(
        backbone=backbone_sizes(state, images, heads),
        num_classes=state["head.weight"].shape[0] if "head.weight" in state else 0,
        pooling=pooling,
        absolute_positions="pos_embed" in state,
        relative_positions=relative,
    )
    model = Classifier(config)
    converted = classifier_from_backbone(
        state,
        config.backbone,
        config.num_classes,
        pooling=config.pooling,
        absolute_positions=config.absolute_positions,
        relative_positions=config.relative_positions,
    )
    load_exactly(model, converted)
    return model.eval()


@torch.no_grad()
def _pooled_difference(state: Mapping[str, Tensor], io: Mapping[str, Tensor], heads: int) -> float:
    images = need(io, "images")
    return relative_difference(build_classifier(state, images, heads).pooled(images), need(io, "pooled"))

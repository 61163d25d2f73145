"""MIM, fine-tuning model, schedules and position tables held against runs of the reference."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn

from jobs.reference.fixtures import Checks, Fixture, divisors, gradients_of, nearest
from pipeline.training.optim import OptimConfig
from pretrain.model.classifier import TABLE, Classifier
from pretrain.model.mim import MIM, masked_patches, mim_loss
from pretrain.model.official import INDEX, backbone_from_official, classifier_from_official
from pretrain.model.positions import (
    NUM_SPECIAL_ROWS,
    relative_position_index,
    resize_position_table,
    spline_coordinates,
    table_grid,
)

SCHEDULE = 1e-6  # float32's resolution, should the reference have been stored so

_SCHEDULE_NAME = re.compile(r"(?:^|_)(\d+)ep_(\d+)it_wu(steps)?(\d+)$")


def check_mim(fixture: Fixture, checks: Checks) -> None:
    """Every quantity of a `mim_*` fixture; sizes come from its weights, the early layer by trial."""
    io, meta, state = fixture.arrays("_io.npz"), fixture.meta(), fixture.tensors("init")
    images, mask, codes = io["images"], io["mask"].flatten(1).bool(), io["tokens"].flatten(1)

    def build(layer: int | None) -> MIM:
        model = backbone_from_official(state, fixture.stem, layer=layer)
        assert isinstance(model, MIM)
        return model.train().requires_grad_(True)

    def second_logits(layer: int) -> Tensor:
        logits = build(layer)(images, mask).logits_cls
        assert logits is not None
        return logits

    model = build(None)
    layer, note = None, "no second head"
    if model.cls_pt_layers is not None:
        layer = nearest(range(1, model.config.depth + 1), second_logits, io["logits2_masked"])
        own_head = "" if model.cls_pt_lm_head is None else ", with a norm and classifier of its own"
        note = f"second head from layer {layer}, by trial{own_head}"
        model = build(layer)
    if (index := state.get(f"rel_pos_bias.{INDEX}")) is not None:
        checks.compare(INDEX, model.rel_pos_bias.relative_position_index, index)

    # Without their classifiers the heads give what those see of every patch.
    bare = build(layer)
    for name in {"lm_head", "cls_pt_lm_head"} & dict(bare.named_children()).keys():
        bare.add_module(name, nn.Identity())
    with torch.no_grad():
        features = bare(images, mask, masked_patches(torch.ones_like(mask)))
    output = model(images, mask)
    loss = mim_loss(output, codes)
    count = loss.num_masked
    total = loss.objective(count)
    rows = {
        "patch_features1": features.logits,
        "patch_features2": features.logits_cls,
        "labels": codes.flatten()[output.masked],
        "logits1_masked": output.logits,
        "loss1": loss.loss / count,
        "acc1": loss.correct / count,
        "logits2_masked": output.logits_cls,
        "loss2": loss.loss_cls / count,
        "acc2": loss.correct_cls / count,
        "total_loss": total,
    }
    notes = {"logits2_masked": note, "total_loss": note}
    absent = {"patch_features2", "logits2_masked", "loss2", "acc2"} if layer is None else set()
    for name in [name for name in rows if name not in absent]:
        ours = rows[name].view_as(io[name]) if name in ("patch_features1", "patch_features2") else rows[name]
        checks.compare(name, ours, io[name], notes.get(name, ""))
    checks.leave(io.keys() - {"images", "mask", "tokens"})
    total.backward()
    gradients = fixture.tensors("grads")
    checks.compare_all("gradients", gradients_of(model), gradients)

    # Optimizer steps with clipping, all on the one batch.
    model = build(layer)

    def losses(_step: object) -> dict[str, Tensor]:
        loss = mim_loss(model(images, mask), codes)
        return {"total": loss.objective(loss.num_masked)}

    checks.compare_steps(model, OptimConfig(), meta, losses)
    after = {key: t for key, t in fixture.tensors("after3").items() if not key.endswith(INDEX)}
    checks.compare_all("three steps: weights", model.state_dict(), after, gradients)


@torch.no_grad()
def check_finetune(fixture: Fixture, checks: Checks) -> None:
    """Pooled features, all tokens and logits of a `finetune_*` fixture; heads by trial if no table tells."""
    io, state = fixture.arrays("_io.npz"), fixture.tensors("init")
    images = io["images"]

    def build(heads: int | None) -> Classifier:
        return classifier_from_official(state, fixture.stem, heads=heads)

    heads, note = None, ""
    if not any(key.endswith(TABLE) for key in state):
        width = state["cls_token"].shape[-1]
        heads = nearest(divisors(width), lambda heads: build(heads).pooled(images), io["pooled"])
        note = f"{heads} heads, by trial"
    model = build(heads)
    for key in (key for key in state if key.endswith(INDEX)):
        checks.compare(key, relative_position_index(model.config.backbone.grid), state[key])
    checks.compare("pooled", model.pooled(images), io["pooled"], f"{model.config.pooling} pooling")
    checks.compare("all_tokens", model.forward_tokens(images), io["all_tokens"], note)
    checks.compare("logits", model(images), io["logits"])
    checks.leave(io.keys() - {"images"})


def check_schedules(fixture: Fixture, checks: Checks) -> None:
    """Every schedule whose name says epochs, steps per epoch and warm-up: `mim_30ep_10it_wu10`, `…_wusteps7`.

    Both learning rates are read off the array: the peak is its maximum, and the last step lies a known part
    of the way above the minimum.
    """
    for name, expected in fixture.arrays().items():
        match = _SCHEDULE_NAME.search(name)
        if match is None:
            checks.leave([name])
            continue
        epochs, iterations, warmup = int(match[1]), int(match[2]), int(match[4])
        total, warmup_steps = epochs * iterations, warmup * (1 if match[3] else iterations)
        peak, last = float(expected.max()), float(expected[-1])
        # The half cosine ends one step short of the minimum.
        above = 0.5 * (1.0 + math.cos(math.pi * (1.0 - 1.0 / max(total - warmup_steps, 1))))
        min_lr = last if above == 1.0 else (last - peak * above) / (1.0 - above)
        lr = OptimConfig(peak_lr=peak, min_lr=min_lr, warmup_epochs=warmup_steps).schedule(1, 1, total)
        ours = torch.tensor([lr(step) for step in range(total)], dtype=torch.float64)
        note = f"{warmup_steps} of {total} steps warm up, to {peak:.3g}"
        checks.compare(name, ours, expected.double(), note, tolerance=SCHEDULE)


def check_position_tables(fixture: Fixture, checks: Checks) -> None:
    """`interp2d_<grid>`: `src` [H, S, S] for another grid; `coords_<grid>`: where the spline's points lie."""
    arrays = fixture.arrays()
    source = arrays["src"].flatten(1).t()
    # The rows of [CLS] must come through untouched, whatever they hold.
    cls_rows = torch.arange(1.0, NUM_SPECIAL_ROWS + 1)[:, None].expand(-1, source.shape[1])
    table = torch.cat([source, cls_rows.to(source)])
    grid = table_grid(len(table))
    for name, expected in arrays.items():
        kind, _, number = name.rpartition("_")
        if kind == "interp2d" and number.isdigit():
            ours = resize_position_table(table, grid, int(number))
            if not torch.equal(ours[-NUM_SPECIAL_ROWS:], table[-NUM_SPECIAL_ROWS:]):
                checks.fail(name, "the rows of [CLS] are not carried over")
            note = f"{grid}x{grid} to {number}x{number}"
            checks.compare(name, ours[:-NUM_SPECIAL_ROWS], expected.flatten(1).t(), note)
        elif kind == "coords" and number.isdigit():
            coordinates = torch.tensor(spline_coordinates(grid, int(number)), dtype=torch.float64)
            checks.compare(name, coordinates, expected.double())
        elif name != "src":
            checks.leave([name])

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from jobs.reference.fixtures import relative_difference
from pipeline.errors import InputError
from pipeline.training.step import RunningMeans
from pipeline.training.worker import Worker
from pretrain.model.backbone import BackboneConfig
from pretrain.model.mim import (
    LOSS_SUMS,
    MIM,
    MIMConfig,
    PatchAggregationConfig,
    masked_patches,
    mim_figures,
    mim_loss,
)

CONFIG = BackboneConfig(image_size=24, patch_size=4, width=32, depth=4, heads=4)
NUM_CODES = 16


def build(
    layer: int | None = 2,
    head_depth: int = 2,
    share: bool = True,
    config: BackboneConfig = CONFIG,
    init: str = "official",
) -> MIM:
    aggregation = PatchAggregationConfig(layer=layer, head_depth=head_depth, share_mim_head=share)
    return MIM(config, MIMConfig(patch_aggregation=aggregation, cls_head_init=init), NUM_CODES)  # type: ignore[arg-type]


def batch(size: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels, a mask with another number of patches in every image, codes."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(size, 3, 24, 24, generator=generator)
    mask = torch.rand(size, 36, generator=generator) < torch.linspace(0.2, 0.6, size)[:, None]
    codes = torch.randint(0, NUM_CODES, (size, 36), generator=generator)
    return pixels, mask, codes


# ------------------------------------------------------------------------------------------------ reference


def test_parameter_groups_are_the_references(shared_dir: Path, monkeypatch):
    from pipeline.training.optim import decays

    for module in ("backbone", "mim"):
        monkeypatch.setattr(f"pretrain.model.{module}.drop_path_rates", lambda rate, depth: [rate] * depth)
    groups = json.loads((shared_dir / "reference" / "param_groups.json").read_text())["mim_base"]
    with torch.device("meta"):
        model = MIM(BackboneConfig(), MIMConfig(), 8192)
    for group in groups:
        decayed = group["weight_decay"] > 0
        ours = {name for name, p in model.named_parameters() if decays(name, p) == decayed}
        assert ours == set(group["params"])


# ------------------------------------------------------------------------------------------------ heads


def slow_forward(model: MIM, pixels: Tensor, mask: Tensor) -> list[Tensor]:
    """Logits [B, N, K] for every patch, per head, the long way round (Figure 3)."""
    bias = model.rel_pos_bias()
    states = [model.embed(pixels, mask)]
    for block in model.blocks:
        states.append(block(states[-1], bias))
    logits = [model.lm_head(model.norm(states[-1]))[:, 1:]]
    layer = model.mim_config.patch_aggregation.layer
    if layer is not None:
        x = torch.cat([states[-1][:, :1], states[layer][:, 1:]], dim=1)
        assert model.cls_pt_layers is not None
        for block in model.cls_pt_layers:
            x = block(x, bias)
        norm, head = model.cls_pt_norm or model.norm, model.cls_pt_lm_head or model.lm_head
        logits.append(head(norm(x))[:, 1:])
    return logits


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(("layer", "head_depth"), [(1, 1), (3, 2), (4, 3), (None, 2)])
def test_forward_is_figure_3(layer, head_depth, share):
    model = build(layer, head_depth, share)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    pixels, mask, _ = batch()
    output = model(pixels, mask)
    expected = slow_forward(model, pixels, mask)
    torch.testing.assert_close(output.logits, expected[0][mask])
    if layer is None:
        assert output.logits_cls is None
        assert not any(name.startswith("cls_pt") for name in model.state_dict())
    else:
        torch.testing.assert_close(output.logits_cls, expected[1][mask])
        own = {name for name in model.state_dict() if name.startswith(("cls_pt_norm", "cls_pt_lm_head"))}
        two_layers = {
            "cls_pt_norm.weight",
            "cls_pt_norm.bias",
            "cls_pt_lm_head.weight",
            "cls_pt_lm_head.bias",
        }
        assert own == (set() if share else two_layers)


def test_the_second_head_sees_late_blocks_through_cls_alone():
    model = build(layer=2, share=False)
    final: list[Tensor] = []

    def keep(_: object, inputs: object, output: Tensor) -> None:
        output.retain_grad()
        final.append(output)

    model.blocks[-1].register_forward_hook(keep)
    pixels, mask, codes = batch()
    mim_loss(model(pixels, mask), codes).loss_cls.backward()
    gradient = final[0].grad
    assert gradient is not None
    assert (gradient[:, 0].abs().sum(dim=1) > 0).all() and not gradient[:, 1:].any()
    assert model.lm_head.weight.grad is None and model.norm.weight.grad is None


@pytest.mark.parametrize("layer", [2, None])
def test_every_parameter_gets_a_gradient(layer):
    """Data parallel training needs no search for unused parameters."""
    for share in (True, False):
        model = build(layer, share=share)
        pixels, mask, codes = batch()
        loss = mim_loss(model(pixels, mask), codes)
        loss.objective(loss.num_masked).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_logits_only_where_asked_and_in_order():
    model = build()
    pixels, mask, _ = batch()
    expected = slow_forward(model, pixels, mask)[0].flatten(0, 1)
    assert torch.equal(masked_patches(mask), torch.tensor([i for i, m in enumerate(mask.flatten()) if m]))
    chosen = torch.tensor([0, 35, 36, 107, 50])
    output = model(pixels, mask, chosen)
    torch.testing.assert_close(output.logits, expected[chosen])


def test_second_head_starts_as_published_or_like_the_other_blocks():
    config = BackboneConfig(image_size=16, patch_size=8, width=256, depth=4, heads=4)
    torch.manual_seed(0)
    official, plain = build(3, config=config), build(3, config=config, init="trunc_normal")
    for model, std, biased in ((official, 256**-0.5 / 3**0.5, True), (plain, 0.0108, False)):
        assert model.cls_pt_layers is not None
        for j, block in enumerate(model.cls_pt_layers):
            # Rescaled as blocks 4 and 5 of the stack they continue.
            residual = (2.0 * (3 + j + 1)) ** -0.5
            weights = dict(block.named_parameters())
            for name, fan_in in (("attn.proj", 256), ("mlp.fc1", 256), ("mlp.fc2", 1024)):
                scale = residual if name != "mlp.fc1" else 1.0
                expected = std * scale * ((256 / fan_in) ** 0.5 if biased else 1.0)
                assert weights[f"{name}.weight"].std().item() == pytest.approx(expected, rel=0.03)
                bias = weights[f"{name}.bias"]
                assert (bias.std().item() > 0.01) if biased else (bias == 0).all()
            assert (weights["attn.q_bias"] == 0).all() and (weights["gamma_1"] == 0.1).all()
    # Only the second head differs in kind.
    for model in (official, plain):
        assert model.lm_head.weight.std().item() == pytest.approx(0.0108, rel=0.05)
        assert (model.lm_head.bias == 0).all()


def test_drop_path_of_the_second_head_continues_from_its_layer():
    config = BackboneConfig(image_size=8, patch_size=4, width=8, depth=12, heads=2, drop_path=0.11)
    model = build(9, 2, config=config)
    assert model.cls_pt_layers is not None
    assert [block.drop_path for block in model.cls_pt_layers] == pytest.approx([0.09, 0.10])
    model = build(12, 3, config=config)  # past the end of the stack: one ramp over all 15
    assert model.cls_pt_layers is not None
    rates = np.linspace(0.0, 0.11, 15)
    assert [block.drop_path for block in model.cls_pt_layers] == pytest.approx(list(rates[12:]))


@pytest.mark.parametrize(
    ("layer", "head_depth", "named"), [(0, 2, "layer"), (5, 2, "layer"), (2, 0, "head_depth")]
)
def test_impossible_aggregation_is_refused(layer, head_depth, named):
    with pytest.raises(InputError, match=named):
        build(layer, head_depth)


# ------------------------------------------------------------------------------------------------ losses


def test_losses_are_sums_over_masked_patches():
    pixels, mask, codes = batch()
    model = build()
    output = model(pixels, mask)
    loss = mim_loss(output, codes.to(torch.int32))
    everything = slow_forward(model, pixels, mask)
    for ours, correct, logits in zip(
        (loss.loss, loss.loss_cls), (loss.correct, loss.correct_cls), everything, strict=True
    ):
        expected = sum(
            -logits[i, n].log_softmax(dim=0)[codes[i, n]] for i in range(3) for n in range(36) if mask[i, n]
        )
        torch.testing.assert_close(ours, expected)
        assert int(correct) == int((logits.argmax(-1) == codes)[mask].sum())
    assert loss.num_masked == int(mask.sum())
    # Codes of visible patches are nobody's business.
    other = torch.where(mask, codes, (codes + 1) % NUM_CODES)
    assert torch.equal(mim_loss(output, other).loss, loss.loss)


def test_parts_of_any_size_add_up_to_the_whole_batch():
    """Micro-batches and rank slices of unequal size; gradients are averaged over ranks."""
    pixels, mask, codes = batch(7)
    model = build()
    total = int(mask.sum())
    mim_loss(model(pixels, mask), codes).objective(total).backward()
    whole = gradients(model)

    ranks = [[slice(0, 1), slice(1, 4)], [slice(4, 7)]]  # two micro-batches on the first, one on the second
    averaged = {name: torch.zeros_like(gradient) for name, gradient in whole.items()}
    means = RunningMeans(torch.device("cpu"), *LOSS_SUMS)
    for micro_batches in ranks:
        model.zero_grad()
        for part in micro_batches:
            loss = mim_loss(model(pixels[part], mask[part]), codes[part])
            loss.objective(total, world_size=2).backward()
            means.add_sums(loss.num_masked, **loss.sums())
        for name, gradient in gradients(model).items():
            averaged[name] += gradient / 2
    for name, gradient in whole.items():
        torch.testing.assert_close(averaged[name], gradient, rtol=1e-4, atol=1e-7)

    loss = mim_loss(model(pixels, mask), codes)
    means.gather(Worker())
    figures = mim_figures(*means.take_sums(), aggregated=True)
    assert figures["loss_total"] == pytest.approx(loss.objective(total).item(), rel=1e-5)
    assert figures["accuracy"] == pytest.approx(loss.correct.item() / total)
    assert figures["loss_total"] == pytest.approx(figures["loss"] + figures["loss_cls"])


def test_a_part_without_masked_patches_adds_nothing():
    model = build()
    pixels, mask, codes = batch()
    loss = mim_loss(model(pixels, torch.zeros_like(mask)), codes)
    assert loss.num_masked == 0 and loss.loss.item() == 0.0
    loss.objective(10).backward()
    assert all(not gradient.any() for gradient in gradients(model).values())


def test_bf16_autocast_stays_close_and_keeps_the_residual_in_fp32():
    model = build().eval()
    pixels, mask, _ = batch()
    exact = model(pixels, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(pixels, mask)
        assert model.embed(pixels, mask).dtype == torch.float32
        assert model.blocks[0](model.embed(pixels), model.rel_pos_bias()).dtype == torch.float32
    assert rough.logits.dtype == torch.bfloat16
    assert relative_difference(rough.logits.float(), exact.logits) < 0.05


def gradients(model: MIM) -> Mapping[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

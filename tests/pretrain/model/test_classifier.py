from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.errors import InputError
from pretrain.model.backbone import BackboneConfig
from pretrain.model.classifier import Classifier, ClassifierConfig, classifier_from_backbone
from pretrain.model.mim import MIM, MIMConfig, PatchAggregationConfig
from pretrain.model.positions import resize_position_table
from tests.reference.shaken import shaken
from tokenizer.model.vit import TransformerSize, VisionTransformer

BACKBONE = BackboneConfig(image_size=24, patch_size=6, width=32, depth=3, heads=4)


def start(
    state: Mapping[str, Tensor], backbone: BackboneConfig = BACKBONE, num_classes: int = 5, **settings: Any
) -> dict[str, Tensor]:
    config = ClassifierConfig(backbone=backbone, num_classes=num_classes, **settings)
    return classifier_from_backbone(state, config)


def build(num_classes: int = 5, **settings: object) -> Classifier:
    config = ClassifierConfig(backbone=BACKBONE, num_classes=num_classes, **settings)  # type: ignore[arg-type]
    return Classifier(config)


def pretrained(image_size: int = 24) -> MIM:
    """A shaken MIM model with a second head of its own."""
    config = dataclasses.replace(BACKBONE, image_size=image_size)
    heads = MIMConfig(patch_aggregation=PatchAggregationConfig(layer=2, share_mim_head=False))
    model = MIM(config, heads, 16)
    shaken(model)
    return model.eval()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pooling": "cls"},
        {"relative_positions": "shared"},
        {"absolute_positions": True, "relative_positions": "none", "pooling": "cls"},
    ],
)
@torch.no_grad()
def test_everything_is_timms(settings: dict[str, object]):
    from timm.models.beit import Beit

    model = shaken(build(**settings))
    theirs = Beit(
        img_size=24, patch_size=6, embed_dim=32, depth=3, num_heads=4, init_values=0.1, num_classes=5,
        use_abs_pos_emb=model.config.absolute_positions,
        use_rel_pos_bias=model.config.relative_positions == "per_block",
        use_shared_rel_pos_bias=model.config.relative_positions == "shared",
        global_pool="avg" if model.config.pooling == "mean" else "token",
    ).eval()  # fmt: skip
    theirs.load_state_dict(model.state_dict(), strict=True)
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    tokens = theirs.forward_features(pixels)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(model(pixels), theirs(pixels), **close)
    torch.testing.assert_close(model.pooled(pixels), theirs.forward_head(tokens, pre_logits=True), **close)
    torch.testing.assert_close(model.forward_tokens(pixels), theirs.fc_norm(tokens), **close)
    expected = theirs.forward_intermediates(
        pixels, indices=[0, 2], output_fmt="NLC", intermediates_only=True, norm=False
    )
    for ours, layer in zip(model.patch_features(pixels, [1, 3]), expected, strict=True):
        torch.testing.assert_close(ours, layer, **close)


def test_start_values_are_the_published_ones():
    torch.manual_seed(0)
    backbone = BackboneConfig(image_size=32, patch_size=8, width=256, depth=3, heads=4)
    config = ClassifierConfig(backbone=backbone, num_classes=300, absolute_positions=True)
    model = Classifier(config)
    parameters = dict(model.named_parameters())
    for name, value in parameters.items():
        if name.endswith(("bias", "bias_table")) and "patch_embed" not in name:
            assert not value.any(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        elif "gamma" in name:
            assert (value == 0.1).all(), name
    for i in range(3):
        for name, scale in (("attn.qkv", 1.0), ("attn.proj", (2 * (i + 1)) ** -0.5), ("mlp.fc1", 1.0)):
            weight = parameters[f"blocks.{i}.{name}.weight"]
            assert weight.std().item() == pytest.approx(0.02 * scale, rel=0.02), name
            # Not cut at one sigma, unlike in pretraining.
            assert weight.abs().max() > 3.5 * 0.02 * scale, name
    assert parameters["pos_embed"].std().item() == pytest.approx(0.02, rel=0.05)
    # Convolutions keep torch's uniform default, whose deviation is 1 / sqrt(3 fan_in).
    assert parameters["patch_embed.proj.weight"].std().item() == pytest.approx((3 * 192) ** -0.5, rel=0.03)
    assert parameters["head.weight"].std().item() == pytest.approx(0.02 * 0.001, rel=0.02)


def test_without_classes_the_logits_are_the_pooled_features():
    model = shaken(build(num_classes=0))
    pixels = torch.randn(2, 3, 24, 24)
    assert torch.equal(model(pixels), model.pooled(pixels))
    assert not any(name.startswith("head") for name in model.state_dict())
    with pytest.raises(InputError, match="num_classes"):
        build(num_classes=-1)


def test_layers_and_sizes_that_do_not_exist_are_errors():
    model = build()
    for layers in ([0], [4], []):
        with pytest.raises(ValueError, match="blocks 1 to 3"):
            model.patch_features(torch.zeros(1, 3, 24, 24), layers)
    with pytest.raises(ValueError, match="24"):
        model(torch.zeros(1, 3, 30, 30))


# ------------------------------------------------------------------------------------------------ conversion


@torch.no_grad()
def test_a_classifier_starts_as_the_backbone_it_comes_from():
    mim, model = pretrained(), build().eval()
    torch.manual_seed(0)
    converted = start(mim.state_dict())
    model.load_state_dict(converted)
    pixels = torch.randn(2, 3, 24, 24)
    outputs = mim.layer_outputs(pixels)
    for ours, expected in zip(model.patch_features(pixels, [1, 2, 3]), outputs, strict=True):
        torch.testing.assert_close(ours, expected[:, 1:], rtol=1e-5, atol=1e-5)
    # What pretraining does not have is fresh; the final norm it does have is of no use here.
    mean = outputs[-1][:, 1:].mean(dim=1)
    expected = (mean - mean.mean(-1, keepdim=True)) / (mean.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
    torch.testing.assert_close(model.pooled(pixels), expected, rtol=1e-4, atol=1e-4)
    assert 0 < converted["head.weight"].abs().max() < 0.02 * 0.001 * 6 and not converted["head.bias"].any()


@torch.no_grad()
def test_cls_pooling_keeps_the_final_norm():
    mim, model = pretrained(), build(pooling="cls").eval()
    model.load_state_dict(start(mim.state_dict(), pooling="cls"))
    pixels = torch.randn(2, 3, 24, 24)
    torch.testing.assert_close(model.pooled(pixels), mim.features(pixels).cls, rtol=1e-5, atol=1e-5)


def test_every_block_gets_a_table_of_its_own_at_the_new_resolution():
    state = pretrained(image_size=18).state_dict()  # 3 x 3 patches
    table = state["rel_pos_bias.relative_position_bias_table"]
    converted = start(state)
    tables = [converted[f"blocks.{i}.attn.relative_position_bias_table"] for i in range(3)]
    for found in tables:
        assert torch.equal(found, resize_position_table(table, 3, 4))
    assert len({found.data_ptr() for found in tables}) == 3
    same_grid = start(pretrained().state_dict())
    tables = [same_grid[f"blocks.{i}.attn.relative_position_bias_table"] for i in range(3)]
    assert len({found.data_ptr() for found in tables}) == 3
    shared = start(state, relative_positions="shared")
    expected = resize_position_table(table, 3, 4)
    assert torch.equal(shared["rel_pos_bias.relative_position_bias_table"], expected)
    assert not any(key.startswith("blocks.") and "table" in key for key in shared)


def test_a_fine_tuned_state_keeps_what_it_learned():
    """Intermediate fine-tuning, then other classes or another resolution."""
    state = shaken(build(num_classes=5)).state_dict()
    again = start(state)
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)
    other = start(state, dataclasses.replace(BACKBONE, image_size=36), num_classes=7)
    assert other["head.weight"].shape == (7, 32) and other["head.weight"].abs().max() < 2e-4
    assert torch.equal(other["fc_norm.weight"], state["fc_norm.weight"])
    for i in range(3):
        key = f"blocks.{i}.attn.relative_position_bias_table"
        assert torch.equal(other[key], resize_position_table(state[key], 4, 6))


def test_absolute_positions_are_resized():
    settings = {"absolute_positions": True, "relative_positions": "none"}
    state = shaken(build(**settings)).state_dict()
    larger = dataclasses.replace(BACKBONE, image_size=36)
    converted = start(state, larger, **settings)  # type: ignore[arg-type]
    assert converted["pos_embed"].shape == (1, 37, 32)
    assert torch.equal(converted["pos_embed"][:, 0], state["pos_embed"][:, 0])


@torch.no_grad()
def test_the_tokenizers_encoder_is_fine_tuned_as_the_same_class():
    encoder = VisionTransformer(
        TransformerSize(width=32, depth=3, heads=4), grid=4, patch_size=6, in_channels=3
    )
    shaken(encoder)
    backbone = dataclasses.replace(BACKBONE, layer_scale_init=0.0)
    config = ClassifierConfig(
        backbone=backbone, num_classes=5, absolute_positions=True, relative_positions="none"
    )
    model = Classifier(config).eval()
    model.load_state_dict(classifier_from_backbone(encoder.state_dict(), config))
    pixels = torch.randn(2, 3, 24, 24)
    torch.testing.assert_close(model.forward_tokens(pixels)[:, 1:], encoder(pixels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"depth": 4}, r"blocks\.3\.\S+ is absent in the weights"),
        ({"depth": 2}, r"the weights hold blocks\.2\."),
        ({"width": 64}, r"cls_token is 1x1x32 in the weights, but 1x1x64"),
        ({"heads": 2}, r"relative_position_bias_table is 52x4 in the weights, but 52x2"),
        ({"layer_scale_init": 0.0}, r"gamma_1"),
    ],
)
def test_weights_of_another_model_are_refused(change: dict[str, float], named: str):
    with pytest.raises(InputError, match=named):
        start(pretrained().state_dict(), dataclasses.replace(BACKBONE, **change))  # type: ignore[arg-type]

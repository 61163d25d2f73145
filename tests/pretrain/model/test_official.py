"""Published pretraining and fine-tuned files as our models and back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipeline.errors import InputError
from pretrain.model.backbone import BackboneConfig
from pretrain.model.classifier import Classifier, ClassifierConfig
from pretrain.model.mim import MIM, MIMConfig, PatchAggregationConfig
from pretrain.model.official import (
    at_image_size,
    backbone_from_official,
    classifier_from_official,
    kind_of,
    official_finetuning,
    official_pretraining,
)
from pretrain.model.positions import resize_position_table

PublishedState = Callable[..., dict[str, Tensor]]

PRETRAINING = [
    ("beit_base_patch16_224_8k_vocab", 24, 12, 12, None),
    ("beit_base_patch16_224_8k_vocab_cls_pt", 24, 12, 12, 9),
    ("beit_large_patch16_224_8k_vocab_cls_pt", 32, 24, 16, 21),
]
"""Name, width (shrunk), depth, heads, block the second head branches from."""

FINETUNED = [
    ("finetune_beit_base_patch16_224", 24, 12, 12, "mean"),
    ("finetune_beit_base_patch16_224_usecls", 24, 12, 12, "cls"),
    ("finetune_beit_large_patch16_224", 32, 24, 16, "mean"),
]


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same keys, shapes and types; the same values but for the index, which is random in `expected`."""
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (found[key].shape, found[key].dtype) == (tensor.shape, tensor.dtype), key
        assert key.endswith("index") or torch.equal(found[key], tensor), key


@pytest.mark.parametrize(("inventory", "width", "depth", "heads", "layer"), PRETRAINING)
def test_a_published_pretraining_file_is_read_and_written_whole(
    published_state: PublishedState, inventory: str, width: int, depth: int, heads: int, layer: int | None
):
    given = published_state(inventory)
    assert kind_of(given) == "pretraining"
    model = backbone_from_official(given, "file")
    assert isinstance(model, MIM) and not model.training
    config = model.config
    assert (config.width, config.depth, config.heads, config.mlp_ratio) == (width, depth, heads, 4.0)
    assert (config.image_size, config.patch_size, model.codebook_size) == (224, 16, 256)
    assert model.mim_config.patch_aggregation.layer == layer
    same(official_pretraining(model.state_dict(), config), given)


def test_a_second_head_with_a_classifier_of_its_own(published_state: PublishedState):
    given = published_state("beit_base_patch16_224_8k_vocab_cls_pt")
    norm, head = torch.rand(24), torch.rand(256, 24)
    given |= {"cls_pt_norm.weight": norm, "cls_pt_norm.bias": norm}
    given |= {"cls_pt_lm_head.weight": head, "cls_pt_lm_head.bias": head[:, 0]}
    model = backbone_from_official(given, "file", layer=4)
    assert isinstance(model, MIM)
    aggregation = model.mim_config.patch_aggregation
    assert (aggregation.layer, aggregation.head_depth, aggregation.share_mim_head) == (4, 2, False)
    same(official_pretraining(model.state_dict(), model.config), given)


def test_without_pretraining_heads_it_is_a_backbone(published_state: PublishedState):
    given = published_state("beit_base_patch16_224_8k_vocab")
    given = {key: value for key, value in given.items() if not key.startswith("lm_head")}
    assert kind_of(given) == "pretraining"
    model = backbone_from_official(given, "file", mean=(0.5, 0.5, 0.5))
    assert not isinstance(model, MIM) and model.config.mean == (0.5, 0.5, 0.5)
    same(official_pretraining(model.state_dict(), model.config), given)


@pytest.mark.parametrize(("inventory", "width", "depth", "heads", "pooling"), FINETUNED)
def test_a_published_finetuned_file_is_read_and_written_whole(
    published_state: PublishedState, inventory: str, width: int, depth: int, heads: int, pooling: str
):
    given = published_state(inventory)
    assert kind_of(given) == "classifier"
    model = classifier_from_official(given, "file")
    backbone = model.config.backbone
    assert (backbone.width, backbone.depth, backbone.heads, backbone.image_size) == (width, depth, heads, 224)
    assert (model.config.num_classes, model.config.pooling, model.training) == (1000, pooling, False)
    same(official_finetuning(model.state_dict(), backbone), given)


def test_a_finetuned_vqkd_encoder_has_absolute_positions_only():
    torch.manual_seed(0)
    backbone = BackboneConfig(image_size=16, patch_size=4, width=64, depth=2, heads=1, layer_scale_init=0.0)
    config = ClassifierConfig(
        backbone=backbone, num_classes=5, absolute_positions=True, relative_positions="none"
    )
    given = Classifier(config).state_dict()
    assert classifier_from_official(given, "file").config == config
    assert classifier_from_official(given, "file", heads=4).config.backbone.heads == 4


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["conv1.weight", "layer1.0.conv1.weight", "fc.weight"], None),
        (["cls_token", "blocks.0.attn.qkv.weight", "norm.weight"], None),
        (["blocks.0.norm1.weight", "rel_pos_bias.relative_position_bias_table"], "pretraining"),
        (["blocks.0.norm1.weight", "head.weight"], "classifier"),
        ([], None),
    ],
)
def test_kinds_are_recognised_from_names(names: list[str], kind: str | None):
    assert kind_of(names) == kind


PRE, FINE = PRETRAINING[1][0], FINETUNED[0][0]
SHARED, TABLE = (f"{place}.relative_position_bias_table" for place in ("rel_pos_bias", "blocks.5.attn"))


@pytest.mark.parametrize(
    ("inventory", "key", "change", "says"),
    [
        (PRE, "cls_token", None, "cls_token is missing"),
        (PRE, "lm_head.bias", None, r"lm_head\.bias is missing"),
        (PRE, SHARED, None, "position_bias_table is missing"),
        (PRE, "cls_pt_layers.1.gamma_1", None, r"cls_pt_layers\.1\.gamma_1 is missing"),
        (PRE, "cls_token", torch.zeros(1, 1, 25), "cls_token is 1x1x25, but 1x1x24"),
        (PRE, SHARED, torch.zeros(700, 12), "no square grid"),
        (PRE, SHARED, torch.zeros(732, 7), "for 7 heads"),
        (PRE, "rel_pos_bias.relative_position_index", torch.zeros(3, 3).long(), "index is 3x3"),
        (PRE, "pos_embed", torch.zeros(1, 197, 24), "pos_embed has no place"),
        (FINE, "fc_norm.bias", None, r"fc_norm\.bias is missing"),
        (FINE, "head.weight", torch.zeros(1000, 23), r"head\.weight is 1000x23, but 1000x24"),
        (FINE, TABLE, torch.zeros(676, 12), f"{TABLE} is 676x12, but 732x12"),
        (FINE, TABLE, torch.zeros(732, 6), f"{TABLE} is 732x6, but 732x12"),
        (FINE, "head.bias", torch.full((1000,), torch.inf), r"head\.bias holds NaN or infinity"),
        (FINE, "norm.weight", torch.zeros(24), "(norm.bias is missing|has no place)"),
    ],
)
def test_the_first_offending_key_is_named(
    published_state: PublishedState, inventory: str, key: str, change: Tensor | None, says: str
):
    given = published_state(inventory)
    read = backbone_from_official if kind_of(given) == "pretraining" else classifier_from_official
    given = {**given, key: torch.zeros(0) if change is None else change}
    if change is None:
        del given[key]
    with pytest.raises(InputError, match=says) as caught:
        read(given, "the file")
    assert str(caught.value).startswith("the file: ") and "\n" not in str(caught.value)


def test_heads_stand_in_the_tables(published_state: PublishedState):
    given = published_state(FINETUNED[0][0])
    assert classifier_from_official(given, "file", heads=12).config.backbone.heads == 12
    with pytest.raises(InputError, match="12 heads, not 6"):
        classifier_from_official(given, "file", heads=6)


# ------------------------------------------------------------------------------------------------ out


@pytest.fixture
def mim() -> MIM:
    torch.manual_seed(0)
    config = BackboneConfig(image_size=16, patch_size=4, width=16, depth=3, heads=2)
    model = MIM(config, MIMConfig(patch_aggregation=PatchAggregationConfig(layer=2)), 8).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def test_another_image_size_resizes_positions_and_nothing_else(mim: MIM):
    state = mim.state_dict()
    resized, config = at_image_size(state, mim.config, 32)
    assert (config.image_size, config.grid, mim.config.image_size) == (32, (8, 8), 16)
    table = "rel_pos_bias.relative_position_bias_table"
    assert torch.equal(resized[table], resize_position_table(state[table], 4, 8))
    assert all(resized[key] is state[key] for key in state if key != table)
    larger = MIM(config, mim.mim_config, 8)
    larger.load_state_dict(resized)
    assert at_image_size(state, mim.config, None) == (state, mim.config)
    with pytest.raises(InputError, match="does not divide"):
        at_image_size(state, mim.config, 18)
    absolute, _ = at_image_size({"pos_embed": torch.zeros(1, 17, 16)}, mim.config, 32)
    assert absolute["pos_embed"].shape == (1, 65, 16)

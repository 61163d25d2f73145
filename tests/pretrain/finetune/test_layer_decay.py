from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from pretrain.finetune.layer_decay import layerwise_groups, set_layerwise_lr
from pretrain.model.backbone import Backbone, BackboneConfig
from pretrain.model.classifier import Classifier, ClassifierConfig


def named_groups(model: nn.Module, layer_decay: float) -> dict[str, tuple[float, float]]:
    """Scale and weight decay of each parameter, by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr_scale"], group["weight_decay"])
        for group in layerwise_groups(model, weight_decay=0.05, layer_decay=layer_decay)
        for parameter in group["params"]
    }


def classifier(**size: int) -> Classifier:
    with torch.device("meta"):
        return Classifier(ClassifierConfig(backbone=BackboneConfig(**size), num_classes=1000))


def test_groups_of_the_base_classifier_are_the_references(shared_dir: Path) -> None:
    groups = json.loads((shared_dir / "reference" / "param_groups.json").read_text())["finetune_base_ld0.65"]
    expected = {name: (g["lr_scale"], g["weight_decay"]) for g in groups for name in g["params"]}
    found = named_groups(classifier(), 0.65)
    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        assert found[name] == pytest.approx(pair, rel=1e-12), name


def test_a_shared_table_moves_with_the_head_and_absolute_positions_with_the_stem() -> None:
    with torch.device("meta"):
        shared = Backbone(BackboneConfig(width=8, depth=2, heads=2, image_size=8, patch_size=4))
    found = named_groups(shared, 0.5)
    assert found["rel_pos_bias.relative_position_bias_table"] == (1.0, 0.05)
    assert found["norm.bias"] == (1.0, 0.0) and found["mask_token"] == (0.125, 0.05)


def test_networks_of_the_libraries() -> None:
    """timm's ViT under a prefix, and open_clip's names: the same layers, positions without decay."""
    import timm

    body = nn.Module()
    body.model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=0)
    found = named_groups(body, 0.5)
    assert found["model.pos_embed"] == (0.125, 0.0) == found["model.cls_token"]
    assert found["model.blocks.1.attn.qkv.weight"] == (0.5, 0.05)
    assert found["model.norm.weight"] == (1.0, 0.0)

    tower = nn.Module()
    tower.class_embedding = nn.Parameter(torch.zeros(4))
    tower.positional_embedding = nn.Parameter(torch.zeros(5, 4))
    tower.conv1 = nn.Conv2d(3, 4, 2, bias=False)
    tower.transformer = nn.Module()
    tower.transformer.resblocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    tower.ln_post = nn.LayerNorm(4)
    found = named_groups(tower, 0.5)
    assert found["positional_embedding"] == (0.125, 0.0) == found["class_embedding"]
    assert found["conv1.weight"] == (0.125, 0.05)
    assert found["transformer.resblocks.0.weight"] == (0.25, 0.05)
    assert found["ln_post.weight"] == (1.0, 0.0)


def test_frozen_parameters_are_in_no_group() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert named_groups(model, 0.5).keys() == {"1.weight", "1.bias"}


def test_the_rate_of_every_group_is_its_share() -> None:
    model = classifier(width=8, depth=2, heads=2, image_size=8, patch_size=4)
    groups = layerwise_groups(model, weight_decay=0.05, layer_decay=0.5)
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    set_layerwise_lr(optimizer, 0.4)
    scales = {(group["lr_scale"], group["lr"]) for group in optimizer.param_groups}
    assert scales == {(0.125, 0.05), (0.25, 0.1), (0.5, 0.2), (1.0, 0.4)}
    optimizer.load_state_dict(optimizer.state_dict())  # the scales survive a checkpoint
    assert optimizer.param_groups[0]["lr_scale"] == 0.125

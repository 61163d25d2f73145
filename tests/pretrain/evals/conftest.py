"""Labelled image shards of a few pictures, and a tiny pretrained backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from pretrain.model.artifacts import save_backbone
from pretrain.model.backbone import BackboneConfig
from pretrain.model.mim import MIM, MIMConfig, PatchAggregationConfig
from tests.pretrain.finetune.conftest import write_images as write


@pytest.fixture
def write_images(tmp_path: Path) -> Callable[..., str]:
    """`write_images(name, labels, class_names)`: image shards of one-coloured stripes."""

    def write_to(name: str, labels: Sequence[int | None], class_names: Sequence[str] | None = None) -> str:
        return write(tmp_path / name, labels, class_names, seed=len(labels))

    return write_to


@pytest.fixture
def backbone_url(tmp_path: Path) -> str:
    torch.manual_seed(1)
    config = BackboneConfig(image_size=16, patch_size=4, width=32, depth=2, heads=2)
    model = MIM(config, MIMConfig(patch_aggregation=PatchAggregationConfig(layer=1)), 16)
    url = str(tmp_path / "backbone")
    save_backbone(url, model)
    return url

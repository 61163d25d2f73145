"""Labelled image shards of a few pictures, and a tiny pretrained backbone."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.model.artifacts import save_backbone
from pretrain.model.backbone import BackboneConfig
from pretrain.model.mim import MIM, MIMConfig, PatchAggregationConfig
from shards.format.build import build_shard
from shards.format.records import StoredSample
from shards.pixels.decode import DecodeConfig, decode_image
from shards.writer.commit import Plan, commit, finish, pending, start


def colour_of(label: int) -> tuple[int, int, int]:
    return ((220, 40, 40), (40, 200, 60), (50, 60, 230))[label]


@pytest.fixture
def write_images(tmp_path: Path) -> Callable[..., str]:
    """`write_images(name, labels, class_names)`: image shards of noisy one-coloured pictures."""

    def write(name: str, labels: Sequence[int | None], class_names: Sequence[str] | None = None) -> str:
        root = str(tmp_path / name)
        plan = Plan(
            kind="images",
            inputs={"images": name},
            first_ids=(0, len(labels) // 2, len(labels)),
            views=1,
            class_names=None if class_names is None else tuple(class_names),
        )
        start(root, plan)
        rng = np.random.default_rng(len(labels))
        for item in pending(root, plan):
            samples = []
            for i in range(item.first_id, item.end_id):
                label = labels[i]
                colour = np.array(colour_of(label or 0)) + rng.normal(0, 40, (20, 24, 3))
                file = io.BytesIO()
                Image.fromarray(colour.clip(0, 255).astype(np.uint8)).save(file, "PNG")
                samples.append(
                    StoredSample(
                        sample_id=i, view=0, image=file.getvalue(), extension="png", source=f"{name}/{i}.png",
                        source_width=24, source_height=20, label=label,
                    )
                )  # fmt: skip
            commit(root, plan, item, build_shard(samples, [], grid=None, codebook_size=None))
        finish(root, plan, lambda data: decode_image(data, DecodeConfig()))
        return root

    return write


@pytest.fixture
def backbone_url(tmp_path: Path) -> str:
    torch.manual_seed(1)
    config = BackboneConfig(image_size=16, patch_size=4, width=32, depth=2, heads=2)
    model = MIM(config, MIMConfig(patch_aggregation=PatchAggregationConfig(layer=1)), 16)
    url = str(tmp_path / "backbone")
    save_backbone(url, model)
    return url

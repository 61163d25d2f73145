"""Stage two on a dataset that grows while it trains: K is frozen at the start (FORMAT.md, Views)."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.cluster.config import ClusterConfig
from pipeline.errors import InputError
from pretrain.config import PretrainConfig
from pretrain.model.backbone import BackboneSize
from pretrain.model.mim import MIMConfig, PatchAggregationConfig
from pretrain.train import pretrain_mim
from shards.dataset.dataset import open_dataset, views_url
from shards.dataset.parts import read_plan
from shards.format.build import build_shard
from shards.format.manifest import read_manifest
from shards.format.records import StoredSample
from shards.pixels.views import CropBox, decode_crop, encode_crop
from shards.writer.commit import commit, finish, pending, start


def test_a_run_keeps_to_the_views_it_began_with(
    token_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = str(tmp_path / "tokens")
    shutil.copytree(token_shards, tokens)
    config = PretrainConfig(
        output=str(tmp_path / "out"),
        shards=tokens,
        backbone=BackboneSize(width=16, depth=2, heads=2),
        mim=MIMConfig(patch_aggregation=PatchAggregationConfig(layer=1, head_depth=1)),
        epochs=1,
        batch_size=20,
        cluster=ClusterConfig(num_workers=0),
    )
    pretrain_mim(config)
    plan = read_plan(tokens)
    assert plan is not None
    inputs = {**plan.inputs, "base": read_manifest(tokens).fingerprint}
    plan = dataclasses.replace(plan, inputs=inputs, first_view=2, views=1)
    place = views_url(tokens, 2)
    start(place, plan)
    for item in pending(place, plan):
        samples = [grey_sample(sample_id, 2) for sample_id in range(item.first_id, item.end_id)]
        commit(place, plan, item, build_shard(samples, [], grid=(4, 4), codebook_size=8))
    finish(place, plan, decode_crop)
    assert open_dataset(tokens).num_views == 3

    capsys.readouterr()
    pretrain_mim(config)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"config\.stored_views: there 2, asked 3"):
        pretrain_mim(dataclasses.replace(config, stored_views=3))
    with pytest.raises(InputError, match="no finished code layer 12345678"):
        pretrain_mim(dataclasses.replace(config, codes="12345678"))
    with pytest.raises(InputError, match="choose among stored codes"):
        PretrainConfig(output="x", images="a", tokenizer="b", stored_views=1)


def grey_sample(sample_id: int, view: int) -> StoredSample:
    return StoredSample(
        sample_id=sample_id,
        view=view,
        image=encode_crop(np.full((32, 32, 3), 6 * sample_id, np.uint8), 95),
        extension="jpg",
        source=f"{sample_id}.png",
        source_width=32,
        source_height=32,
        label=None,
        crop=CropBox(top=0, left=0, height=32, width=32),
        codes=np.zeros((4, 4), np.uint16),
    )

"""What stage two reads: several datasets, a frozen subset, and an order that belongs to the run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.cluster.config import ClusterConfig
from pipeline.errors import InputError
from pipeline.training.metrics import read_metrics
from pretrain.config import PretrainConfig
from pretrain.model.backbone import BackboneSize
from pretrain.model.mim import MIMConfig, PatchAggregationConfig
from pretrain.train import pretrain_mim
from shards.dataset.corpus import SubsetConfig
from shards.dataset.parts import read_plan
from shards.format.build import build_shard
from shards.format.records import StoredSample
from shards.pixels.views import CropBox, decode_crop, encode_crop
from shards.reader.figures import READER_FILE
from shards.writer.commit import commit, finish, pending, start


@pytest.fixture
def more_shards(token_shards: str, tmp_path: Path) -> str:
    """A second dataset of the same tokenizer and recipe: 40 grey crops in two views."""
    root, plan = str(tmp_path / "more"), read_plan(token_shards)
    assert plan is not None
    plan = dataclasses.replace(plan, inputs={**plan.inputs, "images": "others"})
    start(root, plan)
    for item in pending(root, plan):
        samples = [
            StoredSample(
                sample_id=sample_id,
                view=item.view,
                image=encode_crop(np.full((32, 32, 3), 6 * sample_id, np.uint8), 95),
                extension="jpg",
                source=f"{sample_id}.png",
                source_width=32,
                source_height=32,
                label=None,
                crop=CropBox(top=0, left=0, height=32, width=32),
                codes=np.zeros((4, 4), np.uint16),
            )
            for sample_id in range(item.first_id, item.end_id)
        ]
        commit(root, plan, item, build_shard(samples, [], grid=(4, 4), codebook_size=8))
    finish(root, plan, decode_crop)
    return root


def config_of(shards: str, output: Path, **how: object) -> PretrainConfig:
    config = PretrainConfig(
        output=str(output),
        shards=shards,
        backbone=BackboneSize(width=16, depth=2, heads=2),
        mim=MIMConfig(patch_aggregation=PatchAggregationConfig(layer=1, head_depth=1)),
        epochs=1,
        batch_size=8,
        log_every_steps=1,
        cluster=ClusterConfig(num_workers=0),
    )
    return dataclasses.replace(config, **how)  # type: ignore[arg-type]


def test_several_datasets_train_one_backbone(
    token_shards: str, more_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain_mim(config_of(f"{token_shards},{more_shards}", tmp_path / "out"))
    said = capsys.readouterr().out
    assert "80 samples, 1 epochs of 10 steps" in said
    assert "images of the decode probe agree; order version 1" in said and "before the first batch" in said
    records = read_metrics(str(tmp_path / "out"), READER_FILE)
    assert sum(int(record["reader_samples"]) for record in records) == 80
    assert not [name for record in read_metrics(str(tmp_path / "out")) for name in record if "reader" in name]
    with pytest.raises(InputError, match=r"inputs\.shards"):
        pretrain_mim(config_of(token_shards, tmp_path / "out"))


def test_a_subset_and_the_order_belong_to_the_run(token_shards: str, tmp_path: Path) -> None:
    listed = tmp_path / "ids.txt"
    listed.write_text("".join(f"{number}\n" for number in range(3, 19)))
    config = config_of(token_shards, tmp_path / "out", subset=SubsetConfig(ids=str(listed)))
    pretrain_mim(config)
    assert len(read_metrics(config.output)) == 2  # 16 of the 40 samples
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (run["config"]["lanes"], run["config"]["window"]) == (1, 3)
    moved = listed.rename(tmp_path / "moved.txt")
    pretrain_mim(dataclasses.replace(config, subset=SubsetConfig(ids=str(moved))))  # finished, the same list
    with pytest.raises(InputError, match=r"config\.lanes: there 1, asked 2"):
        pretrain_mim(dataclasses.replace(config, subset=SubsetConfig(ids=str(moved)), lanes=2))
    moved.write_text("1\n2\n3\n4\n5\n6\n7\n8\n")
    with pytest.raises(InputError, match=r"inputs\.shards"):
        pretrain_mim(dataclasses.replace(config, subset=SubsetConfig(ids=str(moved))))

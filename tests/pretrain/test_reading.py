"""What stage two reads: several datasets, a frozen subset, and an order and views that belong to the run."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from pipeline.cluster.config import ClusterConfig
from pipeline.errors import InputError
from pipeline.training.metrics import read_metrics
from pretrain.config import PretrainConfig
from pretrain.model.mim import MIMConfig, PatchAggregationConfig
from pretrain.model.size import BackboneSize
from pretrain.train import pretrain_mim
from shards.dataset.corpus import SubsetConfig
from shards.dataset.dataset import open_dataset, views_url
from shards.dataset.parts import read_plan
from shards.format.manifest import read_manifest
from shards.reader.figures import READER_FILE
from tests.pretrain.conftest import write_tokens


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
    token_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = read_plan(token_shards)
    assert plan is not None
    others = dataclasses.replace(plan, inputs={**plan.inputs, "images": "others"})
    more_shards = write_tokens(str(tmp_path / "more"), others)
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


def test_a_run_keeps_to_the_views_it_began_with(
    token_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dataset may grow while it is trained on (FORMAT.md, Views)."""
    tokens = shutil.copytree(token_shards, str(tmp_path / "tokens"))
    config = config_of(tokens, tmp_path / "out", batch_size=20)
    pretrain_mim(config)
    plan = read_plan(tokens)
    assert plan is not None
    inputs = {**plan.inputs, "base": read_manifest(tokens).fingerprint}
    write_tokens(views_url(tokens, 2), dataclasses.replace(plan, inputs=inputs, first_view=2, views=1))
    assert open_dataset(tokens).num_views == 3

    capsys.readouterr()
    pretrain_mim(config)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"config\.stored_views: there 2, asked 3"):
        pretrain_mim(dataclasses.replace(config, stored_views=3))
    with pytest.raises(InputError, match="no finished code layer 12345678"):
        pretrain_mim(dataclasses.replace(config, codes="12345678"))

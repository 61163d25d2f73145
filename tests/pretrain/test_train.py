from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch

from pipeline.cluster.config import ClusterConfig
from pipeline.errors import InputError
from pipeline.training.checkpoints import CheckpointStore
from pipeline.training.metrics import read_metrics
from pipeline.training.optim import OptimConfig
from pretrain.config import PretrainConfig
from pretrain.model.artifacts import load_backbone, load_mim, read_backbone_header
from pretrain.model.mim import MIMConfig, PatchAggregationConfig
from pretrain.model.size import BackboneSize
from pretrain.train import pretrain_mim
from shards.dataset.dataset import open_dataset
from shards.pixels.crops import StoredCrops
from shards.reader.reader import Batches, SampleBatch, ShardReader
from tests.pipeline.gloo_group import GlooGroups, GroupKilledError, check_nothing_lost_nothing_twice
from tests.pipeline.training.kills import Killed, killed_at_save, waiting_for_checkpoints

if TYPE_CHECKING:
    from tests.conftest import RayHead

Make = Callable[..., PretrainConfig]


@pytest.fixture(scope="session")
def make_config(token_shards: str) -> Make:
    """`make_config(output, …)`: seconds of pretraining."""

    def make(output: Path | str, *, layer: int | None = 2, **changes: Any) -> PretrainConfig:
        config = PretrainConfig(
            output=str(output),
            shards=token_shards,
            backbone=BackboneSize(width=32, depth=3, heads=2, drop_path=0.1),
            mim=MIMConfig(patch_aggregation=PatchAggregationConfig(layer=layer, head_depth=1)),
            optim=OptimConfig(peak_lr=3e-3, warmup_epochs=0.5),
            epochs=3,
            batch_size=8,
            log_every_steps=1,
            cluster=ClusterConfig(num_workers=0),
        )
        return dataclasses.replace(config, **changes)

    return make


@pytest.fixture(scope="session")
def backbone_url(make_config: Make, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished run."""
    output = str(tmp_path_factory.mktemp("backbone") / "out")
    pretrain_mim(make_config(output))
    return output


def _weights(output: str | Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(Path(output) / "backbone.safetensors")


def _train_records(output: str | Path) -> list[dict[str, float | int | str]]:
    return [r for r in read_metrics(str(output)) if r["split"] == "train"]


def test_run_logs_both_heads_and_leaves_a_backbone(backbone_url: str, token_shards: str) -> None:
    del token_shards
    records = _train_records(backbone_url)
    assert [r["step"] for r in records] == list(range(1, 16))
    assert {"loss", "loss_cls", "loss_total", "accuracy", "accuracy_cls", "lr", "grad_norm"} <= records[
        0
    ].keys()
    # An untrained model guesses: the cross-entropy over 8 codes is about log 8 in either head.
    assert float(records[0]["loss"]) == pytest.approx(math.log(8), rel=0.1)
    assert float(records[0]["loss_cls"]) == pytest.approx(math.log(8), rel=0.1)
    header = read_backbone_header(backbone_url)
    assert header["run"]["steps"] == 15 and header["tokenizer"]["codebook_size"] == 8
    assert CheckpointStore(backbone_url).latest() is None
    features = load_backbone(backbone_url).features(torch.zeros(2, 3, 32, 32))
    assert features.cls.shape == (2, 32) and features.patches.shape == (2, 16, 32)
    assert load_mim(backbone_url).codebook_size == 8


def test_pretraining_learns_the_codes(make_config: Make, tmp_path: Path) -> None:
    pretrain_mim(make_config(tmp_path / "out", epochs=20))
    records = _train_records(tmp_path / "out")
    for name in ("loss", "loss_cls"):
        assert sum(float(r[name]) for r in records[-5:]) < 0.7 * sum(float(r[name]) for r in records[:5])


def test_without_aggregation_there_is_one_head(make_config: Make, tmp_path: Path) -> None:
    pretrain_mim(make_config(tmp_path / "out", layer=None, epochs=1))
    assert "loss_cls" not in _train_records(tmp_path / "out")[0]
    assert not [name for name in _weights(tmp_path / "out") if name.startswith("cls_pt")]


def test_micro_batches_keep_the_objective(backbone_url: str, make_config: Make, tmp_path: Path) -> None:
    # Stochastic depth draws per forward pass, so the runs are compared at their first step, which has lr 0.
    pretrain_mim(make_config(tmp_path / "out", micro_batch_size=3, epochs=1))
    whole, micro = _train_records(backbone_url)[0], _train_records(tmp_path / "out")[0]
    assert float(micro["loss"]) == pytest.approx(float(whole["loss"]), rel=0.02)


def test_killed_run_resumes_to_the_same_weights_and_curve(
    backbone_url: str, make_config: Make, tmp_path: Path
) -> None:
    config = make_config(tmp_path / "out", checkpoint_every_s=0.0)
    with killed_at_save(7):
        pretrain_mim(config)
    pretrain_mim(config)
    straight, resumed = _weights(backbone_url), _weights(tmp_path / "out")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert _train_records(backbone_url) == _train_records(tmp_path / "out")


def test_the_newest_and_the_best_epoch_are_kept_during_a_run(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a learning rate that ruins the model, so that the best epoch is an early one."""
    kept: list[str] = []

    def look(self: CheckpointStore) -> None:
        self.wait()
        kept.extend(sorted(path.stem for path in (tmp_path / "out" / "checkpoints").glob("*.json")))

    monkeypatch.setattr(CheckpointStore, "clear", look)
    config = make_config(tmp_path / "out", epochs=6, log_every_steps=5)
    pretrain_mim(dataclasses.replace(config, optim=OptimConfig(peak_lr=30.0, warmup_epochs=3)))
    losses = {int(r["step"]): float(r["loss_total"]) for r in _train_records(tmp_path / "out")}
    assert list(losses) == [5, 10, 15, 20, 25, 30]
    best = min(losses, key=lambda step: losses[step])
    assert best < 25
    assert kept == [f"step-{step:09d}" for step in (best, 25, 30)]


def test_another_batch_size_goes_on_at_the_next_unseen_sample(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed after two steps of 8 of the 40 samples; the rest of the epoch is taken in batches of 4."""
    batches: list[SampleBatch] = []
    read = ShardReader.batches

    def watched(self: ShardReader, epoch: int, position: int = 0) -> Iterator[SampleBatch]:
        for batch in read(self, epoch, position):
            batches.append(batch)
            yield batch
            if len(batches) == 2:
                raise Killed

    monkeypatch.setattr(ShardReader, "batches", watched)
    with waiting_for_checkpoints(), pytest.raises(Killed):
        pretrain_mim(make_config(tmp_path / "out", checkpoint_every_s=0.0, epochs=1))
    pretrain_mim(make_config(tmp_path / "out", batch_size=4, epochs=1))
    assert [batch.position for batch in batches] == [0, 8, 16, 20, 24, 28, 32, 36]
    seen = [key for batch in batches for key in batch.keys]
    assert len(seen) == len(set(seen)) == 40
    assert "config.batch_size: there 8, asked 4" in capsys.readouterr().out
    # The rate is a function of the place in the epochs, not of the steps taken.
    rates = {r["step"]: r["lr"] for r in _train_records(tmp_path / "out")}
    pretrain_mim(make_config(tmp_path / "straight", epochs=1))
    straight = {r["step"]: r["lr"] for r in _train_records(tmp_path / "straight")}
    assert rates[3] == pytest.approx(straight[3]) and rates[3] > rates[5] > rates[8]
    with pytest.raises(InputError, match="there 8, asked 4"):
        pretrain_mim(make_config(tmp_path / "out", batch_size=4, epochs=1))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_another_number_of_workers_goes_on_at_the_next_unseen_sample(
    make_config: Make,
    token_shards: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: int,
    after: int,
) -> None:
    """Killed in the second epoch of 40 samples; batches of 7 give two ranks 4 and 3, and leave 5 out."""
    groups = GlooGroups(tmp_path / "groups")
    monkeypatch.setattr("pretrain.train.run_training", groups.run)
    config = make_config(tmp_path / "out", checkpoint_every_s=0.0, epochs=2, batch_size=7)
    groups.kill_at_step = 8
    with pytest.raises(GroupKilledError):
        pretrain_mim(dataclasses.replace(config, cluster=ClusterConfig(num_workers=before)))
    groups.kill_at_step = None
    pretrain_mim(dataclasses.replace(config, cluster=ClusterConfig(num_workers=after)))
    taken = groups.taken()
    with ShardReader(open_dataset(token_shards), StoredCrops(), Batches(7, seed=config.seed)) as reader:
        assert reader.num_dropped == 5
        check_nothing_lost_nothing_twice(taken, reader.batches, num_epochs=2)
    places = [(part.world_size, part.epoch, part.position) for part in taken if part.rank == 0]
    assert places[6:8] == [(before, 1, 7), (after, 1, 14)]
    assert [r["step"] for r in _train_records(tmp_path / "out")] == list(range(1, 11))


def test_two_workers_killed_end_with_the_bits_of_a_straight_run(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved in every step, of which not all are logged: sums over all ranks travel along."""
    groups = GlooGroups(tmp_path / "groups")
    monkeypatch.setattr("pretrain.train.run_training", groups.run)
    two = {
        "cluster": ClusterConfig(num_workers=2),
        "epochs": 2,
        "log_every_steps": 3,
        "checkpoint_every_s": 1e9,
    }
    pretrain_mim(make_config(tmp_path / "straight", **two))
    groups.ask_every_step, groups.kill_at_step = True, 3
    for _ in range(2):
        with pytest.raises(GroupKilledError):
            pretrain_mim(make_config(tmp_path / "killed", **two))
    groups.kill_at_step = None
    pretrain_mim(make_config(tmp_path / "killed", **two))
    straight, killed = _weights(tmp_path / "straight"), _weights(tmp_path / "killed")
    assert all(torch.equal(straight[name], killed[name]) for name in straight)
    assert read_metrics(str(tmp_path / "straight")) == read_metrics(str(tmp_path / "killed"))


@pytest.mark.ray
def test_two_workers_share_the_batch(
    backbone_url: str, make_config: Make, tmp_path: Path, ray_head: RayHead
) -> None:
    cluster = ClusterConfig(num_workers=2, address=ray_head.address)
    pretrain_mim(make_config(tmp_path / "out", cluster=cluster, epochs=1))
    one, two = _train_records(backbone_url), _train_records(tmp_path / "out")
    assert [r["step"] for r in two] == [1, 2, 3, 4, 5]
    # The same batches, masks and first weights; only stochastic depth draws differ.
    assert float(two[0]["loss"]) == pytest.approx(float(one[0]["loss"]), rel=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shards": "/no/such/place"}, "/no/such/place"),
        ({"batch_size": 64}, "64"),
        ({"mim": MIMConfig(patch_aggregation=PatchAggregationConfig(layer=9))}, "layer is 9"),
    ],
)
def test_bad_input_writes_nothing(
    make_config: Make, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        pretrain_mim(dataclasses.replace(make_config(tmp_path / "out"), **change))
    assert not (tmp_path / "out").exists()


def test_one_source_of_codes_is_needed() -> None:
    for wrong in ({}, {"shards": "a", "images": "b", "tokenizer": "c"}, {"images": "b"}):
        with pytest.raises(InputError, match="give either"):
            PretrainConfig(output="x", **wrong)
    with pytest.raises(InputError, match="choose among stored codes"):
        PretrainConfig(output="x", images="a", tokenizer="b", stored_views=1)

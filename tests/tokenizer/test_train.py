from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import safetensors.torch
import torch

from pipeline.artifacts import read_header
from pipeline.cluster.config import ClusterConfig
from pipeline.errors import InputError
from pipeline.training.checkpoints import CheckpointStore
from pipeline.training.metrics import read_metrics
from pipeline.training.worker import Worker
from shards.dataset.dataset import open_dataset
from shards.pixels.crops import FreshCrops
from shards.reader.reader import Batches, ShardReader
from tests.pipeline.gloo_group import GlooGroups, GroupKilledError, check_nothing_lost_nothing_twice
from tests.pipeline.training.kills import asked_to_end, killed_at_save
from tokenizer.config import TokenizerTrainConfig
from tokenizer.model.teacher import build_teacher
from tokenizer.model.teacher_config import TeacherConfig
from tokenizer.model.vqkd import VQKD
from tokenizer.train import train_tokenizer, validate

if TYPE_CHECKING:
    from tests.conftest import RayHead

Make = Callable[..., TokenizerTrainConfig]


def _weights(output: str | Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(Path(output) / "tokenizer.safetensors")


def test_run_leaves_artifact_metrics_and_no_checkpoints(tokenizer_url: str) -> None:
    header = read_header(tokenizer_url, "tokenizer")
    assert header is not None
    assert header["metrics"]["steps"] == 2 * (39 // 8)
    assert 0 < header["metrics"]["codebook_usage"] <= 1 and 1 <= header["metrics"]["perplexity"] <= 16
    records = read_metrics(tokenizer_url)
    train = [r for r in records if r["split"] == "train"]
    assert [r["step"] for r in train] == list(range(1, 9)) and "rec_loss" in train[0] and "lr" in train[0]
    assert [r["epoch"] for r in records if r["split"] == "epoch"] == [1, 2]
    assert CheckpointStore(tokenizer_url).latest() is None


def test_training_lowers_the_loss(tokenizer_config: Make, tmp_path: Path) -> None:
    train_tokenizer(tokenizer_config(tmp_path / "out", epochs=12))
    losses = [float(r["rec_loss"]) for r in read_metrics(str(tmp_path / "out")) if r["split"] == "train"]
    assert sum(losses[-4:]) / 4 < 0.9 * sum(losses[:4]) / 4


def test_micro_batches_keep_the_objective(tokenizer_url: str, tokenizer_config: Make, tmp_path: Path) -> None:
    train_tokenizer(tokenizer_config(tmp_path / "micro", micro_batch_size=3))
    whole, micro = _weights(tokenizer_url), _weights(tmp_path / "micro")
    for name, tensor in whole.items():
        torch.testing.assert_close(micro[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_killed_run_resumes_from_its_checkpoint_to_the_same_weights(
    tokenizer_url: str, tokenizer_config: Make, tmp_path: Path
) -> None:
    config = tokenizer_config(tmp_path / "out", checkpoint_every_s=0.0)
    with killed_at_save(3):
        train_tokenizer(config)
    train_tokenizer(config)
    straight, resumed = _weights(tokenizer_url), _weights(tmp_path / "out")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    steps = [r["step"] for r in read_metrics(str(tmp_path / "out")) if r["split"] == "train"]
    assert steps == list(range(1, 9))


def test_asked_during_validation_it_saves_and_goes_on_bit_for_bit(
    tokenizer_url: str, tokenizer_config: Make, tmp_path: Path
) -> None:
    config = tokenizer_config(tmp_path / "out")
    with asked_to_end(5):  # after each of 4 steps, then within validation
        train_tokenizer(config)
    found = CheckpointStore(str(tmp_path / "out")).latest()
    assert found is not None and found[0].epoch == 0 and found[0].step == 4
    train_tokenizer(config)
    straight, resumed = _weights(tokenizer_url), _weights(tmp_path / "out")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert read_metrics(tokenizer_url) == read_metrics(str(tmp_path / "out"))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_another_number_of_workers_goes_on_at_the_next_unseen_sample(
    tokenizer_config: Make,
    image_shards: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: int,
    after: int,
) -> None:
    """Killed in the second epoch of 39 samples; batches of 7 give two ranks 4 and 3, and leave 4 out."""
    groups = GlooGroups(tmp_path / "groups")
    monkeypatch.setattr("tokenizer.train.run_training", groups.run)
    config = dataclasses.replace(tokenizer_config(tmp_path / "out", checkpoint_every_s=0.0), batch_size=7)
    groups.kill_at_step = 8
    with pytest.raises(GroupKilledError):
        train_tokenizer(dataclasses.replace(config, cluster=ClusterConfig(num_workers=before)))
    groups.kill_at_step = None
    train_tokenizer(dataclasses.replace(config, cluster=ClusterConfig(num_workers=after)))
    taken, views = groups.taken(), config.views.resolve(32)
    with ShardReader(open_dataset(image_shards), FreshCrops(views), Batches(7, seed=config.seed)) as reader:
        assert reader.num_dropped == 4
        check_nothing_lost_nothing_twice(taken, reader.batches, num_epochs=2)
    places = [(part.world_size, part.epoch, part.position) for part in taken if part.rank == 0]
    assert places[6:8] == [(before, 1, 7), (after, 1, 14)]
    steps = [r["step"] for r in read_metrics(str(tmp_path / "out")) if r["split"] == "train"]
    assert steps == list(range(1, 11))


def test_two_workers_killed_end_with_the_bits_of_a_straight_run(
    tokenizer_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved in every step, of which not all are logged: means and counts over all ranks travel along."""
    groups = GlooGroups(tmp_path / "groups")
    monkeypatch.setattr("tokenizer.train.run_training", groups.run)

    def config(output: str) -> TokenizerTrainConfig:
        made = tokenizer_config(tmp_path / output, num_workers=2, checkpoint_every_s=1e9)
        return dataclasses.replace(made, log_every_steps=3)

    train_tokenizer(config("straight"))
    groups.ask_every_step, groups.kill_at_step = True, 3
    for _ in range(2):
        with pytest.raises(GroupKilledError):
            train_tokenizer(config("killed"))
    groups.kill_at_step = None
    train_tokenizer(config("killed"))
    straight, killed = _weights(tmp_path / "straight"), _weights(tmp_path / "killed")
    assert all(torch.equal(straight[name], killed[name]) for name in straight)
    assert read_metrics(str(tmp_path / "straight")) == read_metrics(str(tmp_path / "killed"))


class _FirstOfTwo(Worker):
    """A rank whose sums are its own."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def test_a_rank_without_images_of_the_last_batch_validates_nevertheless(
    tokenizer_config: Make, image_shards: str, tmp_path: Path
) -> None:
    config = dataclasses.replace(tokenizer_config(tmp_path / "out"), batch_size=19)  # 39: one is left
    teacher = build_teacher(config.teacher, config.model.image_size, config.model.patch_size)
    model = VQKD(dataclasses.replace(config.model, kmeans_init=False), teacher.dim)
    worker, images = _FirstOfTwo(world_size=2), open_dataset(image_shards)
    found = validate(model, teacher, config, images, worker, lambda: None)
    assert all(math.isfinite(value) for value in found.values()) and found["perplexity"] >= 1


@pytest.mark.ray
def test_two_workers_give_the_weights_of_one(
    tokenizer_url: str, tokenizer_config: Make, tmp_path: Path, ray_head: RayHead
) -> None:
    train_tokenizer(tokenizer_config(tmp_path / "out", num_workers=2, address=ray_head.address))
    one, two = _weights(tokenizer_url), _weights(tmp_path / "out")
    # Sums over ranks round differently, so k-means and AdamW drift apart a little.
    differing = [name for name in one if not torch.allclose(one[name], two[name], rtol=1e-2, atol=2e-3)]
    assert not differing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": "/no/such/place"}, "no dataset at /no/such/place"),
        ({"batch_size": 64}, "64"),
        ({"teacher": TeacherConfig(input_size=30)}, "30"),
        ({"teacher": TeacherConfig(name="telepathy")}, "telepathy"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    tokenizer_config: Make, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    config = dataclasses.replace(tokenizer_config(tmp_path / "out"), **change)
    with pytest.raises(InputError, match=message):
        train_tokenizer(config)
    assert not (tmp_path / "out").exists()

"""Training that is killed at random moments ends with the bits of a straight run."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pipeline import storage
from pipeline.checkpoints import CheckpointStore
from pipeline.cluster import ClusterConfig
from pipeline.interruption import InterruptedRunError
from pipeline.metrics import read_metrics
from pipeline.optim import OptimConfig
from pretrain.backbone import BackboneSize
from pretrain.masking import MaskConfig
from pretrain.mim import MIMConfig, PatchAggregationConfig
from pretrain.train import PretrainConfig, pretrain_mim
from shards.prepare import PrepareConfig, prepare_images
from shards.views import ViewPolicy
from tokenizer.precompute import PrecomputeConfig, precompute_shards
from tokenizer.train import TokenizerTrainConfig, train_tokenizer
from tokenizer.vqkd import VQKDConfig

if TYPE_CHECKING:
    from tests.conftest import RayHead

Run = Callable[[Any], None]
HERE = ClusterConfig(num_workers=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One of the two training loops, with everything it reads."""

    train: Run
    config: Any
    weights: str


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stage]:
    """Both loops on 48 small pictures, with enough steps to be killed in."""
    from PIL import Image

    root = tmp_path_factory.mktemp("stages")
    (root / "pictures").mkdir()
    generator = random.Random(0)
    for number in range(48):
        picture = Image.effect_noise((48, 48), generator.uniform(10, 90)).convert("RGB")
        picture.save(root / "pictures" / f"{number:02d}.png")
    images, tokenizer, shards = (str(root / name) for name in ("images", "tokenizer", "shards"))
    prepare_images(PrepareConfig(source=str(root / "pictures"), output=images, cluster=HERE))
    stage_one = TokenizerTrainConfig(
        images=images,
        val_images=images,
        output=tokenizer,
        model=VQKDConfig(
            image_size=32, patch_size=8, width=32, depth=1, heads=2, codebook_size=16, code_dim=8
        ),
        views=ViewPolicy(image_size=32, views_per_image=0),
        epochs=8,
        batch_size=8,
        log_every_steps=2,
        checkpoint_every_s=0.0,
        cluster=HERE,
    )
    train_tokenizer(stage_one)
    precompute_shards(
        PrecomputeConfig(
            images=images,
            tokenizer=tokenizer,
            output=shards,
            samples_per_shard=16,
            batch_size=8,
            cluster=HERE,
        )
    )
    stage_two = PretrainConfig(
        shards=shards,
        output=str(root / "backbone"),
        backbone=BackboneSize(width=32, depth=2, heads=2, drop_path=0.1),
        mim=MIMConfig(patch_aggregation=PatchAggregationConfig(layer=1, head_depth=1)),
        mask=MaskConfig(),
        optim=OptimConfig(warmup_epochs=1),
        epochs=12,
        batch_size=8,
        log_every_steps=4,
        checkpoint_every_s=0.0,
        cluster=HERE,
    )
    return {
        "tokenizer": Stage(train=train_tokenizer, config=stage_one, weights="tokenizer.safetensors"),
        "backbone": Stage(train=pretrain_mim, config=stage_two, weights="backbone.safetensors"),
    }


def _run(train: Run, config: Any) -> None:
    """In a process of its own; status 1 says that it was interrupted."""
    try:
        train(config)
    except InterruptedRunError:
        os._exit(1)


@pytest.fixture(scope="module")
def processes() -> Any:
    """New processes that have the slow imports behind them already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tokenizer.train", "pretrain.train"])
    return context


def _result(stage: Stage, output: str) -> tuple[bytes, list[Any]]:
    return storage.read(storage.join(output, stage.weights)), read_metrics(output)


@pytest.mark.chaos
@pytest.mark.parametrize("name", ["tokenizer", "backbone"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_at_random_moments_the_run_ends_with_the_same_bits(
    stages: dict[str, Stage], processes: Any, tmp_path: Path, name: str, how: signal.Signals
) -> None:
    stage = stages[name]
    straight = dataclasses.replace(stage.config, output=str(tmp_path / "straight"))
    began = time.monotonic()
    alone = processes.Process(target=_run, args=(stage.train, straight))
    alone.start()
    alone.join()
    seconds = time.monotonic() - began
    assert alone.exitcode == 0

    config = dataclasses.replace(stage.config, output=str(tmp_path / "killed"))
    generator, kills = random.Random(f"{name}{how}"), 0
    for attempt in range(200):
        process = processes.Process(target=_run, args=(stage.train, config))
        process.start()
        # Some die while they start, some in the middle; every few attempts one gets further.
        process.join(generator.uniform(0.05, 1.0) * seconds * (0.4 + attempt / 12))
        if process.is_alive():
            os.kill(process.pid, how)
            kills += 1
        process.join(60)
        assert process.exitcode in (0, 1, -how)
        if process.exitcode == 0:
            break
    assert process.exitcode == 0 and kills >= 3
    assert _result(stage, config.output) == _result(stage, straight.output)
    print(f"{name}: {kills} times {how.name}, same bits")


def _training_workers(head_pid: int) -> list[int]:
    """Ray Train workers below a process (Linux)."""
    parents: dict[int, int] = {}
    names: dict[int, str] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                parents[int(entry)] = int(
                    Path("/proc", entry, "stat").read_text().rsplit(")", 1)[1].split()[1]
                )
                names[int(entry)] = Path("/proc", entry, "cmdline").read_text()
            except OSError:
                continue

    def below(pid: int) -> bool:
        while pid in parents:
            if pid == head_pid:
                return True
            pid = parents[pid]
        return False

    return [pid for pid, name in names.items() if "RayTrainWorker" in name and below(pid)]


@pytest.fixture
def head_pid(ray_head: RayHead) -> Iterator[int]:
    """The process that started the cluster."""
    del ray_head
    yield os.getpid()


@pytest.mark.chaos
@pytest.mark.ray
@pytest.mark.parametrize("name", ["tokenizer", "backbone"])
def test_two_workers_killed_on_a_cluster_end_with_the_same_bits(
    stages: dict[str, Stage], ray_head: RayHead, head_pid: int, processes: Any, tmp_path: Path, name: str
) -> None:
    stage = stages[name]
    cluster = ClusterConfig(num_workers=2, address=ray_head.address, max_failures=20)
    longer = {"epochs": 40, "cluster": cluster}
    straight = dataclasses.replace(stage.config, output=str(tmp_path / "straight"), **longer)
    stage.train(straight)

    config = dataclasses.replace(stage.config, output=str(tmp_path / "killed"), **longer)
    driver = processes.Process(target=_run, args=(stage.train, config))
    driver.start()
    generator, kills = random.Random(name), 0
    folder = Path(config.output, "checkpoints")
    seen = ""
    while driver.is_alive() and kills < 2:
        newest = max((path.stem for path in folder.glob("*.json")), default="")
        workers = _training_workers(head_pid)
        if newest > seen and len(workers) == 2:
            seen = newest
            time.sleep(generator.uniform(0, 0.2))
            os.kill(generator.choice(workers), signal.SIGKILL)
            kills += 1
            time.sleep(5)
        time.sleep(0.05)
    driver.join(240)
    assert driver.exitcode == 0 and kills >= 1
    assert _result(stage, config.output) == _result(stage, straight.output)
    print(f"{name}: {kills} kills of one of two workers, same bits")


@pytest.mark.chaos
@pytest.mark.ray
def test_sigterm_to_the_driver_has_its_workers_save(
    stages: dict[str, Stage], ray_head: RayHead, processes: Any, tmp_path: Path
) -> None:
    """`ray job stop` and an ended pod: the one checkpoint within an epoch is the one it asked for."""
    stage = stages["backbone"]
    cluster = ClusterConfig(num_workers=2, address=ray_head.address)
    config = dataclasses.replace(
        stage.config, output=str(tmp_path / "out"), epochs=2000, cluster=cluster, checkpoint_every_s=1e9
    )
    driver = processes.Process(target=_run, args=(stage.train, config))
    driver.start()
    folder = Path(config.output, "checkpoints")
    deadline = time.monotonic() + 120
    while not list(folder.glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(driver.pid, signal.SIGTERM)
    driver.join(60)
    assert driver.exitcode == 1
    found = CheckpointStore(config.output).latest()
    assert found is not None and 0 < found[0].epoch < 2000
    ended_at = found[0]
    # The same command goes on from there.
    driver = processes.Process(target=_run, args=(stage.train, config))
    driver.start()
    while max(path.stem for path in folder.glob("*.json")) <= f"step-{ended_at.step:09d}":
        assert driver.is_alive()
        time.sleep(0.1)
    os.kill(driver.pid, signal.SIGTERM)
    driver.join(60)
    assert driver.exitcode == 1

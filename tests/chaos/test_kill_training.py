"""Training that is killed at random moments ends with the bits of a straight run."""

from __future__ import annotations

import dataclasses
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from pipeline import storage
from pipeline.cluster.config import ClusterConfig, WorkerFailedError
from pipeline.cluster.training import run_training
from pipeline.training.checkpoints import CheckpointStore
from pipeline.training.interruption import InterruptedRunError
from pipeline.training.metrics import read_metrics
from pipeline.training.worker import Worker
from tests.chaos.conftest import Run, Stage

if TYPE_CHECKING:
    from tests.conftest import RayHead


def _run(train: Run, config: Any) -> None:
    """In a process of its own; status 1 says that it was interrupted."""
    try:
        train(config)
    except InterruptedRunError:
        os._exit(1)


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
    # How many there are depends on the machine, which may be faster than it was for the straight run.
    assert process.exitcode == 0 and kills >= 1
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
    # One thread each: two are ten times slower where other programs take the cores too.
    cluster = ClusterConfig(num_workers=2, cpus_per_worker=1, address=ray_head.address, max_failures=20)
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


def _fail_on_rank_1(config: dict[str, str], worker: Worker) -> None:
    """Two ranks meet once; before the second time rank 1 raises, is killed, hangs, or is stopped."""
    worker.sum(torch.ones(1))
    if worker.rank == 1:
        Path(config["folder"], "pid").write_text(str(os.getpid()))
        match config["how"]:
            case "raises":
                raise ValueError("there is no such thing")
            case "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hangs":
                time.sleep(3600)
            case "stops":
                os.kill(os.getpid(), signal.SIGSTOP)
    worker.sum(torch.ones(1))


@pytest.mark.chaos
@pytest.mark.ray
@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("raises", r"^rank 1 \(pid {pid} on .+\) failed: ValueError\('there is no such thing'\)"),
        ("dies", r"^rank 1 \(pid {pid} on .+\) died: The actor is dead because"),
        (
            "hangs",
            r"^rank 0 met others in vain \(.*Timed out.*\): "
            r"rank 1 \(pid {pid} on .+\) is at chaos/test_kill_training.py:\d+ \(_fail_on_rank_1\)",
        ),
        (
            "stops",
            r"^rank 0 met others in vain \(.*Timed out.*\): rank 1 \(pid {pid} on .+\) does not answer",
        ),
    ],
)
def test_a_rank_that_fails_ends_its_group_and_is_named(
    ray_head: RayHead, tmp_path: Path, how: str, named: str
) -> None:
    """Rank 0 waits for it in a collective, and it is rank 1 that the job's error must name."""
    # Far more than the minute in which a group ends, where it does not end by this.
    timeout_s = 10.0 if how in ("hangs", "stops") else 600.0
    cluster = ClusterConfig(
        num_workers=2, address=ray_head.address, max_failures=0, collective_timeout_s=timeout_s
    )
    with pytest.raises(WorkerFailedError) as failed:
        run_training(_fail_on_rank_1, {"folder": str(tmp_path), "how": how}, cluster)
    took = time.time() - Path(tmp_path, "pid").stat().st_mtime
    print(f"rank 1 {how}: the job ended {took:.0f} s later: {failed.value}")
    assert re.search(named.format(pid=Path(tmp_path, "pid").read_text()), str(failed.value))


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

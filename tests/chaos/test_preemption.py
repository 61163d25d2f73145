"""A node is announced to go, goes, and is replaced: training saves, goes on, and counts no failure."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import storage
from pipeline.cluster.config import ClusterConfig
from pipeline.training.metrics import read_metrics
from pipeline.training.worker import Worker
from pretrain.config import PretrainConfig
from pretrain.train import pretrain_mim
from tests.chaos.conftest import Stage
from tests.chaos.test_kill_ray import Head, running_head
from tests.conftest import _descendants, _end_with_parent, _free_port, _started
from tests.pipeline.gloo_group import GlooGroups

NOTICE_S = 20
"""From the announcement to the end of the node."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """One more node of a cluster."""

    process: subprocess.Popen[bytes]
    id: str

    def announce_end(self, head: Head) -> None:
        """As a cloud's autoscaler does for a spot instance that is about to be reclaimed."""
        subprocess.run(
            [
                str(Path(sys.executable).with_name("ray")), "drain-node", f"--address={head.address}",
                f"--node-id={self.id}", "--reason=DRAIN_NODE_REASON_PREEMPTION",
                "--reason-message=reclaimed", f"--deadline-remaining-seconds={NOTICE_S}",
            ],
            check=True,
        )  # fmt: skip

    def vanish(self) -> None:
        """Everything on it ends at once, without a word."""
        if self.process.poll() is not None:
            return
        offspring = _descendants(self.process.pid)
        self.process.kill()
        for pid, started in offspring.items():
            if started != "gone" and _started(pid) == started:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def added_node(head: Head) -> Iterator[Node]:
    """Adds a node of one CPU, and afterwards ends every process that it started."""
    before = _alive(head)
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats",
        f"--address={head.address}", f"--dashboard-agent-listen-port={_free_port()}",
        "--min-worker-port=0", "--max-worker-port=0", "--num-cpus=1", f"--object-store-memory={128 << 20}",
    ]  # fmt: skip
    environment = {**os.environ, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    environment.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, preexec_fn=_end_with_parent
        )
        node = None
        try:
            deadline = time.monotonic() + 120
            while not (new := _alive(head) - before):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(log.read().decode(errors="replace")[-4000:])
                time.sleep(0.5)
            node = Node(process=process, id=new.pop())
            yield node
        finally:
            (node or Node(process=process, id="")).vanish()


def _alive(head: Head) -> set[str]:
    import ray
    from ray.core.generated import gcs_pb2

    nodes = ray._raylet.GcsClient(address=head.address).get_all_node_info(timeout=30)
    alive = gcs_pb2.GcsNodeInfo.GcsNodeState.ALIVE
    return {node_id.hex() for node_id, node in nodes.items() if node.state == alive}


def _paced(folder: str, config: PretrainConfig, worker: Worker) -> None:
    """The loop of pretraining, a second per step until the node is gone."""
    from pretrain import train

    set_lr = train.set_lr

    def slow_set_lr(*args: Any) -> None:
        set_lr(*args)
        with Path(folder, f"pids-{worker.rank}").open("a") as file:
            file.write(f"{os.getpid()}\n")
        if not Path(folder, "gone").exists():
            time.sleep(1)

    train.set_lr = slow_set_lr
    train._train(config, worker)


def _drive(config: PretrainConfig, folder: str) -> None:
    from pretrain import train

    run = train.run_training
    train.run_training = lambda _, config, cluster: run(functools.partial(_paced, folder), config, cluster)
    pretrain_mim(config)


def _wait_for(condition: Any, driver: Any, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert driver.is_alive() and time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.chaos
def test_a_preempted_node_costs_no_failure(
    stages: dict[str, Stage], processes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No checkpoint within an epoch but the one that is asked for, and all of them stay.
    straight = replace(
        stages["backbone"].config,
        output=str(tmp_path / "straight"),
        epochs=30,
        checkpoint_every_s=1e9,
        checkpoint_keep=1000,
        cluster=ClusterConfig(num_workers=2),
    )
    with monkeypatch.context() as patch:
        patch.setattr("pretrain.train.run_training", GlooGroups(tmp_path / "groups").run)
        pretrain_mim(straight)

    checkpoints = tmp_path / "out" / "checkpoints"

    def inside_an_epoch() -> list[int]:
        headers = [json.loads(path.read_bytes()) for path in sorted(checkpoints.glob("*.json"))]
        return [header["step"] for header in headers if header["position"] != 0]

    # Two nodes of one CPU, two workers of one CPU: one lands on each.
    with running_head(num_cpus=1) as head, contextlib.ExitStack() as replaced:
        cluster = ClusterConfig(num_workers=2, cpus_per_worker=1, address=head.address, max_failures=0)
        config = replace(straight, output=str(tmp_path / "out"), cluster=cluster)
        with added_node(head) as node:
            driver = processes.Process(target=_drive, args=(config, str(tmp_path)))
            driver.start()
            _wait_for((tmp_path / "pids-0").exists, driver)
            assert not inside_an_epoch()
            node.announce_end(head)
            announced = time.monotonic()
            _wait_for(inside_an_epoch, driver)
            print(f"saved {time.monotonic() - announced:.1f} s after the announcement")
            assert driver.is_alive()
            replaced.enter_context(added_node(head))
            node.vanish()
            (tmp_path / "gone").touch()
        driver.join(240)
        assert driver.exitcode == 0
        print(f"finished {time.monotonic() - announced:.1f} s after the announcement")
    pids = [set(Path(tmp_path, f"pids-{rank}").read_text().split()) for rank in (0, 1)]
    assert [len(found) for found in pids] == [2, 2]
    straight_bits = storage.read(storage.join(straight.output, "backbone.safetensors"))
    assert storage.read(storage.join(config.output, "backbone.safetensors")) == straight_bits
    assert read_metrics(config.output) == read_metrics(straight.output)

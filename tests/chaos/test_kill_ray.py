"""Ray workers, drivers and nodes are killed during a pass; reruns end in the bytes of an undisturbed one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from shards.dataset.dataset import open_dataset
from tests.chaos.tiny_pass import TinyPass, check_receipts, tree
from tests.conftest import ROOT, _descendants, _end_with_parent, _free_port, _started

TINY = TinyPass(num_shards=150, per_shard=3, views=2)
PAUSE_S = 1.0
"""At most so long before each of the four writes of an item: actors take seconds, and work must be left."""
WORKER_KILLS, DRIVER_KILLS, NODE_KILLS = 10, 6, 5


@dataclass(frozen=True, kw_only=True)
class Head:
    """A cluster of one node, in a process of its own."""

    process: subprocess.Popen[bytes]
    address: str

    def victim(self, name: str) -> int | None:
        """The number of the node's raylet, say; None when it has none."""
        for pid in _descendants(self.process.pid):
            with contextlib.suppress(OSError):
                if Path("/proc", str(pid), "cmdline").read_bytes().split(b"\0")[0].endswith(name.encode()):
                    return pid
        return None


@contextlib.contextmanager
def running_head(num_cpus: int = 2) -> Iterator[Head]:
    """Starts a head, and afterwards ends every process that it started."""
    port = _free_port()
    binaries = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "PATH": f"{binaries}:{os.environ.get('PATH', '')}",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
    environment.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        log = Path(folder, "head.log")
        command = [
            f"{binaries}/ray", "start", "--head", "--block", "--disable-usage-stats", f"--port={port}",
            "--include-dashboard=false", f"--dashboard-agent-listen-port={_free_port()}",
            f"--ray-client-server-port={_free_port()}", "--min-worker-port=0", "--max-worker-port=0",
            f"--temp-dir={folder}", f"--num-cpus={num_cpus}", f"--object-store-memory={128 << 20}",
        ]  # fmt: skip
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, preexec_fn=_end_with_parent
            )
        offspring: dict[int, str] = {}
        try:
            deadline = time.monotonic() + 120
            while b"Ray runtime started" not in log.read_bytes():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(log.read_text(errors="replace")[-4000:])
                time.sleep(0.2)
            offspring = _descendants(process.pid)
            yield Head(process=process, address=f"127.0.0.1:{port}")
        finally:
            offspring |= _descendants(process.pid)
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
            process.wait()
            for pid, started in offspring.items():
                if started != "gone" and _started(pid) == started:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True, kw_only=True)
class Output:
    """A dataset in the making, and who writes it."""

    root: str
    pids: Path

    def start_driver(self, head: Head, pause_s: float = PAUSE_S) -> subprocess.Popen[bytes]:
        for stale in self.pids.iterdir():
            stale.unlink()
        config = {
            "root": self.root, "address": head.address, "pids": str(self.pids), "pause_s": pause_s,
            "tiny": dataclasses.asdict(TINY),
        }  # fmt: skip
        with Path(self.pids.parent, "driver.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, str(ROOT / "tests" / "chaos" / "tiny_pass.py"), "drive", json.dumps(config)],
                cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=log, stderr=log,
                preexec_fn=_end_with_parent,
            )  # fmt: skip

    @property
    def finished(self) -> bool:
        return Path(self.root, "manifest.json").exists()

    def worker(self, driver: subprocess.Popen[bytes], known: set[int]) -> int | None:
        """Waits for a worker that has begun to write and is not known; None when the driver ended before."""
        while driver.poll() is None:
            for path in self.pids.iterdir():
                pid = int(path.name)
                if pid not in known and _started(pid) != "gone":
                    return pid
            time.sleep(0.05)
        return None


@pytest.mark.chaos
def test_workers_drivers_and_nodes_are_killed(tmp_path: Path) -> None:
    rng = random.Random(0)
    straight = str(tmp_path / "straight")
    TINY.write(straight)
    (tmp_path / "pids").mkdir()
    output = Output(root=str(tmp_path / "killed"), pids=tmp_path / "pids")
    workers, drivers, nodes = 0, 0, 0

    with running_head() as head:
        driver = output.start_driver(head)
        known: set[int] = set()
        while workers < WORKER_KILLS:
            pid = output.worker(driver, known)
            if pid is None:  # an item that ended three workers ends the pass; so does the end of the work
                assert not output.finished, "too little work for so many kills"
                driver = output.start_driver(head)
                continue
            known.add(pid)
            time.sleep(rng.uniform(0, 2.0))
            os.kill(pid, signal.SIGKILL)
            workers += not output.finished
        while drivers < DRIVER_KILLS:
            # a worker that the dead driver leaves behind may still write beside the next driver's
            output.worker(driver, known)
            time.sleep(rng.uniform(0, 2.0))
            driver.kill()
            drivers += driver.wait() == -signal.SIGKILL and not output.finished
            check_receipts(output.root, TINY.plan)
            known |= {int(path.name) for path in output.pids.iterdir()}
            driver = output.start_driver(head)
        output.worker(driver, known)
        nodes += kill_node(head, "raylet", output)
    driver.kill()
    driver.wait()

    while nodes < NODE_KILLS:
        with running_head() as head:
            driver = output.start_driver(head)
            assert output.worker(driver, set()) is not None
            time.sleep(rng.uniform(0, 1.0))
            nodes += kill_node(head, ("raylet", "gcs_server", "")[nodes % 3], output)
            check_receipts(output.root, TINY.plan)
        driver.kill()
        driver.wait()

    with running_head() as head:
        driver = output.start_driver(head, pause_s=0.0)
        assert driver.wait(240) == 0, Path(tmp_path, "driver.log").read_text(errors="replace")[-4000:]
    print(f"killed with work left: {workers} workers, {drivers} drivers, {nodes} nodes")
    assert workers + drivers >= 15 and nodes >= 5
    assert tree(output.root) == tree(straight)
    manifest = open_dataset(output.root).manifest
    rejected = TINY.views * len(TINY.rejected_sources())
    assert manifest.samples_in == manifest.samples_written + rejected == 900
    assert sum(manifest.samples_rejected.values()) == rejected


def kill_node(head: Head, name: str, output: Output) -> bool:
    """SIGKILL to a part of the node, or (no name) to the process that keeps it; True if work was left."""
    pid = head.victim(name) if name else head.process.pid
    assert pid is not None, name
    os.kill(pid, signal.SIGKILL)
    time.sleep(1.0)  # whatever still runs may go on writing
    return not output.finished

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.cluster.config import ClusterConfig, WorkerFailedError
from pipeline.cluster.items import map_items
from pipeline.cluster.peers import MissingRankError
from pipeline.cluster.training import _first_to_fail, _named, run_training
from pipeline.errors import InputError

if TYPE_CHECKING:
    from pipeline.training.worker import Worker
    from tests.conftest import RayHead

IN_PROCESS = ClusterConfig(num_workers=0)


def _squares() -> Callable[[int], int]:
    return lambda number: number * number


def test_every_item_gives_one_result_in_process() -> None:
    assert sorted(map_items(range(50), _squares, IN_PROCESS)) == [n * n for n in range(50)]
    assert list(map_items([], _squares, IN_PROCESS)) == []


def test_two_items_overlap_and_no_more_are_held() -> None:
    running, most, lock = 0, 0, threading.Lock()
    drawn: list[int] = []

    def make() -> Callable[[int], int]:
        def run(number: int) -> int:
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            time.sleep(0.01)
            with lock:
                running -= 1
            return number

        return run

    def items() -> object:
        for number in range(12):
            drawn.append(number)
            yield number

    for done, _ in enumerate(map_items(items(), make, IN_PROCESS)):  # type: ignore[arg-type]
        assert len(drawn) <= done + 3
    assert most == 2


def test_an_error_ends_the_pass() -> None:
    def make() -> Callable[[int], int]:
        def run(number: int) -> int:
            if number == 3:
                raise InputError("three is bad; leave it out")
            return number

        return run

    with pytest.raises(InputError, match="three is bad"):
        list(map_items(range(10), make, IN_PROCESS))


def test_negative_workers_are_refused() -> None:
    with pytest.raises(InputError, match="num_workers"):
        ClusterConfig(num_workers=-1)


def _dies_on(victim: int, marker: Path | None) -> Callable[[], Callable[[int], int]]:
    """A runner that ends its process at one item: always, or only until the marker exists."""

    def make() -> Callable[[int], int]:
        def run(number: int) -> int:
            if number == victim and (marker is None or not marker.exists()):
                if marker is not None:
                    marker.touch()
                os._exit(1)
            if number == 1000:
                raise InputError("a thousand is too much")
            return number * number

        return run

    return make


def _cannot_be_made() -> Callable[[int], int]:
    raise InputError("there is no such model; name another")


@pytest.mark.ray
def test_actors_survive_a_death_name_a_poison_and_pass_errors_on(ray_head: RayHead, tmp_path: Path) -> None:
    cluster = ClusterConfig(num_workers=2, address=ray_head.address)
    found = sorted(map_items(range(8), _dies_on(5, tmp_path / "died"), cluster))
    assert found == [n * n for n in range(8)] and (tmp_path / "died").exists()
    with pytest.raises(WorkerFailedError, match=r"item 2 ended its worker 3 times"):
        list(map_items(range(4), _dies_on(2, None), cluster))
    with pytest.raises(InputError, match="a thousand is too much"):
        list(map_items([1, 1000], _dies_on(-1, None), cluster))
    with pytest.raises(InputError, match="there is no such model"):
        list(map_items([1, 2, 3], _cannot_be_made, cluster))


def _train(config: dict[str, str], worker: Worker) -> None:
    import torch

    total = worker.sum(torch.tensor([worker.rank + 1.0]))
    rows = worker.gather(torch.full((worker.rank + 1, 2), float(worker.rank)))
    started = Path(config["folder"]) / f"started-{worker.rank}"
    if worker.rank == 1 and not started.exists():
        started.touch()
        os._exit(1)
    if config.get("fail"):
        raise InputError("these settings do not fit; change them")
    answer = f"{worker.rank}/{worker.world_size} {float(total)} {rows[:, 0].tolist()}"
    (Path(config["folder"]) / f"rank-{worker.rank}").write_text(answer)


@pytest.mark.ray
def test_a_training_group_talks_restarts_and_passes_errors_on(ray_head: RayHead, tmp_path: Path) -> None:
    cluster = ClusterConfig(num_workers=2, address=ray_head.address, max_failures=1)
    run_training(_train, {"folder": str(tmp_path)}, cluster)
    assert (tmp_path / "rank-0").read_text() == "0/2 3.0 [0.0, 1.0, 1.0]"
    assert (tmp_path / "rank-1").read_text() == "1/2 3.0 [0.0, 1.0, 1.0]"
    failing = ClusterConfig(num_workers=1, address=ray_head.address, max_failures=0)
    with pytest.raises(InputError, match="these settings do not fit"):
        run_training(_train, {"folder": str(tmp_path), "fail": "yes"}, failing)


class _Died(Exception):
    """As Ray Train reports a process that is gone."""

    def __init__(self) -> None:
        super().__init__("A worker health check failed")
        self.health_check_failure = RuntimeError(
            "The actor died unexpectedly.\n\tpid: 4711\n"
            "The actor is dead because its worker process has died with a connection error."
        )


class _Notes:
    """A board on which all ranks have introduced themselves."""

    def put(self, topic: str, note: str) -> None:
        raise AssertionError((topic, note))

    def get(self, topic: str) -> str:
        rank = topic.removeprefix("process-")
        return f"pid {rank}{rank} on node-{rank}"


ECHO = RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [10.0.0.1]:9929")
IN_VAIN = MissingRankError("rank 0 met others in vain (gloo): rank 2 (pid 22 on node-2) does not answer")


@pytest.mark.parametrize(
    ("failures", "named"),
    [
        ({0: ECHO, 1: ValueError("no")}, "rank 1 (pid 11 on node-1) failed: ValueError('no')"),
        (
            {0: ECHO, 2: _Died()},
            "rank 2 (pid 22 on node-2) died: "
            "The actor is dead because its worker process has died with a connection error.",
        ),
        ({0: IN_VAIN, 1: ECHO}, str(IN_VAIN)),
        ({0: IN_VAIN, 1: ConnectionResetError("by the store")}, "rank 1 (pid 11 on node-1) failed: "),
    ],
)
def test_the_error_names_the_rank_that_failed_by_itself(
    failures: dict[int, BaseException], named: str
) -> None:
    """Not rank 0, whose connection to it broke."""
    assert _named(*_first_to_fail(failures), _Notes()).startswith(named)


def test_a_timeout_that_rounds_to_nothing_is_refused() -> None:
    with pytest.raises(InputError, match=r"collective_timeout_s is 0\.5"):
        ClusterConfig(collective_timeout_s=0.5)

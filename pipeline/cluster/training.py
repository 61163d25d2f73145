"""Training workers on Ray Train: started, restarted after failures, asked to save before they end."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.cluster.config import (
    ClusterConfig,
    WorkerFailedError,
    connect,
    set_num_threads,
    worker_resources,
)
from pipeline.cluster.peers import (
    Board,
    MissingRankError,
    Peers,
    introduce,
    is_collective_error,
    name_of,
)
from pipeline.errors import InputError
from pipeline.training.interruption import InterruptedRunError, Interruption, on_sigterm

if TYPE_CHECKING:
    from pipeline.training.worker import Worker

SAVE_WITHIN_S = 20.0
"""How long a driver that got SIGTERM waits for its workers' checkpoint."""
LISTEN_EVERY_S = 1.0


def run_training(train: Callable[[Any, Worker], None], config: Any, cluster: ClusterConfig) -> None:
    """Run `train(config, worker)` on every worker of a group; returns when all have.

    The group restarts from the loop's own last checkpoint when a worker dies, `max_failures` times; nodes
    that are taken away do not count. SIGTERM to this process has the workers save before it ends, and then
    raises InterruptedRunError.
    """
    if cluster.num_workers == 0:
        from pipeline.training.worker import local_worker

        interruption = Interruption()
        with on_sigterm(interruption.ask):
            train(config, local_worker(interruption))
        return
    connect(cluster)
    import ray.train.torch
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    use_gpu, cpus = worker_resources(cluster)
    resources = {"CPU": float(cpus), **({"GPU": 1.0} if use_gpu else {})}
    board = _RunBoard(f"run-{uuid.uuid4().hex}")
    trainer = ray.train.torch.TorchTrainer(
        _train_on_worker,
        train_loop_config={"train": train, "config": config, "num_threads": cpus, "board": board},
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers, use_gpu=use_gpu, resources_per_worker=resources
        ),
        torch_config=ray.train.torch.TorchConfig(timeout_s=int(cluster.collective_timeout_s)),
        run_config=RunConfig(
            # A fresh name: under a known one Ray Train would resume its own record of another run.
            name=f"run-{uuid.uuid4().hex[:12]}",
            storage_path=os.path.join(tempfile.gettempdir(), "ray-train"),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
        ),
    )
    fit: Future[object] = Future()
    # In a thread: an exception of a signal handler would be lost inside Ray's wait.
    threading.Thread(target=_settle, args=(fit, trainer.fit), name="fit", daemon=True).start()
    asked = threading.Event()
    with on_sigterm(asked.set):
        while not wait([fit], timeout=0.2).done:
            if asked.is_set():
                board.ask_and_wait()
    error = fit.exception()
    if error is not None:
        failures = getattr(error, "worker_failures", None)
        if not failures:
            raise error
        rank, failure = _first_to_fail(failures)
        if isinstance(failure, InputError):
            raise failure from None
        raise WorkerFailedError(_named(rank, failure, board)) from error


def _settle(future: Future[object], function: Callable[[], object]) -> None:
    """Run a function and give its outcome to a future."""
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)


def _train_on_worker(settings: dict[str, Any]) -> None:
    import ray.train
    import ray.train.torch
    import torch

    from pipeline.training.worker import Worker

    set_num_threads(settings["num_threads"])
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device, board = ray.train.torch.get_device(), settings["board"]
    introduce(board, rank)
    attempt = torch.tensor([uuid.uuid4().int >> 66], device=device)
    Worker(rank=rank, world_size=world_size, device=device).broadcast(attempt)
    peers = Peers(board=board, attempt=f"attempt-{int(attempt)}", rank=rank, world_size=world_size)
    with _interruption(board, peers) as interruption:
        worker = Worker(rank=rank, world_size=world_size, device=device, interruption=interruption)
        try:
            settings["train"](settings["config"], worker)
            peers.leave()
        except RuntimeError as error:
            if not is_collective_error(error):
                raise
            # Asking takes seconds, in which Ray sees by itself that a process or a node is gone: a node that
            # was taken away is then not counted as a failure.
            raise peers.find_missing(error) from error


@dataclass(frozen=True)
class _RunBoard:
    """Notes in the cluster's own store, through which driver and workers of one run talk."""

    run: str

    def ask_and_wait(self) -> None:
        """In the driver, after SIGTERM: have the workers save, wait until one has, and end the run."""
        print("SIGTERM: the workers save and the run ends", flush=True)
        self.put("end", "stop")
        given_up = time.monotonic() + SAVE_WITHIN_S
        while time.monotonic() < given_up and self.get("end") != "saved":
            time.sleep(0.1)
        saved = self.get("end") == "saved"
        state = "state saved" if saved else f"nothing saved within {SAVE_WITHIN_S:.0f} s"
        raise InterruptedRunError(f"ended by SIGTERM, {state}; the same command goes on from there")

    def put(self, topic: str, note: str) -> None:
        from ray.experimental.internal_kv import _internal_kv_put

        _internal_kv_put(f"{self.run}/{topic}", note, overwrite=True)

    def get(self, topic: str) -> str:
        from ray.experimental.internal_kv import _internal_kv_get

        return (_internal_kv_get(f"{self.run}/{topic}") or b"").decode()


@contextlib.contextmanager
def _interruption(board: _RunBoard, peers: Peers) -> Iterator[Interruption]:
    """In a worker: hears of the driver's SIGTERM and of nodes that are about to go, and answers its peers."""
    ended = threading.Event()
    preemption = _preemption_of_this_run()
    training = threading.get_ident()
    stopping = False

    def saved() -> None:
        if not stopping:
            return  # only the node is threatened: Ray Train ends and restarts the group when it goes
        board.put("end", "saved")
        # The driver ends now, and with it this process. A return would leave the other ranks waiting in a
        # collective, an error would be taken for a failure.
        ended.wait(10 * SAVE_WITHIN_S)
        raise InterruptedRunError("the driver asked for the end of this run, but did not end")

    interruption = Interruption(saved)

    def listen() -> None:
        nonlocal stopping
        warned = answered = False
        while not ended.wait(LISTEN_EVERY_S):
            if not stopping and board.get("end") == "stop":
                stopping = True
                interruption.ask()
            if not warned and preemption():
                warned = True
                interruption.ask()
            answered = answered or peers.answer(training)

    listener = threading.Thread(target=listen, name="interruption", daemon=True)
    listener.start()
    try:
        yield interruption
    finally:
        ended.set()
        listener.join()


def _preemption_of_this_run() -> Callable[[], bool]:
    """Whether Ray has announced that a node of this group goes; never, where this Ray does not say.

    Ray Train's public function meets with all ranks at every call; this one looks at what it has heard.
    """
    try:
        from ray.train.v2._internal.execution.context import get_train_context

        heard = get_train_context().preemption_context
    except (ImportError, AttributeError):
        return lambda: False
    return lambda: heard.preemption_info is not None


def _first_to_fail(failures: dict[int, BaseException]) -> tuple[int, BaseException]:
    """The rank that failed by itself: the others' errors are about the connection they lost with it."""
    rank = min(failures, key=lambda rank: (is_collective_error(failures[rank]), rank))
    return rank, failures[rank]


def _named(rank: int, failure: BaseException, board: Board) -> str:
    """One line that names the rank which failed, its process, and why."""
    if isinstance(failure, MissingRankError):
        return str(failure)
    death = getattr(failure, "health_check_failure", None)
    if death is not None:
        return f"{name_of(board, rank)} died: {str(death).strip().splitlines()[-1]}"
    return f"{name_of(board, rank)} failed: {failure!r}"

"""The only door to Ray: a group of training workers, and a pool of actors for independent items.

With `num_workers: 0` both run in this process and Ray is not imported. Exactly-once comes from what the
items commit, not from Ray: an item may run twice.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pipeline.cluster.peers import Board, MissingRankError, Peers, blames_others, introduce, name_of
from pipeline.errors import InputError
from pipeline.training.interruption import InterruptedRunError, Interruption, on_sigterm

if TYPE_CHECKING:
    from pipeline.training.worker import Worker

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_ATTEMPTS = 3
ITEMS_IN_FLIGHT = 2
SAVE_WITHIN_S = 20.0
"""How long a driver that got SIGTERM waits for its workers' checkpoint."""
LISTEN_EVERY_S = 1.0


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where the work runs, and how many processes share it."""

    num_workers: int = 1
    """Worker processes; 0 runs in this process, without Ray."""
    use_gpu: bool | None = None
    """One GPU per worker; null takes GPUs where the cluster has them now."""
    cpus_per_worker: int | None = None
    """CPU cores each worker reserves; null divides this machine's cores, or takes 1 on a running cluster."""
    address: str | None = None
    """A running Ray cluster, such as auto; null takes RAY_ADDRESS (set within a job) or starts one."""
    max_failures: int = 3
    """How often a training group is restarted from its last checkpoint after a worker died."""
    collective_timeout_s: float = 600.0
    """How long ranks wait for each other before the group is given up."""

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise InputError(f"cluster.num_workers is {self.num_workers}; give 0 (in process) or more")
        if self.collective_timeout_s < 1:
            raise InputError(f"cluster.collective_timeout_s is {self.collective_timeout_s}; give 1 or more")


class WorkerFailedError(Exception):
    """A worker died or raised; the message names it and carries its traceback."""


def device_type(cluster: ClusterConfig) -> Literal["cpu", "cuda"]:
    """What the workers will compute on: decided here, before any of them runs."""
    if cluster.num_workers == 0:
        import torch

        return "cuda" if torch.cuda.is_available() and cluster.use_gpu is not False else "cpu"
    _connect(cluster)
    return "cuda" if _resources(cluster)[0] else "cpu"


# ------------------------------------------------------------------------------------------------ items


def map_items(
    items: Iterable[Item], make_runner: Callable[[], Callable[[Item], Result]], cluster: ClusterConfig
) -> Iterator[Result]:
    """Results of `runner(item)` as they complete, in any order.

    Each actor builds one runner (a loaded model, say) and has two items in flight, in two threads, so that
    one item's reading and writing overlaps the other's forward pass: runners are called concurrently. An
    item whose actor died runs again, alone on its actor; after three attempts it is named and given up.
    Errors raised by a runner end the pass. Memory here does not grow with the number of items.
    """
    if cluster.num_workers == 0:
        yield from _map_in_process(items, make_runner())
    else:
        yield from _map_on_actors(items, make_runner, cluster)


def _map_in_process(items: Iterable[Item], runner: Callable[[Item], Result]) -> Iterator[Result]:
    with ThreadPoolExecutor(ITEMS_IN_FLIGHT, thread_name_prefix="items") as pool:
        running: set[Future[Result]] = set()
        try:
            for item in items:
                running.add(pool.submit(runner, item))
                if len(running) >= ITEMS_IN_FLIGHT:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            for future in running:
                yield future.result()
        finally:
            for future in running:
                future.cancel()


class _ItemActor:
    """What runs inside an actor: one runner for its whole life.

    It is made with the first item: an error in a constructor would come back as the death of the actor.
    """

    def __init__(self, make_runner: Callable[[], Callable[[Any], Any]], num_threads: int) -> None:
        _set_num_threads(num_threads)
        self._make_runner = make_runner
        self._runner: Callable[[Any], Any] | None = None
        self._making = threading.Lock()

    def run(self, item: Any) -> Any:
        with self._making:
            if self._runner is None:
                self._runner = self._make_runner()
        return self._runner(item)


@dataclass(frozen=True)
class _Run:
    """One attempt at an item."""

    item: Any
    actor: Any
    attempt: int


@dataclass
class _Slot:
    """A place for an actor, and what it runs; `alone` while that is an item that may have ended an actor.

    The actor is made for the first item: one that is killed while it starts prints a page of stack traces.
    """

    actor: Any = None
    runs: dict[Any, _Run] = field(default_factory=dict)
    alone: bool = False


def _map_on_actors(
    items: Iterable[Item], make_runner: Callable[[], Callable[[Item], Result]], cluster: ClusterConfig
) -> Iterator[Result]:
    ray = _connect(cluster)
    use_gpu, cpus = _resources(cluster)
    # No restarts by Ray: what is sent to an actor that is just restarting fails like what ended it.
    actor_class = ray.remote(_ItemActor).options(
        num_cpus=cpus, num_gpus=1 if use_gpu else 0, max_restarts=0, max_concurrency=ITEMS_IN_FLIGHT
    )
    slots = [_Slot() for _ in range(cluster.num_workers)]
    waiting = iter(items)
    suspects: deque[_Run] = deque()

    def start_one(slot: _Slot) -> None:
        if slot.alone or len(slot.runs) == ITEMS_IN_FLIGHT or (suspects and slot.runs):
            return
        if suspects:
            suspect = suspects.popleft()
            item, attempt, slot.alone = suspect.item, suspect.attempt + 1, True
        else:
            try:
                item, attempt = next(waiting), 1
            except StopIteration:
                return
        if slot.actor is None:
            slot.actor = actor_class.remote(make_runner, cpus)
        slot.runs[slot.actor.run.remote(item)] = _Run(item=item, actor=slot.actor, attempt=attempt)

    try:
        while True:
            for _ in range(ITEMS_IN_FLIGHT):
                for slot in slots:
                    start_one(slot)
            if not (references := [reference for slot in slots for reference in slot.runs]):
                return
            [reference], _ = ray.wait(references, num_returns=1)
            slot = next(slot for slot in slots if reference in slot.runs)
            run = slot.runs.pop(reference)
            slot.alone = False
            try:
                result = ray.get(reference)
            except ray.exceptions.RayActorError as error:
                if run.attempt >= MAX_ATTEMPTS:
                    raise WorkerFailedError(
                        f"item {run.item} ended its worker {run.attempt} times, last by: {error}; "
                        "look at it with --cluster.num_workers 0"
                    ) from None
                print(f"warning: a worker died while it held item {run.item}; it runs again", flush=True)
                suspects.append(run)
                if run.actor is slot.actor:
                    ray.kill(slot.actor)
                    slot.actor = None
                continue
            except ray.exceptions.RayTaskError as error:
                raise _cause(error) from error
            yield result
    finally:
        for slot in slots:
            if slot.actor is not None:
                ray.kill(slot.actor)


# ------------------------------------------------------------------------------------------------ training


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
    _connect(cluster)
    import ray.train.torch
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    use_gpu, cpus = _resources(cluster)
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

    _set_num_threads(settings["num_threads"])
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
            if not blames_others(error):
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
        self.say("end", "stop")
        given_up = time.monotonic() + SAVE_WITHIN_S
        while time.monotonic() < given_up and self.said("end") != "saved":
            time.sleep(0.1)
        saved = self.said("end") == "saved"
        state = "state saved" if saved else f"nothing saved within {SAVE_WITHIN_S:.0f} s"
        raise InterruptedRunError(f"ended by SIGTERM, {state}; the same command goes on from there")

    def say(self, about: str, word: str) -> None:
        from ray.experimental.internal_kv import _internal_kv_put

        _internal_kv_put(f"{self.run}/{about}", word, overwrite=True)

    def said(self, about: str) -> str:
        from ray.experimental.internal_kv import _internal_kv_get

        return (_internal_kv_get(f"{self.run}/{about}") or b"").decode()


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
        board.say("end", "saved")
        # The driver ends now, and with it this process. A return would leave the other ranks waiting in a
        # collective, an error would be taken for a failure.
        ended.wait(10 * SAVE_WITHIN_S)
        raise InterruptedRunError("the driver asked for the end of this run, but did not end")

    interruption = Interruption(saved)

    def listen() -> None:
        nonlocal stopping
        warned = answered = False
        while not ended.wait(LISTEN_EVERY_S):
            if not stopping and board.said("end") == "stop":
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
    rank = min(failures, key=lambda rank: (blames_others(failures[rank]), rank))
    return rank, failures[rank]


def _named(rank: int, failure: BaseException, board: Board) -> str:
    """One line that names the rank which failed, its process, and why."""
    if isinstance(failure, MissingRankError):
        return str(failure)
    death = getattr(failure, "health_check_failure", None)
    if death is not None:
        return f"{name_of(board, rank)} died: {str(death).strip().splitlines()[-1]}"
    return f"{name_of(board, rank)} failed: {failure!r}"


# ------------------------------------------------------------------------------------------------ inside


def _connect(cluster: ClusterConfig) -> Any:
    """The ray module, connected: to the given cluster, to the one this job runs in, or to a new one."""
    if not sys.stdout.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    # Ray Train patches print; without this, lines show twice.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    # Nodes are given 30 s of notice: hear of it soon.
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "2")
    # A worker's imports take 15 s on an idle machine, and more than Ray Train's minute on a busy one.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")
    try:
        import ray
    except ImportError:
        raise InputError(
            "ray is not installed; install it, or run in process with --cluster.num_workers 0"
        ) from None
    if ray.is_initialized():
        return ray
    if cluster.address is not None or "RAY_ADDRESS" in os.environ:
        # No runtime_env here: inside a job it would have to be merged with the job's own.
        ray.init(address=cluster.address, log_to_driver=True)
    else:
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, cluster.num_workers * (cluster.cpus_per_worker or 1)),
            include_dashboard=True,
            object_store_memory=512 << 20,
            log_to_driver=True,
        )
    return ray


def _resources(cluster: ClusterConfig) -> tuple[bool, int]:
    """Whether workers take a GPU each, and how many CPU cores each takes."""
    import ray

    available = ray.cluster_resources()
    use_gpu = cluster.use_gpu if cluster.use_gpu is not None else available.get("GPU", 0) >= 1
    cpus = cluster.cpus_per_worker
    if cpus is None:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        cpus = max(1, int(available.get("CPU", 1)) // cluster.num_workers) if len(nodes) == 1 else 1
    return use_gpu, cpus


def _set_num_threads(num_threads: int) -> None:
    import torch

    torch.set_num_threads(num_threads)


def _cause(error: BaseException) -> BaseException:
    """The exception a worker raised, out of Ray's wrapping."""
    return getattr(error, "cause", None) or error.__cause__ or error

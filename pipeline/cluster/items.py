"""A pool of actors that works through independent items.

Exactly-once comes from what the items commit, not from Ray: an item may run twice.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pipeline.cluster.config import (
    ClusterConfig,
    WorkerFailedError,
    connect,
    set_num_threads,
    worker_resources,
)

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_ATTEMPTS = 3
ITEMS_IN_FLIGHT = 2


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
        set_num_threads(num_threads)
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
    ray = connect(cluster)
    use_gpu, cpus = worker_resources(cluster)
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


def _cause(error: BaseException) -> BaseException:
    """The exception a worker raised, out of Ray's wrapping."""
    return getattr(error, "cause", None) or error.__cause__ or error

"""A group of training workers without Ray: gloo processes that write down which samples each step takes."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.cluster.config import ClusterConfig
    from shards.reader.reader import SampleBatch

PRELOADED = ["tokenizer.train", "pretrain.train", "torch._dynamo", "torch.utils.tensorboard"]
"""Imports that would take every process seconds: the loops, and what is imported once they run."""


class GroupKilledError(Exception):
    """A process of the group ended by a signal."""


@dataclass(frozen=True)
class Taken:
    """One rank's part of one step."""

    world_size: int
    rank: int
    epoch: int
    position: int
    keys: tuple[str, ...]


class GlooGroups:
    """`run` stands in for `run_training`; `kill_at_step` ends all ranks, by SIGKILL, as they begin that step.

    With `ask_every_step` the main rank is asked to save in each, as on a node that is only threatened.
    Checkpoints are waited for, so that the one of the step before is there. Rank 0 saves the result only
    when all others have returned: none of them may wait for it in a collective.
    """

    def __init__(self, folder: Path) -> None:
        self.kill_at_step: int | None = None
        self.ask_every_step = False
        self._folder = folder
        self._num_runs = 0

    def run(self, train: Callable[..., None], config: Any, cluster: ClusterConfig) -> None:
        folder = self._folder / f"run-{self._num_runs:02d}"
        folder.mkdir(parents=True)
        self._num_runs += 1
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        processes = [
            context.Process(
                target=_be_rank,
                args=(
                    train,
                    config,
                    rank,
                    cluster.num_workers,
                    folder,
                    self.kill_at_step,
                    self.ask_every_step,
                ),
            )
            for rank in range(cluster.num_workers)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
            process.kill()
            process.join()
        ends = [process.exitcode for process in processes]
        if any(ends):
            raise GroupKilledError(f"exit codes {ends}")

    def taken(self) -> list[Taken]:
        """What all runs took, in the order of runs, ranks and steps."""
        files = sorted(self._folder.glob("run-*/rank-*.jsonl"))
        records = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        return [Taken(**{**record, "keys": tuple(record["keys"])}) for record in records]


def _be_rank(
    train: Callable[..., None],
    config: Any,
    rank: int,
    world_size: int,
    folder: Path,
    kill_at_step: int | None,
    ask_every_step: bool,
) -> None:
    import torch
    import torch.distributed as dist

    from pipeline.training.checkpoints import CheckpointStore
    from pipeline.training.interruption import Interruption
    from pipeline.training.worker import Worker
    from shards.reader.reader import ShardReader

    torch.set_num_threads(1)
    loop = sys.modules[train.__module__]
    read, save, set_lr = ShardReader.batches, CheckpointStore.save, loop.set_lr
    handed_out: list[tuple[int, SampleBatch]] = []
    num_steps = 0
    interruption = Interruption(on_saved=lambda: None)

    def batches(self: ShardReader, epoch: int, position: int = 0) -> Iterator[SampleBatch]:
        for batch in read(self, epoch, position):
            handed_out.append((epoch, batch))
            yield batch

    def begin_step(*args: Any) -> None:
        # The loop calls it once for every batch that it trains on, and for no other.
        nonlocal num_steps
        num_steps += 1
        if num_steps == kill_at_step:
            os.kill(os.getpid(), signal.SIGKILL)
        if ask_every_step:
            interruption.ask()
        epoch, batch = handed_out[-1]
        taken = {"world_size": world_size, "rank": rank, "epoch": epoch, "position": batch.position}
        with Path(folder, f"rank-{rank}.jsonl").open("a") as file:
            file.write(json.dumps({**taken, "keys": batch.keys}) + "\n")
        set_lr(*args)

    def save_last(*args: Any, **how: Any) -> None:
        deadline = time.monotonic() + 60
        while len(list(folder.glob("done-*"))) < world_size - 1:
            assert time.monotonic() < deadline, "other ranks wait for rank 0, which saves the result"
            time.sleep(0.05)
        save_result(*args, **how)

    def save_and_wait(*args: Any, **how: Any) -> None:
        save(*args, **{**how, "wait": True})

    ShardReader.batches, CheckpointStore.save = batches, save_and_wait
    loop.set_lr = begin_step  # type: ignore[attr-defined]
    save_name = next(name for name in ("save_tokenizer", "save_backbone") if hasattr(loop, name))
    save_result = getattr(loop, save_name)
    setattr(loop, save_name, save_last)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    train(config, Worker(rank=rank, world_size=world_size, interruption=interruption))
    Path(folder, f"done-{rank}").touch()
    if world_size > 1:
        dist.destroy_process_group()


def check_nothing_lost_nothing_twice(
    taken: list[Taken], order: Callable[[int], Iterator[SampleBatch]], num_epochs: int
) -> None:
    """In every epoch, all runs and ranks together took the samples of `order`, a reader of one rank, once.

    `order` leaves out the tail of an epoch that is declared as dropped.
    """
    for epoch in range(num_epochs):
        parts: dict[int, list[str]] = {}
        for part in taken:
            if part.epoch == epoch:
                parts.setdefault(part.position, []).extend(part.keys)
        expected = {batch.position: batch.keys for batch in order(epoch)}
        assert {position: sorted(keys) for position, keys in parts.items()} == {
            position: sorted(keys) for position, keys in expected.items()
        }
        keys = [key for part in parts.values() for key in part]
        assert len(keys) == len(set(keys))

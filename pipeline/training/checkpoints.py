"""Training checkpoints on any storage: written beside the training, published whole, newest one wins.

A checkpoint is one file of tensors and one small JSON written after it, which names the file by size and
hash. What is half written has no JSON and is never loaded. No pickled code: `weights_only` on the way in.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline import storage
from pipeline.artifacts import sha256_hex
from pipeline.training.worker import Worker

FOLDER = "checkpoints"
MEET_EVERY_S = 20.0
"""Ranks that wait for rank 0's storage meet so often, lest their collective runs out of time."""
_HEADER = {"epoch", "position", "step", "bytes", "sha256"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState:
    """Where a training run stands: the next sample to consume is `position` of `epoch`."""

    epoch: int = 0
    position: int = 0
    step: int = 0


class CheckpointStore:
    """The checkpoints of one run, under `<output>/checkpoints/`: the newest `keep`, and the best.

    `save` copies the tensors and returns; a thread serializes, hashes and uploads them while training goes
    on, one checkpoint at a time. What went wrong there is raised by the next call. Before it, `is_writing`
    says whether `save` would have to wait, and `wait_together` waits without keeping other ranks in the dark.
    """

    def __init__(self, output: str, *, keep: int = 2) -> None:
        self._folder = storage.join(output, FOLDER)
        self._keep = keep
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(
        self, state: TrainState, tensors: dict[str, Any], *, score: float | None = None, wait: bool = False
    ) -> None:
        """Publish a checkpoint, then drop the oldest beyond `keep`; `wait` returns when that is done.

        `tensors` is a nest of dicts, lists, tensors, numbers and strings. A lower `score` is better.
        """
        self.wait()
        self._writing = self._writer.submit(self._publish, state, _copied(tensors), score)
        if wait:
            self.wait()

    @property
    def is_writing(self) -> bool:
        """True while a checkpoint is being published."""
        return self._writing is not None and not self._writing.done()

    def wait(self) -> None:
        """Return when nothing is being written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def wait_together(self, worker: Worker) -> None:
        """On all ranks: return when nothing is being written."""
        while not worker.agree(self._written_within(MEET_EVERY_S)):
            pass

    def latest(self, worker: Worker | None = None) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that is complete and undamaged, on the CPU; None when there is none.

        With a worker all ranks call, and RuntimeError names those that found another one.
        """
        self.wait()
        newest = self._first_sound(reversed(self._stems()))
        if worker is not None:
            state = TrainState(epoch=-1, position=-1, step=-1) if newest is None else newest[0]
            place = (state.epoch, state.position, state.step)
            worker.require_same(f"epoch, position, step of {self._folder}", *place)
        return newest

    def best(self) -> tuple[TrainState, dict[str, Any]] | None:
        """The undamaged checkpoint with the lowest score; None when none has one."""
        self.wait()
        records = {name: record for name in self._stems() if (record := self._record(name)) is not None}
        return self._first_sound(_by_score(records))

    def clear(self) -> None:
        """Remove all of them: a finished run needs none."""
        self.wait()
        for file in list(storage.list_files(self._folder)):
            storage.remove(file.url)

    def _publish(self, state: TrainState, tensors: dict[str, Any], score: float | None) -> None:
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        data = buffer.getvalue()
        name = f"step-{state.step:09d}"
        storage.put(self._url(name, "pt"), data)
        record = {**asdict(state), "bytes": len(data), "sha256": sha256_hex(data)}
        if score is not None and math.isfinite(score):
            record["score"] = score
        storage.put(self._url(name, "json"), json.dumps(record).encode())
        self._drop_older(name)

    def _drop_older(self, newest: str) -> None:
        """Keep the newest `keep` up to this one and the best; unfinished ones before it go too."""
        older = [name for name in self._stems() if name <= newest]
        records = {name: record for name in older if (record := self._record(name)) is not None}
        kept = {*list(records)[-self._keep :], *_by_score(records)[:1]}
        for name in older:
            if name not in kept:
                # The header goes first: without it the tensors are nothing.
                storage.remove(self._url(name, "json"))
                storage.remove(self._url(name, "pt"))

    def _first_sound(self, names: Iterable[str]) -> tuple[TrainState, dict[str, Any]] | None:
        loaded = (self._load(name) for name in names)
        return next((checkpoint for checkpoint in loaded if checkpoint is not None), None)

    def _load(self, name: str) -> tuple[TrainState, dict[str, Any]] | None:
        record = self._record(name)
        data = (storage.read_or_none(self._url(name, "pt")) or b"") if record is not None else b""
        if record is None or len(data) != record["bytes"] or sha256_hex(data) != record["sha256"]:
            state = "unfinished or damaged" if record is None else "damaged"
            print(f"warning: checkpoint {name} in {self._folder} is {state} and passed over", flush=True)
            return None
        tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        state = TrainState(epoch=record["epoch"], position=record["position"], step=record["step"])
        return state, tensors

    def _record(self, name: str) -> dict[str, Any] | None:
        """The header of a checkpoint; None where there is none, or half of one."""
        try:
            record = json.loads(storage.read_or_none(self._url(name, "json")) or b"")
        except ValueError:
            return None
        return record if isinstance(record, dict) and record.keys() >= _HEADER else None

    def _written_within(self, seconds: float) -> bool:
        return self._writing is None or bool(futures.wait([self._writing], timeout=seconds).done)

    def _url(self, name: str, extension: str) -> str:
        return storage.join(self._folder, f"{name}.{extension}")

    def _stems(self) -> list[str]:
        """Names of what is there, finished or not, oldest first."""
        names = [storage.name(file.url).rpartition(".") for file in storage.list_files(self._folder)]
        return sorted({stem for stem, _, extension in names if extension in ("pt", "json")})


def _copied(value: Any) -> Any:
    """The same nest with tensors of its own on the CPU: training goes on changing the others."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(inner) for inner in value)
    return value


def _by_score(records: dict[str, dict[str, Any]]) -> list[str]:
    """Names of those that have a score, the best first, among equals the oldest."""
    scored = [name for name in sorted(records) if "score" in records[name]]
    return sorted(scored, key=lambda name: records[name]["score"])

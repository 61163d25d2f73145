"""Training checkpoints on any storage: written beside the training, published whole, newest one wins.

A checkpoint is one file of tensors and one small JSON written after it, which names the file by size and
hash. What is half written has no JSON and is never loaded. No pickled code: `weights_only` on the way in.
"""

from __future__ import annotations

import io
import json
import math
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline import storage
from pipeline.artifacts import sha256_hex

FOLDER = "checkpoints"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState:
    """Where a training run stands: the next sample to consume is `position` of `epoch`."""

    epoch: int = 0
    position: int = 0
    step: int = 0


class CheckpointStore:
    """The checkpoints of one run, under `<output>/checkpoints/`: the newest `keep`, and the best.

    `save` copies the tensors and returns; a thread serializes, hashes and uploads them while training goes
    on, one checkpoint at a time. What went wrong there is raised by the next call.
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

    def latest(self) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that is complete and undamaged, on the CPU; None when there is none."""
        self.wait()
        for name in reversed(self._names()):
            if (found := self._load(name)) is not None:
                return found
        return None

    def best(self) -> tuple[TrainState, dict[str, Any]] | None:
        """The checkpoint with the lowest score; None when none has one."""
        self.wait()
        name = self._best(self._names())
        return None if name is None else self._load(name)

    def clear(self) -> None:
        """Remove all of them: a finished run needs none."""
        self.wait()
        for found in list(storage.list_files(self._folder)):
            storage.remove(found.url)

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
        names = self._names()
        best = self._best(names)
        for old in names[: -self._keep]:
            if old != best:
                storage.remove(self._url(old, "json"))
                storage.remove(self._url(old, "pt"))

    def _load(self, name: str) -> tuple[TrainState, dict[str, Any]] | None:
        record = self._record(name)
        data = _read_or_empty(self._url(name, "pt"))
        if len(data) != record["bytes"] or sha256_hex(data) != record["sha256"]:
            print(
                f"warning: checkpoint {name} in {self._folder} is damaged, trying the one before", flush=True
            )
            return None
        tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        state = TrainState(epoch=record["epoch"], position=record["position"], step=record["step"])
        return state, tensors

    def _best(self, names: list[str]) -> str | None:
        scores = {name: score for name in names if (score := self._record(name).get("score")) is not None}
        return min(scores, key=lambda name: scores[name], default=None)

    def _record(self, name: str) -> dict[str, Any]:
        return json.loads(storage.read(self._url(name, "json")))

    def _url(self, name: str, extension: str) -> str:
        return storage.join(self._folder, f"{name}.{extension}")

    def _names(self) -> list[str]:
        found = [storage.name(file.url) for file in storage.list_files(self._folder)]
        return sorted(name.removesuffix(".json") for name in found if name.endswith(".json"))


def _copied(value: Any) -> Any:
    """The same nest with tensors of its own on the CPU: training goes on changing the others."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(inner) for inner in value)
    return value


def _read_or_empty(url: str) -> bytes:
    try:
        return storage.read(url)
    except FileNotFoundError:
        return b""

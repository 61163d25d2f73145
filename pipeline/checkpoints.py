"""Training checkpoints on any storage: published whole, newest complete one wins.

A checkpoint is one file of tensors and one small JSON written after it, which names the file by size and
hash. What is half written has no JSON and is never loaded. No pickled code: `weights_only` on the way in.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import Any

import torch

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
    """The checkpoints of one run, under `<output>/checkpoints/`; keeps the newest `keep`."""

    def __init__(self, output: str, *, keep: int = 2) -> None:
        self._folder = storage.join(output, FOLDER)
        self._keep = keep

    def save(self, state: TrainState, tensors: dict[str, Any]) -> None:
        """Publish a checkpoint, then drop the oldest beyond `keep`."""
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        data = buffer.getvalue()
        name = f"step-{state.step:09d}"
        storage.put(storage.join(self._folder, f"{name}.pt"), data)
        record = {
            "epoch": state.epoch,
            "position": state.position,
            "step": state.step,
            "bytes": len(data),
            "sha256": sha256_hex(data),
        }
        storage.put(storage.join(self._folder, f"{name}.json"), json.dumps(record).encode())
        for old in self._names()[: -self._keep]:
            storage.remove(storage.join(self._folder, f"{old}.json"))
            storage.remove(storage.join(self._folder, f"{old}.pt"))

    def latest(self) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that is complete and undamaged, on the CPU; None when there is none."""
        for name in reversed(self._names()):
            record = json.loads(storage.read(storage.join(self._folder, f"{name}.json")))
            data = _read_or_empty(storage.join(self._folder, f"{name}.pt"))
            if len(data) != record["bytes"] or sha256_hex(data) != record["sha256"]:
                print(
                    f"warning: checkpoint {name} in {self._folder} is damaged, trying the one before",
                    flush=True,
                )
                continue
            tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            return TrainState(
                epoch=record["epoch"], position=record["position"], step=record["step"]
            ), tensors
        return None

    def clear(self) -> None:
        """Remove all of them: a finished run needs none."""
        for found in list(storage.list_files(self._folder)):
            storage.remove(found.url)

    def _names(self) -> list[str]:
        found = [storage.name(file.url) for file in storage.list_files(self._folder)]
        return sorted(name.removesuffix(".json") for name in found if name.endswith(".json"))


def _read_or_empty(url: str) -> bytes:
    try:
        return storage.read(url)
    except FileNotFoundError:
        return b""

"""What both training loops need inside a step: figures over all ranks, and gradients that travel once."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.worker import Worker


class NonFiniteLossError(Exception):
    """The loss became NaN or infinite; the message names the step and the samples."""


class RunningMeans:
    """Weighted means of scalars over micro-batches and ranks, kept on the device until they are asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}

    def add(self, weight: float | Tensor, **values: Tensor) -> None:
        """Count each value `weight` times (its number of samples, say). Does not wait for the device."""
        for name, value in {
            **{n: v.detach() for n, v in values.items()},
            "": torch.ones((), device=self._device),
        }.items():
            term = value.double() * weight
            self._sums[name] = self._sums[name] + term if name in self._sums else term

    def state_dict(self) -> dict[str, Tensor]:
        """What this rank has counted since the last `take`."""
        return dict(self._sums)

    def load_state_dict(self, sums: Mapping[str, Tensor]) -> None:
        """Go on counting from there."""
        self._sums = {name: value.to(self._device) for name, value in sums.items()}

    def take(self, worker: Worker) -> dict[str, float]:
        """Means since the last call, over all ranks, which must all call; empties itself."""
        names = sorted(self._sums)
        sums = worker.sum(torch.stack([self._sums[name] for name in names])).tolist()
        self._sums = {}
        means = dict(zip(names, sums, strict=True))
        weight = means.pop("")
        return {name: value / weight for name, value in means.items()}


def require_finite(figures: Mapping[str, float], step: int, keys: Sequence[str]) -> None:
    """NonFiniteLossError, naming the step and the batch's samples, when a figure is NaN or infinite."""
    wrong = [name for name, value in figures.items() if not math.isfinite(value)]
    if wrong:
        raise NonFiniteLossError(
            f"{', '.join(wrong)} not finite at or shortly before step {step}, batch {', '.join(keys[:8])}…; "
            "the last checkpoint is kept: lower optim.peak_lr, or look at these samples"
        )


def synchronized(replica: nn.Module, last: bool) -> contextlib.AbstractContextManager[object]:
    """Gradients travel between ranks only with the last micro-batch of a step."""
    if last or not isinstance(replica, DistributedDataParallel):
        return contextlib.nullcontext()
    return replica.no_sync()


def to_device(pixels: np.ndarray, device: torch.device) -> Tensor:
    """uint8 images [B, S, S, 3] -> uint8 [B, 3, S, S] on the device: a byte a channel crosses the bus."""
    tensor = torch.from_numpy(pixels)
    if device.type == "cuda":
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return tensor.permute(0, 3, 1, 2)

"""What training loops need inside a step: figures over all ranks, and gradients that travel once."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.training.worker import Worker


class NonFiniteLossError(Exception):
    """The loss became NaN or infinite; the message names the step and the samples."""


class RunningMeans:
    """Weighted means of named scalars; nothing waits for the device but `take` and `take_sums`.

    A rank adds what it sees, and `gather` makes that everybody's: the checkpoint of one rank has it all.
    """

    def __init__(self, device: torch.device, *names: str) -> None:
        self._names = names
        self._here = torch.zeros(len(names) + 1, dtype=torch.float64, device=device)
        self._everywhere = torch.zeros_like(self._here)

    def add(self, weight: float, **values: Tensor) -> None:
        """Count each value `weight` times, its number of samples."""
        self.add_sums(weight, **{name: value.detach().double() * weight for name, value in values.items()})

    def add_sums(self, weight: float, **sums: Tensor) -> None:
        """Count values that are sums over `weight` samples already."""
        values = [sums[name].detach().double() for name in self._names]
        self._here += torch.stack([*values, self._here.new_full((), weight)])

    def gather(self, worker: Worker) -> None:
        """Add up over the ranks what each has added; all must call."""
        self._everywhere += worker.sum(self._here)
        self._here = torch.zeros_like(self._here)

    def state_dict(self) -> dict[str, Tensor]:
        """What was gathered since the last `take`: the weighted sum of each name, and the weights'."""
        return dict(zip([*self._names, ""], self._everywhere, strict=True))

    def load_state_dict(self, sums: Mapping[str, Tensor]) -> None:
        """Go on counting from there, on every rank."""
        self._everywhere += torch.stack([sums[name].to(self._here) for name in [*self._names, ""]])

    def take(self) -> dict[str, float]:
        """The means of what was gathered since the last call; NaN where that is nothing."""
        sums, weight = self.take_sums()
        return {name: value / weight if weight else math.nan for name, value in sums.items()}

    def take_sums(self) -> tuple[dict[str, float], float]:
        """The sums that `take` divides, and the weights'."""
        *sums, weight = self._everywhere.tolist()
        self._everywhere = torch.zeros_like(self._everywhere)
        return dict(zip(self._names, sums, strict=True)), weight


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

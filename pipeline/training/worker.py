"""One process of a training run, as a value: its rank, its device, and how to talk to the others."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.training.interruption import Interruption


@dataclass(frozen=True, kw_only=True)
class Worker:
    """Passed to a training loop; nothing looks ranks up globally."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    interruption: Interruption = field(default_factory=Interruption)
    """Asked when the process or node is about to end: save, and say so."""

    @property
    def is_main(self) -> bool:
        """True on the rank that writes."""
        return self.rank == 0

    def replicate(self, model: nn.Module) -> nn.Module:
        """The model whose gradients are averaged over ranks, step by step; the model itself on one rank."""
        return DistributedDataParallel(model, broadcast_buffers=False) if self.world_size > 1 else model

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's values, in place."""
        if self.world_size > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Rows of all ranks, in rank order: [sum of n_r, ...] from [n_r, ...]; n_r may differ."""
        if self.world_size == 1:
            return tensor
        count = torch.tensor([tensor.shape[0]], device=tensor.device)
        counts = [torch.zeros_like(count) for _ in range(self.world_size)]
        dist.all_gather(counts, count)
        longest = int(max(int(c) for c in counts))
        padded = tensor.new_zeros((longest, *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor
        rows = [torch.zeros_like(padded) for _ in range(self.world_size)]
        dist.all_gather(rows, padded)
        return torch.cat([row[: int(c)] for row, c in zip(rows, counts, strict=True)])

    def agree(self, decision: bool) -> bool:
        """Rank 0's decision, on every rank."""
        if self.world_size == 1:
            return decision
        return bool(self.broadcast(torch.tensor([decision], dtype=torch.int32, device=self.device)))

    def require_same(self, what: str, *numbers: int) -> None:
        """RuntimeError, naming the ranks, unless every rank gives rank 0's numbers."""
        given = self.gather(torch.tensor([numbers], device=self.device))
        differing = (given != given[0]).any(dim=1).nonzero().flatten().tolist()
        if differing:
            theirs, ours = given[differing].tolist(), given[0].tolist()
            raise RuntimeError(f"{what}: ranks {differing} found {theirs}, rank 0 found {ours}")


def local_worker(interruption: Interruption) -> Worker:
    """The only worker of a run in this process, on a GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Worker(device=device, interruption=interruption)

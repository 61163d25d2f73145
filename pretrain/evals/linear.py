"""Linear classifiers on frozen features: one for each learning rate of a sweep, side by side, and the choice.

The features of a whole dataset are never copied, neither for a part of the images nor standardised: what a
step needs is gathered, moved and standardised for that step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import InputError

_CHUNK_BYTES = 16 << 20  # of float32 features, where no batch size is given
_RESIDENT_BYTES = 8 << 30  # features up to this size move to the device as a whole, larger ones by batch

Edge = Literal["highest", "lowest"] | None
"""The end of a sweep at which a rate lies, beyond which nothing was tried; None in between."""

# Shapes below: n images, D numbers an image, C classes, L learning rates, b images of a batch.


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Settings of the classifiers' training and of the choice among them."""

    lrs: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    """Learning rates to choose from; the table says where the chosen one is the highest or the lowest."""
    epochs: int = 50
    """Passes over the features."""
    batch_size: int = 256
    """Features per step of the classifier."""
    holdout: float = 0.2
    """Share of the training images on which the learning rate is chosen."""
    seed: int = 0
    """Decides the held-out part, the order of features, and the weights of the untrained backbone."""

    def __post_init__(self) -> None:
        if not self.lrs or min(self.lrs) <= 0:
            raise InputError(f"lrs is {list(self.lrs)}; give one or more positive learning rates")
        if min(self.epochs, self.batch_size) < 1:
            raise InputError("epochs and batch_size must be at least 1")
        if not 0 < self.holdout < 1:
            raise InputError(f"holdout is {self.holdout}; give a share between 0 and 1, such as 0.2")

    def edge(self, lr: float) -> Edge:
        """The end of this sweep at which a rate lies."""
        if len(set(self.lrs)) == 1:
            return None
        if lr == max(self.lrs):
            return "highest"
        return "lowest" if lr == min(self.lrs) else None


@dataclass(frozen=True)
class LabelledFeatures:
    """Features [N, D], float32 or uint8, and labels int64 [n] below num_classes of the n `chosen` rows.

    chosen: int64 [n]; None where it is all rows in their order. -1 is a class nobody can predict.
    """

    features: Tensor
    labels: Tensor
    num_classes: int
    chosen: Tensor | None = None

    def rows(self, rows: Tensor) -> LabelledFeatures:
        """Some of the images; the features are shared with the whole."""
        chosen = rows if self.chosen is None else self.chosen[rows]
        return LabelledFeatures(self.features, self.labels[rows], self.num_classes, chosen)

    def batch(self, rows: Tensor, device: torch.device | str) -> Tensor:
        """Features of some of the images, float32 [len(rows), D]; rows on the CPU."""
        chosen = rows if self.chosen is None else self.chosen[rows]
        return self.features[chosen.to(self.features.device)].to(device).float()

    def chunks(self, num_rows: int | None = None) -> Iterator[Tensor]:
        """All rows for `batch`, in order, some megabytes of features at a time."""
        if num_rows is None:
            num_rows = max(1, _CHUNK_BYTES // (4 * self.features.shape[1]))
        return iter(torch.arange(len(self.labels)).split(num_rows))

    def near(self, device: torch.device | str) -> LabelledFeatures:
        """The same with the features on the device, where they are not too large for that."""
        if self.features.nbytes > _RESIDENT_BYTES:
            return self
        return LabelledFeatures(self.features.to(device), self.labels, self.num_classes, self.chosen)


@dataclass(frozen=True)
class Fit:
    """One trained classifier on the images it was tested on: correct bool [n], and mean cross-entropy."""

    correct: Tensor
    loss: float


def hold_out(data: LabelledFeatures, sweep: Sweep) -> tuple[LabelledFeatures, LabelledFeatures]:
    """The images to train on and those held out to choose by, drawn by the seed; neither is empty."""
    num = len(data.labels)
    order = torch.randperm(num, generator=torch.Generator().manual_seed(sweep.seed))
    num_held = min(max(1, round(sweep.holdout * num)), num - 1)
    return data.rows(order[num_held:]), data.rows(order[:num_held])


def choose_lr(data: LabelledFeatures, sweep: Sweep, device: torch.device | str) -> tuple[float, float]:
    """The learning rate with the best accuracy on a held-out part of the data, and that accuracy.

    Of equally accurate ones, the one with the smaller cross-entropy.
    """
    kept, held_out = hold_out(data.near(device), sweep)
    fits = train_classifiers(kept, held_out, sweep.lrs, sweep, device)
    best = max(range(len(fits)), key=lambda i: (int(fits[i].correct.sum()), -fits[i].loss))
    return sweep.lrs[best], fits[best].correct.double().mean().item()


def train_classifiers(
    train: LabelledFeatures,
    test: LabelledFeatures,
    lrs: Sequence[float],
    sweep: Sweep,
    device: torch.device | str,
) -> list[Fit]:
    """Train one linear classifier per learning rate, side by side on the same batches, and test each."""
    train, test = train.near(device), test.near(device)
    mean, scale = standardisation(train, device)
    shape = (train.num_classes, train.features.shape[1])
    # The problem is convex: starting from zero favours nothing and draws nothing.
    weights = [torch.zeros(shape, device=device, requires_grad=True) for _ in lrs]
    biases = [torch.zeros(shape[0], device=device, requires_grad=True) for _ in lrs]

    def classify(data: LabelledFeatures, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [b, C, L], by one matrix product of classifiers that share nothing else; targets [b, L]."""
        x = (data.batch(rows, device) - mean) * scale
        logits = F.linear(x, torch.cat(weights), torch.cat(biases))
        targets = data.labels[rows].to(device)[:, None].expand(-1, len(lrs))
        return logits.unflatten(1, (len(lrs), shape[0])).transpose(1, 2), targets

    groups = [{"params": [w, b], "lr": lr} for w, b, lr in zip(weights, biases, lrs, strict=True)]
    optimizer = torch.optim.Adam(groups, fused=True)
    num = len(train.labels)
    num_steps = sweep.epochs * math.ceil(num / sweep.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    generator = torch.Generator().manual_seed(sweep.seed)
    for _ in range(sweep.epochs):
        for rows in torch.randperm(num, generator=generator).split(sweep.batch_size):
            losses = F.cross_entropy(*classify(train, rows), reduction="sum")
            optimizer.zero_grad()
            (losses / len(rows)).backward()
            optimizer.step()
            schedule.step()

    correct: list[Tensor] = []
    loss_sums = torch.zeros(len(lrs), dtype=torch.float64)
    with torch.inference_mode():
        for rows in test.chunks(max(1, _CHUNK_BYTES // (4 * (shape[1] + shape[0] * len(lrs))))):
            logits, targets = classify(test, rows)
            correct.append((logits.argmax(dim=1) == targets).cpu())
            losses = F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
            loss_sums += losses.sum(dim=0, dtype=torch.float64).cpu()
    means = (loss_sums / max(1, int((test.labels != -1).sum()))).tolist()
    return [Fit(*pair) for pair in zip(torch.cat(correct).unbind(dim=1), means, strict=True)]


def standardisation(data: LabelledFeatures, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal standard deviation [D] of the features; 0 for a constant, which says nothing."""
    sums = torch.zeros(data.features.shape[1], dtype=torch.float64, device=device)
    squares = torch.zeros_like(sums)
    # Far from zero, float32 would see little of the differences.
    origin = data.batch(torch.tensor([0]), device)
    for rows in data.chunks():
        x = data.batch(rows, device) - origin
        sums += x.sum(dim=0)
        squares += x.square_().sum(dim=0)
    mean = sums / len(data.labels)
    std = (squares / len(data.labels) - mean.square()).clamp_min(0.0).sqrt()
    scale = torch.where(std > 1e-6, 1.0 / std.clamp_min(1e-6), torch.zeros_like(std))
    return (origin[0] + mean).float(), scale.float()

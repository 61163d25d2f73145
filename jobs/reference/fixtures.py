"""Recorded runs of the official code: their files, their optimizer steps, and how far ours lie from them."""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline import storage
from pipeline.errors import InputError
from pipeline.tensorfile import read_tensors
from pipeline.training.optim import OptimConfig, build_optimizer, set_lr

# Largest max|a - b| / max|b| of a tensor, float32 on CPU.
FORWARD = 1e-5
GRADIENTS = 1e-4
WEIGHTS = 1e-3  # after three optimizer steps

NOISE = 1e-7
"""Gradients below this are rounding: AdamW divides by their size, so the sign of such a step is chance."""

_TRAINED = ("_init.safetensors", "_grads.safetensors", "_after3.safetensors", "_meta.json")
ENDINGS = {
    "vqkd_tiny": ("_train_io.npz", "_eval_io.npz", *_TRAINED),
    "mim_tiny": ("_io.npz", *_TRAINED),
    "finetune_tiny": ("_io.npz", "_init.safetensors"),
    "lr_schedules": (".npz",),
    "relpos_interp": (".npz",),
}
"""Files of a fixture, by the beginning of its name."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One quantity, held against the reference."""

    name: str
    difference: float
    """Largest max|a - b| / max|b|, or the number of entries that differ; infinite where nothing compares."""
    tolerance: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """True if the difference is tolerable."""
        return self.difference <= self.tolerance


@dataclass(kw_only=True)
class Checks:
    """Checks in the making; `group` is the fixture at hand and goes before every name."""

    done: list[Check] = field(default_factory=list)
    left_alone: list[str] = field(default_factory=list)
    """Names of arrays and files that were compared with nothing."""
    group: str = ""

    def compare(
        self, name: str, ours: Tensor, theirs: Tensor, note: str = "", *, tolerance: float = FORWARD
    ) -> None:
        """One tensor, relative to the largest entry of the reference's; whole numbers entry by entry."""
        difference = relative_difference(ours, theirs)
        if ours.shape != theirs.shape:
            note = f"shape {list(ours.shape)} here, {list(theirs.shape)} there"
        elif not theirs.is_floating_point():
            difference, tolerance = int((ours != theirs).sum()), 0.0
            note = "; ".join(filter(None, [f"{difference} of {ours.numel()}", note]))
        self._add(name, difference, tolerance, note)

    def compare_all(
        self,
        name: str,
        ours: Mapping[str, Tensor],
        theirs: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Gradients by name, each relative to itself; with `gradients`, weights where those exceed NOISE."""
        if missing := sorted(ours.keys() ^ theirs.keys()):
            self.fail(name, f"{missing[0]} is {'not there' if missing[0] in ours else 'unknown here'}")
            return
        noise = {key: gradient.abs() < NOISE for key, gradient in (gradients or {}).items()}
        differences: dict[str, float] = {}
        for key, expected in theirs.items():
            value = torch.where(noise[key], expected, ours[key]) if key in noise else ours[key]
            differences[key] = relative_difference(value, expected)
        worst = max(differences, key=differences.__getitem__)
        note = f"{len(theirs)} tensors" + (f", most in {worst}" if differences[worst] else "")
        if gradients is not None:
            excluded = sum(int(mask.sum()) for mask in noise.values())
            total = sum(tensor.numel() for tensor in theirs.values())
            note += f", {excluded:,} of {total:,} entries without a gradient left out"
        self._add(name, differences[worst], GRADIENTS if gradients is None else WEIGHTS, note)

    def compare_steps(
        self,
        model: nn.Module,
        optim: OptimConfig,
        meta: Mapping[str, Any],
        losses: Callable[[Mapping[str, Any]], dict[str, Tensor]],
    ) -> None:
        """Repeat the recorded optimizer steps: losses by their names in the meta file, and gradient norms.

        `losses` runs the model for a recorded step; `total` is what is differentiated.
        """
        optimizer = build_optimizer(model, optim, batch_size=1)
        figures: list[dict[str, Tensor]] = []
        for step, rate in zip(meta["three_steps"], meta["lrs"], strict=True):
            values = losses(step)
            optimizer.zero_grad()
            values["total"].backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), meta.get("clip") or math.inf)
            set_lr(optimizer, rate)
            optimizer.step()
            figures.append({**values, "grad_norm": norm})
        for key in figures[0]:
            ours = torch.stack([values[key].detach() for values in figures])
            recorded = [float(step.get(key, math.nan)) for step in meta["three_steps"]]
            name, tolerance = f"{key} loss", FORWARD
            if key == "grad_norm":
                name, tolerance = "gradient norms", GRADIENTS
            theirs = torch.tensor(recorded, dtype=torch.float64)
            self.compare(f"three steps: {name}", ours, theirs, tolerance=tolerance)

    def fail(self, name: str, why: str) -> None:
        """Something that should be there to be compared, and is not."""
        self._add(name, math.inf, 0.0, why)

    def leave(self, names: Iterable[str]) -> None:
        """Names that were seen; those that were not compared by now are listed as left alone."""
        prefix = f"{self.group}: " if self.group else ""
        done = {check.name for check in self.done}
        self.left_alone += [prefix + name for name in sorted(names) if prefix + name not in done]

    def _add(self, name: str, difference: float, tolerance: float, note: str) -> None:
        full = f"{self.group}: {name}" if self.group else name
        self.done.append(Check(name=full, difference=difference, tolerance=tolerance, note=note))


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """max|a - b| / max|b|; absolute where b is zero throughout; infinite for other shapes and for NaN."""
    if ours.shape != theirs.shape:
        return math.inf
    expected = theirs.detach().double()
    difference = float((ours.detach().double() - expected).abs().max())
    largest = float(expected.abs().max())
    ratio = difference / largest if largest else difference
    return math.inf if math.isnan(ratio) else ratio


@torch.no_grad()
def nearest(candidates: Iterable[int], compute: Callable[[int], Tensor], expected: Tensor) -> int:
    """The candidate that reproduces the reference best: for layers and heads, which weights do not tell."""
    return min(candidates, key=lambda candidate: relative_difference(compute(candidate), expected))


def divisors(width: int) -> list[int]:
    """The numbers of heads that a width allows."""
    return [heads for heads in range(1, width + 1) if width % heads == 0]


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by the names of their parameters."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class Arrays(dict[str, Tensor]):
    """Arrays by name; InputError for a name that is not there."""

    def __missing__(self, key: str) -> Tensor:
        raise InputError(f"there is no array {key!r}; there are {', '.join(sorted(self)) or 'none'}")


@dataclass(frozen=True, kw_only=True)
class Fixture:
    """One run of the reference: its inputs and outputs, weights before and after, gradients."""

    stem: str
    kind: str
    folder: str

    def files(self) -> list[str]:
        """Names of the files it consists of."""
        return [f"{self.stem}{ending}" for ending in ENDINGS[self.kind]]

    def arrays(self, ending: str = ".npz") -> Arrays:
        """Every array of an .npz file; InputError when it is damaged."""
        url = storage.join(self.folder, f"{self.stem}{ending}")
        try:
            with np.load(io.BytesIO(storage.read(url)), allow_pickle=False) as file:
                return Arrays({key: torch.from_numpy(file[key]) for key in file.files})
        except (ValueError, TypeError, OSError, zipfile.BadZipFile) as error:
            raise InputError(f"{storage.name(url)} cannot be read: {error}") from None

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a safetensors file."""
        return read_tensors(storage.join(self.folder, f"{self.stem}_{name}.safetensors")).tensors

    def meta(self) -> dict[str, Any]:
        """The numbers beside the arrays: recorded steps and their learning rates, of one length."""
        name = f"{self.stem}_meta.json"
        try:
            meta = json.loads(storage.read(storage.join(self.folder, name)))
        except ValueError as error:
            raise InputError(f"{name} cannot be read: {error}") from None
        steps, rates = (meta.get(key) for key in ("three_steps", "lrs"))
        if not steps or not rates or len(steps) != len(rates):
            raise InputError(f"{name} has no `three_steps` and `lrs` of one length")
        return meta


def find_fixtures(folder: str, names: Iterable[str]) -> list[Fixture]:
    """The fixtures among the files of a folder, complete or not: models, then tables, in order of names."""
    kinds: dict[str, str] = {}
    for name in names:
        for kind, endings in ENDINGS.items():
            stems = {name.removesuffix(ending) for ending in endings} - {name}
            models = {stem for stem in stems if stem.startswith(f"{kind}_") and len(endings) > 1}
            kinds |= dict.fromkeys(models | (stems & {kind}), kind)
    ordered = sorted(kinds, key=lambda stem: (len(ENDINGS[kinds[stem]]) == 1, stem))
    return [Fixture(stem=stem, kind=kinds[stem], folder=folder) for stem in ordered]

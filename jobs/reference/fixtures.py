"""Reference fixtures as files: which belong together, what they hold, how far our values lie from theirs."""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline import storage
from pipeline.training.optim import OptimConfig

# max|a - b| / max|b| per tensor, float32 on CPU.
FORWARD = 1e-5
GRADIENTS = 1e-4
WEIGHTS = 1e-3  # after three optimizer steps

NOISE = 1e-7
"""Gradients below this are rounding: AdamW divides by their size, so the sign of such a step is chance."""

_WEIGHTS_AND_META = {
    "init": "_init.safetensors",
    "grads": "_grads.safetensors",
    "after3": "_after3.safetensors",
    "meta": "_meta.json",
}
KINDS = {
    "vqkd_tiny": {"io": "_train_io.npz", "eval": "_eval_io.npz", **_WEIGHTS_AND_META},
    "mim_tiny": {"io": "_io.npz", **_WEIGHTS_AND_META},
    "finetune_tiny": {"io": "_io.npz", "init": "_init.safetensors"},
}
"""How a fixture's name begins, and the files it needs: their role, and how their names usually end."""

ENDINGS = {
    "_train_io.npz": "io",
    "_eval_io.npz": "eval",
    "_io.npz": "io",
    "_init.safetensors": "init",
    "_state.safetensors": "init",
    "_grads.safetensors": "grads",
    "_after3.safetensors": "after3",
    "_meta.json": "meta",
}
BARE_ENDINGS = {".npz": "io", ".safetensors": "init", ".json": "meta"}
"""Also understood, where the rest of the name is a fixture's."""


class FixtureError(Exception):
    """A fixture that cannot be compared with, in one line: damaged, incomplete, of another kind of model."""


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
        """Whether the difference is tolerable."""
        return self.difference <= self.tolerance


@dataclass(kw_only=True)
class Checks:
    """Checks in the making; `group` is the fixture at hand and goes before every name."""

    done: list[Check] = field(default_factory=list)
    left_alone: list[str] = field(default_factory=list)
    """What is there and was compared with nothing."""
    group: str = ""

    def close(self, name: str, ours: Tensor, theirs: Tensor, tolerance: float, note: str = "") -> None:
        """One tensor, relative to the largest entry of the reference's."""
        difference = relative_difference(ours, theirs)
        if ours.shape != theirs.shape:
            note = f"shape {list(ours.shape)} here, {list(theirs.shape)} there"
        self._add(name, difference, tolerance, note)

    def equal(self, name: str, ours: Tensor, theirs: Tensor, note: str = "") -> None:
        """Whole numbers, entry by entry."""
        if ours.shape != theirs.shape:
            self.fail(name, f"shape {list(ours.shape)} here, {list(theirs.shape)} there")
            return
        differing = int((ours != theirs).sum())
        self._add(name, differing, 0.0, "; ".join(filter(None, [f"{differing} of {ours.numel()}", note])))

    def all_close(
        self,
        name: str,
        ours: Mapping[str, Tensor],
        theirs: Mapping[str, Tensor],
        tolerance: float,
        *,
        counted: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Tensors by name, each relative to itself; `counted` (bool, same shapes): which entries count."""
        if missing := sorted(ours.keys() ^ theirs.keys()):
            self.fail(name, f"{missing[0]} is {'not there' if missing[0] in ours else 'unknown here'}")
            return
        worst, worst_name, excluded = 0.0, "", 0
        for key, expected in theirs.items():
            value = ours[key].detach()
            if counted is not None and key in counted:
                excluded += int((~counted[key]).sum())
                value = torch.where(counted[key], value, expected)
            difference = relative_difference(value, expected)
            if difference > worst:
                worst, worst_name = difference, key
        notes = [f"{len(theirs)} tensors", f"most in {worst_name}" if worst_name else ""]
        if counted is not None:
            total = sum(tensor.numel() for tensor in theirs.values())
            notes.append(f"{excluded:,} of {total:,} entries without a gradient left out")
        self._add(name, worst, tolerance, ", ".join(filter(None, notes)))

    def fail(self, name: str, why: str) -> None:
        """Something that should be there to be compared, and is not."""
        self._add(name, math.inf, 0.0, why)

    def leave(self, what: Iterable[str]) -> None:
        """Things that were seen and not compared."""
        self.left_alone += [f"{self.group}: {name}" if self.group else name for name in what]

    def _add(self, name: str, difference: float, tolerance: float, note: str) -> None:
        full = f"{self.group}: {name}" if self.group else name
        self.done.append(Check(name=full, difference=difference, tolerance=tolerance, note=note))


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """max|a - b| / max|b|; absolute where b is zero throughout; infinite for other shapes and for NaN."""
    if ours.shape != theirs.shape:
        return math.inf
    if theirs.numel() == 0:
        return 0.0
    expected = theirs.detach().double()
    difference = float((ours.detach().double() - expected).abs().max())
    largest = float(expected.abs().max())
    ratio = difference / largest if largest else difference
    return math.inf if math.isnan(ratio) else ratio


# ------------------------------------------------------------------------------------------------ fixtures


@dataclass(frozen=True, kw_only=True)
class Fixture:
    """One run of the reference: its inputs and outputs, weights before and after, gradients."""

    stem: str
    kind: str
    folder: str
    files: Mapping[str, str]
    """File name by role."""

    @property
    def missing(self) -> list[str]:
        """Names of the files that belong to such a fixture and are not there."""
        return [self.stem + ending for role, ending in KINDS[self.kind].items() if role not in self.files]

    def arrays(self, role: str) -> dict[str, Tensor]:
        """The arrays of a file of numpy arrays; empty where the fixture has no such file."""
        return read_arrays(self._url(role)) if role in self.files else {}

    def tensors(self, role: str) -> dict[str, Tensor]:
        """The tensors of a safetensors file; empty where the fixture has no such file."""
        if role not in self.files:
            return {}
        try:
            return safetensors.torch.load(storage.read(self._url(role)))
        except safetensors.SafetensorError as error:
            raise FixtureError(f"{self.files[role]} cannot be read: {error}") from None

    def meta(self) -> dict[str, Any]:
        """The numbers beside the arrays; empty where the fixture has none."""
        if "meta" not in self.files:
            return {}
        try:
            found = json.loads(storage.read(self._url("meta")))
        except ValueError as error:
            raise FixtureError(f"{self.files['meta']} cannot be read: {error}") from None
        if not isinstance(found, dict):
            raise FixtureError(f"{self.files['meta']} holds no JSON object")
        return found

    def _url(self, role: str) -> str:
        return storage.join(self.folder, self.files[role])


def read_arrays(url: str) -> dict[str, Tensor]:
    """Every array of an .npz file; FixtureError when it is damaged."""
    try:
        with np.load(io.BytesIO(storage.read(url)), allow_pickle=False) as found:
            return {key: torch.from_numpy(found[key]) for key in found.files}
    except (ValueError, TypeError, OSError, zipfile.BadZipFile) as error:
        raise FixtureError(f"{storage.name(url)} cannot be read: {error}") from None


def need(arrays: Mapping[str, Tensor], key: str) -> Tensor:
    """One array; FixtureError when the fixture does not hold it."""
    if key not in arrays:
        raise FixtureError(f"there is no array {key!r}; there are {', '.join(sorted(arrays)) or 'none'}")
    return arrays[key]


def find_fixtures(folder: str, names: Iterable[str]) -> tuple[list[Fixture], list[str]]:
    """The fixtures among files of a folder, by name, and the files that belong to none."""
    files: dict[str, dict[str, str]] = {}
    others: list[str] = []
    bare: list[tuple[str, str, str]] = []
    for name in sorted(names):
        if found := _stem_and_role(name, ENDINGS):
            stem, role = found
            if role in files.setdefault(stem, {}):
                others.append(name)
            else:
                files[stem][role] = name
        elif found := _stem_and_role(name, BARE_ENDINGS):
            bare.append((*found, name))
        else:
            others.append(name)
    pairs = {stem for stem, role, _ in bare if role == "io"} & {
        stem for stem, role, _ in bare if role == "init"
    }
    for stem, role, name in bare:
        known = stem in files or stem in pairs
        if not known and _kind(stem) == "finetune_tiny" and role != "meta":
            known = not any(stem.startswith(f"{other}_") for other in files)
        if known and role not in files.setdefault(stem, {}):
            files[stem][role] = name
        else:
            others.append(name)
    fixtures = [
        Fixture(stem=stem, kind=_kind(stem), folder=folder, files=roles)
        for stem, roles in sorted(files.items())
    ]
    return fixtures, sorted(others)


def _stem_and_role(name: str, endings: Mapping[str, str]) -> tuple[str, str] | None:
    for ending, role in endings.items():
        stem = name.removesuffix(ending)
        kind = _kind(stem)
        if stem != name and kind and (role in KINDS[kind] or role == "meta"):
            return stem, role
    return None


def _kind(stem: str) -> str:
    return next((kind for kind in KINDS if stem == kind or stem.startswith(f"{kind}_")), "")


# ------------------------------------------------------------------------------------------------ sizes


def num_blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    """Transformer blocks among the tensors `<prefix><number>.…`."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return len({found[1] for key in state if (found := pattern.match(key))})


def grid_of(num_tokens: int) -> int:
    """Side of the square grid of so many tokens, one of which is [CLS]."""
    side = math.isqrt(max(num_tokens - 1, 0))
    if side * side != num_tokens - 1:
        raise FixtureError(f"{num_tokens} tokens are no square grid and a [CLS] token")
    return side


def best_by_trial(candidates: Iterable[int], difference: Callable[[int], float]) -> int:
    """The number that reproduces the reference best, where weights do not tell it."""
    return min(candidates, key=difference)


def divisors(width: int) -> list[int]:
    """Head counts that a width allows."""
    return [heads for heads in range(1, width + 1) if width % heads == 0]


def load_exactly(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state; FixtureError names the first tensor that is missing, left over or misshapen."""
    ours = model.state_dict()
    for key in [*ours, *sorted(state)]:
        here = list(ours[key].shape) if key in ours else "absent"
        there = list(state[key].shape) if key in state else "absent"
        if here != there:
            raise FixtureError(f"{key} is {there} in the fixture's weights and {here} in our model")
    model.load_state_dict(cast(dict[str, Any], state))


def recipe(meta: Mapping[str, Any], *, weight_decay: float, betas: tuple[float, float]) -> OptimConfig:
    """AdamW as a fixture's meta file says, or else as the reference's command does."""
    first, second = meta.get("betas", betas)
    return OptimConfig(
        weight_decay=meta.get("weight_decay", weight_decay), betas=(first, second), eps=meta.get("eps", 1e-8)
    )


def counts_in(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Which entries of each weight have a gradient to speak of."""
    return {key: gradient.abs() >= NOISE for key, gradient in gradients.items()}


def numbers_of(steps: Iterable[Mapping[str, Any]], key: str) -> Tensor:
    """One number of each of the steps in a fixture's meta file, float64 [steps]."""
    return torch.tensor([float(step[key]) for step in steps], dtype=torch.float64)

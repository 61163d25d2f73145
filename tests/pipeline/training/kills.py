"""Runs that end before they are finished: killed once a checkpoint is there, or asked to save and end."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import pytest

from pipeline.training.checkpoints import CheckpointStore, TrainState
from pipeline.training.interruption import InterruptedRunError, Interruption


class Killed(BaseException):
    """Ends a run like a kill: nothing after it is executed."""


@contextlib.contextmanager
def killed_at_save(number: int) -> Iterator[None]:
    """What runs inside is killed when its `number`-th checkpoint, counted from 1, has been published."""
    save, saves = CheckpointStore.save, itertools.count(1)

    def save_and_die(
        self: CheckpointStore, state: TrainState, tensors: dict[str, object], **how: object
    ) -> None:
        save(self, state, tensors, **{**how, "wait": True})  # type: ignore[arg-type]
        if next(saves) == number:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(CheckpointStore, "save", save_and_die)
        yield


@contextlib.contextmanager
def asked_to_end(number: int) -> Iterator[None]:
    """What runs inside is asked to save and end when it looks for that the `number`-th time, from 1."""
    looks = itertools.count(1)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedRunError):
        patch.setattr(Interruption, "asked", property(lambda self: next(looks) == number))
        yield


@contextlib.contextmanager
def waiting_for_checkpoints() -> Iterator[None]:
    """Inside, every checkpoint is published before training goes on."""
    save = CheckpointStore.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointStore, "save", lambda *args, **how: save(*args, **{**how, "wait": True}))
        yield

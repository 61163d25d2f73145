"""What a training loop writes beside training: its opening line, records, progress and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from pipeline.config import identity
from pipeline.training.checkpoints import CheckpointStore, TrainState
from pipeline.training.config import TrainingConfig
from pipeline.training.metrics import MetricsLog, Progress
from pipeline.training.worker import Worker


class Stateful(Protocol):
    """A model, an optimizer, a gradient scaler."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any, /) -> object: ...


class Reports(Protocol):
    """Figures beside the metrics, such as what reading costs."""

    def at(self, step: int) -> None: ...

    def close(self) -> None: ...


class Journal:
    """Called by a loop at every step; only the main rank writes, and nothing of the training happens here.

    A new journal has loaded the newest checkpoint into `states` on every rank: `state` is where the run
    stands, and `resumed` what else the checkpoint holds, or None in a new run. Then `begin`, and after every
    step `record`, where figures are due, and `after_step`.
    """

    def __init__(self, config: TrainingConfig, worker: Worker, states: Mapping[str, Stateful]) -> None:
        self._config, self._worker, self._states = config, worker, states
        self._checkpoints = CheckpointStore(config.output, keep=config.checkpoint_keep)
        self.state = TrainState()
        self.resumed: dict[str, Any] | None = None
        if (loaded := self._checkpoints.latest(worker)) is not None:
            self.state, self.resumed = loaded
            for name, part in states.items():
                part.load_state_dict(self.resumed.pop(name))

    def begin(
        self,
        opening: str,
        progress: Progress,
        tensors: Callable[[], dict[str, Any]],
        *,
        epochs: int = 0,
        reports: Reports | None = None,
    ) -> None:
        """Print the opening line and open the records, of which those after `state.step` are dropped.

        `tensors` gives what a checkpoint holds beside the states; it is called when one is saved. `epochs` of
        the run are shown, where it has some.
        """
        self._progress, self._tensors, self._epochs, self._reports = progress, tensors, epochs, reports
        self._log: MetricsLog | None = None
        self._saved_s = time.monotonic()
        if self._worker.is_main:
            self._log = MetricsLog(self._config.output, resume_step=self.state.step)
            print(opening, flush=True)

    def record(self, state: TrainState, figures: Mapping[str, float], *, split: str = "train") -> None:
        """Add a line of figures to metrics.jsonl, and one to the reports."""
        self.state = state
        if self._log is not None:
            self._log.log(state.step, figures, split=split)
            if self._reports is not None:
                self._reports.at(state.step)

    def after_step(
        self, state: TrainState, taken: int, shown: Mapping[str, float], *, may_save: bool = True
    ) -> None:
        """Count what a step took towards the progress, and save if that is asked for, or due and allowed.

        With `may_save` off, a checkpoint is not due yet: figures since the last record are unchecked, or the
        one at the end of the epoch follows.
        """
        self.state = state
        if self._log is None:
            return
        epoch = {"epoch": state.epoch + 1} if self._epochs else {}
        self._progress.update(taken, **epoch, **shown)
        due = time.monotonic() - self._saved_s > self._config.checkpoint_every_s
        if may_save and due and not self._checkpoints.is_writing:
            self._save()
            self._saved_s = time.monotonic()
        self.save_if_asked()

    def save_if_asked(self) -> None:
        """Save and answer when this process or node is about to end; the answer may end the run.

        Called after steps, and within validation: it may take longer than a preempted node has.
        """
        if self._worker.is_main and self._worker.interruption.asked:
            self._save(wait=True)
            self._worker.interruption.saved()

    def save_together(
        self, state: TrainState, *, score: float | None = None, figures: Mapping[str, float] | None = None
    ) -> None:
        """On all ranks, at an epoch's end: save, once nothing is being written; lower scores are better.

        `figures` are recorded as those of the epoch, and printed.
        """
        self._checkpoints.wait_together(self._worker)
        self.state = state
        if self._log is None:
            return
        if figures is not None:
            self._log.log(state.step, {"epoch": state.epoch, **figures}, split="epoch")
            shown = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())
            print(f"epoch {state.epoch}/{self._epochs}: {shown}", flush=True)
        self._save(score=score)
        self._saved_s = time.monotonic()

    def account(self) -> dict[str, Any]:
        """What a result says of its run: steps, seconds, and the settings that decided it."""
        return {
            "steps": self.state.step,
            "seconds": self._progress.elapsed_s,
            "config": identity(self._config),
        }

    def best(self) -> tuple[TrainState, dict[str, Any]] | None:
        """The checkpoint with the lowest score; None when none has one."""
        return self._checkpoints.best()

    def finish(self, **shown: float) -> None:
        """On the main rank, once the result is saved: publish all records, and drop the checkpoints."""
        if self._log is None:
            return
        if self._reports is not None:
            self._reports.close()
        self._progress.close(**shown)
        self._log.close()
        self._checkpoints.clear()

    def _save(self, *, score: float | None = None, wait: bool = False) -> None:
        tensors = {name: part.state_dict() for name, part in self._states.items()} | self._tensors()
        assert self._log is not None
        self._log.flush()
        self._checkpoints.save(self.state, tensors, score=score, wait=wait)

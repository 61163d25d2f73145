"""Figures of a long run: progress lines with rate and ETA, and one record of figures per step.

Progress lines are whole lines, so that they stay legible in `ray job logs`.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pipeline import storage

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"


class Progress:
    """Prints `what: done/total unit (percent), rate, ETA, figures` at most every `every_s` seconds."""

    def __init__(self, what: str, total: int, unit: str, *, done: int = 0, every_s: float = 10.0) -> None:
        self.what, self.total, self.unit, self.every_s = what, total, unit, every_s
        self.done = self._first = done
        self._start = time.monotonic()
        self._printed = self._start - every_s + min(2.0, every_s)

    @property
    def elapsed_s(self) -> float:
        """Seconds since this progress began."""
        return time.monotonic() - self._start

    def update(self, n: int = 1, **figures: float | int | str) -> None:
        """Count n more, and print a line when it is time."""
        self.done += n
        if time.monotonic() - self._printed >= self.every_s:
            self.close(**figures)

    def close(self, **figures: float | int | str) -> None:
        """Print a line, the last one in any case."""
        self._printed = time.monotonic()
        rate = (self.done - self._first) / max(self.elapsed_s, 1e-9)
        left_s = (self.total - self.done) / rate if rate > 0 else float("inf")
        percent = 100.0 * self.done / max(self.total, 1)
        parts = [
            f"{self.what}: {self.done:,}/{self.total:,} {self.unit} ({percent:.0f} %)",
            f"{rate:,.1f} {self.unit}/s",
            f"ETA {duration(left_s)}" if self.done < self.total else f"in {duration(self.elapsed_s)}",
        ]
        for key, value in figures.items():
            parts.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
        print(", ".join(parts), flush=True)


def duration(seconds: float) -> str:
    """`1 h 02 min`, `3 min 20 s`, `12.3 s`."""
    if seconds == float("inf"):
        return "unknown"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class MetricsLog:
    """Figures of a run: `<output>/metrics.jsonl` and TensorBoard events under `<output>/tensorboard/`.

    One line per record: `{"step": 12, "split": "train", "loss": 3.1, …}`. Opening the log of a resumed run
    keeps the records up to `resume_step`, so the curve has no fork. Object stores cannot append: both files
    are kept here and put whole at every flush.
    """

    def __init__(
        self, output: str, *, resume_step: int = 0, flush_every_s: float = 15.0, file: str = METRICS_FILE
    ) -> None:
        self._output = output
        self._url = storage.join(output, file)
        self._lines = [
            json.dumps(record) for record in read_metrics(output, file) if int(record["step"]) <= resume_step
        ]
        self._flush_every_s = flush_every_s
        self._flushed = time.monotonic()
        self._events = tempfile.mkdtemp(prefix="tensorboard-")
        self._writer: SummaryWriter | None = None

    def log(self, step: int, values: Mapping[str, float], *, split: str = "train") -> None:
        """Record figures of one step."""
        self._lines.append(json.dumps({"step": step, "split": split, **values}))
        writer = self._tensorboard()
        for key, value in values.items():
            writer.add_scalar(f"{split}/{key}", value, step)
        if time.monotonic() - self._flushed >= self._flush_every_s:
            self.flush()

    def flush(self) -> None:
        """Publish everything recorded so far."""
        self._flushed = time.monotonic()
        storage.put(self._url, "".join(f"{line}\n" for line in self._lines).encode())
        if self._writer is not None:
            self._writer.flush()
            for name in os.listdir(self._events):
                with open(os.path.join(self._events, name), "rb") as file:
                    storage.put(storage.join(self._output, "tensorboard", name), file.read())

    def close(self) -> None:
        """Publish and let go of the event file."""
        self.flush()
        if self._writer is not None:
            self._writer.close()
        shutil.rmtree(self._events, ignore_errors=True)

    def _tensorboard(self) -> SummaryWriter:
        if self._writer is None:
            # Imported here: it costs a second, and readers of metrics do without.
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self._events)
        return self._writer


def read_metrics(output: str, file: str = METRICS_FILE) -> list[dict[str, float | int | str]]:
    """The records of a run, oldest first; empty when there are none."""
    data = storage.read_or_none(storage.join(output, file)) or b""
    return [json.loads(line) for line in data.splitlines() if line]

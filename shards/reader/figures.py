"""What reading costs a run: rate, waits, decoding, fetches, and whether data or compute is the limit."""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.training.metrics import MetricsLog

READER_FILE = "reader.jsonl"
"""Beside metrics.jsonl, whose records are the same in every run of the same settings; times are not."""

BOUND_BY_DATA = 0.05
"""Share of the time spent waiting for batches from which a run is bound by data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReaderFigures:
    """What a reader did in `seconds` of one consumer; threads' times are sums over threads."""

    seconds: float = 0.0
    samples: int = 0
    wait_s: float = 0.0
    """The consumer waited for batches."""
    decode_s: float = 0.0
    """Threads decoded, cropped and augmented."""
    shard_wait_s: float = 0.0
    """Threads waited for shards to be fetched, hashed and opened."""
    shards_opened: int = 0
    cache_hits: int = 0
    """Of the shards opened, those whose tar was on this node already."""
    gets: int = 0
    """Tars, or parts of foreign ones, that were fetched."""
    get_p50_s: float = 0.0
    get_p99_s: float = 0.0
    retries: int = 0
    bytes_fetched: int = 0

    @property
    def samples_per_s(self) -> float:
        return self.samples / self.seconds if self.seconds > 0 else 0.0

    @property
    def wait_share(self) -> float:
        """Part of the time in which the consumer had nothing to do."""
        return min(1.0, self.wait_s / self.seconds) if self.seconds > 0 else 0.0

    @property
    def bound_by_data(self) -> bool:
        return self.wait_share >= BOUND_BY_DATA

    def to_json(self) -> dict[str, float]:
        """Figures by name, each with `reader_` before it."""
        rates = {"samples_per_s": self.samples_per_s, "wait_share": self.wait_share}
        values = {**dataclasses.asdict(self), **rates}
        return {f"reader_{name}": value for name, value in values.items()}

    def verdict(self, num_threads: int) -> str:
        """One line for people: what limits the run, and what to raise."""
        rate = f"{self.samples_per_s:,.1f} samples/s"
        line = f"reader: {rate}, {self.wait_share:.1%} of the time waiting for data"
        if not self.bound_by_data:
            return f"{line}: bound by compute"
        if self.shard_wait_s > self.decode_s:
            cost = f"{self.gets} fetches of {self.get_p50_s:.2g} s (p99 {self.get_p99_s:.2g} s), "
            return (
                f"warning: {line}: bound by data, {cost}{self.retries} retries; raise --cache.bytes so that "
                "shards stay on this node, or bring the data nearer"
            )
        return f"warning: {line}: bound by data, by decoding; raise --decode_threads (now {num_threads})"


class Telemetry:
    """Counts from any thread; `take` gives what happened since the last `take`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._began = time.perf_counter()
        self._counts = _zeros()
        self._gets_s: list[float] = []

    def __reduce__(self) -> tuple[type[Telemetry], tuple[()]]:
        return Telemetry, ()  # another process counts from zero

    def delivered(self, samples: int, wait_s: float) -> None:
        """A batch was handed over, after the consumer waited so long."""
        self._add({"samples": samples, "wait_s": wait_s})

    def decoded(self, decode_s: float, shard_wait_s: float) -> None:
        """A thread filled some places of a batch."""
        self._add({"decode_s": decode_s, "shard_wait_s": shard_wait_s})

    def opened(self, *, hit: bool) -> None:
        """A shard was opened; `hit` where nothing had to be fetched for it."""
        self._add({"shards_opened": 1, "cache_hits": int(hit)})

    def fetched(self, num_bytes: int, get_s: float) -> None:
        """An object came from its store, retries included."""
        self._add({"gets": 1, "bytes_fetched": num_bytes})
        with self._lock:
            self._gets_s.append(get_s)

    def retried(self) -> None:
        """A request is repeated."""
        self._add({"retries": 1})

    def _add(self, counts: dict[str, float]) -> None:
        with self._lock:
            for name, count in counts.items():
                self._counts[name] += count

    def take(self) -> ReaderFigures:
        """What happened since the last call, or since the beginning."""
        with self._lock:
            now, gets_s = time.perf_counter(), np.array(self._gets_s or [0.0])
            p50, p99 = np.quantile(gets_s, [0.5, 0.99], method="higher").tolist()
            timed = {"seconds": now - self._began, "get_p50_s": p50, "get_p99_s": p99}
            figures = ReaderFigures(**self._counts | timed)
            self._began, self._counts, self._gets_s = now, _zeros(), []
        return figures


def _zeros() -> dict[str, Any]:
    return dataclasses.asdict(ReaderFigures())


class ReaderReports:
    """Writes a reader's figures to `<output>/reader.jsonl` and TensorBoard, and prints its verdict."""

    def __init__(
        self,
        output: str,
        telemetry: Telemetry,
        num_threads: int,
        *,
        resume_step: int = 0,
        every_s: float = 60.0,
    ) -> None:
        self._output, self._resume_step = output, resume_step
        self._telemetry = telemetry
        self._num_threads = num_threads
        self._every_s = every_s
        self._since_line: list[ReaderFigures] = []
        telemetry.take()  # what came before the first step is no part of the loop

    @functools.cached_property
    def _log(self) -> MetricsLog:
        """Opened with the first record: only the rank that writes has one."""
        return MetricsLog(self._output, resume_step=self._resume_step, file=READER_FILE)

    def at(self, step: int) -> None:
        """Record what reading cost since the last call; prints a line when it is time."""
        figures = self._telemetry.take()
        self._log.log(step, figures.to_json(), split="reader")
        self._since_line.append(figures)
        if sum(figures.seconds for figures in self._since_line) >= self._every_s:
            self._print()

    def close(self) -> None:
        """Print the last line and publish everything."""
        if self._since_line:
            self._print()
        self._log.close()

    def _print(self) -> None:
        print(_together(self._since_line).verdict(self._num_threads), flush=True)
        self._since_line = []


def _together(parts: list[ReaderFigures]) -> ReaderFigures:
    """Sums; of the quantiles the largest."""
    summed = {}
    for field in dataclasses.fields(ReaderFigures):
        values = [getattr(part, field.name) for part in parts]
        summed[field.name] = max(values) if field.name.startswith("get_") else sum(values)
    return ReaderFigures(**summed)

"""Running one stage, here or as a job of a cluster, with its log, its time and its end."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.stages.stage import Stage
from pipeline import storage
from pipeline.training import metrics

LOG_TAIL_LINES = 25

StartJob = Callable[[Stage, Sequence[str], Callable[[str], None]], int]
"""Runs a stage's job with these arguments; hands over its output line by line; returns its exit status."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """How one run of a stage ended."""

    status: int
    """Exit status of the job; minus the signal that ended it."""
    seconds: float
    """Wall time, together with that of earlier attempts."""
    finished: bool
    """The status is 0 and every output exists."""


def run_stage(
    stage: Stage, argv: Sequence[str], root: str, start: StartJob, *, earlier_s: float = 0.0
) -> Attempt:
    """Run a stage and print how it ended; its output is kept in `<root>/logs`.

    earlier_s: seconds of attempts before this one, which count with it.
    """
    print(f"{stage.name}: python -m jobs.{stage.job} {shlex.join(argv)}", flush=True)
    log, tail = log_url(root, stage.name), deque[str](maxlen=LOG_TAIL_LINES)
    began = time.monotonic()
    with _local_path(log) as path, open(path, "w", encoding="utf-8", errors="replace") as file:

        def on_line(text: str) -> None:
            tail.append(text)
            if stage.echoes:
                print(f"[{stage.name}] {text}", flush=True)
            file.write(f"{text}\n")
            file.flush()

        status = start(stage, argv, on_line)
    seconds = time.monotonic() - began + earlier_s
    finished = status == 0 and stage.is_finished()
    if finished:
        print(f"{stage.name}: finished in {metrics.duration(seconds)}", flush=True)
    else:
        what = f"stage {stage.name} {_how_it_failed(stage, status)}"
        mend = f"above is the end of its log, {log}; once mended, the same command goes on from here"
        lines = [*(f"  | {line}" for line in tail), f"error: {what}; {mend}"]
        print("\n".join(lines), file=sys.stderr, flush=True)
    return Attempt(status=status, seconds=seconds, finished=finished)


def log_url(root: str, name: str) -> str:
    """Where the output of a stage's last attempt is kept."""
    return storage.join(root, "logs", f"{name}.log")


@contextlib.contextmanager
def _local_path(url: str) -> Iterator[str]:
    """A local file to write, which is put at `url` afterwards where that is remote."""
    if storage.is_local(url):
        os.makedirs(os.path.dirname(url), exist_ok=True)
        yield url
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "log")
        try:
            yield str(path)
        finally:
            storage.put(url, path.read_bytes())


def _how_it_failed(stage: Stage, status: int) -> str:
    if status == 0:
        return f"ended without writing {' and '.join(stage.outputs)}"
    if status > 0:
        return f"failed with exit status {status}"
    memory = ", as when memory runs out" if -status == signal.SIGKILL else ""
    return f"was ended by signal {signal.Signals(-status).name}{memory}"


def run_here(stage: Stage, argv: Sequence[str], on_line: Callable[[str], None]) -> int:
    """Run a stage's job as a process of its own, so that its memory is free when it ends."""
    # Ray colours the lines of its workers for terminals; here they go through a pipe into a log.
    environment = {"RAY_COLOR_PREFIX": "0", **os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", f"jobs.{stage.job}", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=environment,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            on_line(line.rstrip("\n"))
        return process.wait()
    except BaseException:
        # Ctrl-C reaches the job by itself; a SIGTERM to this process only does not.
        process.terminate()
        process.wait()
        raise


@contextlib.contextmanager
def job_starter(
    address: str | None, stages: Sequence[Stage], places: Mapping[str, str]
) -> Iterator[StartJob]:
    """Starts jobs here, or on the cluster whose job server is at `address`; SIGTERM ends the running one.

    places: what the user named, by flag; every node of a cluster has to see it.
    """

    def end(signum: int, frame: object) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, end)
    try:
        if address is None:
            yield run_here
            return
        # Imported here: it brings Ray, which a run on this machine does not need in this process.
        from jobs.stages.submission import JobServer

        for flag, url in places.items():
            if storage.is_local(url):
                print(f"note: {flag} {url} is no URL: every node of the cluster has to see it there")
        with JobServer.connect(address) as server:
            for file in sorted({stage.settings.config for stage in stages if stage.settings.config}):
                server.check_travels(file)
            yield server.run
    finally:
        signal.signal(signal.SIGTERM, before)

"""Record what the jobs write and say, as small data that later code is held to by tests/test_recorded.py.

python tests/recorded/record.py OUTPUT_FOLDER [--code PATH_OF_CHECKOUT]

Runs `python -m jobs.<name>` only, in PATH_OF_CHECKOUT (default: the checkout that this file lies in), so that
it does not depend on where the source lies. Everything is made in /tmp/recorded, which is emptied first: the
listing of an image dataset holds the paths of its sources. Takes some minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from tests.recorded.drawing import draw_images, draw_segmentation, set_times  # noqa: E402
from tests.recorded.scenario import (  # noqa: E402
    AGAIN,
    COMMANDS,
    DATASETS,
    HALF,
    HEADERS,
    PLACE,
    SOURCE,
    SOURCE_TIME,
    command,
    comparable,
    dataset_files,
    differences,
    halved,
    last_lines,
    machine,
    orders,
    read_json,
    read_lines,
)

KEPT = ("tokenizer", "tokenizer_2", "backbone")
"""Artifacts that later code has to open."""
TRIES = 8


@dataclass(frozen=True, kw_only=True)
class Said:
    """How a job ended."""

    exit: int
    out: str
    err: str

    def to_json(self) -> dict[str, Any]:
        """What is recorded of it: the exit status and the last lines."""
        if self.exit == 2:
            return {"exit": self.exit, "lines": last_lines(self.err)[-1:]}
        return {"exit": self.exit, "lines": last_lines(self.out)}


class Recorder:
    """Runs jobs of one checkout."""

    def __init__(self, code: Path) -> None:
        self._code = code
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(code),
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TQDM_DISABLE": "1",
        }

    def run(self, name: str, *, inputs: Path = PLACE, outputs: Path = PLACE) -> Said:
        """Run a command to its end."""
        begun = time.monotonic()
        with self._start(name, inputs=inputs, outputs=outputs) as process:
            out, err = process.communicate()
        said = Said(exit=process.returncode, out=out, err=err)
        print(f"{name}: exit {said.exit} after {time.monotonic() - begun:.1f} s", flush=True)
        if said.exit not in (0, 2):
            raise SystemExit(f"{name} failed:\n{out}\n{err}")
        return said

    def interrupt(self, name: str, *, outputs: Path) -> None:
        """Run a command until it has begun, or has ended an epoch, and end it by SIGTERM: it saves first."""
        output = outputs / name
        for _ in range(TRIES):
            shutil.rmtree(output, ignore_errors=True)
            with self._start(name, inputs=PLACE, outputs=outputs) as process:
                self._wait(process, name, output)
                process.send_signal(signal.SIGTERM)
                process.communicate()
            if process.returncode == 1 and any(output.glob("checkpoints/*.json")):
                return
            print(f"{name}: exit {process.returncode}, not interrupted; once more", flush=True)
        raise SystemExit(f"{name} could not be interrupted part-way in {TRIES} tries")

    def _wait(self, process: subprocess.Popen[str], name: str, output: Path) -> None:
        """Until there are metrics, or the line that is printed before the first step."""
        if name in ("tokenizer", "backbone"):
            while process.poll() is None and not (output / "metrics.jsonl").exists():
                time.sleep(0.001)
            return
        assert process.stdout is not None
        for line in process.stdout:
            if re.search(r"\d workers, cpu", line):
                time.sleep(0.05)
                return

    def _start(self, name: str, *, inputs: Path, outputs: Path) -> subprocess.Popen[str]:
        job, arguments = command(name, inputs=inputs, outputs=outputs)
        return subprocess.Popen(
            [sys.executable, "-m", f"jobs.{job}", *arguments],
            cwd=self._code,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


# ------------------------------------------------------------------------------------------------ parts


def record_run(output: Path) -> dict[str, Any]:
    """What a finished run left, as far as it is comparable."""
    found: dict[str, Any] = {"run": read_json(output / "run.json")}
    found["header"] = comparable(read_json(output / HEADERS[output.name]))
    if (output / "metrics.jsonl").exists():
        found["metrics"] = read_lines(output / "metrics.jsonl")
    return found


def trim(output: Path, *, newest_only: bool) -> None:
    """Leave of an interrupted run what the next attempt reads; event files hold the name of the machine."""
    shutil.rmtree(output / "tensorboard", ignore_errors=True)
    if newest_only:
        stems = sorted(path.stem for path in output.glob("checkpoints/*.json"))
        for stem in stems[:-1]:
            for path in output.glob(f"checkpoints/{stem}.*"):
                path.unlink()


def require_equal(what: str, held: Any, found: Any) -> None:
    """What is recorded must come out again."""
    if lines := differences(held, found):
        raise SystemExit(f"{what} does not come out twice:\n" + "\n".join(lines[:20]))


def record_half(recorder: Recorder, name: str, straight: dict[str, Any]) -> int:
    """Store an interrupted run, resume a copy of it and require the straight run's result; its step."""
    recorder.interrupt(name, outputs=PLACE / "half")
    half = PLACE / "half" / name
    # Fine-tuning chooses the best epoch from its checkpoints, the others train on from the newest.
    trim(half, newest_only=name in ("tokenizer", "backbone"))
    checkpoint = read_json(sorted(half.glob("checkpoints/*.json"))[-1])
    shutil.copytree(half, PLACE / "resumed" / name)
    recorder.run(name, outputs=PLACE / "resumed")
    require_equal(f"{name}, resumed", straight, record_run(PLACE / "resumed" / name))
    return checkpoint["step"]


def record_halved(recorder: Recorder, name: str, expected: dict[str, Any]) -> list[str]:
    """Take files from a finished dataset, have it finished and require the same; which files."""
    root = PLACE / "halved" / name
    shutil.copytree(PLACE / name, root)
    part = root / "train" if name == "prepared" else root
    gone = halved(part)
    for file in gone:
        (part / file).unlink()
    recorder.run(name, outputs=PLACE / "halved")
    require_equal(f"{name}, finished", expected, dataset_files(root))
    return [f"{part.relative_to(root).as_posix()}/{file}".removeprefix("./") for file in gone]


def record(recorder: Recorder) -> dict[str, Any]:
    """Run every command; what is compared exactly, by kind."""
    shutil.rmtree(PLACE, ignore_errors=True)
    draw_images(SOURCE)
    set_times(SOURCE, SOURCE_TIME)
    draw_segmentation(PLACE / "segmentation")
    said: dict[str, Any] = {}
    again: dict[str, Any] = {}
    runs: dict[str, Any] = {}
    datasets: dict[str, Any] = {}
    for name in COMMANDS:
        if name in ("extended", "layered"):
            shutil.copytree(PLACE / "tokens", PLACE / name)
        said[name] = recorder.run(name).to_json()
        if name in HEADERS:
            runs[name] = record_run(PLACE / name)
        if name in (*DATASETS, "extended", "layered"):
            datasets[name] = dataset_files(PLACE / name)
        if name in AGAIN:
            again[name] = recorder.run(name).to_json()
    gone = {name: record_halved(recorder, name, datasets[name]) for name in DATASETS}
    steps = {name: record_half(recorder, name, runs[name]) for name in HALF}
    with ThreadPoolExecutor(2) as pool:
        printed = list(pool.map(recorder.run, orders()))
    order = {name: json.loads(one.out)["steps"] for name, one in zip(orders(), printed, strict=True)}
    return {
        "recorded": {
            "machine": machine(),
            "code_version": read_json(PLACE / "backbone" / "backbone.json")["code_version"],
            "interrupted_at_step": steps,
            "removed_from_half_finished": gone,
        },
        "said": {"first": said, "again": again},
        "runs": runs,
        "datasets": datasets,
        "order": order,
    }


def write_json(path: Path, value: Any) -> None:
    """JSON that can be read and compared line by line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def store(output: Path, found: dict[str, Any]) -> None:
    """Everything that the test reads."""
    shutil.rmtree(output, ignore_errors=True)
    for name in ("recorded", "said", "datasets", "order"):
        write_json(output / f"{name}.json", found[name])
    for name, run in found["runs"].items():
        write_json(output / "finished" / f"{name}.json", run)
    shutil.copytree(SOURCE, output / "images")
    shutil.copytree(PLACE / "segmentation", output / "segmentation")
    for name in DATASETS:
        shutil.copytree(PLACE / name, output / name)
    for name in KEPT:
        shutil.copytree(PLACE / name, output / name, ignore=shutil.ignore_patterns("tensorboard"))
    shutil.copytree(PLACE / "half", output / "half")


def main(run: Callable[[Recorder], dict[str, Any]] = record) -> None:
    """Record, and store what was recorded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for what is recorded; it is emptied first")
    parser.add_argument("--code", type=Path, default=ROOT, help="checkout whose jobs are run")
    arguments = parser.parse_args()
    found = run(Recorder(arguments.code.resolve()))
    store(arguments.output, found)
    size = sum(path.stat().st_size for path in arguments.output.rglob("*") if path.is_file())
    print(f"{size:,} bytes at {arguments.output}")


if __name__ == "__main__":
    main()

"""What earlier code wrote stays readable, goes on where it was, and comes out the same again.

`recorded/data` was made by `recorded/record.py`: datasets, artifacts, half-finished outputs, what jobs said.
On the recorded processor with the recorded libraries everything is compared bit for bit; elsewhere figures
within the tolerances of `recorded/scenario.py`, and neither weights nor codes (they may differ in rare ties).
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import io
import json
import os
import re
import runpy
import shutil
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.recorded.scenario import (
    AGAIN,
    COMMANDS,
    DATA,
    HEADERS,
    LIBRARIES,
    PLACE,
    SOURCE,
    SOURCE_TIME,
    command,
    comparable,
    dataset_files,
    differences,
    last_lines,
    machine,
    orders,
    read_json,
    read_lines,
)

RECORDED = read_json(DATA / "recorded.json")
SAID = read_json(DATA / "said.json")
KEPT = ("prepared", "tokens", "tokenizer", "tokenizer_2", "backbone", "segmentation")
UNFINISHED_SHARDS = {"prepared": "prepared/train", "tokens": "tokens"}


# ------------------------------------------------------------------------------------------------ running


@pytest.fixture(scope="module", autouse=True)
def as_recorded() -> Iterator[None]:
    """One thread and no GPU, as in the recorded runs; the drawn images where their listing says they are."""
    import torch

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        # Needs a standard error with a file number, which a captured one has not.
        patch.setattr(faulthandler, "enable", lambda *_, **__: None)
        torch.set_num_threads(1)
        _put_sources()
        yield
    torch.set_num_threads(threads)


def _put_sources() -> None:
    """The recorded dataset lists its sources as /tmp/recorded/images/…, with their times.

    Safe while other test processes do the same, and left there: every file is always the same.
    """
    wanted = {path.relative_to(DATA / "images"): path for path in (DATA / "images").rglob("*.*")}
    for path in [path for path in SOURCE.rglob("*") if path.is_file()]:
        if path.relative_to(SOURCE) not in wanted:
            path.unlink(missing_ok=True)
    for name, path in wanted.items():
        (SOURCE / name).parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=PLACE, delete=False) as file:
            file.write(path.read_bytes())
        os.utime(file.name, (SOURCE_TIME, SOURCE_TIME))
        os.replace(file.name, SOURCE / name)


@dataclass(frozen=True, kw_only=True)
class Jobs:
    """Runs jobs in this process, as `python -m` would: importing torch once saves minutes."""

    inputs: Path
    """Copies of what was recorded."""

    def run(self, name: str, outputs: Path | None = None) -> dict[str, Any]:
        """Exit status and last lines of a recorded command."""
        job, arguments = command(name, inputs=self.inputs, outputs=outputs or self.inputs)
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="") for _ in range(2))
        status = 0
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            patch.setattr(sys, "argv", [job, *arguments])
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    runpy.run_module(f"jobs.{job}", run_name="__main__", alter_sys=True)
                except SystemExit as ended:
                    status = int(ended.code or 0)
                out.flush()
                err.flush()
        texts = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
        lines = last_lines(texts[status == 2], *self._places(outputs))
        assert status in (0, 2), "\n".join(texts)
        return {"exit": status, "lines": lines[-1:] if status == 2 else lines}

    def files(self, root: Path, outputs: Path) -> dict[str, Any]:
        """Every file of a dataset, comparable."""
        return dataset_files(root, *self._places(outputs))

    def _places(self, outputs: Path | None) -> list[Path]:
        return [self.inputs] if outputs is None else [self.inputs, outputs]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Jobs that have copies of everything recorded before them."""
    inputs = tmp_path_factory.mktemp("inputs")
    for name in KEPT:
        shutil.copytree(DATA / name, inputs / name)
    return Jobs(inputs=inputs)


@pytest.fixture(scope="module")
def classifier(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The half-finished fine-tuning, resumed, in the folder named classifier of what comes back."""
    outputs = tmp_path_factory.mktemp("classifier")
    return _resumed(jobs, "classifier", outputs)


def _resumed(jobs: Jobs, name: str, outputs: Path) -> Path:
    shutil.copytree(DATA / "half" / name, outputs / name)
    jobs.run(name, outputs)
    return outputs


# ------------------------------------------------------------------------------------------------ comparing


@functools.cache
def same_machine() -> bool:
    """Whether floating-point results must be equal bit for bit."""
    return RECORDED["machine"] == machine()


@functools.cache
def same_libraries() -> bool:
    """Whether files must be: Parquet files name their writer, plans name the versions of libraries."""
    here = machine()
    return all(RECORDED["machine"][name] == here[name] for name in LIBRARIES)


def require_same(held: Any, found: Any, *, exact: bool | None = None) -> None:
    """Fails with the keys in which two JSON values differ."""
    lines = differences(held, found, exact=same_machine() if exact is None else exact)
    if lines:
        more = f"\nand {len(lines) - 25} more" if len(lines) > 25 else ""
        pytest.fail("differs from what was recorded:\n" + "\n".join(lines[:25]) + more, pytrace=False)


def require_said(kind: str, name: str, found: dict[str, Any], *, exact: bool | None = None) -> None:
    """A job ended as recorded; where figures may differ, so may footnotes, and only the last line counts."""
    held = SAID[kind][name]
    if not (same_machine() if exact is None else exact):
        held, found = ({**one, "lines": one["lines"][-1:]} for one in (held, found))
    require_same(held, found, exact=exact)


def require_run(name: str, output: Path) -> None:
    """A finished run is the recorded one: run.json, metrics.jsonl, header with the hash of weights."""
    held = read_json(DATA / "finished" / f"{name}.json")
    run = read_json(output / "run.json")
    require_same(held["run"]["config"], run["config"], exact=True)
    require_same(held["run"], run)
    if "metrics" in held:
        require_same(held["metrics"], read_lines(output / "metrics.jsonl"))
    header = comparable(read_json(output / HEADERS[name]), output.parent)
    if not same_machine():  # of figures and footnotes
        held["header"].pop("table", None), header.pop("table", None)
    require_same(held["header"], header)


def require_dataset(jobs: Jobs, name: str, root: Path, outputs: Path) -> None:
    """A dataset has the recorded files, byte for byte where codes and libraries allow that."""
    held = read_json(DATA / "datasets.json")[name]
    found = jobs.files(root, outputs)
    if same_libraries() and (same_machine() or name == "prepared"):
        require_same(held, found, exact=True)
    elif differences(held, found):
        require_same(sorted(map(_without_hash, held)), sorted(map(_without_hash, found)), exact=True)
        if (DATA / name).exists():
            require_same(_pixels(DATA / name), _pixels(root), exact=True)


def _without_hash(name: str) -> str:
    return re.sub(r"[-/][0-9a-f]{8}\b", "-#", name)


def _pixels(root: Path) -> dict[str, bytes]:
    """What tars hold but codes."""
    found: dict[str, bytes] = {}
    for path in sorted(root.rglob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                file = tar.extractfile(member)
                if file is not None and not member.name.endswith(".codes.npy"):
                    found[f"{path.parent.name}/{member.name}"] = file.read()
    return found


# ------------------------------------------------------------------------------------------------ datasets


@pytest.mark.parametrize("name", ["prepared", "tokens"])
def test_a_new_dataset_has_the_recorded_bytes(jobs: Jobs, tmp_path: Path, name: str) -> None:
    require_said("first", name, jobs.run(name, tmp_path))
    require_dataset(jobs, name, tmp_path / name, tmp_path)


@pytest.mark.parametrize("name", ["prepared", "tokens"])
def test_a_half_finished_dataset_is_finished_with_the_recorded_bytes(
    jobs: Jobs, tmp_path: Path, name: str
) -> None:
    if not same_libraries():
        pytest.skip("a plan names the versions of its libraries: another one does not go on with it")
    shutil.copytree(DATA / name, tmp_path / name)
    for file in RECORDED["removed_from_half_finished"][name]:
        (tmp_path / name / file).unlink()
    jobs.run(name, tmp_path)
    require_dataset(jobs, name, tmp_path / name, tmp_path)


@pytest.mark.parametrize("name", ["extended", "layered"])
def test_a_recorded_dataset_grows_as_recorded(jobs: Jobs, tmp_path: Path, name: str) -> None:
    shutil.copytree(DATA / "tokens", tmp_path / name)
    require_said("first", name, jobs.run(name, tmp_path), exact=same_libraries() and same_machine())
    require_dataset(jobs, name, tmp_path / name, tmp_path)


@pytest.mark.parametrize("name", [name for name in COMMANDS if re.match("inspect|verify|gc", name)])
def test_a_recorded_dataset_is_read_and_found_sound(jobs: Jobs, name: str) -> None:
    require_said("first", name, jobs.run(name), exact=not name.startswith("verify") or same_machine())


def test_the_order_is_the_recorded_one(jobs: Jobs) -> None:
    held = read_json(DATA / "order.json")
    found = {name: json.loads(jobs.run(name)["lines"][-1])["steps"] for name in orders()}
    require_same(held, found, exact=True)


# ------------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2", "backbone", "online", "segmenter"])
def test_a_new_run_is_the_recorded_one(jobs: Jobs, tmp_path: Path, name: str) -> None:
    require_said("first", name, jobs.run(name, tmp_path))
    require_run(name, tmp_path / name)


@pytest.mark.parametrize("name", ["tokenizer", "backbone", "segmenter"])
def test_a_half_finished_run_ends_as_recorded(jobs: Jobs, tmp_path: Path, name: str) -> None:
    begun = read_lines(DATA / "half" / name / "metrics.jsonl")
    outputs = _resumed(jobs, name, tmp_path)
    require_run(name, outputs / name)
    # What was there before is not computed again: equal on any machine.
    require_same(begun, read_lines(outputs / name / "metrics.jsonl")[: len(begun)], exact=True)


def test_a_half_finished_fine_tuning_ends_as_recorded(classifier: Path) -> None:
    require_run("classifier", classifier / "classifier")


def test_a_new_fine_tuning_is_the_recorded_one(jobs: Jobs, tmp_path: Path) -> None:
    require_said("first", "classifier", jobs.run("classifier", tmp_path))
    require_run("classifier", tmp_path / "classifier")


@pytest.mark.parametrize("name", ["probe", "robustness"])
def test_an_evaluation_is_the_recorded_one(jobs: Jobs, classifier: Path, tmp_path: Path, name: str) -> None:
    there = Jobs(inputs=tmp_path)
    for folder in ("backbone", "prepared"):
        shutil.copytree(jobs.inputs / folder, tmp_path / folder)
    shutil.copytree(classifier / "classifier", tmp_path / "classifier")
    require_said("first", name, there.run(name))
    require_run(name, tmp_path / name)
    require_said("again", name, there.run(name))


# ---------------------------------------------------------------------------------------------- what they say


@pytest.mark.parametrize("name", ["prepared", "tokens", "tokenizer", "backbone"])
def test_a_recorded_output_is_finished_already(jobs: Jobs, name: str) -> None:
    assert name in AGAIN
    if name == "tokens" and not same_libraries():
        pytest.skip("a plan names the versions of its libraries: another one does not go on with it")
    before = {path: path.read_bytes() for path in (jobs.inputs / name).rglob("*") if path.is_file()}
    require_said("again", name, jobs.run(name), exact=True)
    after = {path: path.read_bytes() for path in (jobs.inputs / name).rglob("*") if path.is_file()}
    assert before == after


def test_a_resumed_fine_tuning_is_finished_already(jobs: Jobs, classifier: Path) -> None:
    require_said("again", "classifier", jobs.run("classifier", classifier), exact=True)


@pytest.mark.parametrize("name", ["unknown_key", "another_run", "no_dataset"])
def test_bad_input_is_refused_as_recorded(jobs: Jobs, name: str, tmp_path: Path) -> None:
    require_said("first", name, jobs.run(name, tmp_path), exact=True)

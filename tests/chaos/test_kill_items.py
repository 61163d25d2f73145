"""A write pass killed at every step, and at random moments, ends in the bytes of an undisturbed one."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.errors import InputError
from shards.dataset.dataset import open_dataset
from tests.chaos.tiny_pass import ForkedPasses, Steps, TinyPass, check_receipts, tree

if TYPE_CHECKING:
    from tests.chaos.proxy import FaultProxy

SMALL = TinyPass()
LARGE = TinyPass(num_shards=8, per_shard=4, views=2)
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def passes() -> Iterator[ForkedPasses]:
    forked = ForkedPasses()
    yield forked
    forked.close()


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[TinyPass, dict[str, bytes]]:
    """What an undisturbed pass leaves, its accounts checked down to the source of every reject."""
    trees: dict[TinyPass, dict[str, bytes]] = {}
    for tiny in (SMALL, LARGE):
        root = str(tmp_path_factory.mktemp("straight"))
        manifest = tiny.write(root)
        everything = tiny.num_shards * tiny.per_shard * tiny.views
        rejected = sum(manifest.samples_rejected.values())
        assert manifest.samples_in == everything == manifest.samples_written + rejected
        listed: dict[str, str] = {}
        for path in Path(root, "rejects").iterdir():
            for row in pq.read_table(path).to_pylist():
                listed[row["source"]] = row["reason"]
        assert listed == tiny.rejected_sources() and rejected == tiny.views * len(listed)
        trees[tiny] = tree(root)
    return trees


def unfinished(root: str, tiny: TinyPass) -> bool:
    """Whether the dataset is; then no reader takes it, and what is committed is whole."""
    if storage.exists(storage.join(root, "manifest.json")):
        return False
    with pytest.raises(InputError, match=r"unfinished|no dataset"):
        open_dataset(root)
    check_receipts(root, tiny.plan)
    return True


def kill_at_steps(
    root: Path, passes: ForkedPasses, straight: dict[TinyPass, dict[str, bytes]], steps: range
) -> int:
    """Kill a pass at each of the steps and let another finish it; how many died with work left."""
    counted = 0
    for step in steps:
        assert passes.run(str(root), SMALL, fatal_step=step) == KILLED
        counted += unfinished(str(root), SMALL)
        assert passes.run(str(root), SMALL) == 0, passes.errors()
        assert tree(str(root)) == straight[SMALL], f"killed at step {step}"
        shutil.rmtree(root)
    return counted


def steps_of_a_pass(root: Path) -> int:
    steps = Steps()
    with steps.counting():
        SMALL.write(str(root))
    shutil.rmtree(root)
    return steps.count


def test_killed_at_some_steps(
    tmp_path: Path, passes: ForkedPasses, straight: dict[TinyPass, dict[str, bytes]]
) -> None:
    steps = range(1, steps_of_a_pass(tmp_path / "counted"), 29)
    assert kill_at_steps(tmp_path / "killed", passes, straight, steps) >= len(steps) - 2


@pytest.mark.chaos
def test_killed_at_every_step(
    tmp_path: Path, passes: ForkedPasses, straight: dict[TinyPass, dict[str, bytes]]
) -> None:
    count = steps_of_a_pass(tmp_path / "counted")
    assert passes.run(str(tmp_path / "whole"), SMALL, fatal_step=count + 1) == 0  # that is all of them
    counted = kill_at_steps(tmp_path / "killed", passes, straight, range(1, count + 1))
    print(f"{counted} of {count} kills at a step counted")
    assert counted >= 80


@pytest.mark.chaos
def test_killed_at_random_moments_again_and_again(
    tmp_path: Path, passes: ForkedPasses, straight: dict[TinyPass, dict[str, bytes]]
) -> None:
    """The same output is killed until a pass gets through: leftovers of many attempts lie side by side."""
    rng = random.Random(0)
    began = time.monotonic()
    assert passes.run(str(tmp_path / "timed"), LARGE) == 0
    whole_s = time.monotonic() - began
    counted, finished = 0, 0
    root = ""
    while counted < 60 or finished < 3:
        root = str(tmp_path / f"killed-{finished}")
        pid = passes.start(root, LARGE)
        time.sleep(rng.uniform(0, 0.5 * whole_s))
        os.kill(pid, signal.SIGKILL)
        status = passes.wait(pid)
        assert status in (KILLED, 0), passes.errors()
        left = unfinished(root, LARGE)
        counted += status == KILLED and left
        if not left:
            assert tree(root) == straight[LARGE]
            finished += 1
    print(f"{counted} kills at random moments counted, {finished} datasets finished between them")
    assert passes.run(root, LARGE) == 0, passes.errors()
    assert tree(root) == straight[LARGE]


@pytest.mark.chaos
def test_killed_on_s3(
    fault_proxy: FaultProxy, s3_url: str, straight: dict[TinyPass, dict[str, bytes]]
) -> None:
    """At steps, and with the write done but its answer not yet there."""
    passes = ForkedPasses(s3=True)
    try:
        counted = 0
        for number in range(1, 9):
            root = f"{s3_url}/answer-{number}"
            done = fault_proxy.counts["puts done"]
            pid = passes.start(root, SMALL)

            def kill(put: int, last: int = done + number, pid: int = pid) -> None:
                if put == last:
                    os.kill(pid, signal.SIGKILL)

            fault_proxy.after_put = kill
            assert passes.wait(pid) == KILLED
            fault_proxy.after_put = None
            counted += unfinished(root, SMALL)
            assert passes.run(root, SMALL) == 0, passes.errors()
            assert tree(root) == straight[SMALL]
        for step in range(5, 200, 33):
            root = f"{s3_url}/step-{step}"
            assert passes.run(root, SMALL, fatal_step=step) == KILLED
            counted += unfinished(root, SMALL)
            assert passes.run(root, SMALL) == 0, passes.errors()
            assert tree(root) == straight[SMALL]
    finally:
        passes.close()
    print(f"{counted} kills on S3 counted")
    assert counted >= 10

"""Two drivers on one output, started by mistake: one dataset comes out, complete and right."""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline import storage
from pipeline.errors import InputError
from tests.chaos.proxy import FaultProxy, Faults
from tests.chaos.tiny_pass import ForkedPasses, TinyPass, tree

MINE = TinyPass()
SAME = TinyPass()
OTHER = TinyPass(seed=1)
Write = Callable[[str, bytes], Any]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[TinyPass, dict[str, bytes]]:
    """What either driver leaves when it is alone."""
    trees: dict[TinyPass, dict[str, bytes]] = {}
    for tiny in (MINE, OTHER):
        root = str(tmp_path_factory.mktemp("alone"))
        tiny.write(root)
        trees[tiny] = tree(root)
    return trees


@contextmanager
def before_each_write(act: Callable[[int], None]) -> Iterator[None]:
    """Calls `act(number)` before every put and create of this process, counted from 1."""
    count = 0

    def watched(write: Write) -> Write:
        def attempt(url: str, data: bytes) -> Any:
            nonlocal count
            count += 1
            act(count)
            return write(url, data)

        return attempt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "put", watched(storage.put))
        patch.setattr(storage, "create", watched(storage.create))
        yield


def write_or_be_refused(root: str, tiny: TinyPass) -> str:
    """The refusal, or "" when the dataset was written."""
    try:
        tiny.write(root)
    except InputError as error:
        return str(error)
    return ""


def check_outcome(root: str, said: dict[TinyPass, str], straight: dict[TinyPass, dict[str, bytes]]) -> None:
    """Exactly one plan is written, and another refused by what differs."""
    written = [tiny for tiny, refusal in said.items() if not refusal]
    assert len(written) == 1, said
    [winner] = written
    assert tree(root) == straight[winner]
    for tiny, refusal in said.items():
        if tiny != winner:
            there, asked = winner.seed, tiny.seed
            assert f"recipe.views.seed: there {there}, asked {asked}" in refusal and root in refusal


@pytest.mark.parametrize("second", [SAME, OTHER], ids=["same", "other"])
def test_a_second_driver_runs_between_any_two_writes_of_the_first(
    tmp_path: Path, straight: dict[TinyPass, dict[str, bytes]], second: TinyPass
) -> None:
    number = 0
    while True:
        number += 1
        root = str(tmp_path / f"{number}")
        said: dict[TinyPass, str] = {}
        nested = False

        def interrupt(write: int, number: int = number, root: str = root, said: dict = said) -> None:
            nonlocal nested
            if write == number and not nested:
                nested = True
                said[second] = write_or_be_refused(root, second)

        with before_each_write(interrupt):
            refusal = write_or_be_refused(root, MINE)
        if not nested:
            break
        assert second != MINE or refusal == said[second] == ""
        said[MINE] = refusal
        check_outcome(root, said, straight)
    # plan, probe, tar, index, rejects and receipt, tar, index and receipt, table, manifest
    assert number - 1 == 11


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(20))
def test_two_drivers_take_turns_in_any_order(
    tmp_path: Path, straight: dict[TinyPass, dict[str, bytes]], seed: int
) -> None:
    """Threads that wait before every write until a seeded draw lets one of them on."""
    rng = random.Random(seed)
    second = OTHER if seed % 2 else SAME
    said: dict[str, str] = {}
    turn = threading.Condition()
    waiting: set[str] = set()
    running = {"first", "second"}

    def wait_for_turn(_: int) -> None:
        me = threading.current_thread().name
        if me not in ("first", "second"):
            return
        with turn:
            waiting.add(me)
            turn.notify_all()
            turn.wait_for(lambda: me not in waiting, timeout=30)

    def run(tiny: TinyPass) -> None:
        me = threading.current_thread().name
        try:
            said[me] = write_or_be_refused(str(tmp_path), tiny)
        finally:
            with turn:
                running.discard(me)
                turn.notify_all()

    with before_each_write(wait_for_turn):
        threads = [
            threading.Thread(target=run, args=(MINE,), name="first"),
            threading.Thread(target=run, args=(second,), name="second"),
        ]
        for thread in threads:
            thread.start()
        while running:
            with turn:
                turn.wait_for(lambda: not running or waiting >= running, timeout=30)
                if waiting:
                    waiting.discard(rng.choice(sorted(waiting)))
                    turn.notify_all()
        for thread in threads:
            thread.join()
    if second == MINE:
        assert said == {"first": "", "second": ""}
        check_outcome(str(tmp_path), {MINE: ""}, straight)
    else:
        check_outcome(str(tmp_path), {MINE: said["first"], second: said["second"]}, straight)


def race(passes: ForkedPasses, root: str, one: TinyPass, two: TinyPass) -> tuple[list[int], list[str]]:
    """Exit statuses of two passes that began at the same instant, and what the refused said."""
    at = time.monotonic() + 0.05
    pids = [passes.start(root, tiny, at=at) for tiny in (one, two)]
    return [passes.wait(pid) for pid in pids], passes.errors()


@pytest.mark.chaos
@pytest.mark.parametrize("place", ["local", "s3"])
def test_two_drivers_race_from_the_first_instant(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    straight: dict[TinyPass, dict[str, bytes]],
    place: str,
) -> None:
    if place == "s3":
        proxy: FaultProxy = request.getfixturevalue("fault_proxy")
        proxy.faults = Faults(delay=0.3, delay_s=0.02)  # so that the order of their requests changes
    base = str(tmp_path) if place == "local" else request.getfixturevalue("s3_url")
    winners: list[int] = []
    passes = ForkedPasses(s3=place == "s3")
    try:
        for number in range(30 if place == "local" else 6):
            root = f"{base}/race-{number}"
            if number % 2:
                assert race(passes, root, MINE, SAME) == ([0, 0], [])
                assert tree(root) == straight[MINE]
            else:
                statuses, said = race(passes, root, MINE, OTHER)
                assert sorted(statuses) == [0, 2] and len(said) == 1, said
                winner, loser = (MINE, OTHER) if statuses[0] == 0 else (OTHER, MINE)
                assert f"recipe.views.seed: there {winner.seed}, asked {loser.seed}" in said[0]
                assert tree(root) == straight[winner]
                winners.append(winner.seed)
    finally:
        passes.close()
    print(f"different plans: the first driver won {winners.count(0)} of {len(winners)} races")


def test_the_same_plan_in_other_words_is_the_same(tmp_path: Path) -> None:
    """What is compared is the plan, so a driver of a finished dataset changes nothing and says nothing."""
    root = str(tmp_path)
    first = MINE.write(root)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert dataclasses.replace(MINE).write(root) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before

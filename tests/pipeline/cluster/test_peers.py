from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest

from pipeline.cluster import peers
from pipeline.cluster.peers import MissingRankError, Peers, introduce, is_collective_error, name_of, place_of


class _Notes:
    """A board in this process."""

    def __init__(self) -> None:
        self.notes: dict[str, str] = {}

    def put(self, topic: str, note: str) -> None:
        self.notes[topic] = note

    def get(self, topic: str) -> str:
        return self.notes.get(topic, "")


def _wait_in_vain(release: threading.Event) -> None:
    release.wait(60)


@pytest.fixture
def stuck() -> Iterator[int]:
    """A thread that hangs in `_wait_in_vain`."""
    release = threading.Event()
    thread = threading.Thread(target=_wait_in_vain, args=(release,))
    thread.start()
    assert thread.ident is not None
    yield thread.ident
    release.set()
    thread.join()


def test_a_place_is_the_line_of_ours_and_the_one_it_waits_in(stuck: int) -> None:
    while "wait" not in place_of(stuck):
        time.sleep(0.01)
    found = place_of(stuck)
    assert found.startswith("is at cluster/test_peers.py:") and "(_wait_in_vain), in " in found
    assert found.endswith("(wait)") and "threading.py:" in found


def test_the_rank_that_hangs_is_named_before_those_that_wait_with_us(
    stuck: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of five ranks 1 does not answer, 3 hangs, and 2 and 4 wait in the same collective as 0."""
    monkeypatch.setattr(peers, "ANSWER_WITHIN_S", 1.2)
    board, ended = _Notes(), threading.Event()
    group = [Peers(board=board, attempt="a", rank=rank, world_size=5) for rank in range(5)]
    for rank in range(5):
        introduce(board, rank)
    assert not group[3].answer(stuck)  # nobody asked yet

    def waits(rank: int) -> None:
        while not board.get("a/where"):
            time.sleep(0.01)
        board.put(f"a/place-{rank}", "is at somewhere/else.py:1 (all_reduce)")

    def hangs() -> None:
        while not ended.is_set() and not group[3].answer(stuck):
            time.sleep(0.01)

    threads = [threading.Thread(target=waits, args=(rank,)) for rank in (2, 4)]
    threads.append(threading.Thread(target=hangs))
    for thread in threads:
        thread.start()
    found = str(group[0].find_missing(RuntimeError("Timed out waiting 5000ms")))
    ended.set()
    for thread in threads:
        thread.join()
    assert found.startswith("rank 0 met others in vain (Timed out waiting 5000ms): rank 1 (pid ")
    names = [part.split(" ")[1] for part in found.split(": ", 1)[1].split("; ")]
    assert names == ["1", "3", "2", "4"]
    assert f"rank 1 (pid {os.getpid()} on " in found and "does not answer" in found
    assert "rank 3 (pid" in found and "(_wait_in_vain)" in found


def test_a_rank_that_asks_itself_is_not_blamed(stuck: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its listener answers for a training thread that is inside `find_missing`."""
    monkeypatch.setattr(peers, "ANSWER_WITHIN_S", 1.2)
    board = _Notes()
    group = [Peers(board=board, attempt="a", rank=rank, world_size=3) for rank in range(3)]
    asking = threading.Thread(target=group[1].find_missing, args=(RuntimeError("gloo"),))
    asking.start()
    assert asking.ident is not None
    while not group[1].answer(asking.ident):
        time.sleep(0.01)
    assert group[2].answer(stuck)
    found = str(group[0].find_missing(RuntimeError("gloo")))
    asking.join()
    assert found.index("rank 2") < found.index("rank 1 waits for others too")


def test_a_rank_that_left_says_so_and_answers_of_an_earlier_attempt_do_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peers, "ANSWER_WITHIN_S", 0.1)
    board = _Notes()
    Peers(board=board, attempt="first", rank=1, world_size=2).leave()
    again = Peers(board=board, attempt="second", rank=0, world_size=2)
    assert "rank 1 does not answer" in str(again.find_missing(RuntimeError("gloo")))
    Peers(board=board, attempt="second", rank=1, world_size=2).leave()
    assert "rank 1 has left its training function" in str(again.find_missing(RuntimeError("gloo")))


def test_names_of_many_ranks_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "ANSWER_WITHIN_S", 0.1)
    found = str(Peers(board=_Notes(), attempt="a", rank=0, world_size=64).find_missing(RuntimeError("gloo")))
    assert found.count("does not answer") == 8 and found.endswith("and 55 more")


def test_only_errors_of_the_process_group_blame_others() -> None:
    assert is_collective_error(RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer"))
    assert is_collective_error(MissingRankError("rank 0 met others in vain"))
    assert not is_collective_error(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_collective_error(ConnectionResetError("connection reset by the store"))


def test_a_rank_without_a_process_has_its_number() -> None:
    assert name_of(_Notes(), 3) == "rank 3"

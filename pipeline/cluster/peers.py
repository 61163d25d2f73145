"""Which rank is missing when a collective fails: the ranks of a group tell each other where they are.

The rank that waited learns only that a connection broke or that its time is up. If it did not ask the others,
its error would name itself and not the rank that died or hangs.
"""

from __future__ import annotations

import os
import socket
import sys
import sysconfig
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import PurePath
from typing import Protocol

ANSWER_WITHIN_S = 4.0
"""Seconds that a rank waits for the others' answers; they look for questions every second."""
MOST_NAMED = 8
_WAITING = "waits for others too"
_SILENT = "does not answer"
_LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))


class MissingRankError(Exception):
    """A collective failed because ranks did not arrive; the message lists them with their current line."""


class Board(Protocol):
    """Notes that the driver and the ranks of one run leave for each other, outside of the collectives."""

    def put(self, topic: str, note: str) -> None:
        """Leave a note on a topic, in place of an earlier one."""
        ...

    def get(self, topic: str) -> str:
        """The note on a topic; empty when there is none."""
        ...


@dataclass(frozen=True, kw_only=True)
class Peers:
    """One rank of one attempt at a run; a restarted group is another attempt."""

    board: Board
    attempt: str
    rank: int
    world_size: int

    def answer(self, thread: int) -> bool:
        """Report the current line of a thread if another rank has asked for it; True once reported."""
        if not self.board.get(f"{self.attempt}/where"):
            return False
        self._say_place(place_of(thread))
        return True

    def leave(self) -> None:
        """Report that this rank will take part in no further collective."""
        self._say_place("has left its training function")

    def find_missing(self, error: BaseException) -> MissingRankError:
        """The error for a failed collective: it lists the other ranks, those that differ from most first."""
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        self.board.put(f"{self.attempt}/where", "asked")
        places = dict.fromkeys(others, "")
        given_up = time.monotonic() + ANSWER_WITHIN_S
        while not all(places.values()) and time.monotonic() < given_up:
            time.sleep(0.5)
            for rank in (rank for rank, place in places.items() if not place):
                places[rank] = self.board.get(f"{self.attempt}/place-{rank}")
        places = {rank: place or _SILENT for rank, place in places.items()}
        times = Counter(places.values())
        others.sort(key=lambda rank: (places[rank] != _SILENT, places[rank] == _WAITING, times[places[rank]]))
        named = [f"{name_of(self.board, rank)} {places[rank]}" for rank in others[:MOST_NAMED]]
        if len(others) > MOST_NAMED:
            named.append(f"and {len(others) - MOST_NAMED} more")
        return MissingRankError(f"rank {self.rank} met others in vain ({error}): {'; '.join(named)}")

    def _say_place(self, place: str) -> None:
        self.board.put(f"{self.attempt}/place-{self.rank}", place)


def introduce(board: Board, rank: int) -> None:
    """Record the process id and host of this rank."""
    board.put(f"process-{rank}", f"pid {os.getpid()} on {socket.gethostname()}")


def name_of(board: Board, rank: int) -> str:
    """`rank 1 (pid 4711 on node-3)`; the latest process that was this rank."""
    process = board.get(f"process-{rank}")
    return f"rank {rank} ({process})" if process else f"rank {rank}"


def is_collective_error(error: BaseException) -> bool:
    """True for what torch.distributed raises when a connection breaks or its time is up."""
    words = str(error).lower()
    return isinstance(error, MissingRankError) or (
        isinstance(error, RuntimeError)
        and any(word in words for word in ("gloo", "nccl", "connection", "socket", "process group"))
    )


def place_of(thread: int) -> str:
    """The current line of a thread of this process: the innermost outside of libraries, and the innermost."""
    frames = traceback.extract_stack(sys._current_frames()[thread])
    if any(frame.filename == __file__ for frame in frames):
        return _WAITING
    ours = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)]
    shown = dict.fromkeys(
        f"{'/'.join(PurePath(frame.filename).parts[-2:])}:{frame.lineno} ({frame.name})"
        for frame in (*ours[-1:], frames[-1])
    )
    return f"is at {', in '.join(shown)}"

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from pipeline import storage
from pipeline.training import checkpoints
from pipeline.training.checkpoints import CheckpointStore, TrainState
from pipeline.training.worker import Worker


def _tensors(value: float) -> dict[str, object]:
    return {
        "model": {"w": torch.full((3,), value)},
        "metrics": {"loss": value},
        "optimizer": {"step": [1, 2]},
    }


def test_newest_wins_and_old_ones_go(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), keep=2)
    assert store.latest() is None
    for step in (5, 50, 100):
        store.save(TrainState(epoch=1, position=step * 8, step=step), _tensors(step))
    found = store.latest()
    assert found is not None
    state, tensors = found
    assert state == TrainState(epoch=1, position=800, step=100)
    assert torch.equal(tensors["model"]["w"], torch.full((3,), 100.0)) and tensors["metrics"] == {"loss": 100}
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [
        f"step-{step:09d}.{extension}" for step in (50, 100) for extension in ("json", "pt")
    ]
    store.clear()
    assert store.latest() is None


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("harm", "extension", "state"),
    [
        (_flip, "pt", "damaged"),
        (_cut, "pt", "damaged"),
        (Path.unlink, "pt", "damaged"),
        (_cut, "json", "unfinished or damaged"),
        (Path.unlink, "json", "unfinished or damaged"),
    ],
)
def test_half_written_or_damaged_ones_are_passed_over_aloud(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    harm: Callable[[Path], None],
    extension: str,
    state: str,
) -> None:
    """The newest is harmed, and it is the best too: the one before is loaded, and the next best."""
    store = CheckpointStore(str(tmp_path), keep=3)
    for step, score in ((1, 0.4), (2, 0.5), (3, 0.3)):
        store.save(TrainState(step=step), _tensors(step), score=score)
    store.wait()
    harm(tmp_path / "checkpoints" / f"step-000000003.{extension}")
    store = CheckpointStore(str(tmp_path))
    found = store.latest()
    assert found is not None and found[0].step == 2 and found[1]["metrics"] == {"loss": 2}
    said = capsys.readouterr().out
    assert f"step-000000003 in {tmp_path}/checkpoints is {state} and passed over" in said
    assert "step-000000002" not in said
    best = store.best()
    assert best is not None and best[0].step == 1


def test_a_killed_write_is_cleared_away_by_a_later_one(tmp_path: Path) -> None:
    """Its tensors are there, its header is not; what is newer than the run that goes on is left alone."""
    store = CheckpointStore(str(tmp_path), keep=1)
    store.save(TrainState(step=1), _tensors(1), wait=True)
    folder = tmp_path / "checkpoints"
    for step in (2, 9):
        (folder / f"step-{step:09d}.pt").write_bytes(b"half")
    store.save(TrainState(step=3), _tensors(3), wait=True)
    assert sorted(path.name for path in folder.iterdir()) == [
        "step-000000003.json",
        "step-000000003.pt",
        "step-000000009.pt",
    ]


def test_what_is_newest_and_damaged_does_not_push_out_what_is_good(tmp_path: Path) -> None:
    """A run goes on from step 1, because step 9 is damaged: its next checkpoint must stay."""
    store = CheckpointStore(str(tmp_path), keep=1)
    store.save(TrainState(step=9), _tensors(9), wait=True)
    _cut(tmp_path / "checkpoints" / "step-000000009.pt")
    store.save(TrainState(step=2), _tensors(2), wait=True)
    found = store.latest()
    assert found is not None and found[0].step == 2


@dataclass(frozen=True, kw_only=True)
class _RankZero(Worker):
    """Rank 0 of two; what rank 1 gives, and what is done where the two meet."""

    other: torch.Tensor | None = None
    meet: Callable[[], None] = lambda: None

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        assert self.other is not None
        return torch.cat([tensor, self.other])

    def agree(self, decision: bool) -> bool:
        self.meet()
        return decision


def test_ranks_that_found_different_checkpoints_are_named(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    store.save(TrainState(epoch=1, position=16, step=7), _tensors(7), wait=True)
    same = _RankZero(world_size=2, other=torch.tensor([[1, 16, 7]]))
    found = store.latest(same)
    assert found is not None and found[0].step == 7
    with pytest.raises(RuntimeError, match=r"ranks \[1\] found \[\[1, 8, 6\]\], rank 0 found \[1, 16, 7\]"):
        store.latest(_RankZero(world_size=2, other=torch.tensor([[1, 8, 6]])))
    with pytest.raises(RuntimeError, match=r"rank 0 found \[-1, -1, -1\]"):
        CheckpointStore(str(tmp_path / "empty")).latest(same)


def test_ranks_meet_while_one_waits_for_its_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store takes the checkpoint only after they have met three times."""
    monkeypatch.setattr(checkpoints, "MEET_EVERY_S", 0.01)
    met, may_write = [], threading.Event()
    put = storage.put

    def slow_put(url: str, data: bytes) -> None:
        assert may_write.wait(30)
        put(url, data)

    def meet() -> None:
        met.append(store.is_writing)
        if len(met) == 3:
            may_write.set()

    monkeypatch.setattr(storage, "put", slow_put)
    store = CheckpointStore(str(tmp_path))
    worker = _RankZero(world_size=2, meet=meet)
    store.wait_together(worker)
    assert met == [False]
    met.clear()
    store.save(TrainState(step=1), _tensors(1))
    store.wait_together(worker)
    assert met[:3] == [True, True, True] and not store.is_writing


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "executed"),)

    store = CheckpointStore(str(tmp_path))
    store.save(TrainState(step=1), {"model": Evil()})
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        store.latest()
    assert not (tmp_path / "executed").exists()


def test_the_best_stays_beside_the_newest(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), keep=2)
    assert store.best() is None
    for step, score in ((1, 0.5), (2, 0.2), (3, None), (4, 0.3), (5, float("nan")), (6, 0.4)):
        store.save(TrainState(step=step), _tensors(step), score=score)
    store.wait()
    kept = sorted(path.stem for path in (tmp_path / "checkpoints").glob("*.json"))
    assert kept == ["step-000000002", "step-000000005", "step-000000006"]
    best = CheckpointStore(str(tmp_path)).best()
    assert best is not None and best[0].step == 2 and best[1]["metrics"] == {"loss": 2}


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is published is what was saved, however long the store takes and whatever training changes."""
    may_write = threading.Event()
    put = storage.put

    def slow_put(url: str, data: bytes) -> None:
        assert may_write.wait(30)
        put(url, data)

    monkeypatch.setattr(storage, "put", slow_put)
    store, weights = CheckpointStore(str(tmp_path)), torch.zeros(3)
    store.save(TrainState(step=1), {"model": {"w": weights}, "nested": [(weights, 1)]})
    assert store.is_writing
    weights += 1  # the next step
    may_write.set()
    found = store.latest()
    assert found is not None and not store.is_writing
    assert found[1]["model"]["w"].tolist() == [0, 0, 0]
    assert found[1]["nested"][0][0].tolist() == [0, 0, 0] and found[1]["nested"][0][1] == 1


def test_what_failed_in_the_background_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(url: str, data: bytes) -> None:
        raise OSError(28, "No space left on device", url)

    monkeypatch.setattr(storage, "put", full)
    store = CheckpointStore(str(tmp_path))
    store.save(TrainState(step=1), _tensors(1))
    with pytest.raises(OSError, match="No space left"):
        store.save(TrainState(step=2), _tensors(2))

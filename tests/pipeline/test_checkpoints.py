from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from pipeline import storage
from pipeline.checkpoints import CheckpointStore, TrainState


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


def test_half_written_one_is_not_seen(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    store.save(TrainState(step=1), _tensors(1), wait=True)
    (tmp_path / "checkpoints" / "step-000000002.pt").write_bytes(b"half")
    found = store.latest()
    assert found is not None and found[0].step == 1


def test_damaged_one_is_passed_over_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = CheckpointStore(str(tmp_path))
    store.save(TrainState(step=1), _tensors(1))
    store.save(TrainState(step=2), _tensors(2), wait=True)
    path = tmp_path / "checkpoints" / "step-000000002.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    found = store.latest()
    assert found is not None and found[0].step == 1
    assert "step-000000002" in capsys.readouterr().out


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

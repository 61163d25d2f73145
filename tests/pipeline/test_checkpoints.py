from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

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
    assert len(os.listdir(tmp_path / "checkpoints")) == 4
    store.clear()
    assert store.latest() is None


def test_half_written_one_is_not_seen(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    store.save(TrainState(step=1), _tensors(1))
    (tmp_path / "checkpoints" / "step-000000002.pt").write_bytes(b"half")
    found = store.latest()
    assert found is not None and found[0].step == 1


def test_damaged_one_is_passed_over_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = CheckpointStore(str(tmp_path))
    store.save(TrainState(step=1), _tensors(1))
    store.save(TrainState(step=2), _tensors(2))
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

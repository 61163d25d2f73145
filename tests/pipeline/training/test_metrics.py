from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.training.metrics import MetricsLog, Progress, duration, read_metrics


def test_records_survive_a_resume_without_a_fork(tmp_path: Path) -> None:
    first = MetricsLog(str(tmp_path))
    for step in (10, 20, 30):
        first.log(step, {"loss": 1.0 / step})
    first.close()
    second = MetricsLog(str(tmp_path), resume_step=20)
    second.log(30, {"loss": 7.0})
    second.log(30, {"loss": 8.0}, split="val")
    second.close()
    records = read_metrics(str(tmp_path))
    assert [(r["step"], r["split"], r["loss"]) for r in records] == [
        (10, "train", 0.1),
        (20, "train", 0.05),
        (30, "train", 7.0),
        (30, "val", 8.0),
    ]
    assert any((tmp_path / "tensorboard").iterdir())


def test_a_new_run_forgets_the_old_records(tmp_path: Path) -> None:
    old = MetricsLog(str(tmp_path))
    old.log(10, {"loss": 1.0})
    old.close()
    MetricsLog(str(tmp_path)).close()
    assert read_metrics(str(tmp_path)) == []


def test_progress_shows_rate_eta_and_figures(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("precompute", 100, "images", done=20, every_s=0.0)
    progress.update(30, loss=0.123456, shards="1/2")
    progress.update(50)
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("precompute: 50/100 images (50 %)") and "ETA" in lines[0]
    assert "loss 0.1235" in lines[0] and "shards 1/2" in lines[0]
    assert "100/100" in lines[-1] and " in " in lines[-1]


def test_duration() -> None:
    assert [duration(s) for s in (3.21, 75, 3725, float("inf"))] == [
        "3.2 s",
        "1 min 15 s",
        "1 h 02 min",
        "unknown",
    ]

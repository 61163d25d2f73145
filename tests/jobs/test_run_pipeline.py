"""The pipeline's processes, with real stages: exit statuses, signals, and what is printed at the end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from jobs.stages.pipeline import read_record

ROOT = Path(__file__).resolve().parents[2]


def run_job(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.run_pipeline", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_bad_input_to_a_stage_is_exit_status_2(tmp_path: Path) -> None:
    ended = run_job(["--output", str(tmp_path / "run"), "--draw_images.overrides", '{"num_images": -1}'])
    assert ended.returncode == 2
    assert "[draw_images] error: --num_images -1 is out of range" in ended.stdout
    assert "stage draw_images failed with exit status 2" in ended.stderr
    assert "--num_images -1 is out of range" in ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr


def test_an_unknown_key_is_one_line(tmp_path: Path) -> None:
    ended = run_job(["--output", str(tmp_path / "run"), "--pretrain_mim.configs", "a.yaml"])
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_the_running_stage_ends_with_the_pipeline(tmp_path: Path) -> None:
    overrides = '{"num_images": 90000}'
    command = [sys.executable, "-m", "jobs.run_pipeline", "--output", str(tmp_path / "run")]
    pipeline = subprocess.Popen(
        [*command, "--draw_images.overrides", overrides], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("run/images/images/*/*.jpg")) and time.monotonic() < deadline:
        time.sleep(0.05)
    children = Path(f"/proc/{pipeline.pid}/task/{pipeline.pid}/children").read_text().split()
    assert len(children) == 1
    pipeline.send_signal(signal.SIGTERM)
    assert pipeline.wait(30) == 128 + signal.SIGTERM
    assert not Path(f"/proc/{children[0]}").exists()
    assert read_record(str(tmp_path / "run")) == {}


@pytest.mark.slow
def test_all_stages_run_here_on_images_without_labels(tmp_path: Path, make_image_folder: Any) -> None:
    """The quickstart's files with tiny models, in process: every artifact, then nothing left to do."""
    folder = make_image_folder(classes=0, per_class=32, size=32)
    tokenizer = {
        "model": {"image_size": 32, "width": 32, "depth": 1, "heads": 2, "codebook_size": 16, "code_dim": 8},
        "epochs": 1,
        "batch_size": 8,
    }
    backbone = {
        "backbone": {"width": 32, "depth": 2, "heads": 2},
        "mim": {"patch_aggregation": {"layer": 1, "head_depth": 1}},
        "epochs": 1,
        "batch_size": 8,
    }
    arguments = [
        *("--config", "jobs/configs/quickstart/pipeline.yaml"),
        *("--images", str(folder), "--output", str(tmp_path / "run")),
        *("--val_fraction", "0.25", "--cluster.num_workers", "0"),
        *("--train_tokenizer.overrides", json.dumps(tokenizer)),
        *("--pretrain_mim.overrides", json.dumps(backbone)),
    ]
    first = run_job(arguments)
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stdout.splitlines()[-1].endswith("report.html")
    assert "perplexity" in first.stdout
    page = (tmp_path / "run" / "report.html").read_text()
    assert "label" in page
    again = run_job(arguments)
    assert again.returncode == 0
    assert again.stdout.count("; skipped") == 6
    assert again.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]

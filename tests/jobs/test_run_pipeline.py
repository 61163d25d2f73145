"""The pipeline's book-keeping with stand-ins for its stages, and its processes with a real one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from jobs import run_pipeline
from jobs.run_pipeline import PipelineConfig, Stage, StageConfig
from pipeline import storage
from pipeline.config import parse
from pipeline.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


class FakeStages:
    """Stands in for the jobs: writes headers that follow from the settings and from the headers read."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.fails_with: dict[str, int] = {}
        self.writes_nothing: set[str] = set()

    def __call__(self, stage: Stage, argv: list[str], on_line: Callable[[str], None]) -> int:
        self.ran.append(stage.name)
        for i in range(40):
            on_line(f"{stage.name} line {i}")
        if stage.name in self.fails_with:
            on_line("the reason why")
            return self.fails_with[stage.name]
        if stage.name in self.writes_nothing:
            return 0
        read = [storage.read(url).decode() for url in stage.reads if storage.exists(url)]
        settings = sorted(argument for argument in argv if argument.startswith("--epochs"))
        for url in stage.writes:
            storage.put(url, json.dumps([storage.name(url), settings, read]).encode())
        return 0

    def run(self, config: PipelineConfig) -> list[str]:
        """The stages that ran."""
        self.ran = []
        run_pipeline.run_stages(config, self)
        return self.ran


ALL = [
    "draw_images",
    "prepare_images",
    "train_tokenizer",
    "precompute_shards",
    "pretrain_mim",
    "probe_linear",
    "write_report",
]


@pytest.fixture
def config(tmp_path: Path) -> PipelineConfig:
    return PipelineConfig(output=str(tmp_path / "run"), val_fraction=0.25)


def with_epochs(config: PipelineConfig, stage: str, epochs: int) -> PipelineConfig:
    return replace(config, **{stage: StageConfig(overrides={"epochs": epochs})})


# ------------------------------------------------------------------------------------------------ stages


@pytest.mark.parametrize(
    ("images", "val_fraction", "online"), list(product([None, "pictures"], [0.0, 0.1], [False, True]))
)
def test_every_stage_reads_what_an_earlier_one_wrote(
    images: str | None, val_fraction: float, online: bool
) -> None:
    config = PipelineConfig(output="run", images=images, val_fraction=val_fraction, online=online)
    found = run_pipeline.stages(config)
    left_out = run_pipeline.left_out_stages(config)
    assert sorted([stage.name for stage in found] + list(left_out)) == sorted(ALL)
    assert [stage.name for stage in found] == [name for name in ALL if name not in left_out]
    written: set[str] = set()
    for stage in found:
        assert set(stage.reads) <= written, stage.name
        assert stage.writes
        assert not written & set(stage.writes), stage.name
        written |= set(stage.writes)
        for flag, value in stage.flags.items():
            if flag != "val_fraction":
                assert os.path.isabs(value), (stage.name, flag)
    assert ("draw_images" in left_out) == (images is not None)
    assert ("precompute_shards" in left_out) == online
    assert ("probe_linear" in left_out) == (val_fraction == 0)


def test_urls_stay_urls() -> None:
    config = PipelineConfig(output="s3://bucket/run/", images="s3://bucket/pictures", val_fraction=0.1)
    for stage in run_pipeline.stages(config):
        for url in (*stage.reads, *stage.writes):
            assert url.startswith("s3://bucket/run/")
            assert "//" not in url.removeprefix("s3://")


def test_overrides_come_last_and_keep_their_types(config: PipelineConfig) -> None:
    overrides: dict[str, Any] = {
        "model.width": 64,
        "schedule": {"epochs": 3, "warmup": {"epochs": 0.5}},
        "flag": True,
        "nothing": None,
        "name": "with space",
        "list": [1, 2],
        "empty": {},
    }
    stage = replace(
        run_pipeline.stages(config)[2], settings=StageConfig(config="a.yaml", overrides=overrides)
    )
    argv = run_pipeline.command_line(stage, run_pipeline.ClusterOverride(num_workers=0))
    assert argv[:2] == ["--config", "a.yaml"]
    assert argv[-10:] == [
        "--cluster.num_workers",
        "0",
        "--model.width=64",
        "--schedule.epochs=3",
        "--schedule.warmup.epochs=0.5",
        "--flag=true",
        "--nothing=null",
        "--name=with space",
        "--list=[1, 2]",
        "--empty={}",
    ]


def test_stages_without_workers_are_not_told_of_them(config: PipelineConfig) -> None:
    told = {
        stage.name
        for stage in run_pipeline.stages(config)
        if "--cluster.num_workers"
        in run_pipeline.command_line(stage, run_pipeline.ClusterOverride(num_workers=3))
    }
    assert told == set(ALL) - {"draw_images", "write_report"}


@pytest.mark.parametrize(
    "wrong", [{"val_fraction": 1.0}, {"val_fraction": -0.1}, {"address": "ray://head:10001"}]
)
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        PipelineConfig(output="run", **wrong)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "jobs" / "configs").glob("*/pipeline.yaml")), ids=lambda path: path.parent.name
)
def test_the_pipelines_that_come_along_name_files_that_exist(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = parse(PipelineConfig, ["--config", str(path.relative_to(ROOT))])
    for stage in run_pipeline.stages(config):
        argv = run_pipeline.command_line(stage, config.cluster)
        assert run_pipeline.settings_fingerprint(stage, argv)


# ------------------------------------------------------------------------------------------------ skipping


def test_a_second_run_runs_nothing(config: PipelineConfig, capsys: pytest.CaptureFixture[str]) -> None:
    fake = FakeStages()
    assert fake.run(config) == ALL
    assert "[pretrain_mim] pretrain_mim line 39" in capsys.readouterr().out
    assert fake.run(config) == []
    again = capsys.readouterr().out
    assert again.count("; skipped") == len(ALL)
    # The summary, which is what the report's job printed, ends both runs.
    assert again.endswith("\nwrite_report line 38\nwrite_report line 39\n")


def test_another_setting_runs_its_stage_and_what_depends_on_it(config: PipelineConfig) -> None:
    fake = FakeStages()
    fake.run(config)
    assert fake.run(with_epochs(config, "pretrain_mim", 5)) == [
        "pretrain_mim",
        "probe_linear",
        "write_report",
    ]
    assert fake.run(with_epochs(config, "pretrain_mim", 5)) == []
    # A setting that does not change the artifact: the stages after it stay as they are.
    other = replace(config, train_tokenizer=StageConfig(overrides={"log_every": 5}))
    other = replace(other, pretrain_mim=StageConfig(overrides={"epochs": 5}))
    assert fake.run(other) == ["train_tokenizer"]


def test_another_content_of_a_configuration_file_counts(config: PipelineConfig, tmp_path: Path) -> None:
    file = tmp_path / "probe.yaml"
    file.write_text("epochs: 1\n")
    config = replace(config, probe_linear=StageConfig(config=str(file)))
    fake = FakeStages()
    assert fake.run(config) == ALL
    file.write_text("epochs: 2\n")
    assert fake.run(config) == ["probe_linear"]


def test_a_missing_configuration_file_shows_before_anything_runs(config: PipelineConfig) -> None:
    fake = FakeStages()
    with pytest.raises(InputError, match=r"write_report\.config.*nowhere\.yaml"):
        fake.run(replace(config, write_report=StageConfig(config="nowhere.yaml")))
    assert fake.ran == []


def test_a_lost_artifact_is_made_again(config: PipelineConfig) -> None:
    fake = FakeStages()
    fake.run(config)
    tokenizer = next(stage for stage in run_pipeline.stages(config) if stage.name == "train_tokenizer")
    storage.remove(tokenizer.writes[0])
    # It comes back the same, so what was made from it is still right.
    assert fake.run(config) == ["train_tokenizer"]
    storage.put(tokenizer.writes[0], b"of another run")
    assert fake.run(config)[:3] == ["train_tokenizer"]


def test_other_images_are_prepared_again(config: PipelineConfig, make_image_folder: Any) -> None:
    folder = make_image_folder(classes=2, per_class=2)
    config = replace(config, images=str(folder))
    fake = FakeStages()
    assert fake.run(config) == ALL[1:]
    assert fake.run(config) == []
    (folder / "one-more.png").write_bytes(b"another picture")
    assert fake.run(config) == ["prepare_images"]
    (folder / "one-more.png").write_bytes(b"an other picture")
    assert fake.run(config) == ["prepare_images"]


@pytest.mark.parametrize(("status", "exit_status"), [(2, 2), (1, 1), (-9, 1), (3, 1)])
def test_a_failed_stage_ends_the_run_and_the_next_goes_on_there(
    config: PipelineConfig, status: int, exit_status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeStages()
    fake.fails_with = {"precompute_shards": status}
    with pytest.raises(SystemExit) as ended:
        fake.run(config)
    assert ended.value.code == exit_status
    assert fake.ran == ALL[:4]
    message = capsys.readouterr().err
    how = "was ended by signal SIGKILL" if status == -9 else f"failed with exit status {status}"
    assert f"error: stage precompute_shards {how}" in message
    assert "precompute_shards line 39" in message
    assert "the reason why" in message
    log = Path(config.output, "logs", "precompute_shards.log")
    assert str(log) in message
    assert log.read_text().splitlines()[-1] == "the reason why"
    fake.fails_with = {}
    assert fake.run(config) == ALL[3:]


def test_a_stage_that_writes_nothing_has_failed(
    config: PipelineConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeStages()
    fake.writes_nothing = {"train_tokenizer"}
    with pytest.raises(SystemExit) as ended:
        fake.run(config)
    assert ended.value.code == 1
    assert "ended without writing" in capsys.readouterr().err


def test_a_record_of_something_else_is_refused(config: PipelineConfig) -> None:
    storage.put(storage.join(config.output, run_pipeline.RECORD_FILE), b"{")
    with pytest.raises(InputError, match="not JSON"):
        FakeStages().run(config)
    storage.put(storage.join(config.output, run_pipeline.RECORD_FILE), b'{"format": 99}')
    with pytest.raises(InputError, match="of this version"):
        FakeStages().run(config)


def test_record_and_logs_lie_beside_the_artifacts_in_an_object_store(s3_url: str) -> None:
    config = PipelineConfig(output=f"{s3_url}/run", images=f"{s3_url}/pictures")
    fake = FakeStages()
    assert fake.run(config) == [name for name in ALL if name not in ("draw_images", "probe_linear")]
    assert fake.run(config) == []
    assert storage.read(f"{s3_url}/run/logs/pretrain_mim.log").startswith(b"pretrain_mim line 0\n")
    record = json.loads(storage.read(f"{s3_url}/run/pipeline.json"))
    assert set(record["left_out"]) == {"draw_images", "probe_linear"}


def test_attempts_and_steps_are_recorded(config: PipelineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(run_pipeline.time, "monotonic", lambda: float(next(clock)))
    metrics = b'{"step": 5, "split": "train", "loss": 2.0}\n{"step": 9, "split": "train", "loss": 1.0}\n'
    storage.put(storage.join(config.output, "tokenizer", "metrics.jsonl"), metrics)
    fake = FakeStages()
    fake.fails_with = {"train_tokenizer": 1}
    with pytest.raises(SystemExit):
        fake.run(config)
    fake.fails_with = {}
    fake.run(config)
    record = run_pipeline.read_record(config.output)
    assert record["train_tokenizer"].seconds == 2 * record["prepare_images"].seconds
    assert record["train_tokenizer"].steps == 9
    assert record["prepare_images"].steps is None
    assert all(entry.finished and entry.artifact for entry in record.values())


# ------------------------------------------------------------------------------------------------ processes


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
    assert run_pipeline.read_record(str(tmp_path / "run")) == {}


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

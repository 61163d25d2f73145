"""The pipeline's graph and its record of what is finished, with stand-ins for its jobs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count, product
from pathlib import Path
from typing import Any

import pytest

from jobs.stages import pipeline, runner
from jobs.stages.pipeline import PipelineConfig
from jobs.stages.stage import ClusterOverride, Stage, StageConfig
from pipeline import storage
from pipeline.config import parse
from pipeline.errors import InputError

ROOT = Path(__file__).resolve().parents[3]
ALL = [
    "draw_images",
    "prepare_images",
    "train_tokenizer",
    "precompute_shards",
    "pretrain_mim",
    "probe_linear",
    "write_report",
]


class FakeJobs:
    """Stands in for the jobs: writes headers that follow from the settings and from the headers read."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.fails_with: dict[str, int] = {}

    def __call__(self, stage: Stage, argv: Sequence[str], on_line: Callable[[str], None]) -> int:
        self.ran.append(stage.name)
        for i in range(40):
            on_line(f"{stage.name} line {i}")
        if stage.name in self.fails_with:
            on_line("the reason why")
            return self.fails_with[stage.name]
        headers = [storage.read(url).decode() for url in stage.inputs if storage.exists(url)]
        settings = sorted(argument for argument in argv if argument.startswith("--epochs"))
        for url in stage.outputs:
            storage.put(url, json.dumps([storage.name(url), settings, headers]).encode())
        return 0

    def run(self, config: PipelineConfig) -> list[str]:
        """The stages that ran."""
        self.ran = []
        pipeline.run_stages(config, self)
        return self.ran


@pytest.fixture
def config(tmp_path: Path) -> PipelineConfig:
    return PipelineConfig(output=str(tmp_path / "run"), val_fraction=0.25)


def with_overrides(config: PipelineConfig, stage: str, **overrides: int) -> PipelineConfig:
    return replace(config, **{stage: StageConfig(overrides=overrides)})


# ------------------------------------------------------------------------------------------------ graph


@pytest.mark.parametrize(
    ("images", "val_fraction", "online"), list(product([None, "s3://b/pictures"], [0.0, 0.1], [False, True]))
)
def test_every_stage_reads_what_an_earlier_one_wrote(
    images: str | None, val_fraction: float, online: bool
) -> None:
    output = "run" if images is None else "s3://b/run/"
    config = PipelineConfig(output=output, images=images, val_fraction=val_fraction, online=online)
    stages, left_out = pipeline.stages(config), pipeline.left_out_stages(config)
    assert sorted([stage.name for stage in stages] + list(left_out)) == sorted(ALL)
    assert [stage.name for stage in stages] == [name for name in ALL if name not in left_out]
    written: set[str] = set()
    for stage in stages:
        assert set(stage.inputs) <= written, stage.name
        assert stage.outputs and not written & set(stage.outputs), stage.name
        written |= set(stage.outputs)
        for flag, value in stage.flags.items():
            place = value.removeprefix("s3:/")  # URLs stay URLs
            assert flag == "val_fraction" or (os.path.isabs(place) and "//" not in place), (stage.name, flag)
    assert ("draw_images" in left_out) == (images is not None)
    assert ("precompute_shards" in left_out) == online
    assert ("probe_linear" in left_out) == (val_fraction == 0)


def test_arguments_end_with_overrides_that_keep_their_types(config: PipelineConfig) -> None:
    overrides: dict[str, Any] = {
        "model.width": 64,
        "schedule": {"epochs": 3, "warmup": {"epochs": 0.5}},
        "flag": True,
        "nothing": None,
        "name": "with space",
        "list": [1, 2],
        "empty": {},
    }
    stage = replace(pipeline.stages(config)[2], settings=StageConfig(config="a.yaml", overrides=overrides))
    argv = stage.argv(ClusterOverride(num_workers=0))
    assert argv[:2] == ["--config", "a.yaml"]
    assert argv[-10:] == [
        *("--cluster.num_workers", "0", "--model.width=64", "--schedule.epochs=3"),
        *("--schedule.warmup.epochs=0.5", "--flag=true", "--nothing=null", "--name=with space"),
        *("--list=[1, 2]", "--empty={}"),
    ]
    told = {
        stage.name
        for stage in pipeline.stages(config)
        if "--cluster.num_workers" in stage.argv(ClusterOverride(num_workers=3))
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
    for stage in pipeline.stages(config):
        assert stage.settings_fingerprint(stage.argv(config.cluster))


# ------------------------------------------------------------------------------------------------ skipping


def test_a_second_run_runs_nothing(config: PipelineConfig, capsys: pytest.CaptureFixture[str]) -> None:
    fake = FakeJobs()
    assert fake.run(config) == ALL
    printed = capsys.readouterr().out
    assert "[pretrain_mim] pretrain_mim line 39" in printed
    assert "write_report line" not in printed  # it is the summary at the end
    assert fake.run(config) == []
    assert capsys.readouterr().out.count("; skipped") == len(ALL)


def test_another_setting_runs_its_stage_and_what_depends_on_it(config: PipelineConfig) -> None:
    fake = FakeJobs()
    fake.run(config)
    config = with_overrides(config, "pretrain_mim", epochs=5)
    assert fake.run(config) == ["pretrain_mim", "probe_linear", "write_report"]
    assert fake.run(config) == []
    # A setting that does not change the artifact: the stages after it stay as they are.
    assert fake.run(with_overrides(config, "train_tokenizer", log_every=5)) == ["train_tokenizer"]


def test_the_content_of_a_configuration_file_counts(config: PipelineConfig, tmp_path: Path) -> None:
    file = tmp_path / "probe.yaml"
    file.write_text("epochs: 1\n")
    config = replace(config, probe_linear=StageConfig(config=str(file)))
    fake = FakeJobs()
    assert fake.run(config) == ALL
    file.write_text("epochs: 2\n")
    assert fake.run(config) == ["probe_linear"]
    # A missing one shows before anything runs.
    with pytest.raises(InputError, match=r"write_report\.config.*nowhere\.yaml"):
        fake.run(replace(config, val_fraction=0.5, write_report=StageConfig(config="nowhere.yaml")))
    assert fake.ran == []


def test_a_lost_or_other_artifact_is_made_again(config: PipelineConfig) -> None:
    fake = FakeJobs()
    fake.run(config)
    tokenizer = next(stage for stage in pipeline.stages(config) if stage.name == "train_tokenizer")
    storage.remove(tokenizer.outputs[0])
    # It comes back the same, so what was made from it is still right.
    assert fake.run(config) == ["train_tokenizer"]
    storage.put(tokenizer.outputs[0], b"of another run")
    assert fake.run(config)[:3] == ["train_tokenizer"]


def test_other_images_are_prepared_again(config: PipelineConfig, make_image_folder: Any) -> None:
    folder = make_image_folder(classes=2, per_class=2)
    config = replace(config, images=str(folder))
    fake = FakeJobs()
    assert fake.run(config) == ALL[1:]
    assert fake.run(config) == []
    for content in (b"another picture", b"an other picture"):
        (folder / "one-more.png").write_bytes(content)
        assert fake.run(config) == ["prepare_images"]


@pytest.mark.parametrize(
    ("status", "exit_status", "how"),
    [
        (2, 2, "failed with exit status 2"),
        (3, 1, "failed with exit status 3"),
        (-9, 1, "was ended by signal SIGKILL"),
        (0, 1, "ended without writing"),
    ],
)
def test_a_failed_stage_ends_the_run_and_the_next_goes_on_there(
    config: PipelineConfig, status: int, exit_status: int, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeJobs()
    fake.fails_with = {"precompute_shards": status}
    with pytest.raises(SystemExit, match=str(exit_status)):
        fake.run(config)
    assert fake.ran == ALL[:4]
    message = capsys.readouterr().err
    assert f"error: stage precompute_shards {how}" in message
    assert "precompute_shards line 39" in message
    assert "the reason why" in message
    log = Path(config.output, "logs", "precompute_shards.log")
    assert str(log) in message
    assert log.read_text().splitlines()[-1] == "the reason why"
    fake.fails_with = {}
    assert fake.run(config) == ALL[3:]


# ------------------------------------------------------------------------------------------------ record


@pytest.mark.parametrize(("record", "message"), [(b"{", "not JSON"), (b'{"format": 99}', "of this version")])
def test_a_record_of_something_else_is_refused(config: PipelineConfig, record: bytes, message: str) -> None:
    storage.put(storage.join(config.output, pipeline.RECORD_FILE), record)
    with pytest.raises(InputError, match=message):
        FakeJobs().run(config)


def test_record_and_logs_lie_beside_the_artifacts_in_an_object_store(s3_url: str) -> None:
    config = PipelineConfig(output=f"{s3_url}/run", images=f"{s3_url}/pictures")
    fake = FakeJobs()
    assert fake.run(config) == [name for name in ALL if name not in ("draw_images", "probe_linear")]
    assert fake.run(config) == []
    assert storage.read(f"{s3_url}/run/logs/pretrain_mim.log").startswith(b"pretrain_mim line 0\n")
    record = json.loads(storage.read(f"{s3_url}/run/pipeline.json"))
    assert set(record["left_out"]) == {"draw_images", "probe_linear"}


def test_attempts_and_steps_are_recorded(config: PipelineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = count(0, 10)
    monkeypatch.setattr(runner.time, "monotonic", lambda: float(next(clock)))
    metrics = b'{"step": 5, "split": "train", "loss": 2.0}\n{"step": 9, "split": "train", "loss": 1.0}\n'
    storage.put(storage.join(config.output, "tokenizer", "metrics.jsonl"), metrics)
    fake = FakeJobs()
    fake.fails_with = {"train_tokenizer": 1}
    with pytest.raises(SystemExit):
        fake.run(config)
    fake.fails_with = {}
    fake.run(config)
    record = pipeline.read_record(config.output)
    assert record["train_tokenizer"].seconds == 2 * record["prepare_images"].seconds
    assert record["train_tokenizer"].steps == 9
    assert record["prepare_images"].steps is None
    assert all(entry.finished and entry.artifact for entry in record.values())

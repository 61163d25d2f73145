"""Every stage as a submitted job, on a real Ray head with its job server: final states, messages and logs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.job_submission import JobSubmissionClient

from jobs.run_pipeline import run_pipeline
from jobs.stages.pipeline import PipelineConfig, stages
from jobs.stages.runner import log_url
from jobs.stages.stage import ClusterOverride, StageConfig
from jobs.stages.submission import JobServer
from pipeline import storage
from pipeline.errors import InputError

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = "jobs/configs/quickstart"

TINY_TOKENIZER = {
    "model": {"image_size": 32, "width": 32, "depth": 1, "heads": 2, "codebook_size": 16, "code_dim": 8},
    "epochs": 1,
    "batch_size": 8,
}
TINY_BACKBONE = {
    "backbone": {"width": 32, "depth": 2, "heads": 2},
    "mim": {"patch_aggregation": {"layer": 1, "head_depth": 1}},
    "epochs": 1,
    "batch_size": 8,
}


def tiny_pipeline(output: str, address: str | None) -> PipelineConfig:
    """All seven stages on 36 drawn pictures of 32 px and models of one or two blocks."""
    return PipelineConfig(
        output=output,
        val_fraction=0.25,
        address=address,
        cluster=ClusterOverride(num_workers=1),
        draw_images=StageConfig(overrides={"num_images": 36, "num_classes": 3, "image_size": 32}),
        prepare_images=StageConfig(config=f"{CONFIGS}/prepare.yaml"),
        train_tokenizer=StageConfig(config=f"{CONFIGS}/tokenizer.yaml", overrides=TINY_TOKENIZER),
        precompute_shards=StageConfig(config=f"{CONFIGS}/precompute.yaml"),
        pretrain_mim=StageConfig(config=f"{CONFIGS}/pretrain.yaml", overrides=TINY_BACKBONE),
        probe_linear=StageConfig(config=f"{CONFIGS}/probe.yaml", overrides={"epochs": 2, "lrs": [0.001]}),
        write_report=StageConfig(overrides={"sample_images": 16, "predictions": 2}),
    )


def submit(client: JobSubmissionClient, entrypoint: str) -> str:
    """`ray job submit --working-dir . --no-wait -- entrypoint`."""
    return client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": str(ROOT)})


def ended(client: JobSubmissionClient, job_id: str | None) -> tuple[JobDetails, str]:
    """What the server says of the job after its end, and its whole log."""
    assert job_id is not None
    deadline = time.monotonic() + 180
    while not (info := client.get_job_info(job_id)).status.is_terminal():
        assert time.monotonic() < deadline, f"{job_id} does not end:\n{client.get_job_logs(job_id)}"
        time.sleep(0.2)
    return info, client.get_job_logs(job_id)


PRINTED = {
    "draw_images": "36 images of 3 classes",
    "prepare_images": "36",
    "train_tokenizer": "perplexity",
    "precompute_shards": "crops written",
    "pretrain_mim": "loss",
    "probe_linear": "top-1",
    "write_report": "report: ",
}
"""Something of what each stage prints."""


def test_every_stage_runs_as_a_submitted_job(
    ray_head: Any,
    s3_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From drawn pictures to the report, everything read from and written to an object store."""
    monkeypatch.chdir(ROOT)
    client = JobSubmissionClient(ray_head.job_server)
    output = f"{s3_url}/run"
    config = tiny_pipeline(output, ray_head.job_server)

    # Beside the stages, which run one after the other: bad input.
    absent = tmp_path / "absent"
    bad_job = submit(client, f"python -m jobs.prepare_images --source {absent} --output {absent}/out")

    run_pipeline(config)
    assert "MiB to upload (Ray takes 100 MiB)" in capsys.readouterr().out
    jobs = {
        job.entrypoint.split()[2].removeprefix("jobs."): ended(client, job.submission_id)
        for job in client.list_jobs()
        if output in job.entrypoint
    }
    assert list(PRINTED) == [stage.name for stage in stages(config)]
    assert jobs.keys() == PRINTED.keys()
    for stage in stages(config):
        info, log = jobs[stage.name]
        assert (info.status, info.driver_exit_code) == ("SUCCEEDED", 0), log
        assert PRINTED[stage.name] in log, log
        # The stage's log has the job's own lines, without those that Ray adds before its entrypoint starts.
        kept = storage.read(log_url(output, stage.name)).decode()
        assert PRINTED[stage.name] in kept
        assert "Running entrypoint" not in kept
        assert stage.is_finished()

    info, log = ended(client, bad_job)
    assert (info.status, info.driver_exit_code) == ("FAILED", 2), log
    assert "exit code 2" in (info.message or "")
    assert str(absent) in log.splitlines()[-1]
    assert "Traceback" not in log
    assert not absent.exists()

    command = f"python -m jobs.inspect_shards --dataset {output}/token_shards --json"
    info, log = ended(client, submit(client, command))
    assert info.status == "SUCCEEDED", log
    assert '"perplexity"' in log

    # Nothing is submitted a second time.
    run_pipeline(config)
    assert capsys.readouterr().out.count("; skipped") == len(PRINTED)
    assert sum(output in job.entrypoint for job in client.list_jobs()) == len(PRINTED) + 1


def test_a_failing_stage_hands_on_its_exit_status(
    ray_head: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    config = PipelineConfig(
        output=str(tmp_path / "run"),
        address=ray_head.job_server,
        draw_images=StageConfig(overrides={"num_images": -1}),
    )
    with pytest.raises(SystemExit, match="2"):
        run_pipeline(config)
    captured = capsys.readouterr()
    assert "FAILED: Job entrypoint command failed with exit code 2" in captured.out
    assert "stage draw_images failed with exit status 2" in captured.err
    assert "--num_images -1 is out of range" in captured.err


def test_a_job_that_still_runs_is_followed_not_repeated(
    ray_head: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after the submitter's machine was switched off and on."""
    monkeypatch.chdir(ROOT)
    argv = ["--output", str(tmp_path / "drawn"), "--num_images", "90000"]
    stage = stages(PipelineConfig(output="run"))[0]

    def leave(line: str) -> None:
        raise KeyboardInterrupt

    with JobServer.connect(ray_head.job_server) as server:
        for text in ("submitted", "still running, started by an earlier submission"):
            with pytest.raises(KeyboardInterrupt):
                server.run(stage, argv, leave)
            printed = capsys.readouterr().out
            assert text in printed
            assert "goes on; the same command follows it again" in printed
    client = JobSubmissionClient(ray_head.job_server)
    [job_id] = [job.submission_id for job in client.list_jobs() if str(tmp_path) in job.entrypoint]
    assert job_id is not None
    client.stop_job(job_id)
    assert ended(client, job_id)[0].status == "STOPPED"


def test_the_upload_is_measured_and_refused_when_too_large(
    ray_head: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "module.py").write_text("x = 1\n")
    (tmp_path / "photos").mkdir()
    with open(tmp_path / "photos" / "large.bin", "wb") as file:
        file.truncate(101 << 20)
    with (
        pytest.raises(InputError, match=r"101\.0 MiB.*Ray takes 100 MiB.*\.rayignore.*photos \(101\.0 MiB\)"),
        JobServer.connect(ray_head.job_server, str(tmp_path)),
    ):
        pass
    (tmp_path / ".rayignore").write_text("photos/\n")
    with JobServer.connect(ray_head.job_server, str(tmp_path)) as server:
        assert "is 0.0 MiB to upload" in capsys.readouterr().out
        server.check_travels("code/module.py")
        server.check_travels("./code/../code/module.py")
        server.check_travels("s3://bucket/config.yaml")
        for config in ("photos/large.bin", "../elsewhere.yaml", str(tmp_path / "code" / "module.py")):
            with pytest.raises(InputError, match="does not travel"):
                server.check_travels(config)


def test_nobody_at_the_address_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = PipelineConfig(output=str(tmp_path / "run"), address="http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"no job server answers at http://127\.0\.0\.1:9"):
        run_pipeline(config)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    with pytest.raises(InputError, match="RAY_ADDRESS is set"):
        run_pipeline(config)

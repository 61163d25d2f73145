"""The graph of a table, what the names of its stages depend on, and which of them run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.reproduce_table import reproduce_table
from jobs.stages.results import collect, markdown
from jobs.stages.rows import ReproduceConfig
from jobs.stages.stage import ClusterOverride
from jobs.stages.tables import plan_table
from pipeline import storage
from pipeline.config import parse
from pipeline.errors import InputError

AFTER_TOKENIZER = {"precompute_shards", "pretrain_mim", "probe_linear", "finetune_classifier"}
AFTER_PRETRAINING = {"probe_linear", "finetune_classifier"}


def names(config: ReproduceConfig) -> list[str]:
    return [stage.name for stage in plan_table(config).stages]


def of_row(config: ReproduceConfig, number: int) -> dict[str, str]:
    """Job -> folder of one row."""
    return {stage.job: stage.name for stage in plan_table(config).rows[number - 1].stages}


def jobs_that_changed(before: ReproduceConfig, after: ReproduceConfig) -> set[str]:
    """Jobs of the first row of Tables 1 and 2 that have another name."""
    first, second = (
        of_row(replace(config, table=1), 1) | of_row(replace(config, table=2), 1)
        for config in (before, after)
    )
    assert first.keys() == second.keys()
    return {job for job in first if first[job] != second[job]}


# ------------------------------------------------------------------------------------------------ names


def test_names_stay_those_of_outputs_that_exist(config: ReproduceConfig, tmp_path: Path) -> None:
    """A finished stage is found by its name: another version of the code must come to the same."""
    for part in ("train", "val"):
        (tmp_path / part / "x").mkdir(parents=True)
        (tmp_path / part / "x" / "1.png").write_bytes(part.encode())
    places = {f"{part}_source": str(tmp_path / part) for part in ("train", "val")}
    assert names(replace(config, rows="2", **places)) == [
        "prepare_images-ff417366",
        "prepare_images-b2f6e0ef",
        "train_tokenizer-7ad46188",
        "precompute_shards-7e479f5e",
        "pretrain_mim-52359814",
        "finetune_classifier-1a3da843",
        "probe_linear-a225ca0c",
    ]


def test_names_do_not_depend_on_places_workers_and_threads(config: ReproduceConfig, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    for source in (config.train_source, config.val_source):
        shutil.copytree(source, moved / Path(source).name)
    shutil.copy(str(config.teacher), moved / "weights.safetensors")
    other = replace(
        config,
        train_source=str(moved / Path(config.train_source).name),
        val_source=str(moved / Path(config.val_source).name),
        teacher=str(moved / "weights.safetensors"),
        output=str(tmp_path / "other"),
        cluster=ClusterOverride(num_workers=3),
        overrides={
            "train_tokenizer": {"decode_threads": 7, "cluster.num_workers": 5},
            "pretrain_mim": {"micro_batch_size": 2, "checkpoint_every_s": 5},
        },
    )
    for table in (1, 2):
        assert names(replace(other, table=table)) == names(replace(config, table=table))
    stages = plan_table(replace(other, table=2)).stages
    assert any("--cluster.num_workers" in stage.argv(other.cluster) for stage in stages)


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        ({"train_tokenizer": {"model.code_dim": 8}}, {"train_tokenizer"} | AFTER_TOKENIZER),
        ({"precompute_shards": {"views.views_per_image": 3}}, AFTER_TOKENIZER),
        ({"pretrain_mim": {"epochs": 5}}, {"pretrain_mim"} | AFTER_PRETRAINING),
        ({"probe_linear": {"epochs": 5}}, {"probe_linear"}),
        ({"finetune_classifier": {"epochs": 5}}, {"finetune_classifier"}),
        # What the file or the default says already is no other setting.
        ({"pretrain_mim": {"epochs": 4}, "probe_linear": {"holdout": 0.2}}, set()),
    ],
)
def test_another_setting_changes_its_stage_and_those_after_it(
    config: ReproduceConfig, overrides: dict[str, dict[str, Any]], changed: set[str]
) -> None:
    assert jobs_that_changed(config, replace(config, overrides=overrides)) == changed


def test_contents_count_and_comments_do_not(config: ReproduceConfig, given: Path, tmp_path: Path) -> None:
    config = replace(config, table=2)
    (given / "other.yaml").write_text("epochs: 4\n\n# another comment\n")
    other = tmp_path / "other_scale.yaml"
    other.write_text(Path(config.scale).read_text().replace("pretrain.yaml", "other.yaml"))
    assert names(replace(config, scale=str(other))) == names(config)
    (tmp_path / "heavier.safetensors").write_bytes(b"other weights")
    heavier = replace(config, teacher=str(tmp_path / "heavier.safetensors"))
    assert jobs_that_changed(config, heavier) == {"train_tokenizer"} | AFTER_TOKENIZER
    (tmp_path / "ids.txt").write_text("1\n2\n")
    some = replace(config, finetune_ids=str(tmp_path / "ids.txt"))
    assert jobs_that_changed(config, some) == {"finetune_classifier"}
    shutil.copytree(config.train_source, tmp_path / "more")
    shutil.copy(next((tmp_path / "more").rglob("*.png")), tmp_path / "more" / "again.png")
    shared = set(names(config)) & set(names(replace(config, train_source=str(tmp_path / "more"))))
    assert [name.split("-")[0] for name in shared] == ["prepare_images"]  # val's


def test_every_seed_has_trainings_of_its_own_from_the_same_images(config: ReproduceConfig) -> None:
    config = replace(config, table=2)
    three = plan_table(replace(config, seeds="0,1,2")).stages
    count = [stage.job for stage in three].count
    assert count("prepare_images") == 2
    for job in ("train_tokenizer", "precompute_shards", "pretrain_mim", "probe_linear"):
        assert count(job) == 3
    words = {word for stage in three for word in stage.argv(config.cluster) if word.startswith("--seed=")}
    assert words == {"--seed=0", "--seed=1", "--seed=2"}
    assert set(names(config)) <= {stage.name for stage in three}


# ------------------------------------------------------------------------------------------------ running


def test_stages_that_rows_share_run_once_and_never_again(
    config: ReproduceConfig, jobs: Any, tmp_path: Path
) -> None:
    plan = plan_table(config)
    assert jobs.run(plan) == {}
    assert len(set(jobs.ran)) == len(jobs.ran)
    count = [name.split("-")[0] for name in jobs.ran].count
    assert count("prepare_images") == 2
    # CLIP's stand-in and HOG; six rows can be run, "head of 1 block" cannot.
    assert (count("train_tokenizer"), count("precompute_shards")) == (2, 2)
    assert count("pretrain_mim") == count("probe_linear") == count("finetune_classifier") == 7
    assert jobs.run(plan) == {} and jobs.ran == []
    # Tables 1 and 2 need what is there already, and outputs may be moved.
    shutil.move(config.output, tmp_path / "moved")
    for table in (1, 2):
        moved = replace(config, table=table, output=str(tmp_path / "moved"))
        assert jobs.run(plan_table(moved)) == {} and jobs.ran == []


def test_only_the_rows_asked_for_are_run_and_the_others_show_what_is_there(
    config: ReproduceConfig, jobs: Any
) -> None:
    for rows in ("1", "2"):
        plan = plan_table(replace(config, rows=rows))
        jobs.run(plan)
    cells = [row["probe"] for row in collect(plan, {}).cells.values()]
    # "untrained" is a score of row 2's probe.
    assert [cell.mean is not None for cell in cells] == [True, True, *[False] * 5, False, True]
    assert cells[3].reason == "not run"


def test_a_failed_stage_is_named_and_the_others_go_on(
    config: ReproduceConfig, jobs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, row = plan_table(config), of_row(config, 2)
    broken = row["pretrain_mim"]
    jobs.fails = lambda stage: stage.name == broken
    lost = jobs.run(plan)
    printed = capsys.readouterr()
    assert lost == dict.fromkeys(
        (broken, row["probe_linear"], row["finetune_classifier"]), f"{broken} failed"
    )
    assert "the reason why" in printed.err
    assert f"{broken}.log" in printed.err
    # All rows but this one and the probe's baseline, which is read off it.
    result = collect(plan, lost)
    measured = [row["probe"].mean is not None for row in result.cells.values()]
    assert measured == [True, False, False, *[True] * 5, False]
    assert f"{broken} failed" in markdown(result)
    jobs.fails = lambda stage: False
    assert jobs.run(plan) == {}
    assert set(jobs.ran) == set(lost)


def test_the_job_ends_with_status_1_after_a_failure_and_shows_the_table_all_the_same(
    config: ReproduceConfig, jobs: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs.fails = lambda stage: stage.job == "finetune_classifier"
    monkeypatch.setattr("jobs.stages.runner.run_here", jobs)
    with pytest.raises(SystemExit) as ended:
        reproduce_table(config)
    assert ended.value.code == 1
    assert "Table 5" in capsys.readouterr().out
    jobs.fails = lambda stage: False
    reproduce_table(config)
    table = json.loads(Path(config.output, "table-5-tiny.json").read_text())
    assert [row["metrics"]["finetune"]["mean"] for row in table["rows"]][:2] == [50.0, 50.0]


def test_a_run_with_other_settings_in_the_place_of_a_stage_is_refused(
    config: ReproduceConfig, jobs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_table(replace(config, rows="2"))
    jobs.run(plan)
    backbone = next(stage for stage in plan.stages if stage.job == "pretrain_mim")
    for layer, refused in ((9, False), (5, True)):
        settings = {"epochs": 4, "mim": {"patch_aggregation": {"layer": layer}}}
        run = {"config": {**settings, "lanes": 64, "a_setting_of_the_past": False}}
        storage.put(storage.join(backbone.output, "run.json"), json.dumps(run).encode())
        assert (backbone.name in jobs.run(plan)) == refused
    assert "patch_aggregation.layer: there 5, asked 9" in capsys.readouterr().err


def test_dry_run_prints_the_graph_and_writes_nothing(
    config: ReproduceConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    reproduce_table(replace(config, dry_run=True))
    printed = capsys.readouterr().out
    for name in names(config):
        assert f"{name}: would run; rows" in printed
    assert "python -m jobs.pretrain_mim --config" in printed
    assert "head_depth 1 has no counterpart at the scale tiny" in printed
    assert not Path(config.output).exists()


# ------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"table": 8}, "1 to 7"),
        ({"seeds": "0,0"}, "different"),
        ({"seeds": "a"}, "seeds is 'a'"),
        ({"rows": "99"}, "rows names 99"),
        ({"scale": "mnist"}, "no scale mnist"),
        ({"overrides": {"train": {}}}, "no stage"),
        ({"overrides": {"pretrain_mim": {"epoch": 1}}}, "epoch"),
        ({"train_source": "nowhere"}, "nowhere"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    config: ReproduceConfig, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        plan_table(replace(config, **wrong))
    assert not Path(config.output).exists()


def test_without_a_teacher_the_rows_that_need_one_are_dashes(config: ReproduceConfig) -> None:
    plan = plan_table(replace(config, teacher=None))
    assert [bool(row.measured_by) for row in plan.rows] == [*[False] * 7, True, False]
    assert "give --teacher" in plan.rows[0].reasons["probe"]


def test_lists_of_numbers_are_typed_with_commas() -> None:
    places = ["--train_source", "a", "--val_source", "b", "--output", "c", "--scale", "cifar10"]
    config = parse(ReproduceConfig, ["--table", "5", *places, "--rows", "3", "--seeds", "0,2"])
    assert (config.rows, config.seed_numbers) == ("3", (0, 2))
    assert parse(ReproduceConfig, ["--table", "5", *places, "--seeds", "4"]).seed_numbers == (4,)

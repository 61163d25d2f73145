"""The graph of a table's stages, their names, and what is printed; stand-ins write the artifacts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jobs.reproduce_table import ReproduceConfig, collect, plan_of, publish, reproduce_table, run_all
from jobs.run_pipeline import ClusterOverride, Stage
from jobs.stages.paper_tables import METRICS, TABLES
from jobs.stages.results import Cell, Reading, Result, judge, markdown, verdict_of, written_into
from jobs.stages.tables import HEADERS
from pipeline import storage
from pipeline.cluster.config import ClusterConfig
from pipeline.config import parse
from pipeline.errors import InputError
from shards.writer.prepare import PrepareConfig, prepare_images

IN_PROCESS = ClusterConfig(num_workers=0)
SCALE = """
stages:
  prepare_images: {}
  train_tokenizer: {overrides: {epochs: 3}}
  precompute_shards: {}
  pretrain_mim: {config: FOLDER/pretrain.yaml}
  probe_linear: {}
  finetune_classifier: {overrides: {epochs: 2}}
recipes:
  base_300: {}
teachers:
  clip: {teacher.name: timm:vit_base_patch16_224}
  hog: {teacher.name: hog}
teacher_from_file: true
translate:
  pretrain_mim:
    mim.patch_aggregation.head_depth: {"1": null}
controls:
  "5": [hog, untrained]
"""


class FakeStages:
    """Stands in for the jobs: real image shards, and headers with the numbers a test wants."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.fails: Callable[[Stage], bool] = lambda stage: False
        self.top1: Callable[[list[str]], float] = lambda argv: 0.5

    def __call__(self, stage: Stage, argv: list[str], on_line: Callable[[str], None]) -> int:
        self.ran.append(storage.name(stage.flags["output"]))
        on_line("something was printed")
        if self.fails(stage):
            on_line("the reason why")
            return 1
        for url in stage.reads:
            assert storage.exists(url), f"{stage.name} runs before {url} is there"
        output = stage.flags["output"]
        if stage.name == "prepare_images":
            prepare_images(PrepareConfig(source=stage.flags["source"], output=output, cluster=IN_PROCESS))
            return 0
        top1 = self.top1(argv)
        header: dict[str, Any] = {"files": {}}
        if stage.name == "train_tokenizer":
            header["metrics"] = {"reconstruction_loss": 0.25, "codebook_usage": 0.75, "perplexity": 3.0}
        if stage.name == "finetune_classifier":
            header["metrics"] = {"val_top1": top1}
        if stage.name == "probe_linear":
            scores = [("pretrained", top1), ("pretrained", 0.9), ("untrained", 0.125)]
            header["result"] = {
                "skipped": None,
                "scores": [{"model": m, "top1": x, "low": x - 0.02, "high": x + 0.02} for m, x in scores],
            }
        storage.put(stage.writes[0], json.dumps(header).encode())
        return 0


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the user has; in one place for all tests, so that equal settings are parsed once."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "pretrain.yaml").write_text("# a comment\nepochs: 4\n")
    (folder / "tiny.yaml").write_text(SCALE.replace("FOLDER", str(folder)))
    (folder / "teacher.safetensors").write_bytes(b"weights")
    for part, count in (("train", 3), ("val", 5)):
        for label, colour in (("cat", "red"), ("dog", "blue")):
            (folder / part / label).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8 + i), colour).save(folder / part / label / f"{i}.png")
    return folder


@pytest.fixture
def scale(given: Path) -> Path:
    return given / "tiny.yaml"


@pytest.fixture
def config(given: Path, tmp_path: Path) -> ReproduceConfig:
    return ReproduceConfig(
        table=5,
        scale=str(given / "tiny.yaml"),
        train_source=str(given / "train"),
        val_source=str(given / "val"),
        output=str(tmp_path / "runs"),
        teacher=str(given / "teacher.safetensors"),
    )


def names(config: ReproduceConfig) -> list[str]:
    return [node.name for node in plan_of(config).stages]


def of_row(config: ReproduceConfig, number: int) -> dict[str, str]:
    """Job -> folder of one row."""
    return {node.job: node.name for node in plan_of(config).rows[number - 1].stages if node.job}


def jobs_that_changed(before: ReproduceConfig, after: ReproduceConfig) -> set[str]:
    """Jobs of the first row of Tables 1 and 2 that have another name."""
    ours, theirs = (
        of_row(replace(config, table=1), 1) | of_row(replace(config, table=2), 1)
        for config in (before, after)
    )
    assert ours.keys() == theirs.keys()
    return {job for job in ours if ours[job] != theirs[job]}


AFTER_TOKENIZER = {"precompute_shards", "pretrain_mim", "probe_linear", "finetune_classifier"}
AFTER_PRETRAINING = {"probe_linear", "finetune_classifier"}

# ------------------------------------------------------------------------------------------------ graph


def test_stages_that_rows_share_run_once_and_never_again(config: ReproduceConfig) -> None:
    fake = FakeStages()
    plan = plan_of(config)
    assert run_all(plan, fake) == {}
    assert len(set(fake.ran)) == len(fake.ran)
    count = [name.split("-")[0] for name in fake.ran].count
    assert count("prepare_images") == 2
    # CLIP's stand-in and HOG; six rows can be run, "head of 1 block" cannot.
    assert (count("train_tokenizer"), count("precompute_shards")) == (2, 2)
    assert count("pretrain_mim") == count("probe_linear") == count("finetune_classifier") == 7
    fake.ran = []
    assert run_all(plan, fake) == {}
    assert fake.ran == []
    # Tables 1 and 2 need what is there already.
    for table in (1, 2):
        assert run_all(plan_of(replace(config, table=table)), fake) == {}
    assert fake.ran == []


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
    assert any(
        "--cluster.num_workers" in node.argv("x", other.cluster)
        for node in plan_of(replace(other, table=2)).stages
    )


def test_a_run_that_was_moved_is_taken_up(config: ReproduceConfig, tmp_path: Path) -> None:
    fake = FakeStages()
    config = replace(config, table=1)
    run_all(plan_of(config), fake)
    shutil.move(config.output, tmp_path / "moved")
    fake.ran = []
    run_all(plan_of(replace(config, output=str(tmp_path / "moved"))), fake)
    assert fake.ran == []


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


def test_contents_count_and_comments_do_not(config: ReproduceConfig, scale: Path, tmp_path: Path) -> None:
    config = replace(config, table=2)
    before = names(config)
    (scale.parent / "other.yaml").write_text("epochs: 4\n\n# another comment\n")
    other = tmp_path / "other_scale.yaml"
    other.write_text(scale.read_text().replace("pretrain.yaml", "other.yaml"))
    assert names(replace(config, scale=str(other))) == before
    (tmp_path / "heavier.safetensors").write_bytes(b"other weights")
    heavier = replace(config, teacher=str(tmp_path / "heavier.safetensors"))
    assert jobs_that_changed(config, heavier) == {"train_tokenizer"} | AFTER_TOKENIZER
    (tmp_path / "ids.txt").write_text("1\n2\n")
    assert jobs_that_changed(config, replace(config, finetune_ids=str(tmp_path / "ids.txt"))) == {
        "finetune_classifier"
    }


def test_other_images_change_everything(config: ReproduceConfig, tmp_path: Path) -> None:
    more = tmp_path / "more"
    shutil.copytree(config.train_source, more)
    first = next(more.rglob("*.*"))
    shutil.copy(first, first.with_name(f"again{first.suffix}"))
    config = replace(config, table=2)
    shared = set(names(config)) & set(names(replace(config, train_source=str(more))))
    assert [name.split("-")[0] for name in shared] == ["prepare_images"]  # val's


def test_every_seed_has_trainings_of_its_own_from_the_same_images(config: ReproduceConfig) -> None:
    config = replace(config, table=2)
    three = plan_of(replace(config, seeds="0,1,2"))
    count = [node.job for node in three.stages].count
    assert count("prepare_images") == 2
    assert {
        count(job) for job in ("train_tokenizer", "precompute_shards", "pretrain_mim", "probe_linear")
    } == {3}
    seeds = {
        word
        for node in three.stages
        for word in node.argv("x", ClusterOverride())
        if word.startswith("--seed=")
    }
    assert seeds == {"--seed=0", "--seed=1", "--seed=2"}
    assert set(names(config)) <= {node.name for node in three.stages}


def test_only_the_rows_asked_for_are_run_and_the_others_show_what_is_there(config: ReproduceConfig) -> None:
    fake = FakeStages()
    for rows in ("1", "2"):
        plan = plan_of(replace(config, rows=rows))
        run_all(plan, fake)
    shown = [line.cells["probe"].mean is not None for line in collect(plan, {}).lines]
    # "untrained" is a score of row 2's probe.
    assert shown == [True, True, *[False] * 5, False, True]
    assert collect(plan, {}).lines[3].cells["probe"].reason == "not run"


# ------------------------------------------------------------------------------------------------ running


def test_a_failed_stage_is_named_and_the_others_go_on(
    config: ReproduceConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeStages()
    plan = plan_of(config)
    broken = of_row(config, 2)["pretrain_mim"]
    fake.fails = lambda stage: storage.name(stage.flags["output"]) == broken
    lost = run_all(plan, fake)
    said = capsys.readouterr()
    assert set(lost) == {broken, of_row(config, 2)["probe_linear"], of_row(config, 2)["finetune_classifier"]}
    assert set(lost.values()) == {f"{broken} failed"}
    assert "the reason why" in said.err
    assert f"{broken}.log" in said.err
    # All rows but this one and the probe's baseline, which is read off it.
    cells = [line.cells["probe"] for line in collect(plan, lost).lines]
    assert [cell.mean is not None for cell in cells] == [True, False, False, *[True] * 5, False]
    assert f"{broken} failed" in markdown(collect(plan, lost))
    fake.fails, fake.ran = lambda stage: False, []
    assert run_all(plan, fake) == {}
    assert set(fake.ran) == set(lost)


def test_the_job_ends_with_status_1_after_a_failure_and_shows_the_table_all_the_same(
    config: ReproduceConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeStages()
    fake.fails = lambda stage: stage.name == "finetune_classifier"
    monkeypatch.setattr("jobs.run_pipeline.run_here", fake)
    with pytest.raises(SystemExit) as ended:
        reproduce_table(config)
    assert ended.value.code == 1
    assert "Table 5" in capsys.readouterr().out
    fake.fails = lambda stage: False
    reproduce_table(config)
    held = json.loads(Path(config.output, "table-5-tiny.json").read_text())
    assert [row["metrics"]["finetune"]["mean"] for row in held["rows"]][:2] == [50.0, 50.0]


def test_a_run_with_other_settings_in_the_place_of_a_stage_is_refused(
    config: ReproduceConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeStages()
    plan = plan_of(replace(config, rows="2"))
    run_all(plan, fake)
    backbone = next(node for node in plan.stages if node.job == "pretrain_mim")
    claimed = {"config": {"epochs": 4, "mim": {"patch_aggregation": {"layer": 9}}, "lanes": 64}}
    storage.put(storage.join(backbone.place(plan.output), "run.json"), json.dumps(claimed).encode())
    assert run_all(plan, fake) == {}
    claimed["config"]["mim"] = {"patch_aggregation": {"layer": 5}}
    storage.put(storage.join(backbone.place(plan.output), "run.json"), json.dumps(claimed).encode())
    assert backbone.name in run_all(plan, fake)
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


@pytest.mark.parametrize(
    ("wrong", "said"),
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
def test_what_is_wrong_is_said_before_anything_runs(
    config: ReproduceConfig, wrong: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        plan_of(replace(config, **wrong))
    assert not Path(config.output).exists()


def test_without_a_teacher_the_rows_that_need_one_are_dashes(config: ReproduceConfig) -> None:
    plan = plan_of(replace(config, teacher=None))
    run = [bool(row.nodes) for row in plan.rows]
    assert run == [*[False] * 7, True, False]
    assert "give --teacher" in plan.rows[0].reasons["probe"]


def test_lists_of_numbers_are_typed_with_commas() -> None:
    places = ["--train_source", "a", "--val_source", "b", "--output", "c", "--scale", "cifar10"]
    config = parse(ReproduceConfig, ["--table", "5", *places, "--rows", "3", "--seeds", "0,2"])
    assert (config.rows, config.seed_numbers) == ("3", (0, 2))
    assert parse(ReproduceConfig, ["--table", "5", *places, "--seeds", "4"]).seed_numbers == (4,)


# ------------------------------------------------------------------------------------------------ results


def result_of(config: ReproduceConfig, top1: Callable[[list[str]], float]) -> Result:
    fake = FakeStages()
    fake.top1 = top1
    plan = plan_of(config)
    assert run_all(plan, fake) == {}
    return collect(plan, {})


def test_numbers_come_from_the_artifacts(config: ReproduceConfig) -> None:
    result = result_of(config, lambda argv: 0.625)
    cells = result.lines[1].cells
    assert (cells["probe"].paper, cells["probe"].mean) == (80.1, 62.5)
    assert cells["probe"].half == pytest.approx(2.0)
    assert result.lines[-1].cells["probe"].mean == 12.5  # untrained
    # Ten images: the Wilson interval of 62.5 % is wide.
    assert cells["finetune"].half is not None and 20 < cells["finetune"].half < 50
    tokenizer = result_of(replace(config, table=4), lambda argv: 0.5).lines[0].cells
    assert (tokenizer["rec_loss"].mean, tokenizer["usage"].mean) == (0.25, 75.0)
    assert tokenizer["miou"].reason == "the scale tiny does not run finetune_segmentation"


def test_several_seeds_give_mean_and_spread(config: ReproduceConfig) -> None:
    def top1(argv: list[str]) -> float:
        return 0.4 + 0.1 * float(next(word for word in argv if word.startswith("--seed=")).split("=")[1])

    three = replace(config, table=2, seeds="0,1,2")
    fake = FakeStages()
    fake.top1 = lambda argv: top1(argv) if any(word.startswith("--seed=") for word in argv) else 0.0
    plan = plan_of(three)
    run_all(plan, fake)
    cell = collect(plan, {}).lines[0].cells["probe"]
    assert [reading.value for reading in cell.readings] == pytest.approx([40.0, 50.0, 60.0])
    assert (cell.mean, cell.spread) == (pytest.approx(50.0), pytest.approx(10.0))
    assert cell.half == pytest.approx(4.303 * 10 / 3**0.5)
    assert "50.0 ± 10.0" in markdown(collect(plan, {}))


@pytest.mark.parametrize(
    ("difference", "half", "verdict"),
    [
        (3.0, 2.0, "agrees"),
        (-3.0, 2.0, "disagrees"),
        (1.9, 2.0, "within the confidence interval"),
        (-1.9, 2.0, "within the confidence interval"),
        (0.1, None, "agrees"),
        (-0.1, None, "disagrees"),
    ],
)
def test_verdicts(difference: float, half: float | None, verdict: str) -> None:
    assert verdict_of(difference, half) == verdict


def test_orderings_follow_their_column(config: ReproduceConfig) -> None:
    """With aggregation the probe is far better, as in the paper; fine-tuning is worse, but on ten images."""

    def top1(argv: list[str]) -> float:
        without = of_row(config, 1)
        probed = any(without["pretrain_mim"] in word for word in argv)
        return (0.3 if probed else 0.6) if any("probe_linear" in word for word in argv) else 0.5

    judged = {
        (one.ordering.worse, one.metric): one
        for one in judge(result_of(config, top1))
        if one.ordering.better == TABLES[5].default
    }
    probe = judged["without patch aggregation", "probe"]
    assert probe.verdict == "agrees"
    assert probe.difference == pytest.approx(30.0)
    assert probe.half == pytest.approx(8**0.5)
    assert judged["without patch aggregation", "finetune"].verdict == "within the confidence interval"
    assert judged["HOG for a teacher", "probe"].ordering.said == "a control"
    assert judged["HOG for a teacher", "miou"].verdict == "–"


def test_the_document_says_what_its_numbers_are_of(config: ReproduceConfig) -> None:
    other = replace(config, table=2, overrides={"pretrain_mim": {"epochs": 1}})
    text = markdown(result_of(other, lambda argv: 0.5))
    assert "one seed leaves out the chance of training" in text
    assert '{"pretrain_mim": {"epochs": 1}}' in text
    assert "other settings" not in markdown(collect(plan_of(replace(config, table=2)), {}))


def test_a_lower_loss_is_better() -> None:
    table = TABLES[4]
    one, three = table.rows[0], table.rows[1]
    assert METRICS["rec_loss"].lower_is_better

    def line(row: Any, value: float) -> Any:
        from jobs.stages.results import Line

        cell = Cell(paper=None, readings=(Reading(value=value),))
        return Line(row=row, here={}, cells={"rec_loss": cell})

    rest = [line(row, 1.0) for row in table.rows[2:]]
    result = Result(
        table=table,
        scale="x",
        seeds=(0,),
        metrics=("rec_loss",),
        lines=(line(one, 0.3), line(three, 0.2), *rest),
    )
    [judged] = [found for found in judge(result) if found.ordering.worse == one.label]
    assert (judged.verdict, judged.difference) == ("agrees", pytest.approx(0.1))


# ------------------------------------------------------------------------------------------------ documents


def test_the_table_is_replaced_between_its_markers_and_nowhere_else(config: ReproduceConfig) -> None:
    first, second = (
        result_of(replace(config, output=f"{config.output}{x}"), lambda argv, x=x: x) for x in (0.25, 0.75)
    )
    document = "# Reproducing\n\nAbove.\n"
    once = written_into(document, first, "a.md")
    assert once.startswith(document.rstrip())
    assert "<!-- table 5, tiny: begin -->" in once and "25.0" in once
    below = f"{once}\nBelow.\n"
    assert written_into(below, first, "a.md") == below
    again = written_into(below, second, "a.md")
    assert "75.0" in again and "25.0" not in again
    assert again.startswith(document.rstrip()) and again.endswith("\nBelow.\n")
    other = replace(second, scale="other")
    both = written_into(again, other, "a.md")
    assert both.count("begin -->") == both.count("end -->") == 2
    assert written_into(both, second, "a.md") == both


@pytest.mark.parametrize("broken", ["<!-- table 5, tiny: begin -->", "<!-- table 5, tiny: end -->"])
def test_a_marker_alone_is_refused(config: ReproduceConfig, broken: str) -> None:
    result = collect(plan_of(config), {})
    with pytest.raises(InputError, match="once each"):
        written_into(f"text\n{broken}\n", result, "a.md")


def test_what_is_published_is_what_is_printed(
    config: ReproduceConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "reproduce.md"
    document.write_text("# Title\n")
    config = replace(config, write=str(document))
    plan = plan_of(config)
    run_all(plan, FakeStages())
    result = collect(plan, {})
    publish(plan, result)
    assert markdown(result) in document.read_text()
    assert markdown(result) in capsys.readouterr().out
    held = json.loads(Path(config.output, "table-5-tiny.json").read_text())
    assert len(held["rows"]) == len(result.lines)
    for row in held["rows"]:
        for stage in row["stages"]:
            assert stage.split("-")[0] in HEADERS
            assert Path(config.output, stage).is_dir()

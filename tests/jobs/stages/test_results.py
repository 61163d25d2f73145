"""Numbers read from artifacts, the orderings judged by them, and the document they are written into."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.reproduce_table import publish
from jobs.stages.naming import JOBS
from jobs.stages.paper_tables import Ordering, paper_tables
from jobs.stages.results import T_95, Cell, collect, judge, judge_column, markdown, written_into
from jobs.stages.rows import MAX_SEEDS, ReproduceConfig
from jobs.stages.tables import plan_table
from pipeline.errors import InputError

WITHOUT = "without patch aggregation"


def test_numbers_come_from_the_artifacts(config: ReproduceConfig, jobs: Any) -> None:
    jobs.top1 = lambda argv: 0.625
    *_, untrained = rows = list(jobs.result(config).cells.values())
    cells = rows[1]
    assert (cells["probe"].paper, cells["probe"].mean) == (80.1, 62.5)
    assert cells["probe"].half == pytest.approx(2.0)
    assert untrained["probe"].mean == 12.5
    # Ten images: the Wilson interval of 62.5 % is wide.
    assert cells["finetune"].half is not None and 20 < cells["finetune"].half < 50
    tokenizer = next(iter(jobs.result(replace(config, table=4)).cells.values()))
    assert (tokenizer["rec_loss"].mean, tokenizer["usage"].mean) == (0.25, 75.0)
    assert tokenizer["miou"].reason == "the scale tiny does not run finetune_segmentation"


def test_several_seeds_give_mean_and_spread(config: ReproduceConfig, jobs: Any) -> None:
    assert len(T_95) + 1 == MAX_SEEDS

    def top1(argv: Sequence[str]) -> float:
        return 0.4 + 0.1 * sum(float(word.split("=")[1]) for word in argv if word.startswith("--seed="))

    jobs.top1 = top1
    result = jobs.result(replace(config, table=2, seeds="0,1,2"))
    cell = next(iter(result.cells.values()))["probe"]
    assert list(cell.values) == pytest.approx([40.0, 50.0, 60.0])
    assert (cell.mean, cell.spread) == (pytest.approx(50.0), pytest.approx(10.0))
    assert cell.half == pytest.approx(4.303 * 10 / 3**0.5)
    assert "50.0 ± 10.0" in markdown(result)


# ------------------------------------------------------------------------------------------------ orderings


@pytest.mark.parametrize(
    ("metric", "better", "half", "verdict"),
    [
        ("probe", 53.0, 1.4, "agrees"),
        ("probe", 47.0, 1.4, "disagrees"),
        ("probe", 51.9, 1.4, "within the confidence interval"),
        ("probe", 48.1, 1.4, "within the confidence interval"),
        ("probe", 50.1, None, "agrees"),
        ("probe", 49.9, None, "disagrees"),
        ("rec_loss", 49.9, None, "agrees"),  # a lower loss is better
        ("rec_loss", 50.1, None, "disagrees"),
    ],
)
def test_an_ordering_is_judged_by_sign_and_interval(
    metric: str, better: float, half: float | None, verdict: str
) -> None:
    """The other row has 50.0; two half intervals of 1.4 make one of 2.0 for the difference."""
    cells = [Cell(values=(value,), half=half) for value in (better, 50.0)]
    ordering = Ordering(better="a", worse="b", metrics=(metric,), said="cells")
    judged = judge_column(ordering, metric, *cells)
    assert judged.verdict == verdict
    assert judged.difference == pytest.approx((better - 50) * (-1 if metric == "rec_loss" else 1))
    assert judge_column(ordering, metric, cells[0], Cell(paper=1.0)).verdict == "–"


def test_orderings_follow_their_column(config: ReproduceConfig, jobs: Any) -> None:
    """With aggregation the probe is far better, as in the paper; fine-tuning is worse, but on ten images."""
    [backbone] = [stage.name for stage in plan_table(config).rows[0].stages if stage.job == "pretrain_mim"]

    def top1(argv: Sequence[str]) -> float:
        if not any("probe_linear" in word for word in argv):
            return 0.5
        return 0.3 if any(backbone in word for word in argv) else 0.6

    jobs.top1 = top1
    default = paper_tables().table(5).default
    judged = {(j.worse, j.metric): j for j in judge(jobs.result(config)) if j.better == default}
    probe = judged[WITHOUT, "probe"]
    assert probe.verdict == "agrees"
    assert probe.difference == pytest.approx(30.0)
    assert probe.half_interval == pytest.approx(8**0.5)
    assert judged[WITHOUT, "finetune"].verdict == "within the confidence interval"
    assert judged["HOG for a teacher", "probe"].said == "a control"
    assert judged["HOG for a teacher", "miou"].verdict == "–"


# ------------------------------------------------------------------------------------------------ documents


def test_the_document_says_what_its_numbers_are_of(config: ReproduceConfig) -> None:
    plain = replace(config, table=2)
    other = replace(plain, overrides={"pretrain_mim": {"epochs": 1}})
    text = markdown(collect(plan_table(other), {}))
    assert "one seed leaves out the chance of training" in text
    assert '{"pretrain_mim": {"epochs": 1}}' in text
    assert "other settings" not in markdown(collect(plan_table(plain), {}))


def test_the_table_is_replaced_between_its_markers_and_nowhere_else(
    config: ReproduceConfig, jobs: Any
) -> None:
    jobs.top1 = lambda argv: 0.25
    first = jobs.result(config)
    jobs.top1 = lambda argv: 0.75
    second = jobs.result(replace(config, output=f"{config.output}2"))
    document = "# Reproducing\n\nAbove.\n"
    once = written_into(document, first, "a.md")
    assert once.startswith(document.rstrip())
    assert "<!-- table 5, tiny: begin -->" in once and "25.0" in once
    below = f"{once}\nBelow.\n"
    assert written_into(below, first, "a.md") == below
    again = written_into(below, second, "a.md")
    assert "75.0" in again and "25.0" not in again
    assert again.startswith(document.rstrip()) and again.endswith("\nBelow.\n")
    plan = replace(second.plan, config=replace(config, scale="other"))
    both = written_into(again, replace(second, plan=plan), "a.md")
    assert both.count("begin -->") == both.count("end -->") == 2
    assert written_into(both, second, "a.md") == both


@pytest.mark.parametrize("marker", ["<!-- table 5, tiny: begin -->", "<!-- table 5, tiny: end -->"])
def test_a_marker_alone_is_refused(config: ReproduceConfig, marker: str) -> None:
    result = collect(plan_table(config), {})
    with pytest.raises(InputError, match="once each"):
        written_into(f"text\n{marker}\n", result, "a.md")


def test_what_is_published_is_what_is_printed(
    config: ReproduceConfig, jobs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "reproduce.md"
    document.write_text("# Title\n")
    result = jobs.result(replace(config, write=str(document)))
    publish(result)
    assert markdown(result) in document.read_text()
    assert markdown(result) in capsys.readouterr().out
    table = json.loads(Path(config.output, "table-5-tiny.json").read_text())
    assert len(table["rows"]) == len(result.cells)
    for row in table["rows"]:
        for stage in row["stages"]:
            assert stage.split("-")[0] in JOBS
            assert Path(config.output, stage).is_dir()

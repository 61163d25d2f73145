"""The paper's numbers, and that every row of every table is a run that the jobs know."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from jobs.stages.paper_tables import Table, paper_tables, read_scale
from jobs.stages.rows import ADE20K, GIVEN, LeftOut, ReproduceConfig, RowPlanner
from jobs.stages.tables import topological

ROOT = Path(__file__).resolve().parents[3]
PAPER_TABLES = paper_tables()
TABLES = {table.number: table for table in PAPER_TABLES.tables}
EACH_TABLE = pytest.mark.parametrize("table", PAPER_TABLES.tables, ids=lambda table: f"table {table.number}")

PAPER = {
    (1, "finetune"): [85.0, 85.5, 86.5, 86.6, 87.3, 88.4],
    (1, "miou"): [52.7, 53.1, 53.5, None, 56.7, 57.5],
    (2, "probe"): [80.1],
    (3, "imagenet_a"): [54.4, 69.0],
    (3, "imagenet_r"): [61.0, 69.9],
    (3, "imagenet_sketch"): [45.6, 53.5],
    (4, "rec_loss"): [0.164, 0.145, None, None, None, None],
    (4, "usage"): [100.0, 95.0, None, None, None, None],
    (5, "finetune"): [None, 85.0, None, None, None, None, None],
    (5, "probe"): [None, 80.1, None, None, None, None, None],
    (6, "finetune"): [None, None, 84.4, None, None, 85.0],
    (6, "miou"): [None, None, 49.2, None, None, 52.7],
    (7, "finetune"): [86.5, None, 88.4, 89.0],
}


# ------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(("number", "metric"), list(PAPER))
def test_the_papers_numbers(number: int, metric: str) -> None:
    assert [row.paper.get(metric) for row in TABLES[number].rows] == PAPER[number, metric]


def test_no_number_stands_twice_with_two_values() -> None:
    """Tables 5 and 6 repeat the default model of Tables 1 and 2; Table 7 repeats the 21k rows of Table 1."""
    one, two, five, six, seven = (TABLES[number].rows for number in (1, 2, 5, 6, 7))
    assert not any(row.paper for row in PAPER_TABLES.controls.values())
    assert five[1].paper == {**one[0].paper, **two[0].paper}
    assert six[-1].paper == one[0].paper
    assert [seven[0].paper["finetune"], seven[2].paper["finetune"]] == [
        one[2].paper["finetune"],
        one[5].paper["finetune"],
    ]


# ------------------------------------------------------------------------------------------------ shape


@EACH_TABLE
def test_rows_and_orderings_name_what_is_there(table: Table) -> None:
    labels = [row.label for row in table.rows]
    assert len(set(labels)) == len(labels)
    assert table.default in labels
    assert set(table.metrics) <= set(PAPER_TABLES.metrics)
    for row in table.rows:
        assert set(row.paper) <= set(table.metrics), row.label
    for ordering in table.orderings:
        assert ordering.better != ordering.worse
        assert {ordering.better, ordering.worse} <= set(labels)
        assert set(ordering.metrics) <= set(table.metrics)


@EACH_TABLE
def test_an_ordering_is_that_of_the_cells_where_they_are_known(table: Table) -> None:
    for ordering in table.orderings:
        for metric in ordering.metrics:
            better, worse = (
                table.row(label).paper.get(metric) for label in (ordering.better, ordering.worse)
            )
            if better is not None and worse is not None:
                lower = PAPER_TABLES.metrics[metric].lower_is_better
                assert better < worse if lower else better > worse, (ordering, metric)
            else:
                assert ordering.said != "cells", (ordering, metric)


def test_rows_of_an_ablation_differ_from_the_default_in_one_setting() -> None:
    """And the backbones of Table 4 are without patch aggregation."""
    for number, job in ((4, "train_tokenizer"), (5, "pretrain_mim")):
        table = TABLES[number]
        default = table.row(table.default).overrides[job]
        for row in table.rows:
            keys = row.overrides[job]
            assert sum(keys.get(key, value) != value for key, value in default.items()) <= 1, row.label
    for row in TABLES[4].rows:
        assert row.overrides["pretrain_mim"] == {"mim.patch_aggregation.layer": None}


# ------------------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Everything a table may ask for, with one file each."""
    folder = tmp_path_factory.mktemp("given")
    for name in (*GIVEN, *(f"ade20k/{place}" for place in ADE20K.values())):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "image.jpg").write_bytes(name.encode())
    return {name: str(folder / name) for name in GIVEN if name != "finetune_ids"} | {
        "teacher": str(folder / "teacher" / "image.jpg")
    }


def planner_at(scale: str, given: dict[str, Any]) -> RowPlanner:
    config = ReproduceConfig(table=1, scale=scale, output="runs", **given)
    return RowPlanner(config=config, scale=read_scale(scale))


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales and the files that they name are given relative to it."""
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", ["imagenet1k", "cifar10"])
@EACH_TABLE
def test_every_stage_of_every_row_parses_with_its_jobs_configuration(
    name: str, table: Table, given: dict[str, str]
) -> None:
    planner = planner_at(name, given)
    scale = planner.scale
    controls = [PAPER_TABLES.controls[control] for control in scale.controls.get(str(table.number), ())]
    rows = (*table.rows, *controls)
    assert len({row.label for row in rows}) == len(rows)
    left_out, stages = {}, []
    for row in rows:
        for metric in scale.metrics.get(str(table.number), table.metrics):
            try:
                stages.append(planner.measure(row, metric))
            except LeftOut as reason:
                left_out[row.label, metric] = str(reason)
    for stage in topological(stages):
        # Parsing is what refuses an unknown key; equal settings are parsed once.
        assert stage.resolved["output"] == "somewhere"
        for key, value in stage.settings.overrides.items():
            if not isinstance(value, dict):
                assert stage.resolved[key] == value, (stage.name, key)
    if name == "imagenet1k":
        # All that the paper measured is run, but for the teachers' and tokenizers' own segmentation.
        assert set(left_out.values()) <= {"finetune_segmentation starts from a backbone or from chance"}
        assert {label for label, _ in left_out} <= {row.label for row in TABLES[6].rows}
    else:
        # Every reason but that of the column names the scale.
        assert all(
            "cifar10" in reason or metric in ("finetune", "miou", "probe")
            for (_, metric), reason in left_out.items()
        )


def test_the_scales_values_replace_the_papers(given: dict[str, str]) -> None:
    planner = planner_at("cifar10", given)
    table = TABLES[5]
    assert planner.changed_settings(table.row(table.default)) == {
        "mim.patch_aggregation.layer": 4,
        "mim.patch_aggregation.head_depth": 1,
    }
    assert planner.changed_settings(table.rows[0]) == {}
    with pytest.raises(LeftOut, match="head_depth 1 has no counterpart"):
        planner.changed_settings(table.row("l = 9, head of 1 block, shared MIM head"))
    for earlier, later in pairwise((6, 9, 11)):
        rows = (table.row(f"l = {layer}, head of 2 blocks, shared MIM head") for layer in (earlier, later))
        ours = [planner.changed_settings(row)["mim.patch_aggregation.layer"] for row in rows]
        assert ours[0] < ours[1]


def test_what_is_not_given_is_named(given: dict[str, str]) -> None:
    for number, metric, option in (
        (1, "miou", "ade20k"), (3, "imagenet_r", "imagenet_r"), (7, "finetune", "imagenet21k")
    ):  # fmt: skip
        planner = planner_at("imagenet1k", {name: url for name, url in given.items() if name != option})
        with pytest.raises(LeftOut, match=f"needs .*: give --{option}"):
            planner.measure(TABLES[number].rows[0], metric)

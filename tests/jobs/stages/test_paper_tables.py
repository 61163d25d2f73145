"""The paper's numbers, and that every row of every table is a run that the jobs know."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from jobs.reproduce_table import read_scale
from jobs.stages.paper_tables import CONTROLS, METRICS, TABLES, Ordering, Row, Table
from jobs.stages.tables import BENCHMARKS, LeftOut, Planner, Sources, in_order, resolved

ROOT = Path(__file__).resolve().parents[3]
TABLE_LIST = [TABLES[number] for number in sorted(TABLES)]
ROWS = [(table, row) for table in TABLE_LIST for row in table.rows]

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


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Everything a table may ask for, with one file each."""
    tmp_path = tmp_path_factory.mktemp("sources")
    places = {}
    for name in ("train", "val", "imagenet21k", *BENCHMARKS):
        (tmp_path / name / "class").mkdir(parents=True)
        (tmp_path / name / "class" / "image.jpg").write_bytes(name.encode())
        places[name] = str(tmp_path / name)
    for folder in ("images/training", "images/validation", "annotations/training", "annotations/validation"):
        (tmp_path / "ade" / folder).mkdir(parents=True)
        (tmp_path / "ade" / folder / "one.png").write_bytes(folder.encode())
    (tmp_path / "teacher.safetensors").write_bytes(b"weights")
    benchmarks = {name: places.pop(name) for name in BENCHMARKS}
    teacher = str(tmp_path / "teacher.safetensors")
    return Sources(**places, ade20k=str(tmp_path / "ade"), benchmarks=benchmarks, teacher=teacher)


# ------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(("number", "metric"), list(PAPER))
def test_the_papers_numbers(number: int, metric: str) -> None:
    assert [row.paper.get(metric) for row in TABLES[number].rows] == PAPER[number, metric]


def test_no_number_stands_twice_with_two_values() -> None:
    """Tables 5 and 6 repeat the default model of Tables 1 and 2; Table 7 repeats the 21k rows of Table 1."""
    one, two, five, six, seven = (TABLES[number].rows for number in (1, 2, 5, 6, 7))
    assert five[1].paper == {**one[0].paper, **two[0].paper}
    assert six[-1].paper == one[0].paper
    assert [seven[0].paper["finetune"], seven[2].paper["finetune"]] == [
        one[2].paper["finetune"],
        one[5].paper["finetune"],
    ]


# ------------------------------------------------------------------------------------------------ shape


def test_there_are_seven_tables() -> None:
    assert sorted(TABLES) == list(range(1, 8))
    assert all(number == table.number for number, table in TABLES.items())


@pytest.mark.parametrize("table", TABLE_LIST, ids=lambda table: f"table {table.number}")
def test_rows_and_orderings_name_what_is_there(table: Table) -> None:
    labels = [row.label for row in table.rows]
    assert len(set(labels)) == len(labels)
    assert table.default in labels
    assert set(table.metrics) <= set(METRICS)
    for row in table.rows:
        assert set(row.paper) <= set(table.metrics), row.label
    for ordering in table.orderings:
        assert ordering.better != ordering.worse
        assert {ordering.better, ordering.worse} <= set(labels)
        assert set(ordering.metrics) <= set(table.metrics)


ORDERINGS = [
    (table, one, metric) for table in TABLE_LIST for one in table.orderings for metric in one.metrics
]


@pytest.mark.parametrize(("table", "ordering", "metric"), ORDERINGS)
def test_an_ordering_is_that_of_the_cells_where_they_are_known(
    table: Table, ordering: Ordering, metric: str
) -> None:
    better = table.row(ordering.better).paper.get(metric)
    worse = table.row(ordering.worse).paper.get(metric)
    if ordering.said == "cells":
        assert better is not None
        assert worse is not None
    if better is not None and worse is not None:
        assert better < worse if METRICS[metric].lower_is_better else better > worse


def test_table_4_is_without_patch_aggregation() -> None:
    for row in TABLES[4].rows:
        assert row.overrides["pretrain_mim"] == {"mim.patch_aggregation.layer": None}


def test_rows_of_an_ablation_differ_from_the_default_in_one_setting() -> None:
    for number, job in ((4, "train_tokenizer"), (5, "pretrain_mim")):
        table = TABLES[number]
        default = table.row(table.default).overrides[job]
        for row in table.rows:
            keys = row.overrides[job]
            changed = {key for key in default if key in keys and keys[key] != default[key]}
            small = keys.get("model.encoder") == "small"
            assert len(changed) <= 1 or small, row.label


# ------------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize("scale", ["imagenet1k", "cifar10"])
@pytest.mark.parametrize("table", TABLE_LIST, ids=lambda table: f"table {table.number}")
def test_every_stage_of_every_row_parses_with_its_jobs_configuration(
    scale: str, table: Table, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    known = read_scale(scale)
    planner = Planner(scale, known, sources)
    controls = [CONTROLS[name] for name in known.controls.get(str(table.number), ())]
    left_out = {}
    nodes = []
    for row in (*table.rows, *controls):
        for metric in known.metrics.get(str(table.number), table.metrics):
            try:
                nodes.append(planner.measure(row, metric))
            except LeftOut as reason:
                left_out[row.label, metric] = str(reason)
    for node in in_order(nodes):
        # Parsing is what refuses an unknown key; equal settings are parsed once.
        assert resolved(node)["output"] == "somewhere"
        for key, value in node.settings.overrides.items():
            if not isinstance(value, dict):
                assert resolved(node)[key] == value, (node.name, key)
    if scale == "imagenet1k":
        # All that the paper measured is run, but for the teachers' and tokenizers' own segmentation.
        assert set(left_out.values()) <= {"finetune_segmentation starts from a backbone or from chance"}
        assert {label for label, _ in left_out} <= {row.label for row in TABLES[6].rows}
    else:
        # Every reason but that of the column names the scale.
        assert all(
            "cifar10" in reason or metric in ("finetune", "miou", "probe")
            for (_, metric), reason in left_out.items()
        )


def test_the_scales_values_replace_the_papers(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    planner = Planner("cifar10", read_scale("cifar10"), sources)
    table = TABLES[5]
    assert planner.here(table.row(table.default)) == {
        "mim.patch_aggregation.layer": 4,
        "mim.patch_aggregation.head_depth": 1,
    }
    assert planner.here(table.rows[0]) == {}
    [one_block] = [row for row in table.rows if "head of 1 block," in row.label]
    with pytest.raises(LeftOut, match="head_depth 1 has no counterpart"):
        planner.here(one_block)
    layers = [
        planner.here(row)["mim.patch_aggregation.layer"]
        for row in sorted(
            (row for row in table.rows if "head of 2 blocks, shared" in row.label),
            key=lambda row: row.overrides["pretrain_mim"]["mim.patch_aggregation.layer"],
        )
    ]
    assert all(earlier < later for earlier, later in pairwise(layers))


def test_controls_are_no_rows_of_the_paper() -> None:
    assert all(not row.paper for row in CONTROLS.values())
    assert len({row.label for row in CONTROLS.values()}) == len(CONTROLS)


@pytest.mark.parametrize("scale", ["imagenet1k", "cifar10"])
def test_labels_of_a_table_with_its_controls_are_told_apart(
    scale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    known = read_scale(scale)
    for number, names in known.controls.items():
        rows: list[Row] = [*TABLES[int(number)].rows, *(CONTROLS[name] for name in names)]
        assert len({row.label for row in rows}) == len(rows)
    assert set(known.metrics) <= {str(number) for number in TABLES}

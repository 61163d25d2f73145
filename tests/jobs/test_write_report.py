"""The report says what the artifacts say, shows what is there, and says of the rest that it is missing."""

from __future__ import annotations

import contextlib
import io
import json
import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from jobs.report.findings import ReportConfig, collect, summary_rows
from jobs.stages.pipeline import StageRecord, write_record
from jobs.write_report import write_report
from pipeline import artifacts
from pipeline.errors import InputError
from pretrain.model.artifacts import save_backbone
from pretrain.model.backbone import Backbone, BackboneConfig
from shards.dataset.codes import code_statistics, count_codes
from shards.dataset.dataset import open_dataset

RECORDED = Path(__file__).parents[1] / "recorded" / "data"
GAIN = {"of": "ours", "over": "theirs", "difference": 0.3, "low": 0.21, "high": 0.39, "verdict": "gain"}
INPUTS = ("images", "tokenizer", "shards", "backbone", "probe", "pipeline_summary")


def _probe(url: Path, **changes: Any) -> str:
    """The recorded probe with some of its results changed."""
    result = json.loads((RECORDED / "finished" / "probe.json").read_text())["header"]["result"]
    artifacts.publish(str(url), "probe", {}, {"kind": "probe", "result": {**result, **changes}, "table": ""})
    return str(url)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every input of a report: the recorded ones, the probe, and a record of a pipeline."""
    root = tmp_path_factory.mktemp("run")
    stage = StageRecord(settings="s", inputs="i", artifact="a", finished=True, seconds=12.5, steps=50)
    record = {"train_tokenizer": stage, "pretrain_mim": replace(stage, seconds=100.0, steps=400)}
    write_record(str(root), record, {"draw_images": "the images are your own"})
    folders = {"images": "prepared", "tokenizer": "tokenizer", "shards": "tokens", "backbone": "backbone"}
    return {
        **{name: str(RECORDED / folder) for name, folder in folders.items()},
        "probe": _probe(root / "probe", comparisons=[GAIN]),
        "pipeline_summary": str(root / "pipeline.json"),
    }


def _config(run: dict[str, str], output: Path, inputs: tuple[str, ...] = INPUTS) -> ReportConfig:
    places = {name: run[name] for name in inputs}
    return ReportConfig(output=str(output / "report.html"), codes=6, predictions=3, **places)  # type: ignore[arg-type]


def _report(config: ReportConfig) -> tuple[str, str]:
    """The text of the page, and what was printed, both with single spaces."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        write_report(config)
    page = re.sub(r"<style>.*?</style>|<[^>]*>", " ", Path(config.output).read_text(), flags=re.DOTALL)
    return tuple(re.sub(r"\s+", " ", unescape(text)) for text in (page, printed.getvalue()))  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------ the whole


def test_the_page_is_self_contained_and_shows_every_part(run: dict[str, str], tmp_path: Path):
    config = _config(run, tmp_path)
    text, printed = _report(config)
    page = Path(config.output).read_text()
    assert not re.findall(r'(?:src|href|srcset|action|poster)\s*=\s*"(?!data:image/)', page)
    assert "url(" not in page and "@import" not in page and "<script" not in page and "<link" not in page
    assert "Not shown" not in text and "not shown" not in text
    assert page.count("<h2>") == 6 and page.count("<svg") >= 7
    assert page.count('alt="right or wrong"') == page.count('alt="guessed codes"') == 3
    assert page.count(", patch ") > 3 * 12, "patches of codes"
    for row in summary_rows(collect(config)):
        for cell in row:
            assert re.sub(r"\s+", " ", cell) in text and re.sub(r"\s+", " ", cell) in printed
    assert printed.endswith(f"report: {config.output} ")
    first = Path(config.output).read_bytes()
    _report(config)
    assert Path(config.output).read_bytes() == first, "a function of its inputs"


def test_page_and_table_tell_what_the_artifacts_say(run: dict[str, str], tmp_path: Path):
    text, printed = _report(_config(run, tmp_path))
    for figure in ("40 / 39 / 1", "truncated 1", "0.9050", "93.8 %", "30 of 32 codes", "20.4", "3.379",
                   "4.2 %", "3.357", "22.9 %", "80.0 % [49.0, 94.3]", "+30.0 points", "a gain",
                   "12.5 s", "400 steps", "1 min 40 s", "draw_images"):  # fmt: skip
        assert figure in text and figure in printed, figure
    statistics = code_statistics(count_codes(open_dataset(run["shards"])))
    used = f"{statistics.codebook_size - statistics.num_dead:,} of 32 codes occur"
    assert f"{used} ({100 * statistics.usage:.1f} %), perplexity {statistics.perplexity:,.1f}" in text
    assert "3 held-out images" in text
    text, _ = _report(_config(run, tmp_path, ("shards", "backbone")))
    assert "3 stored crops of the training set" in text and "Colours are arbitrary" in text


@pytest.mark.parametrize("name", INPUTS)
def test_any_part_may_be_missing_or_alone_and_is_named(run: dict[str, str], tmp_path: Path, name: str):
    others = tuple(other for other in INPUTS if other != name)
    for text in _report(_config(run, tmp_path, others)):
        assert f"no --{name} was given" in text
    config = _config(run, tmp_path, (name,))
    for text in _report(config):
        assert all(f"no --{other} was given" in text for other in others)
    assert any(value for _, _, value, _ in summary_rows(collect(config))), (
        "the part that is there has figures"
    )


# ------------------------------------------------------------------------------------------------ judgement


def test_a_gain_inside_the_interval_is_called_that(run: dict[str, str], tmp_path: Path):
    probe = _probe(tmp_path / "probe")
    for text in _report(replace(_config(run, tmp_path), probe=probe)):
        assert "inside the confidence interval: no gain is shown" in text and "a gain:" not in text


def test_a_skipped_probe_gives_its_reason(run: dict[str, str], tmp_path: Path):
    probe = _probe(tmp_path / "probe", skipped="none of the 40 training images has a label")
    for text in _report(replace(_config(run, tmp_path), probe=probe)):
        assert "none of the 40 training images has a label" in text and "points" not in text


def test_codes_of_another_tokenizer_are_not_held_against_the_backbone(run: dict[str, str], tmp_path: Path):
    other = str(RECORDED / "tokenizer_2")
    text, _ = _report(replace(_config(run, tmp_path), tokenizer=other, shards=None))
    assert re.search(r"predicts codes of tokenizer 35358c1e, and these are codes of 9ad7dba8", text)
    assert "hidden codes guessed" not in text


def test_a_backbone_without_heads_or_figures_is_said_to_be_one(run: dict[str, str], tmp_path: Path):
    config = BackboneConfig(image_size=32, patch_size=8, width=16, depth=1, heads=2)
    save_backbone(str(tmp_path / "bare"), Backbone(config))
    text, _ = _report(replace(_config(run, tmp_path), backbone=str(tmp_path / "bare")))
    assert "holds no pretraining heads" in text and "it was not pretrained here" in text


# ------------------------------------------------------------------------------------------------ places


def test_an_older_report_is_replaced_and_anything_else_refused(run: dict[str, str], tmp_path: Path):
    config = _config(run, tmp_path, ("pipeline_summary",))
    assert _report(config) == _report(config)
    place = Path(config.output)
    place.write_text("<html>mine</html>")
    with pytest.raises(InputError, match="is no report"):
        write_report(config)
    assert place.read_text() == "<html>mine</html>"


def test_a_folder_gets_a_report_of_fixed_name(run: dict[str, str], tmp_path: Path):
    write_report(replace(_config(run, tmp_path, ("pipeline_summary",)), output=str(tmp_path / "here")))
    assert (tmp_path / "here" / "report.html").exists()


def test_an_absent_input_is_named_and_alone_an_error(run: dict[str, str], tmp_path: Path):
    nowhere = str(tmp_path / "nowhere")
    text, _ = _report(replace(_config(run, tmp_path, ("pipeline_summary",)), backbone=nowhere))
    assert f"no finished backbone at {nowhere}" in text
    with pytest.raises(InputError, match=r"nothing to report on.*nowhere"):
        write_report(ReportConfig(output=str(tmp_path / "new" / "r.html"), tokenizer=nowhere))
    assert not (tmp_path / "new").exists()


def test_values_out_of_range_are_named():
    with pytest.raises(InputError, match="--predictions"):
        ReportConfig(output="x", predictions=0)

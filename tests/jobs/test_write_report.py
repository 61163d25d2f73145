"""The report says what the artifacts say, shows what is there, and says of the rest that it is missing."""

from __future__ import annotations

import contextlib
import io
import json
import re
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
import torch
from PIL import Image

from jobs.report import drawing
from jobs.report.findings import ReportConfig, collect, summary_rows
from jobs.stages.pipeline import StageRecord, write_record
from jobs.write_report import write_report
from pipeline import artifacts
from pipeline.cluster.config import ClusterConfig
from pipeline.errors import InputError
from pretrain.evals.probe import ProbeResult, Score, compare, wilson_interval
from pretrain.model.artifacts import save_backbone
from pretrain.model.backbone import Backbone, BackboneConfig
from pretrain.model.mim import MIM, MIMConfig, PatchAggregationConfig
from shards.dataset.codes import code_statistics, count_codes
from shards.dataset.dataset import open_dataset
from shards.pixels.views import ViewPolicy
from shards.writer.prepare import PrepareConfig, prepare_images
from tokenizer.model.artifact import VisualTokenizer, save_tokenizer
from tokenizer.model.teacher import TeacherConfig, build_teacher
from tokenizer.model.vqkd import VQKD, VQKDConfig
from tokenizer.precompute.config import PrecomputeConfig
from tokenizer.precompute.run import precompute_shards

IN_PROCESS = ClusterConfig(num_workers=0)
SIZE, PATCH, CODES = 32, 8, 13
INPUTS = ("images", "tokenizer", "shards", "backbone", "probe", "pipeline_summary")


def _tokenizer(url: Path, seed: int) -> None:
    torch.manual_seed(seed)
    config = VQKDConfig(
        image_size=SIZE, patch_size=PATCH, width=16, depth=1, heads=2, decoder_depth=1, codebook_size=CODES,
        code_dim=4, kmeans_init=False,
    )  # fmt: skip
    teacher = build_teacher(TeacherConfig(name="hog"), SIZE, PATCH, torch.device("cpu"))
    figures = {"reconstruction_loss": 0.1234, "codebook_usage": 12 / 13, "perplexity": 7.77}
    save_tokenizer(str(url), VQKD(config, teacher.dim), teacher=teacher, metrics=figures, inputs={})
    lines = [
        {"step": i, "split": "train", "rec_loss": 1 / i, "emb_loss": 0.1, "loss": 1.0} for i in range(1, 60)
    ]
    lines.append(
        {"step": 59, "split": "epoch", "train_perplexity": 7.0, "val_perplexity": 6.5, "val_rec_loss": 0.2}
    )
    _metrics(url, lines)


def _backbone(url: Path, tokenizer: Path) -> None:
    torch.manual_seed(0)
    config = BackboneConfig(image_size=SIZE, patch_size=PATCH, width=16, depth=2, heads=2)
    model = MIM(config, MIMConfig(patch_aggregation=PatchAggregationConfig(layer=1, head_depth=1)), CODES)
    figures = {"loss": 2.345, "accuracy": 0.314, "loss_cls": 2.456, "accuracy_cls": 0.217}
    save_backbone(
        str(url),
        model,
        tokenizer=VisualTokenizer.load(str(tokenizer)).spec.to_json(),
        run={"metrics": figures},
    )
    _metrics(url, [{"step": i, "split": "train", **figures, "lr": 0.1, "grad_norm": 1.0} for i in range(5)])


def _metrics(url: Path, lines: list[dict[str, object]]) -> None:
    (url / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _probe(url: Path, ours: float, theirs: float, *, skipped: str | None = None) -> None:
    """A finished probe of 200 images, of which two classifiers hit the given shares."""
    num = 200
    correct = {"pretrained": torch.arange(num) < ours * num, "untrained": torch.arange(num) < theirs * num}
    scores = []
    for model, hits in correct.items():
        low, high = wilson_interval(int(hits.sum()), num)
        share = float(hits.double().mean())
        score = Score(
            model="pretrained", input="cls", top1=share, low=low, high=high, lr=0.1, holdout_top1=0.0
        )
        scores.append(replace(score, model=model))
    compared = compare(correct["pretrained"], correct["untrained"], of=scores[0].label, over=scores[1].label)
    result = ProbeResult(
        skipped=skipped, num_classes=3, num_train=900, num_val=num, largest_class=0.4, scores=tuple(scores),
        comparisons=(compared,),
    )  # fmt: skip
    artifacts.publish(str(url), "probe", {}, {"kind": "probe", "result": result.to_json(), "table": ""})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every input of a report, tiny, made by the code that makes the real ones."""
    root = tmp_path_factory.mktemp("run")
    for index in range(40):
        picture = drawing.draw(index, num_classes=3, image_size=48, seed=0)
        folder = root / "pictures" / str(picture.label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.pixels).save(folder / f"{index}.jpg")
    (root / "pictures" / "0" / "broken.jpg").write_bytes(b"no image")
    prepare_images(
        PrepareConfig(
            source=str(root / "pictures"), output=str(root / "images"), val_fraction=0.3, cluster=IN_PROCESS
        )
    )
    _tokenizer(root / "tokenizer", seed=0)
    precompute_shards(
        PrecomputeConfig(
            images=str(root / "images" / "train"), tokenizer=str(root / "tokenizer"),
            output=str(root / "shards"), views=ViewPolicy(image_size=SIZE, views_per_image=2),
            encoder_threads=1, cluster=IN_PROCESS,
        )
    )  # fmt: skip
    _backbone(root / "backbone", root / "tokenizer")
    _probe(root / "probe", 0.6, 0.3)
    stage = StageRecord(settings="s", inputs="i", artifact="a", finished=True, seconds=12.5, steps=50)
    record = {"train_tokenizer": stage, "pretrain_mim": replace(stage, seconds=100.0, steps=400)}
    write_record(str(root), record, {"draw_images": "the images are your own"})
    (root / "pipeline.json").rename(root / "pipeline_summary")
    return root


def _config(run: Path, output: Path, inputs: tuple[str, ...] = INPUTS) -> ReportConfig:
    places = {name: str(run / name) for name in inputs}
    return ReportConfig(output=str(output / "report.html"), codes=6, predictions=3, **places)  # type: ignore[arg-type]


def _report(config: ReportConfig) -> tuple[str, str]:
    """The text of the page, and what was printed, both with single spaces."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        write_report(config)
    page = re.sub(r"<style>.*?</style>|<[^>]*>", " ", Path(config.output).read_text(), flags=re.DOTALL)
    return tuple(re.sub(r"\s+", " ", unescape(text)) for text in (page, printed.getvalue()))  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------ the whole


def test_the_page_is_self_contained_and_shows_every_part(run: Path, tmp_path: Path):
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


def test_page_and_table_tell_what_the_artifacts_say(run: Path, tmp_path: Path):
    text, printed = _report(_config(run, tmp_path))
    for figure in ("41 / 40 / 1", "not_an_image 1", "0.1234", "92.3 %", "12 of 13 codes", "7.8", "2.345",
                   "31.4 %", "2.456", "21.7 %", "60.0 % [53.1, 66.5]", "+30.0 points", "a gain",
                   "12.5 s", "400 steps", "1 min 40 s", "draw_images"):  # fmt: skip
        assert figure in text and figure in printed, figure
    statistics = code_statistics(count_codes(open_dataset(str(run / "shards"))))
    used = f"{statistics.codebook_size - statistics.num_dead:,} of 13 codes occur"
    assert f"{used} ({100 * statistics.usage:.1f} %), perplexity {statistics.perplexity:,.1f}" in text
    assert "3 held-out images" in text
    text, _ = _report(_config(run, tmp_path, ("shards", "backbone")))
    assert "3 stored crops of the training set" in text and "Colours are arbitrary" in text


@pytest.mark.parametrize("name", INPUTS)
def test_any_part_may_be_missing_or_alone_and_the_rest_is_named(run: Path, tmp_path: Path, name: str):
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


def test_a_gain_inside_the_interval_is_called_that(run: Path, tmp_path: Path):
    _probe(tmp_path / "probe", 0.31, 0.30)
    for text in _report(replace(_config(run, tmp_path), probe=str(tmp_path / "probe"))):
        assert "inside the confidence interval: no gain is shown" in text and "a gain:" not in text


def test_a_skipped_probe_gives_its_reason(run: Path, tmp_path: Path):
    _probe(tmp_path / "probe", 0.5, 0.5, skipped="none of the 40 training images has a label")
    for text in _report(replace(_config(run, tmp_path), probe=str(tmp_path / "probe"))):
        assert "none of the 40 training images has a label" in text and "points" not in text


def test_codes_of_another_tokenizer_are_not_held_against_the_backbone(run: Path, tmp_path: Path):
    _tokenizer(tmp_path / "other", seed=1)
    text, _ = _report(replace(_config(run, tmp_path), tokenizer=str(tmp_path / "other"), shards=None))
    other, own = (
        VisualTokenizer.load(str(url)).artifact.fingerprint[:8]
        for url in (tmp_path / "other", run / "tokenizer")
    )
    assert f"predicts codes of tokenizer {own}, and these are codes of {other}" in text
    assert "hidden codes guessed" not in text


def test_a_backbone_without_heads_or_figures_is_said_to_be_one(run: Path, tmp_path: Path):
    config = BackboneConfig(image_size=SIZE, patch_size=PATCH, width=16, depth=1, heads=2)
    save_backbone(str(tmp_path / "bare"), Backbone(config))
    text, _ = _report(replace(_config(run, tmp_path), backbone=str(tmp_path / "bare")))
    assert "holds no pretraining heads" in text and "it was not pretrained here" in text


# ------------------------------------------------------------------------------------------------ places


def test_an_older_report_is_replaced_and_anything_else_refused(run: Path, tmp_path: Path):
    config = _config(run, tmp_path, ("pipeline_summary",))
    assert _report(config) == _report(config)
    place = Path(config.output)
    place.write_text("<html>mine</html>")
    with pytest.raises(InputError, match="is no report"):
        write_report(config)
    assert place.read_text() == "<html>mine</html>"


def test_a_folder_gets_a_report_of_fixed_name(run: Path, tmp_path: Path):
    write_report(replace(_config(run, tmp_path, ("pipeline_summary",)), output=str(tmp_path / "here")))
    assert (tmp_path / "here" / "report.html").exists()


def test_an_absent_input_is_named_and_alone_an_error(run: Path, tmp_path: Path):
    nowhere = str(tmp_path / "nowhere")
    text, _ = _report(replace(_config(run, tmp_path, ("pipeline_summary",)), backbone=nowhere))
    assert f"no finished backbone at {nowhere}" in text
    with pytest.raises(InputError, match=r"nothing to report on.*nowhere"):
        write_report(ReportConfig(output=str(tmp_path / "new" / "r.html"), tokenizer=nowhere))
    assert not (tmp_path / "new").exists()


def test_values_out_of_range_are_named():
    with pytest.raises(InputError, match="--predictions"):
        ReportConfig(output="x", predictions=0)

"""The report says what the artifacts say, shows what is there, and says of the rest that it is missing."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.report import drawing
from jobs.report.findings import ReportConfig, find, summary_rows
from jobs.stages.pipeline import StageRecord, write_record
from jobs.write_report import summary_table, write_report
from pipeline import artifacts
from pipeline.cluster.config import ClusterConfig
from pipeline.errors import InputError
from pretrain.evals.probe import ProbeResult, Score, compare, wilson_interval
from pretrain.model.artifacts import save_backbone
from pretrain.model.backbone import Backbone, BackboneConfig
from pretrain.model.mim import MIM, MIMConfig, PatchAggregationConfig
from shards.dataset.dataset import open_dataset
from shards.dataset.summary import code_statistics, count_codes
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


class _Page(HTMLParser):
    """Text, tags and what is loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.foreign: list[str] = []
        self.images: list[np.ndarray] = []
        self.tags: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            if key in ("src", "href", "xlink:href", "srcset", "poster", "action"):
                head, _, data = (value or "").partition(",")
                if head in ("data:image/jpeg;base64", "data:image/png;base64"):
                    self.images.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))))
                else:
                    self.foreign.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _read(url: str) -> tuple[_Page, str]:
    html = Path(url).read_text()
    page = _Page()
    page.feed(html)
    return page, re.sub(r"\s+", " ", " ".join(page.text))


# ------------------------------------------------------------------------------------------------ the whole


def test_the_page_is_self_contained_and_shows_every_part(run: Path, tmp_path: Path):
    page, text = _read(write_report(_config(run, tmp_path)))
    assert page.foreign == [] and "script" not in page.tags and "link" not in page.tags
    assert "url(" not in Path(tmp_path, "report.html").read_text()
    assert "Not shown" not in text and "not shown" not in text
    assert page.tags.count("h2") == 6 and page.tags.count("svg") >= 9
    assert len(page.images) > 3 * 5, "patches of codes, and five pictures for each of three images"
    for row in summary_rows(find(_config(run, tmp_path))):
        assert re.sub(r"\s+", " ", row.value) in text and row.name in text


def test_page_and_table_tell_what_the_artifacts_say(run: Path, tmp_path: Path):
    config = _config(run, tmp_path)
    _, text = _read(write_report(config))
    table = summary_table(config)
    for said in (text, table):
        flat = re.sub(r"\s+", " ", said)
        for figure in ("41 / 40 / 1", "not_an_image 1", "0.1234", "92.3 %", "12 of 13 codes", "7.8", "2.345",
                       "31.4 %", "2.456", "21.7 %", "60.0 % [53.1, 66.5]", "+30.0 points", "a gain",
                       "12.5 s", "400 steps", "1 min 40 s", "draw_images"):  # fmt: skip
            assert figure in flat, figure
    statistics = code_statistics(count_codes(open_dataset(str(run / "shards"))))
    used = statistics.codebook_size - statistics.num_dead
    assert (
        f"{used:,} of 13 codes occur ({100 * used / 13:.1f} %), perplexity {statistics.perplexity:,.1f}"
        in text
    )


def test_the_page_is_a_function_of_its_inputs(run: Path, tmp_path: Path):
    first = Path(write_report(_config(run, tmp_path))).read_bytes()
    assert Path(write_report(_config(run, tmp_path))).read_bytes() == first


@pytest.mark.parametrize("left_out", INPUTS)
def test_any_part_may_be_missing_and_is_said_to_be(run: Path, tmp_path: Path, left_out: str):
    config = _config(run, tmp_path, tuple(name for name in INPUTS if name != left_out))
    _, text = _read(write_report(config))
    assert f"no --{left_out} was given" in text and f"no --{left_out} was given" in summary_table(config)


@pytest.mark.parametrize("only", INPUTS)
def test_any_part_alone_makes_a_report(run: Path, tmp_path: Path, only: str):
    config = _config(run, tmp_path, (only,))
    _, text = _read(write_report(config))
    assert all(f"no --{name} was given" in text for name in INPUTS if name != only)
    values = [row.value for row in summary_rows(find(config)) if row.value]
    assert values, "the part that is there has figures"


# ------------------------------------------------------------------------------------------------ judgement


def test_a_gain_inside_the_interval_is_called_that(run: Path, tmp_path: Path):
    _probe(tmp_path / "probe", 0.31, 0.30)
    config = replace(_config(run, tmp_path), probe=str(tmp_path / "probe"))
    _, text = _read(write_report(config))
    for said in (text, summary_table(config)):
        assert "inside the confidence interval: no gain is shown" in said and "a gain:" not in said


def test_a_skipped_probe_gives_its_reason(run: Path, tmp_path: Path):
    _probe(tmp_path / "probe", 0.5, 0.5, skipped="none of the 40 training images has a label")
    config = replace(_config(run, tmp_path), probe=str(tmp_path / "probe"))
    _, text = _read(write_report(config))
    assert "none of the 40 training images has a label" in text and "points" not in summary_table(config)


def test_codes_of_another_tokenizer_are_not_held_against_the_backbone(run: Path, tmp_path: Path):
    _tokenizer(tmp_path / "other", seed=1)
    config = replace(_config(run, tmp_path), tokenizer=str(tmp_path / "other"), shards=None)
    _, text = _read(write_report(config))
    other = VisualTokenizer.load(str(tmp_path / "other")).artifact.fingerprint
    own = VisualTokenizer.load(str(run / "tokenizer")).artifact.fingerprint
    assert f"predicts codes of tokenizer {own[:8]}, and these are codes of {other[:8]}" in text
    assert "hidden codes guessed" not in text


def test_a_backbone_without_heads_or_figures_is_said_to_be_one(run: Path, tmp_path: Path):
    config = BackboneConfig(image_size=SIZE, patch_size=PATCH, width=16, depth=1, heads=2)
    save_backbone(str(tmp_path / "bare"), Backbone(config))
    _, text = _read(write_report(replace(_config(run, tmp_path), backbone=str(tmp_path / "bare"))))
    assert "holds no pretraining heads" in text and "it was not pretrained here" in text


def test_predictions_use_held_out_images_where_there_are_any(run: Path, tmp_path: Path):
    _, text = _read(write_report(_config(run, tmp_path)))
    assert "3 held-out images" in text
    _, text = _read(write_report(_config(run, tmp_path, ("shards", "backbone"))))
    assert "3 stored crops of the training set" in text and "Colours are arbitrary" in text


# ------------------------------------------------------------------------------------------------ places


def test_an_older_report_is_replaced_and_anything_else_refused(run: Path, tmp_path: Path):
    config = _config(run, tmp_path, ("pipeline_summary",))
    place = Path(write_report(config))
    assert place.read_bytes() == Path(write_report(config)).read_bytes()
    place.write_text("<html>mine</html>")
    with pytest.raises(InputError, match="is no report"):
        write_report(config)
    assert place.read_text() == "<html>mine</html>"


def test_a_folder_gets_a_report_of_fixed_name(run: Path, tmp_path: Path):
    config = replace(_config(run, tmp_path, ("pipeline_summary",)), output=str(tmp_path / "here"))
    assert write_report(config) == str(tmp_path / "here" / "report.html")


def test_nothing_to_report_on_is_an_error_that_names_what_was_looked_for(tmp_path: Path):
    with pytest.raises(InputError, match="nowhere"):
        write_report(ReportConfig(output=str(tmp_path / "r.html"), tokenizer=str(tmp_path / "nowhere")))
    assert list(tmp_path.iterdir()) == []


def test_an_absent_input_is_named_beside_those_that_are_there(run: Path, tmp_path: Path):
    config = replace(_config(run, tmp_path, ("pipeline_summary",)), backbone=str(tmp_path / "nowhere"))
    _, text = _read(write_report(config))
    assert f"no finished backbone at {tmp_path / 'nowhere'}" in text


def test_values_out_of_range_are_named():
    with pytest.raises(InputError, match="--predictions"):
        ReportConfig(output="x", predictions=0)

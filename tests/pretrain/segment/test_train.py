from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from pipeline import storage
from pipeline.cluster.config import ClusterConfig
from pipeline.config import parse
from pipeline.errors import InputError
from pipeline.training.checkpoints import CheckpointStore
from pipeline.training.metrics import read_metrics
from pipeline.training.step import NonFiniteLossError
from pipeline.training.worker import Worker
from pretrain.model.artifacts import save_backbone, save_classifier
from pretrain.model.backbone import Backbone, BackboneConfig
from pretrain.model.classifier import Classifier, ClassifierConfig
from pretrain.model.size import BackboneSize
from pretrain.segment import train as segmentation
from pretrain.segment.artifact import load_segmenter, read_segmentation_header
from pretrain.segment.config import PolyOptimConfig, SegmentationConfig, poly_schedule
from pretrain.segment.label_maps import CropPolicy, CropReader, list_pairs
from pretrain.segment.score import Score, confusion_matrix
from pretrain.segment.train import finetune_segmentation, predict
from pretrain.segment.upernet import SegmentationLoss, SegmenterOutput, UperNetConfig
from tests.pipeline.training.kills import asked_to_end, killed_at_save, waiting_for_checkpoints

ROOT = Path(__file__).resolve().parents[3]

Make = Callable[..., SegmentationConfig]


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bright boxes (label 2) on dark ground (label 1), framed by label 0; 8 images to train on, 4 for val."""
    root = tmp_path_factory.mktemp("shapes")
    for split, num in (("train", 8), ("val", 4)):
        for i in range(num):
            rng = np.random.default_rng([i, num])
            labels = np.ones((44, 60 - 4 * i), np.uint8)
            top, left = rng.integers(2, 14, 2)
            labels[top : top + 24, left : left + 18] = 2
            pixels = np.where(labels[..., None] == 2, (200, 160, 90), (40, 60, 80))
            pixels = pixels + rng.normal(0, 8, (*labels.shape, 3))
            labels[:1], labels[:, :1] = 0, 0
            for kind, array in (("images", pixels.clip(0, 255).astype(np.uint8)), ("labels", labels)):
                file = io.BytesIO()
                Image.fromarray(array).save(file, "PNG")
                storage.put(str(root / split / kind / f"{i}.png"), file.getvalue())
    return root


@pytest.fixture(scope="session")
def make_config(shapes: Path) -> Make:
    """`make_config(output, …)`: seconds of training."""

    def make(
        output: Path | str, *, backbone: str | None = None, peak_lr: float = 3e-3, **changes: Any
    ) -> SegmentationConfig:
        config = SegmentationConfig(
            train_images=str(shapes / "train" / "images"),
            train_labels=str(shapes / "train" / "labels"),
            val_images=str(shapes / "val" / "images"),
            val_labels=str(shapes / "val" / "labels"),
            num_classes=2,
            reduce_zero_label=True,
            class_names=("ground", "box"),
            output=str(output),
            backbone=backbone,
            init="scratch" if backbone is None else "backbone",
            scratch=BackboneSize(width=32, depth=3, heads=2),
            patch_size=8,
            drop_path=0.1,
            head=UperNetConfig(channels=16, auxiliary_channels=8),
            crops=CropPolicy(size=32, short_side=44, ratio_range=(0.7, 1.4)),
            optim=PolyOptimConfig(peak_lr=peak_lr, warmup_steps=3, layer_decay=0.9),
            steps=8,
            batch_size=4,
            num_pictures=2,
            log_every_steps=1,
            cluster=ClusterConfig(num_workers=0),
        )
        return dataclasses.replace(config, **changes)

    return make


@pytest.fixture(scope="session")
def run_url(make_config: Make, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished run of a few steps."""
    output = str(tmp_path_factory.mktemp("segmenter") / "out")
    finetune_segmentation(make_config(output))
    return output


def _weights(output: str | Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(Path(output) / "segmentation.safetensors")


def test_schedule_is_the_published_one() -> None:
    lr = poly_schedule(PolyOptimConfig(peak_lr=5e-5, warmup_steps=1500), 160_000)
    assert lr(0) == pytest.approx(5e-5 * 1e-6)
    assert lr(750) == pytest.approx(5e-5 * (1 - 750 / 160_000) * (0.5 + 0.5e-6))
    assert lr(1500) == pytest.approx(5e-5 * (1 - 1500 / 160_000))
    assert lr(80_000) == pytest.approx(2.5e-5)
    assert lr(159_999) == pytest.approx(5e-5 / 160_000)
    bent = poly_schedule(PolyOptimConfig(peak_lr=1.0, min_lr=0.2, power=2.0, warmup_steps=0), 10)
    assert bent(0) == 1.0 and bent(5) == pytest.approx(0.2 + 0.8 * 0.25)


# ------------------------------------------------------------------------------------------------ runs


def test_two_colours_are_learned(
    make_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tmp_path / "out", steps=40)
    score = finetune_segmentation(config)
    printed = capsys.readouterr().out.splitlines()
    assert score.miou > 0.9 and printed[-1] == f"mIoU {score.miou:.4f}"
    assert any(line.startswith("box ") for line in printed)
    records = read_metrics(config.output)
    train = [r for r in records if r["split"] == "train"]
    assert [r["step"] for r in train] == list(range(1, 41))
    assert {"loss", "loss_auxiliary", "loss_total", "accuracy", "lr", "grad_norm"} <= train[0].keys()
    # An untrained model guesses between two classes; ignored pixels and margins count as zero loss.
    assert 0.3 < float(train[0]["loss"]) < 0.8
    losses = [float(r["loss_total"]) for r in train]
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
    [val] = [r for r in records if r["split"] == "val"]
    assert val["miou"] == score.miou
    pictures = sorted(path.name for path in (tmp_path / "out" / "pictures").iterdir())
    assert pictures == ["0.png", "3.png"]
    assert CheckpointStore(config.output).latest() is None

    # The published model gives the published score.
    model = load_segmenter(config.output)
    confusion = torch.zeros(2, 2, dtype=torch.int64)
    for i in range(4):
        image = np.asarray(Image.open(Path(config.val_images) / f"{i}.png"))
        labels = np.asarray(Image.open(Path(config.val_labels) / f"{i}.png"))
        found = predict(model, image, config.crops, config.stride, torch.float32)
        assert found.shape == labels.shape
        confusion += confusion_matrix(torch.from_numpy(labels.astype(np.int64) - 1), found, 2)
    assert Score.of(confusion.numpy(), 4) == score


@pytest.mark.parametrize("killed_at", [3, 8])
def test_killed_run_resumes_to_the_same_weights_and_curve(
    run_url: str, make_config: Make, tmp_path: Path, killed_at: int
) -> None:
    config = make_config(tmp_path / "out", checkpoint_every_s=0.0)
    with killed_at_save(killed_at):
        finetune_segmentation(config)
    finetune_segmentation(config)
    straight, resumed = _weights(run_url), _weights(tmp_path / "out")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert read_metrics(run_url) == read_metrics(config.output)


def test_interrupted_between_records_the_curve_is_the_same(make_config: Make, tmp_path: Path) -> None:
    straight = make_config(tmp_path / "straight", log_every_steps=4)
    finetune_segmentation(straight)
    config = make_config(tmp_path / "out", log_every_steps=4)
    with asked_to_end(6):
        finetune_segmentation(config)
    finetune_segmentation(config)
    assert read_metrics(straight.output) == read_metrics(config.output)
    assert [r["step"] for r in read_metrics(config.output)] == [4, 8, 8]


def test_evaluations_change_nothing_and_can_be_interrupted(
    run_url: str, make_config: Make, tmp_path: Path
) -> None:
    config = dataclasses.replace(make_config(tmp_path / "out"), evaluate_every_steps=4)
    # Asked after each of 8 steps and of 4 images at step 4; the 14th time is in the last evaluation.
    with asked_to_end(14):
        finetune_segmentation(config)
    assert not (tmp_path / "out" / "segmentation.json").exists()
    finetune_segmentation(config)
    straight, evaluated = _weights(run_url), _weights(config.output)
    assert all(torch.equal(straight[name], evaluated[name]) for name in straight)
    records = read_metrics(config.output)
    assert [r["step"] for r in records if r["split"] == "val"] == [4, 8]
    assert [r for r in records if (r["split"], r["step"]) != ("val", 4)] == read_metrics(run_url)


def test_finished_run_is_left_alone_and_another_is_refused(
    run_url: str, make_config: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (Path(run_url) / "segmentation.json").read_bytes()
    score = finetune_segmentation(make_config(run_url))
    printed = capsys.readouterr().out
    assert "nothing to do" in printed and printed.endswith(f"mIoU {score.miou:.4f}\n")
    with pytest.raises(InputError, match=r"config\.steps: there 8, asked 9"):
        finetune_segmentation(make_config(run_url, steps=9))
    assert (Path(run_url) / "segmentation.json").read_bytes() == before


def test_loss_that_is_not_finite_names_step_and_batch_and_keeps_the_last_checkpoint(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path / "out", log_every_steps=4, checkpoint_every_s=0.0, steps=12)
    loss_of, num_steps = segmentation.segmentation_loss, 0

    def poisoned(output: SegmenterOutput, classes: torch.Tensor, *, ignored: int) -> SegmentationLoss:
        nonlocal num_steps
        num_steps += 1
        loss = loss_of(output, classes, ignored=ignored)
        return dataclasses.replace(loss, decode=loss.decode * math.nan) if num_steps == 6 else loss

    monkeypatch.setattr(segmentation, "segmentation_loss", poisoned)
    reader = CropReader(
        list_pairs(config.train_images, config.train_labels),
        config.rules,
        config.crops,
        Worker(),
        fill=(0, 0, 0),
        batch_size=4,
        seed=config.seed,
        num_threads=1,
    )
    # Records come after steps 4 and 8; the sixth is the culprit.
    with (
        waiting_for_checkpoints(),
        pytest.raises(NonFiniteLossError, match=f"step 6, batch {', '.join(reader.keys(5))}"),
    ):
        finetune_segmentation(config)
    assert num_steps == 8
    found = CheckpointStore(config.output).latest()
    assert found is not None and found[0].step == 4
    assert all(bool(x.isfinite().all()) for x in found[1]["model"].values())
    assert not (tmp_path / "out" / "segmentation.json").exists()


def test_micro_batches_keep_the_objective(run_url: str, make_config: Make, tmp_path: Path) -> None:
    # Batch norm and dropout see other batches, so the first losses are only close.
    config = make_config(tmp_path / "out", micro_batch_size=2, steps=1)
    finetune_segmentation(config)
    whole, micro = read_metrics(run_url)[0], read_metrics(config.output)[0]
    assert float(micro["loss"]) == pytest.approx(float(whole["loss"]), rel=0.2)
    assert float(micro["loss"]) != float(whole["loss"])


# ------------------------------------------------------------------------------------------------ backbones


def test_backbone_weights_are_taken_over_with_tables_at_the_size_of_the_crop(
    make_config: Make, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    # Pretrained at 48 pixels, 6 x 6 patches; crops of 32 have 4 x 4.
    sizes = BackboneConfig(image_size=48, patch_size=8, width=32, depth=3, heads=2, mean=(0.1, 0.2, 0.3))
    backbone = Backbone(sizes)
    torch.nn.init.normal_(backbone.rel_pos_bias.relative_position_bias_table)
    url = str(tmp_path / "backbone")
    save_backbone(url, backbone)
    # Each layer moves a millionth of the one above: the head learns, and the backbone stays what it was.
    optim = PolyOptimConfig(peak_lr=1e-2, warmup_steps=0, layer_decay=1e-6)
    config = dataclasses.replace(make_config(tmp_path / "out", backbone=url, steps=2), optim=optim)
    finetune_segmentation(config)
    weights, pretrained = _weights(config.output), backbone.state_dict()
    assert float(weights["decode_head.conv_seg.bias"].abs().min()) > 1e-3
    for i in range(3):
        assert weights[f"backbone.blocks.{i}.attn.relative_position_bias_table"].shape == (7 * 7 + 3, 2)
        for name in ("attn.qkv.weight", "mlp.fc1.weight", "gamma_1"):
            key = f"blocks.{i}.{name}"
            torch.testing.assert_close(weights[f"backbone.{key}"], pretrained[key], atol=1e-6, rtol=0)
    shape = read_segmentation_header(config.output)["config"]["backbone"]["backbone"]
    assert shape["mean"] == [0.1, 0.2, 0.3]

    # The same shape with random weights, and a classifier that was fine-tuned before.
    scratch = dataclasses.replace(config, init="scratch", output=str(tmp_path / "scratch"))
    finetune_segmentation(scratch)
    ours = _weights(scratch.output)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in weights.items()}
    key = "backbone.blocks.1.attn.qkv.weight"
    assert not torch.allclose(ours[key], weights[key], atol=1e-3)
    classifier = Classifier(ClassifierConfig(backbone=sizes, num_classes=4, pooling="cls"))
    save_classifier(str(tmp_path / "classifier"), classifier, None)
    again = dataclasses.replace(config, backbone=str(tmp_path / "classifier"), output=str(tmp_path / "after"))
    finetune_segmentation(again)
    tuned = classifier.state_dict()[key.removeprefix("backbone.")]
    torch.testing.assert_close(_weights(again.output)[key], tuned, atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"init": "backbone", "backbone": None}, "--init scratch"),
        ({"class_names": ("one",)}, "1 class_names for num_classes 2"),
        ({"batch_size": 1}, "batch norm needs two"),
        ({"batch_size": 6, "micro_batch_size": 1}, "batch norm needs two"),
        ({"batch_size": 4, "cluster": ClusterConfig(num_workers=3)}, "does not divide by 3 workers"),
        ({"window_stride": 33}, "window_stride is 33"),
        ({"steps": 0}, "steps is 0; give 1 or more"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    make_config: Make, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        dataclasses.replace(make_config(tmp_path), **changes)  # type: ignore[arg-type]


def test_bad_input_is_one_line_and_nothing_is_written(make_config: Make, tmp_path: Path) -> None:
    config = make_config(tmp_path / "out")
    arguments = [
        *("--train_images", config.train_images, "--train_labels", config.train_labels),
        *("--val_images", config.val_images, "--val_labels", config.val_labels),
        *("--num_classes", "2", "--ignore_index", "255", "--init", "scratch", "--output", config.output),
        *("--crops.size", "32", "--patch_size", "8", "--cluster.num_workers", "0", "--scratch.size", "tiny"),
    ]
    for more, said in (
        (["--reduce_zero_label=false"], r"train/labels/0.png has label 2 in row"),
        (["--val_labels", str(tmp_path / "none")], "val/images/0.png has no label map"),
        (["--crops.size", "36"], "image_size 36 does not divide by patch_size 8"),
        (["--init=backbone", "--backbone", str(tmp_path)], "no finished backbone or classifier at"),
        (["--head.layers", "[1, 2, 3, 13]"], "four blocks of 1 to 12"),
    ):
        with pytest.raises(InputError) as raised:
            finetune_segmentation(parse(SegmentationConfig, [*arguments, "--reduce_zero_label", *more]))
        assert said in str(raised.value) and "\n" not in str(raised.value)
        assert not (tmp_path / "out").exists()


def test_camvid_config_parses() -> None:
    folders = [f"--{split}_{kind}=x" for split in ("train", "val") for kind in ("images", "labels")]
    path = ROOT / "jobs" / "configs" / "camvid" / "segment.yaml"
    config = parse(SegmentationConfig, ["--config", str(path), "--backbone=b", "--output=o", *folders])
    assert config.num_classes == 11 and config.ignore_index == 11 and config.crops.size == 224
    assert config.class_names is not None and math.prod(config.crops.resized(360, 480)) == 360 * 480

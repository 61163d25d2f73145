from __future__ import annotations

import dataclasses
import io
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.errors import InputError
from pipeline.training.checkpoints import CheckpointStore
from pipeline.training.interruption import InterruptedRunError
from pipeline.training.metrics import read_metrics
from pipeline.training.optim import OptimConfig
from pipeline.training.step import NonFiniteLossError
from pipeline.training.worker import Worker
from pretrain.finetune import train as finetune
from pretrain.finetune.augment import AugmentConfig, MixedBatch, RandAugment
from pretrain.finetune.labels import check_labels
from pretrain.finetune.start import from_backbone, from_scratch
from pretrain.finetune.train import Finetuning, finetune_classifier, sum_scores
from pretrain.model.artifacts import load_classifier
from pretrain.model.backbone import IMAGENET_MEAN
from pretrain.model.classifier import Classifier
from pretrain.model.size import BackboneSize
from shards.dataset.corpus import SubsetConfig
from shards.dataset.dataset import open_dataset
from tests.pipeline.training.kills import killed_at_save, waiting_for_checkpoints
from tests.pretrain.finetune.conftest import (
    NAMES,
    PLAIN,
    SIDE,
    Make,
    equal,
    goal_of,
    make_sample,
    pictures,
    weights_of,
    write_images,
)

# ------------------------------------------------------------------------------------------------ the run


def test_it_learns_eight_images_and_leaves_a_classifier(
    make_config: Make, train: str, tmp_path: Path
) -> None:
    output = str(tmp_path / "out")
    optim = OptimConfig(peak_lr=1e-2, min_lr=1e-5, warmup_epochs=1)
    finetune_classifier(
        make_config(output, augment=PLAIN, drop_path=0.0, optim=optim, val=train, epochs=12, batch_size=8)
    )
    records = read_metrics(output)
    losses = [float(r["loss"]) for r in records if r["split"] == "train"]
    assert losses[0] == pytest.approx(math.log(4), rel=0.05) and losses[-1] < 0.6 * losses[0]
    epochs = [r for r in records if r["split"] == "epoch"]
    assert [r["epoch"] for r in epochs] == list(range(1, 13))
    assert float(epochs[-1]["val_top1"]) == 1.0 == float(epochs[-1]["val_top5"])
    model, header = load_classifier(output)
    assert header["class_names"] == list(NAMES) and header["metrics"]["val_top1"] == 1.0
    # The best of the epochs is the first with the highest accuracy.
    assert header["metrics"]["epoch"] == next(r["epoch"] for r in epochs if float(r["val_top1"]) == 1.0)
    assert load_classifier(f"{output}/last")[1]["metrics"]["epoch"] == 12
    assert header["run"]["config"]["layer_decay"] == 0.9 and header["backbone"]["kind"] == "backbone"
    assert header["inputs"].keys() == {"train", "val", "backbone"}
    assert CheckpointStore(output).latest() is None
    assert model(model.normalize(pictures())).shape == (3, 4)


def test_a_frozen_list_of_the_training_images(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ids.txt").write_text("0\n1\n2\n3\n6\n")
    monkeypatch.chdir(tmp_path)  # a relative place is made absolute before any worker sees it
    config = make_config(tmp_path / "out", subset=SubsetConfig(ids="ids.txt"), epochs=1)
    finetune_classifier(config)
    assert "5 images of 4 classes" in capsys.readouterr().out
    header = load_classifier(str(tmp_path / "out"))[1]
    whole = open_dataset(config.train).fingerprint
    assert header["inputs"]["train"] not in ("", whole) and header["class_names"] == list(NAMES)
    with pytest.raises(InputError, match="another"):
        finetune_classifier(make_config(tmp_path / "out", epochs=1))


def test_all_augmentation_is_on_by_default_and_changes_the_run(
    make_config: Make, straight: str, tmp_path: Path
) -> None:
    first = float(read_metrics(straight)[0]["loss"])
    assert first == pytest.approx(math.log(4), rel=0.05)
    for name in ("rand_augment", "erase_prob", "mixup"):
        value = None if name == "rand_augment" else 0.0
        config = make_config(tmp_path / name, augment=AugmentConfig(**{name: value}))
        finetune_classifier(config)
        assert not equal(weights_of(tmp_path / name, "last"), weights_of(straight, "last"))


def test_killed_run_resumes_to_the_same_weights_and_curve(
    make_config: Make, straight: str, tmp_path: Path
) -> None:
    config = make_config(tmp_path / "out", checkpoint_every_s=0.0)
    with killed_at_save(3):
        finetune_classifier(config)
    assert not (tmp_path / "out" / "classifier.json").exists()
    finetune_classifier(config)
    for folder in ("", "last"):
        assert equal(weights_of(straight, folder), weights_of(tmp_path / "out", folder))
    assert read_metrics(straight) == read_metrics(str(tmp_path / "out"))


@pytest.mark.parametrize("during", ["step", "evaluation"])
def test_sigterm_saves_and_the_same_command_goes_on(
    make_config: Make, straight: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: str
) -> None:
    name = "sum_scores" if during == "evaluation" else "_augmented"
    real, calls = getattr(finetune, name), 0

    def ask_then(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(finetune, name, ask_then)
        with pytest.raises(InterruptedRunError):
            finetune_classifier(make_config(tmp_path / "out"))
    found = CheckpointStore(str(tmp_path / "out")).latest()
    assert found is not None and found[0].step == (4 if during == "evaluation" else 2)
    finetune_classifier(make_config(tmp_path / "out"))
    assert equal(weights_of(straight, "last"), weights_of(tmp_path / "out", "last"))
    assert read_metrics(straight) == read_metrics(str(tmp_path / "out"))


def test_micro_batches_and_threads_change_nothing(make_config: Make, tmp_path: Path) -> None:
    whole = make_config(tmp_path / "whole", drop_path=0.0, epochs=2)
    finetune_classifier(whole)
    finetune_classifier(
        dataclasses.replace(whole, output=str(tmp_path / "micro"), micro_batch_size=3, decode_threads=3)
    )
    ours, theirs = read_metrics(str(tmp_path / "whole")), read_metrics(str(tmp_path / "micro"))
    for one, other in zip(ours, theirs, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_not_a_number_ends_the_run_and_the_last_good_state_is_kept(
    make_config: Make, straight: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    augmented = finetune._augmented

    def poisoned(run: Any, start: Any, samples: Any, epoch: int, worker: Worker) -> MixedBatch:
        batch = augmented(run, start, samples, epoch, worker)
        if epoch == 1 and samples.position == 4:
            batch.pixels[1, 0, 0, 0] = math.nan
        return batch

    config = make_config(tmp_path / "out", checkpoint_every_s=0.0)
    with waiting_for_checkpoints(), monkeypatch.context() as patch:
        patch.setattr(finetune, "_augmented", poisoned)
        with pytest.raises(NonFiniteLossError, match=r"loss.* step 4, batch 000000000\d-00, ") as caught:
            finetune_classifier(config)
    assert "last checkpoint is kept" in str(caught.value)
    found = CheckpointStore(str(tmp_path / "out")).latest()
    assert found is not None and found[0].step == 3
    assert all(value.isfinite().all() for value in found[1]["model"].values())
    finetune_classifier(config)  # the picture was mended
    assert equal(weights_of(straight, "last"), weights_of(tmp_path / "out", "last"))


def test_without_val_the_last_epoch_is_the_result(make_config: Make, straight: str, tmp_path: Path) -> None:
    finetune_classifier(make_config(tmp_path / "out", val=None))
    # Evaluation draws nothing, so training is the same without it.
    assert equal(weights_of(tmp_path / "out"), weights_of(straight, "last"))
    assert "val_top1" not in load_classifier(str(tmp_path / "out"))[1]["metrics"]


# ------------------------------------------------------------------------------------------------ evaluation


@pytest.mark.parametrize(
    ("world_size", "batch_size", "micro"), [(1, 4, None), (3, 4, 2), (2, 64, 3), (5, 6, None)]
)
def test_every_image_is_counted_once_however_it_is_cut(
    make_config: Make, train: str, val: str, world_size: int, batch_size: int, micro: int | None
) -> None:
    config = make_config("unused", batch_size=batch_size, micro_batch_size=micro)
    dataset = open_dataset(val)
    run = Finetuning(config=config, labels=check_labels(open_dataset(train), dataset))
    assert config.backbone is not None
    model = from_backbone(config.backbone, goal_of())
    workers = [Worker(rank=rank, world_size=world_size) for rank in range(world_size)]
    sums = torch.stack([sum_scores(run, model, dataset, worker, lambda: None) for worker in workers]).sum(0)

    reader = finetune._val_reader(config, dataset, model, Worker())
    batches = list(reader.batches(0))
    pixels = torch.cat([torch.from_numpy(batch.pixels) for batch in batches])
    labels = torch.cat([torch.from_numpy(batch.labels) for batch in batches])
    assert labels.tolist() == [i % 4 for i in range(11)]
    assert isinstance(model.model, Classifier)
    with torch.no_grad():
        logits = model.model(model.model.normalize(pixels))
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
    top1 = sum(int(row.argmax()) == int(label) for row, label in zip(logits, labels, strict=True))
    assert sums.tolist() == pytest.approx([loss, top1, 11, 11], rel=1e-5)


def test_top5_counts_the_five_best_of_more_classes(make_config: Make, tmp_path: Path) -> None:
    names = [f"class-{i}" for i in range(9)]
    images = write_images(tmp_path / "nine", list(range(9)), names)
    dataset = open_dataset(images)
    config = make_config("unused", batch_size=2)
    run = Finetuning(config=config, labels=check_labels(dataset, dataset))
    assert config.backbone is not None
    start = from_backbone(config.backbone, goal_of(num_classes=9, class_names=tuple(names)))
    with torch.no_grad():  # every image gets the same ranking: classes 8, 7, …
        start.model.head.weight.zero_()
        start.model.head.bias.copy_(torch.arange(9.0))
    _, top1, top5, num = sum_scores(run, start, dataset, Worker(), lambda: None).tolist()
    assert (top1, top5, num) == (1, 5, 9)


def test_crops_of_large_models_show_the_whole_image(make_config: Make, val: str) -> None:
    """reference.md §6.1: 0.875 of the shorter side below 384 pixels, all of it from there."""
    dataset, shape = open_dataset(val), BackboneSize(width=8, depth=1, heads=1)
    for size, fraction in ((16, 0.875), (380, 0.875), (384, 1.0)):
        start = from_scratch(shape, goal_of(image_size=size), patch_size=size // 2)
        assert (
            finetune._val_reader(make_config("x"), dataset, start, Worker()).crops.center_fraction == fraction
        )
    reader = finetune._val_reader(make_config("x", center_fraction=0.5), dataset, start, Worker())
    assert reader.crops.center_fraction == 0.5 and reader.image_size == 384


def test_the_reader_augments_and_crops_as_it_is_told(make_config: Make, backbone: str, train: str) -> None:
    start, dataset = from_backbone(backbone, goal_of()), open_dataset(train)
    plain = make_config("x", augment=PLAIN)
    config = make_config("x", decode_threads=3)
    augment = RandAugment("rand-m9-mstd0.5-inc1", mean=IMAGENET_MEAN, seed=0)
    for epoch in (0, 3):
        batches = zip(
            finetune._train_reader(plain, dataset, start, Worker()).batches(epoch),
            finetune._train_reader(config, dataset, start, Worker()).batches(epoch),
            strict=True,
        )
        for crops, augmented in batches:
            assert crops.keys == augmented.keys and crops.pixels.shape == (4, SIDE, SIDE, 3)
            for crop, sample_id, found in zip(crops.pixels, crops.sample_ids, augmented.pixels, strict=True):
                assert np.array_equal(found, augment(crop, int(sample_id), epoch))

    whole = make_config("x", center_fraction=1.0)
    [batch] = finetune._val_reader(
        dataclasses.replace(whole, batch_size=8), dataset, start, Worker()
    ).batches(0)
    source = Image.open(io.BytesIO(make_sample(5, 1, 0).image)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    assert np.array_equal(batch.pixels[5], np.asarray(source))


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("labels", "val_labels", "val_names", "message"),
    [
        ([0, 1, 2, 3], [0, 7], None, r"label 7, but there are 4 classes"),
        ([0, None, 2, None], [0, 1], NAMES, r"2 of the 4 images of .*train have no label"),
        ([0, 1, 2, 3], [0, None], NAMES, r"1 of the 2 images of .*val have no label"),
        ([0, 1, 2, 3], [0, 1], ("ant", "emu"), r"'emu', which train lacks"),
        ([0, 0, 0, 0], [0, 0], ("ant",), r"one class"),
        ([0, 1, 2, 3], [], NAMES, r"val holds no images"),
        ([], [0, 1], NAMES, r"train holds no images"),
    ],
)
def test_images_that_cannot_be_learned_from_are_refused(
    make_config: Make,
    tmp_path: Path,
    labels: list[int | None],
    val_labels: list[int | None],
    val_names: tuple[str, ...] | None,
    message: str,
) -> None:
    names = ("ant",) if labels == [0, 0, 0, 0] else NAMES
    train = write_images(tmp_path / "train", labels, names)
    val = write_images(tmp_path / "val", val_labels, val_names)
    with pytest.raises(InputError, match=message) as caught:
        finetune_classifier(make_config(tmp_path / "out", train=train, val=val))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_val_may_number_the_same_classes_otherwise(make_config: Make, train: str, tmp_path: Path) -> None:
    """Class folders that val lacks shift the numbers of those that follow."""
    fewer = write_images(tmp_path / "val", [0, 1, 1], ("bee", "dog"))
    labels = check_labels(open_dataset(train), open_dataset(fewer))
    run = Finetuning(config=make_config("unused"), labels=labels)
    assert run.config.backbone is not None
    start = from_backbone(run.config.backbone, goal_of())
    with torch.no_grad():
        start.model.head.weight.zero_()
        start.model.head.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 1.0]))  # dog, always
    _, top1, _, num = sum_scores(run, start, open_dataset(fewer), Worker(), lambda: None).tolist()
    assert (top1, num) == (2, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": None}, "--backbone"),
        ({"init": "scratch"}, "--backbone"),
        ({"init": "tokenizer", "backbone": None}, "--tokenizer"),
        ({"tokenizer": "t"}, "--tokenizer"),
        ({"layer_decay": 0.0}, "layer_decay"),
        ({"center_fraction": 1.5}, "center_fraction"),
        ({"epochs": 0}, "epochs"),
        ({"backbone": "/no/such"}, "no finished backbone or classifier at /no/such"),
        ({"train": "/no/such"}, "/no/such"),
        ({"batch_size": 64}, "64"),
        ({"image_size": 18}, "18"),
        ({"init": "teacher", "backbone": None}, "hog has no weights"),
    ],
)
def test_bad_settings_write_nothing(
    make_config: Make, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        finetune_classifier(make_config(tmp_path / "out", **change))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()

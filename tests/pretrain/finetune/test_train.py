from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from pipeline.cluster.config import ClusterConfig
from pipeline.config import run_job
from pipeline.errors import InputError
from pipeline.training.checkpoints import CheckpointStore
from pipeline.training.interruption import InterruptedRunError
from pipeline.training.metrics import read_metrics
from pipeline.training.optim import OptimConfig
from pipeline.training.step import NonFiniteLossError
from pipeline.training.worker import Worker
from pretrain.finetune import train as finetune
from pretrain.finetune.augment import AugmentConfig, MixedBatch, RandAugment
from pretrain.finetune.config import FinetuneConfig
from pretrain.finetune.labels import check_labels
from pretrain.finetune.start import Goal, from_backbone, from_scratch, from_teacher, from_tokenizer
from pretrain.finetune.train import Finetuning, finetune_classifier, sum_scores
from pretrain.model.artifacts import load_classifier, save_backbone, save_classifier
from pretrain.model.backbone import IMAGENET_MEAN, Backbone, BackboneConfig, BackboneSize
from pretrain.model.classifier import Classifier
from shards.dataset.corpus import SubsetConfig
from shards.dataset.dataset import open_dataset
from shards.format.build import build_shard
from shards.format.plan import Plan
from shards.format.records import RejectedSample, StoredSample
from shards.pixels.decode import DecodeConfig, decode_image
from shards.pixels.views import ViewPolicy, encode_crop
from shards.writer.commit import commit, finish, pending, start
from tokenizer.model.artifact import load_vqkd, read_tokenizer, save_tokenizer
from tokenizer.model.teacher import TeacherConfig, build_teacher
from tokenizer.model.vqkd import VQKD, VQKDConfig, normalize_pixels

SIDE, PATCH = 16, 4
NAMES = ("ant", "bee", "cat", "dog")
SMALL = BackboneConfig(image_size=SIDE, patch_size=PATCH, width=32, depth=2, heads=2)
PLAIN = AugmentConfig(rand_augment=None, erase_prob=0.0, mixup=0.0, cutmix=0.0)
IN_PROCESS = ClusterConfig(num_workers=0)

Make = Callable[..., FinetuneConfig]


def write_images(
    root: Path, labels: Sequence[int | None], names: Sequence[str] | None = NAMES, seed: int = 0
) -> str:
    """A dataset with one image per label: red, green, blue or grey stripes.

    Without labels, its only image was rejected.
    """
    rejects = [] if labels else [RejectedSample(sample_id=0, source="0.jpg", reason="truncated", message="")]
    first_ids = (0, len(labels) or 1) if len(labels) < 8 else (0, 5, len(labels))
    class_names = None if names is None else tuple(names)
    inputs = {"source": f"{seed}-{list(labels)}"}
    plan = Plan(kind="images", inputs=inputs, first_ids=first_ids, views=1, class_names=class_names)
    start(str(root), plan)
    for item in pending(str(root), plan):
        samples = [_sample(i, labels[i], seed) for i in range(item.first_id, item.end_id) if labels]
        commit(str(root), plan, item, build_shard(samples, rejects, grid=None, codebook_size=None))
    finish(str(root), plan, lambda data: decode_image(data, DecodeConfig()))
    return str(root)


def _sample(sample_id: int, label: int | None, seed: int) -> StoredSample:
    rng = np.random.default_rng([seed, sample_id])
    y, x = np.mgrid[:20, :20]
    stripes = (y * (sample_id % 3) + x) // 3 % 2
    colour = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.5, 0.5, 0.5]])[(label or 0) % 4]
    pixels = 40 + (100 + 60 * stripes[..., None]) * colour + rng.normal(0, 8, (20, 20, 3))
    return StoredSample(
        sample_id=sample_id,
        view=0,
        image=encode_crop(np.clip(pixels, 0, 255).astype(np.uint8), 95),
        extension="jpg",
        source=f"{sample_id}.jpg",
        source_width=20,
        source_height=20,
        label=label,
    )


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> str:
    """8 images of 4 classes."""
    return write_images(tmp_path_factory.mktemp("data") / "train", [0, 1, 2, 3] * 2)


@pytest.fixture(scope="module")
def val(tmp_path_factory: pytest.TempPathFactory) -> str:
    """11 other images; the number divides by nothing."""
    return write_images(tmp_path_factory.mktemp("data") / "val", [i % 4 for i in range(11)], seed=1)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Fresh weights, but positions that are not zero."""
    torch.manual_seed(0)
    model = Backbone(SMALL)
    torch.nn.init.normal_(model.rel_pos_bias.relative_position_bias_table, std=0.5)
    url = str(tmp_path_factory.mktemp("backbone") / "out")
    save_backbone(url, model)
    return url


@pytest.fixture(scope="module")
def make_config(train: str, val: str, backbone: str) -> Make:
    """`make_config(output, …)`: a second of fine-tuning."""

    def make(output: Path | str, **changes: Any) -> FinetuneConfig:
        settings: dict[str, Any] = {
            "train": train,
            "val": val,
            "output": str(output),
            "backbone": backbone,
            "drop_path": 0.1,
            "layer_decay": 0.9,
            "views": ViewPolicy(scale=(0.7, 1.0), views_per_image=0),
            "optim": OptimConfig(peak_lr=3e-3, min_lr=1e-5, warmup_epochs=1, clip_grad_norm=1.0),
            "epochs": 3,
            "batch_size": 4,
            "decode_threads": 1,
            "log_every_steps": 1,
            "cluster": IN_PROCESS,
        }
        return FinetuneConfig(**{**settings, **changes})

    return make


@pytest.fixture(scope="module")
def straight(make_config: Make, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished run of three epochs with all augmentation."""
    output = str(tmp_path_factory.mktemp("straight") / "out")
    finetune_classifier(make_config(output))
    return output


def _goal(**changes: Any) -> Goal:
    settings: dict[str, Any] = {
        "num_classes": 4,
        "class_names": NAMES,
        "image_size": None,
        "pooling": "mean",
        "drop_path": 0.0,
        "head_init_scale": 1.0,
        "new_head": False,
    }
    return Goal(**{**settings, **changes})


def _weights(output: str | Path, folder: str = "") -> dict[str, Tensor]:
    return safetensors.torch.load_file(Path(output) / folder / "classifier.safetensors")


def _equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def _pictures(size: int = SIDE, num: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, 3, size, size), dtype=torch.uint8, generator=generator)


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
    assert model(model.normalize(_pictures())).shape == (3, 4)


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
        assert not _equal(_weights(tmp_path / name, "last"), _weights(straight, "last"))


class _Killed(BaseException):
    """Ends a run like a kill: nothing after it is executed."""


def test_killed_run_resumes_to_the_same_weights_and_curve(
    make_config: Make, straight: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path / "out", checkpoint_every_s=0.0)
    save, saves = CheckpointStore.save, []

    def save_and_die(self: CheckpointStore, state: object, tensors: dict[str, object], **how: object) -> None:
        save(self, state, tensors, **how)  # type: ignore[arg-type]
        self.wait()
        saves.append(state)
        if len(saves) == 3:
            raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "save", save_and_die)
        with pytest.raises(_Killed):
            finetune_classifier(config)
    assert not (tmp_path / "out" / "classifier.json").exists()
    finetune_classifier(config)
    for folder in ("", "last"):
        assert _equal(_weights(straight, folder), _weights(tmp_path / "out", folder))
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
    assert _equal(_weights(straight, "last"), _weights(tmp_path / "out", "last"))
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
    save = CheckpointStore.save
    with monkeypatch.context() as patch:
        # A process that ends waits for its checkpoint; here it is looked at before.
        patch.setattr(CheckpointStore, "save", lambda *args, **how: save(*args, **{**how, "wait": True}))
        patch.setattr(finetune, "_augmented", poisoned)
        with pytest.raises(NonFiniteLossError, match=r"loss.* step 4, batch 000000000\d-00, ") as caught:
            finetune_classifier(config)
    assert "last checkpoint is kept" in str(caught.value)
    found = CheckpointStore(str(tmp_path / "out")).latest()
    assert found is not None and found[0].step == 3
    assert all(value.isfinite().all() for value in found[1]["model"].values())
    finetune_classifier(config)  # the picture was mended
    assert _equal(_weights(straight, "last"), _weights(tmp_path / "out", "last"))


def test_finished_run_is_left_alone_and_another_is_refused(
    make_config: Make, straight: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (Path(straight) / "classifier.json").read_bytes()
    finetune_classifier(make_config(straight))
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"augment\.mixup: there 0\.8, asked 0\.5"):
        finetune_classifier(make_config(straight, augment=AugmentConfig(mixup=0.5)))
    assert (Path(straight) / "classifier.json").read_bytes() == before


def test_without_val_the_last_epoch_is_the_result(make_config: Make, straight: str, tmp_path: Path) -> None:
    finetune_classifier(make_config(tmp_path / "out", val=None))
    # Evaluation draws nothing, so training is the same without it.
    assert _equal(_weights(tmp_path / "out"), _weights(straight, "last"))
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
    model = from_backbone(config.backbone, _goal())
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
    start = from_backbone(config.backbone, _goal(num_classes=9, class_names=tuple(names)))
    with torch.no_grad():  # every image gets the same ranking: classes 8, 7, …
        start.model.head.weight.zero_()
        start.model.head.bias.copy_(torch.arange(9.0))
    _, top1, top5, num = sum_scores(run, start, dataset, Worker(), lambda: None).tolist()
    assert (top1, top5, num) == (1, 5, 9)


def test_crops_of_large_models_show_the_whole_image(make_config: Make, val: str) -> None:
    """reference.md §6.1: 0.875 of the shorter side below 384 pixels, all of it from there."""
    dataset, shape = open_dataset(val), BackboneSize(width=8, depth=1, heads=1)
    for size, fraction in ((16, 0.875), (380, 0.875), (384, 1.0)):
        start = from_scratch(shape, _goal(image_size=size), patch_size=size // 2)
        assert (
            finetune._val_reader(make_config("x"), dataset, start, Worker()).crops.center_fraction == fraction
        )
    reader = finetune._val_reader(make_config("x", center_fraction=0.5), dataset, start, Worker())
    assert reader.crops.center_fraction == 0.5 and reader.image_size == 384


def test_the_reader_augments_and_crops_as_it_is_told(make_config: Make, backbone: str, train: str) -> None:
    start, dataset = from_backbone(backbone, _goal()), open_dataset(train)
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
    source = Image.open(io.BytesIO(_sample(5, 1, 0).image)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    assert np.array_equal(batch.pixels[5], np.asarray(source))


# ------------------------------------------------------------------------------------------------ starts


def test_a_backbone_gives_its_blocks_and_one_table_each(backbone: str) -> None:
    held = safetensors.torch.load_file(Path(backbone) / "backbone.safetensors")
    state = from_backbone(backbone, _goal()).model.state_dict()
    table = held["rel_pos_bias.relative_position_bias_table"]
    for block in range(2):
        assert torch.equal(state[f"blocks.{block}.attn.relative_position_bias_table"], table)
    assert torch.equal(state["blocks.1.mlp.fc1.weight"], held["blocks.1.mlp.fc1.weight"])
    assert torch.equal(state["fc_norm.weight"], torch.ones(32)) and "norm.weight" not in state
    by_cls = from_backbone(backbone, _goal(pooling="cls")).model.state_dict()
    assert torch.equal(by_cls["norm.weight"], held["norm.weight"]) and "fc_norm.weight" not in by_cls


def test_another_resolution_resizes_the_tables(backbone: str) -> None:
    start = from_backbone(backbone, _goal(image_size=24, drop_path=0.3))
    assert start.image_size == 24
    table = start.model.state_dict()["blocks.0.attn.relative_position_bias_table"]
    assert table.shape == ((2 * 6 - 1) ** 2 + 3, 2)
    assert start.model(start.model.normalize(_pictures(24))).shape == (3, 4)
    assert isinstance(start.model, Classifier) and start.model.config.backbone.drop_path == 0.3
    with pytest.raises(InputError, match="does not divide by patch_size"):
        from_backbone(backbone, _goal(image_size=18))


def test_a_fresh_head_is_drawn_from_the_seed_and_scaled(backbone: str) -> None:
    def head(scale: float) -> Tensor:
        torch.manual_seed(5)
        return from_backbone(backbone, _goal(head_init_scale=scale)).model.state_dict()["head.weight"]

    assert torch.equal(head(1.0), head(1.0)) and torch.allclose(head(0.001), 0.001 * head(1.0))
    assert 0.015 < float(head(1.0).std()) < 0.025


def test_a_classifier_is_an_input_of_the_next_run(make_config: Make, straight: str, tmp_path: Path) -> None:
    """Intermediate fine-tuning: the head stays where the classes are the same, and is new elsewhere."""
    held = _weights(straight)
    kept = from_backbone(straight, _goal()).model.state_dict()
    assert _equal(kept, held)
    fresh = from_backbone(straight, _goal(new_head=True)).model.state_dict()
    other = from_backbone(straight, _goal(num_classes=3, class_names=NAMES[:3])).model.state_dict()
    for state in (fresh, other):
        assert not torch.equal(state["head.weight"][:3], held["head.weight"][:3])
        assert all(torch.equal(state[name], held[name]) for name in held if not name.startswith("head."))
    swapped = _goal(class_names=("bee", "ant", "cat", "dog"))
    with pytest.raises(InputError, match=r"'ant' where the training images have 'bee'.*--new_head true"):
        from_backbone(straight, swapped)
    assert from_backbone(straight, dataclasses.replace(swapped, new_head=True)).origin["kind"] == "classifier"

    three = write_images(tmp_path / "three", [0, 1, 2] * 3, NAMES[:3])
    config = make_config(tmp_path / "next", backbone=straight, train=three, val=three, epochs=1)
    finetune_classifier(config)
    assert load_classifier(config.output)[1]["inputs"].keys() == {"train", "val", "classifier"}


def test_chance_gives_a_plain_classifier(make_config: Make, tmp_path: Path) -> None:
    size = BackboneSize(width=32, depth=2, heads=2)
    torch.manual_seed(0)
    start = from_scratch(size, _goal(image_size=SIDE), patch_size=PATCH)
    assert start.image_size == SIDE and start.origin == {"kind": "scratch"}
    config = make_config(
        tmp_path / "out",
        init="scratch",
        backbone=None,
        scratch=size,
        patch_size=PATCH,
        image_size=SIDE,
        epochs=1,
    )
    finetune_classifier(config)
    assert load_classifier(config.output)[1]["inputs"].keys() == {"train", "val"}
    assert _equal(_shapes(_weights(config.output)), _shapes(start.model.state_dict()))


def _shapes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.tensor(value.shape) for name, value in state.items()}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = VQKDConfig(
        image_size=SIDE, patch_size=PATCH, width=32, depth=2, heads=2, decoder_depth=1,
        codebook_size=8, code_dim=4, kmeans_init=False,
    )  # fmt: skip
    torch.manual_seed(0)
    teacher = build_teacher(TeacherConfig(), SIDE, PATCH)
    url = str(tmp_path_factory.mktemp("tokenizer") / "out")
    metrics = {"codebook_usage": 1.0, "perplexity": 1.0, "reconstruction_loss": 1.0}
    save_tokenizer(url, VQKD(config, teacher.dim), teacher=teacher, metrics=metrics, inputs={})
    return url


def test_a_tokenizers_encoder_sees_what_it_saw(make_config: Make, tokenizer: str, tmp_path: Path) -> None:
    """Table 6: all tokens after its norm are those of VQ-KD, from the same pixels."""
    start = from_tokenizer(tokenizer, _goal())
    vqkd = load_vqkd(read_tokenizer(tokenizer))
    assert isinstance(start.model, Classifier)
    with torch.no_grad():
        found = start.model.eval().forward_tokens(start.model.normalize(_pictures()))[:, 1:]
        expected = vqkd.encoder(normalize_pixels(_pictures()))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    config = make_config(tmp_path / "out", init="tokenizer", backbone=None, tokenizer=tokenizer, epochs=1)
    finetune_classifier(config)
    model, header = load_classifier(config.output)
    assert model.config.absolute_positions and header["backbone"]["kind"] == "tokenizer"
    assert start.origin["fingerprint"] == header["inputs"]["tokenizer"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> TeacherConfig:
    import timm

    kwargs = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": 24, "depth": 2, "num_heads": 2}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **kwargs)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    return TeacherConfig(name="timm:vit_tiny_patch16_224", pretrained=str(path), model_kwargs=kwargs)


def test_a_teacher_is_fine_tuned_as_it_is(make_config: Make, teacher: TeacherConfig, tmp_path: Path) -> None:
    goal = _goal(image_size=SIDE, drop_path=0.2)
    start = from_teacher(teacher, goal, patch_size=PATCH)
    frozen = build_teacher(teacher, SIDE, PATCH)
    with torch.no_grad():
        logits = start.model.eval()(start.model.normalize(_pictures()))
        expected = start.model.head(frozen(_pictures()).mean(dim=1))
    torch.testing.assert_close(logits, expected)
    start.model.train()(start.model.normalize(_pictures())).sum().backward()
    assert all(p.grad is not None for p in start.model.parameters())  # as data parallelism needs
    assert sum(module.drop_prob or 0 for module in start.model.modules() if hasattr(module, "drop_prob")) > 0

    config = make_config(
        tmp_path / "out",
        init="teacher",
        backbone=None,
        teacher=teacher,
        patch_size=PATCH,
        image_size=SIDE,
        epochs=1,
    )
    finetune_classifier(config)
    weights = _weights(config.output)
    assert weights.keys() == start.model.state_dict().keys()
    assert not torch.equal(weights["body.model.pos_embed"], start.model.state_dict()["body.model.pos_embed"])
    with pytest.raises(InputError, match="holds no classifier"):
        load_classifier(config.output)


def test_a_clip_tower_is_fine_tuned_before_its_projection(shared_dir: Path, tmp_path: Path) -> None:
    import open_clip

    vision = {"image_size": 64, "layers": 2, "width": 64, "head_width": 64, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 16, "width": 32, "heads": 1, "layers": 1}
    described = {"embed_dim": 512, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "ViT-finetuned.json").write_text(json.dumps(described))
    open_clip.add_model_config(tmp_path / "ViT-finetuned.json")
    init = safetensors.torch.load_file(
        shared_dir / "reference" / "fixtures" / "vqkd_tiny_kmeans_init.safetensors"
    )
    prefix = "teacher_model."
    safetensors.torch.save_file(
        {name.removeprefix(prefix): t for name, t in init.items() if name.startswith(prefix)},
        tmp_path / "clip.safetensors",
    )
    clip = TeacherConfig(
        name="open_clip:ViT-finetuned", pretrained=str(tmp_path / "clip.safetensors"), force_quick_gelu=True
    )
    start = from_teacher(clip, _goal(image_size=64), patch_size=16)
    assert start.model.head.in_features == 64
    frozen = build_teacher(clip, 64, 16)
    pixels = start.model.normalize(_pictures(64))
    with torch.no_grad():
        projected = start.model.eval().body(pixels) @ frozen.body.visual.proj
        torch.testing.assert_close(projected, frozen(_pictures(64)), atol=1e-5, rtol=1e-5)
    start.model.train()(pixels).sum().backward()
    assert all(p.grad is not None for p in start.model.parameters())
    with pytest.raises(InputError, match="set drop_path to 0"):
        from_teacher(clip, _goal(image_size=64, drop_path=0.1), patch_size=16)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("labels", "val_labels", "val_names", "message"),
    [
        ([0, 1, 4, 0], [0, 1], NAMES, r"label 4, but there are 4 classes"),
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
    start = from_backbone(run.config.backbone, _goal())
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


def test_the_job_exits_with_2_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], train: str
) -> None:
    words = [
        "finetune",
        "--train",
        train,
        "--val",
        train,
        "--backbone",
        "/no/such",
        "--output",
        str(tmp_path / "out"),
    ]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
    monkeypatch.setattr("faulthandler.enable", lambda: None)  # wants a real stderr
    with pytest.raises(SystemExit) as ended:
        run_job(finetune_classifier, FinetuneConfig)
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_save_classifier_is_what_the_next_run_reads(tmp_path: Path) -> None:
    """An artifact made elsewhere (an imported checkpoint) without class names keeps its head."""
    torch.manual_seed(0)
    model = from_scratch(
        BackboneSize(width=32, depth=1, heads=2), _goal(image_size=SIDE), patch_size=PATCH
    ).model
    assert isinstance(model, Classifier)
    save_classifier(str(tmp_path / "imported"), model, None)
    assert _equal(from_backbone(str(tmp_path / "imported"), _goal()).model.state_dict(), model.state_dict())

"""Clean against shifted images: as a slow loop with Pillow counts them, by name, with nothing dropped."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline.cluster.config import ClusterConfig
from pipeline.errors import InputError
from pretrain.evals.corruptions import Corruption
from pretrain.evals.image_sets import wnids
from pretrain.evals.robustness import RobustnessConfig, evaluate_robustness, score
from pretrain.finetune.augment import AugmentConfig
from pretrain.finetune.config import FinetuneConfig
from pretrain.finetune.train import finetune_classifier
from pretrain.model.artifacts import load_classifier, save_classifier
from pretrain.model.backbone import IMAGENET_MEAN, IMAGENET_STD, BackboneConfig
from pretrain.model.classifier import Classifier, ClassifierConfig
from pretrain.model.size import BackboneSize
from shards.dataset.dataset import open_dataset
from shards.pixels.views import ViewPolicy
from shards.sources.listing import SourceConfig, list_sources
from shards.sources.table import rows_of
from shards.writer.prepare import PrepareConfig, prepare_images

SIDE = 16
IN_PROCESS = ClusterConfig(num_workers=0)
SMALL = BackboneConfig(image_size=SIDE, patch_size=4, width=32, depth=1, heads=2)
ANIMALS = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")


def save_random(url: Path, names: Sequence[str] | None, num_classes: int = 0, **artifact: Any) -> str:
    """A classifier whose answers depend on the image: its head is large and random."""
    torch.manual_seed(0)
    model = Classifier(
        ClassifierConfig(backbone=SMALL, num_classes=num_classes or len(names or ()), head_init_scale=50.0)
    )
    save_classifier(str(url), model, names, **artifact)
    return str(url)


def drawn(seed: int, height: int = 24, width: int = 20) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def slow_crop(image: Image.Image, fraction: float = 0.875) -> np.ndarray:
    """The evaluation crop, in Pillow's words, uint8 [S, S, 3]."""
    side = round(fraction * min(image.size))
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = image.crop((left, top, left + side, top + side))
    return np.asarray(box.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def slow_logits(model: Classifier, *crops: np.ndarray) -> list[list[float]]:
    scaled = (np.stack(crops) / 255.0 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    return model(torch.from_numpy(scaled).float().permute(0, 3, 1, 2)).tolist()


def slow_best(logits: Sequence[float], among: Sequence[int], k: int = 1) -> list[int]:
    return sorted(among, key=lambda i: -logits[i])[:k]


def settings(**changes: Any) -> RobustnessConfig:
    return RobustnessConfig(
        **{"clean": "c", "output": "o", "cluster": IN_PROCESS, "decode_threads": 1, **changes}
    )


def result_of(output: Path | str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The header, and the rows by name."""
    header = json.loads((Path(output) / "robustness.json").read_text())
    return header, {row["name"]: row for row in header["result"]["rows"]}


def measured(
    output: Path, animals: Mapping[str, str], **changes: Any
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The header of an evaluation of the classifier of animals, and the rows by name."""
    evaluate_robustness(settings(classifier=animals["classifier"], output=str(output), **changes))
    return result_of(output)


def hits(row: Mapping[str, Any]) -> int:
    return round(row["top1"] * row["num_images"])


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A classifier of the 1000 wnids, its outputs not in their order."""
    names = list(wnids("imagenet_sketch"))
    np.random.default_rng(5).shuffle(names)
    return save_random(tmp_path_factory.mktemp("imagenet") / "classifier", names)


def fill(root: Path, model: Classifier, names: Sequence[str], classes: Sequence[str], num: int) -> None:
    """An image per class, and `num` more, most of which this classifier finds among these classes."""
    among = [names.index(name) for name in classes]
    for i in range(len(classes) + num):
        image, name = drawn(1000 * len(classes) + i), classes[i % len(classes)]
        if i >= len(classes) and i % 4:
            name = names[slow_best(slow_logits(model, slow_crop(image))[0], among)[0]]
        (root / name).mkdir(parents=True, exist_ok=True)
        image.save(root / name / f"{i}.png")


Seen = list[tuple[str, list[float]]]
"""Class and logits of every image of a folder."""


def slow_pass(model: Classifier, root: Path | str, fraction: float = 0.875) -> Seen:
    files = sorted(Path(root).glob("*/*.png"))
    logits = slow_logits(model, *(slow_crop(Image.open(file), fraction) for file in files))
    return list(zip((file.parent.name for file in files), logits, strict=True))


def slow_counts(
    seen: Seen, names: Sequence[str], classes: Sequence[str], restricted: bool
) -> tuple[int, int, int]:
    """Images of these classes, how many of them are found, and how many among the first five."""
    among = [names.index(name) for name in classes] if restricted else list(range(len(names)))
    num = top1 = top5 = 0
    for name, logits in seen:
        if name in classes:
            best = [names[i] for i in slow_best(logits, among, 5)]
            num += 1
            top1 += best[0] == name
            top5 += name in best
    return num, top1, top5


# ------------------------------------------------------------------------------------------------ ImageNet


def test_imagenet_a_r_and_sketch_against_a_slow_loop(
    tmp_path: Path, imagenet: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, header = load_classifier(imagenet)
    names: list[str] = header["class_names"]
    # Clean images of 200 classes, so that not all of A's have one.
    classes = {"clean": wnids("imagenet_sketch")[:200]}
    classes |= {name: wnids(name) for name in ("imagenet_a", "imagenet_r", "imagenet_sketch")}
    roots = {name: tmp_path / name for name in classes}
    for name, root in roots.items():
        fill(root, model, names, classes[name], 40)
    (roots["imagenet_a"] / "README.txt").write_text("no image")
    (roots["imagenet_a"] / classes["imagenet_a"][0] / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut off")

    places = {name: str(root) for name, root in roots.items()}
    config = settings(classifier=imagenet, output=str(tmp_path / "out"), images_per_batch=37, **places)
    evaluate_robustness(config)
    header, rows = result_of(tmp_path / "out")
    seen = {name: slow_pass(model, root) for name, root in roots.items()}
    assert list(rows) == list(classes)
    for name, row in rows.items():
        restricted = name in ("imagenet_a", "imagenet_r")
        num, top1, top5 = slow_counts(seen[name], names, classes[name], restricted)
        assert (row["num_images"], hits(row), round(row["top5"] * num)) == (num, top1, top5)
        assert top1 < top5 < num and top1 > 0
        assert row["num_classes"] == len(classes[name])
        assert row["num_answers"] == (200 if restricted else 1000)
        assert row["low"] < row["top1"] < row["high"]
        if name == "clean":
            assert row["difference"] is None
            continue
        # Held against the clean images of these classes, of which the same may be answered.
        there = slow_counts(seen["clean"], names, classes[name], restricted)
        difference = row["difference"]
        assert difference["num_clean"] == there[0] < rows["clean"]["num_images"] or name == "imagenet_sketch"
        assert difference["clean_top1"] == pytest.approx(there[1] / there[0])
        assert difference["difference"] == pytest.approx(top1 / num - there[1] / there[0])
        assert difference["low"] < difference["difference"] < difference["high"] and not difference["paired"]
    # Restricted or not is no small matter here.
    at_large = slow_counts(seen["imagenet_a"], names, classes["imagenet_a"], False)[1]
    assert hits(rows["imagenet_a"]) > 2 * at_large

    accounts = {account["name"]: account for account in header["result"]["sets"]}
    assert sum(accounts["imagenet_a"]["rejected"].values()) == 2 and accounts["clean"]["rejected"] == {}
    assert "imagenet_a: 2 files rejected when prepared" in header["table"]
    assert header["table"] in capsys.readouterr().out

    # Finished: printed again, nothing done. Other settings, or a set that changed: refused.
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")}
    evaluate_robustness(config)
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(InputError, match="seed: there 0, asked 1"):
        evaluate_robustness(dataclasses.replace(config, seed=1))
    drawn(1).save(roots["imagenet_a"] / classes["imagenet_a"][0] / "new.png")
    with pytest.raises(InputError, match=r"images\.imagenet_a: there"):
        evaluate_robustness(config)
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")}


# ------------------------------------------------------------------------------------------------ own sets


@pytest.fixture(scope="module")
def animals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A classifier of seven classes, 35 clean images of all as shards, and a folder of 18 of three."""
    root = tmp_path_factory.mktemp("animals")
    classifier = save_random(root / "classifier", ANIMALS[::-1])
    model, header = load_classifier(classifier)
    fill(root / "clean", model, header["class_names"], ANIMALS, 28)
    fill(root / "few", model, header["class_names"], ("bee", "cat", "fox"), 15)
    prepare_images(PrepareConfig(source=str(root / "clean"), output=str(root / "shards"), cluster=IN_PROCESS))
    return {name: str(root / name) for name in ("classifier", "clean", "shards", "few")}


@pytest.mark.parametrize(("restricted", "fraction"), [(False, 0.6), (True, 1.0)])
def test_a_set_of_ones_own(
    tmp_path: Path, animals: dict[str, str], restricted: bool, fraction: float
) -> None:
    sets = {"clean": animals["shards"], "shifted": f"few={animals['few']}, all={animals['shards']}"}
    changes = {**sets, "restrict_shifted": restricted, "center_fraction": fraction}
    _, rows = measured(tmp_path / "out", animals, **changes)
    model, header = load_classifier(animals["classifier"])
    names: list[str] = header["class_names"]
    assert list(rows) == ["clean", "few", "all"]
    few, chosen = rows["few"], ("bee", "cat", "fox")
    num, top1, _ = slow_counts(slow_pass(model, animals["few"], fraction), names, chosen, restricted)
    assert (few["num_images"], hits(few), few["num_classes"]) == (num, top1, 3)
    assert few["num_answers"] == (3 if restricted else 7)
    assert (few["top5"] is None) == restricted
    there = slow_counts(slow_pass(model, animals["clean"], fraction), names, chosen, restricted)
    assert few["difference"]["num_clean"] == there[0]
    assert few["difference"]["clean_top1"] == pytest.approx(there[1] / there[0])
    # The same images twice: no difference, whatever may be answered.
    assert rows["all"]["top1"] == rows["clean"]["top1"] and rows["all"]["difference"]["difference"] == 0.0


def test_without_clean_images_of_its_classes_a_set_stands_alone(
    tmp_path: Path, animals: dict[str, str]
) -> None:
    clean = _folder(tmp_path / "clean", "ant", "eel")
    header, rows = measured(tmp_path / "out", animals, clean=clean, shifted=f"few={animals['few']}")
    assert rows["few"]["difference"] is None and "no clean image of its classes" in header["table"]


def _folder(root: Path, *names: str) -> str:
    """A folder with one image of each class."""
    for name in names:
        (root / name).mkdir(parents=True)
        drawn(3).save(root / name / "0.png")
    return str(root)


def test_numbered_classes_need_no_names(tmp_path: Path, animals: dict[str, str]) -> None:
    """Labels without names on both sides: the number is the class."""
    files = [io.BytesIO() for _ in range(6)]
    for i, file in enumerate(files):
        drawn(i).save(file, "PNG")
    columns = {"image": [file.getvalue() for file in files], "label": [i % 3 for i in range(6)]}
    source = str(tmp_path / "x.parquet")
    pq.write_table(pa.table(columns), source)
    prepare_images(PrepareConfig(source=source, output=str(tmp_path / "shards"), cluster=IN_PROCESS))
    assert open_dataset(str(tmp_path / "shards")).manifest.class_names is None
    classifier = save_random(tmp_path / "numbered", None, num_classes=3)
    config = settings(
        classifier=classifier, clean=str(tmp_path / "shards"), corruptions="contrast", severities="2",
        output=str(tmp_path / "out"),
    )  # fmt: skip
    evaluate_robustness(config)
    assert result_of(tmp_path / "out")[1]["clean"]["num_images"] == 6
    with pytest.raises(InputError, match="numbers only"):
        evaluate_robustness(dataclasses.replace(config, classifier=animals["classifier"]))


# ------------------------------------------------------------------------------------------------ corruptions


def test_corrupted_copies_are_those_of_the_crops(tmp_path: Path, animals: dict[str, str]) -> None:
    named = {"corruptions": "jpeg, gaussian_noise,gaussian_blur", "severities": "5,1"}
    changes = {**named, "strengths": "imagenet_c", "seed": 3, "images_per_batch": 8, "decode_threads": 2}
    header, rows = measured(tmp_path / "out", animals, clean=animals["clean"], **changes)
    order = ["gaussian_noise", "gaussian_blur", "jpeg"]
    assert list(rows) == ["clean", *(f"{name} {severity}" for name in order for severity in (1, 5))]

    model, classifier = load_classifier(animals["classifier"])
    names: list[str] = classifier["class_names"]
    # A sample's id is its place in the listing.
    listing = list_sources(SourceConfig(url=animals["clean"]), IN_PROCESS)
    files = [Path(source.url) for source in rows_of(listing.table)]
    crops = [slow_crop(Image.open(file)) for file in files]

    def num_right(shown: Sequence[np.ndarray]) -> int:
        logits = slow_logits(model, *shown)
        seen = [(file.parent.name, row) for file, row in zip(files, logits, strict=True)]
        return slow_counts(seen, names, ANIMALS, False)[1]

    for name, severity in ((name, severity) for name in order for severity in (1, 5)):
        corruption = Corruption(name=name, severity=severity, table="imagenet_c", seed=3)  # type: ignore[arg-type]
        right = num_right([corruption(crop, sample_id, 0) for sample_id, crop in enumerate(crops)])
        row = rows[f"{name} {severity}"]
        assert (row["num_images"], hits(row)) == (35, right)
        assert row["difference"]["paired"] and row["difference"]["num_clean"] == 35
        assert row["difference"]["difference"] == pytest.approx((right - num_right(crops)) / 35)
    assert min(hits(rows[f"{name} 5"]) for name in order) < hits(rows["clean"])
    copies = [row["top1"] for row in rows.values() if row["corruption"] is not None]
    assert header["result"]["mean_corrupted"] == pytest.approx(sum(copies) / 6)
    assert "constants of imagenet_c" in header["table"]


# ------------------------------------------------------------------------------------------------ crops


def test_the_clean_accuracy_is_that_of_the_fine_tuning(tmp_path: Path, make_image_folder: Any) -> None:
    """The same crop, so the same figure, on the images it was validated on."""
    folder = make_image_folder(classes=3, per_class=10, size=30)
    prepare_images(PrepareConfig(source=str(folder), output=str(tmp_path / "images"), cluster=IN_PROCESS))
    images = str(tmp_path / "images")
    finetune_classifier(
        FinetuneConfig(
            train=images, val=images, output=str(tmp_path / "ft"), init="scratch",
            scratch=BackboneSize(size="tiny", width=32, depth=1, heads=2), patch_size=4, image_size=SIDE,
            views=ViewPolicy(views_per_image=0, interpolation="bilinear"), center_fraction=0.6,
            augment=AugmentConfig(rand_augment=None, erase_prob=0, mixup=0, cutmix=0),
            epochs=2, batch_size=10, cluster=IN_PROCESS,
        )
    )  # fmt: skip
    config = settings(
        classifier=str(tmp_path / "ft"), clean=images, corruptions="contrast", severities="1",
        output=str(tmp_path / "out"),
    )  # fmt: skip
    evaluate_robustness(config)
    header, rows = result_of(tmp_path / "out")
    assert rows["clean"]["top1"] == load_classifier(str(tmp_path / "ft"))[1]["metrics"]["val_top1"]
    found = header["result"]
    assert (found["center_fraction"], found["interpolation"], found["image_size"]) == (0.6, "bilinear", SIDE)
    evaluate_robustness(
        dataclasses.replace(config, center_fraction=1.0, interpolation="bicubic", output=str(tmp_path / "b"))
    )
    found = result_of(tmp_path / "b")[0]["result"]
    assert (found["center_fraction"], found["interpolation"]) == (1.0, "bicubic")


# ------------------------------------------------------------------------------------------------ scores


def test_only_answers_compete() -> None:
    logits = torch.tensor([[5.0, 1.0, 4.0, 3.0], [5.0, 1.0, 4.0, 3.0], [0.0, 9.0, 8.0, 7.0]])
    truth = torch.tensor([2, 0, 3])
    assert score(logits, truth, None).tolist() == [[False, True], [True, True], [False, True]]
    # 0 is no answer: not right although its logit is the highest.
    assert score(logits, truth, (2, 3)).tolist() == [[True, True], [False, False], [False, True]]
    many = torch.arange(10.0).repeat(2, 1)
    assert score(many, torch.tensor([5, 4]), None).tolist() == [[False, True], [False, False]]


def test_logits_that_are_no_numbers_are_an_error(
    tmp_path: Path, animals: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Classifier.forward

    def broken(self: Classifier, pixels: Tensor) -> Tensor:
        return forward(self, pixels) * math.nan

    monkeypatch.setattr(Classifier, "forward", broken)
    places = {"classifier": animals["classifier"], "clean": animals["shards"]}
    with pytest.raises(FloatingPointError, match="not finite on"):
        evaluate_robustness(settings(**places, corruptions="jpeg", output=str(tmp_path / "out")))
    assert not (tmp_path / "out" / "robustness.json").exists()


# ------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "nothing to compare"),
        ({"corruptions": "fog"}, "'fog'; give some of gaussian_noise,gaussian_blur,contrast,jpeg"),
        ({"corruptions": "jpeg", "severities": "1,6"}, "severities is '1,6'"),
        ({"corruptions": "jpeg", "severities": ","}, "severities is ','"),
        ({"shifted": "s3://bucket/x"}, "give name=URL"),
        ({"shifted": "..=x"}, "give name=URL"),
        ({"shifted": "a=x,a=y"}, "name a for a second set"),
        ({"shifted": "imagenet_a=x"}, "name imagenet_a for a second set"),
        ({"shifted": "clean=x"}, "name clean for a second set"),
        ({"corruptions": "jpeg", "center_fraction": 1.5}, "center_fraction is 1.5"),
        ({"corruptions": "jpeg", "images_per_batch": 0}, "images_per_batch is 0"),
        ({"corruptions": "jpeg", "seed": -1}, "seed is -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        settings(classifier="x", **changes)


def test_what_does_not_fit_writes_nothing(tmp_path: Path, animals: dict[str, str]) -> None:
    def refused(said: str, **changes: Any) -> None:
        places = {"classifier": animals["classifier"], "clean": animals["shards"]}
        with pytest.raises(InputError, match=said) as error:
            evaluate_robustness(
                settings(**{**places, "corruptions": "jpeg", "output": str(tmp_path / "out"), **changes})
            )
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()

    one, other = _folder(tmp_path / "one", "bee"), _folder(tmp_path / "other", "yak")
    refused("no finished classifier", classifier=str(tmp_path))
    refused("there are no files", clean=str(tmp_path / "nothing"))
    refused("images of yak, which .* does not know", shifted=f"x={other}")
    refused("have no label", clean=f"{one}/bee")
    refused("does not know .* of the 200 classes of ImageNet-A", imagenet_a=one)
    refused("all images of .* are of one class", shifted=f"x={one}", restrict_shifted=True)
    refused("views.interpolation is nearest", interpolation="nearest")
    refused("fp16 needs a CUDA device", precision="fp16")
    refused("lies in the image folder", clean=one, output=f"{one}/out")
    assert not (tmp_path / "one" / "out").exists()

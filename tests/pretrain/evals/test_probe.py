from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline.errors import InputError
from pipeline.metrics import Progress
from pretrain.backbone import Backbone, BackboneConfig, save_backbone
from pretrain.evals.features import (
    FeatureSet,
    backbone_features,
    extract_features,
    pixel_features,
    read_labels,
)
from pretrain.evals.probe import (
    LabelledFeatures,
    ProbeConfig,
    choose_lr,
    compare,
    probe_features,
    probe_linear,
    run_probe,
    train_classifiers,
    translate_labels,
    wilson_interval,
)
from pretrain.mim import MIM, MIMConfig, PatchAggregationConfig, mim_header
from shards.build import build_shard
from shards.commit import Plan, commit, finish, pending, start
from shards.decode import DecodeConfig, decode_image
from shards.manifest import open_dataset
from shards.samples import StoredSample

CPU = torch.device("cpu")
BACKBONE = BackboneConfig(image_size=16, patch_size=4, width=32, depth=2, heads=2)


def settings(**changes: object) -> ProbeConfig:
    places = {"backbone": "b", "train": "t", "val": "v", "output": "o"}
    return ProbeConfig(**{**places, "epochs": 15, **changes})  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ statistics


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (1, 10), (5, 10), (37, 400), (400, 400), (1, 1)])
def test_wilson_interval_solves_its_defining_equation(successes, trials):
    """Its ends are the shares p from which the observed one lies 1.96 standard errors *of p* away."""
    low, high = wilson_interval(successes, trials)
    share = successes / trials
    assert 0.0 <= low <= share <= high <= 1.0
    for end in (low, high):
        if 0.0 < end < 1.0:
            assert abs(share - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / trials))


def test_paired_interval_covers_the_true_difference_and_is_tighter_than_two_intervals():
    rng = np.random.default_rng(0)
    trials, images, covered = 400, 150, 0
    for _ in range(trials):
        difficulty = rng.random(images)
        ours, theirs = difficulty < 0.6, difficulty + rng.normal(0, 0.05, images) < 0.5
        truth = 0.1  # by symmetric noise, far from the ends
        found = compare(torch.from_numpy(ours), torch.from_numpy(theirs), of="a", over="b")
        assert found.difference == pytest.approx(ours.mean() - theirs.mean())
        covered += found.low <= truth <= found.high
        apart = sum(np.diff(wilson_interval(int(x.sum()), images))[0] for x in (ours, theirs))
        assert found.high - found.low < 0.7 * apart
    assert 0.92 <= covered / trials <= 0.99


@pytest.mark.parametrize(
    ("only_ours", "only_theirs", "verdict"),
    [(30, 5, "gain"), (5, 30, "loss"), (12, 9, "within"), (0, 0, "within")],
)
def test_verdict_needs_an_interval_without_zero(only_ours, only_theirs, verdict):
    ours = torch.tensor([True] * only_ours + [False] * only_theirs + [True] * 100)
    theirs = torch.tensor([False] * only_ours + [True] * only_theirs + [True] * 100)
    found = compare(ours, theirs, of="a", over="b")
    assert found.verdict == verdict
    assert found.low <= found.difference <= found.high


# ------------------------------------------------------------------------------------------------ classifier


def blobs(num: int, spread: float, seed: int, classes: int = 4, width: int = 12) -> LabelledFeatures:
    """Normal clusters around fixed centres, with offsets and scales that standardising must undo."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, classes, (num,), generator=generator)
    features = centres[labels] + spread * torch.randn(num, width, generator=generator)
    scales = 10.0 ** torch.arange(-3, width - 3, dtype=torch.float32).remainder(7)
    return LabelledFeatures(features * scales + 5 * scales, labels, classes)


def test_classifier_reaches_the_bayes_rate():
    train, test = blobs(2000, 1.0, seed=0), blobs(2000, 1.0, seed=1)
    centres = torch.stack([train.features[train.labels == k].mean(dim=0) for k in range(4)])
    within = torch.cat([train.features[train.labels == k] - centres[k] for k in range(4)]).std(dim=0)
    bayes = torch.cdist(test.features / within, centres / within).argmin(dim=1) == test.labels
    [fit] = train_classifiers(train, test, [1e-2], settings(), CPU)
    assert fit.correct.double().mean() == pytest.approx(bayes.double().mean().item(), abs=0.02)


def test_classifiers_of_a_sweep_do_not_touch_each_other():
    train, test = blobs(300, 1.0, seed=0), blobs(200, 1.0, seed=1)
    together = train_classifiers(train, test, [1e-5, 1e-3, 1e-1], settings(), CPU)
    for lr, fit in zip([1e-5, 1e-3, 1e-1], together, strict=True):
        [alone] = train_classifiers(train, test, [lr], settings(), CPU)
        assert torch.equal(alone.correct, fit.correct) and alone.loss == pytest.approx(fit.loss)
    assert len({round(fit.loss, 4) for fit in together}) == 3


def test_constant_features_carry_nothing_and_break_nothing():
    train, test = blobs(300, 0.3, seed=0), blobs(200, 0.3, seed=1)
    constant = torch.full((300, 1), 3.0), torch.full((200, 1), 1e6)
    wider = [
        LabelledFeatures(torch.cat([part.features, column], dim=1), part.labels, 4)
        for part, column in zip((train, test), constant, strict=True)
    ]
    [plain] = train_classifiers(train, test, [1e-2], settings(), CPU)
    [padded] = train_classifiers(wider[0], wider[1], [1e-2], settings(), CPU)
    assert plain.loss == pytest.approx(padded.loss, rel=1e-4)


def test_learning_rate_is_chosen_on_held_out_training_images():
    data = blobs(400, 1.5, seed=0)
    config = settings(lrs=(1e-7, 3e-3, 1e4), holdout=0.25)
    lr, accuracy = choose_lr(data, config, CPU)
    assert lr == 3e-3
    order = torch.randperm(400, generator=torch.Generator().manual_seed(config.seed))
    [expected] = train_classifiers(data.rows(order[100:]), data.rows(order[:100]), [lr], config, CPU)
    assert accuracy == pytest.approx(expected.correct.double().mean().item())
    # Another seed holds out other images.
    assert choose_lr(data, settings(lrs=(3e-3,), seed=1), CPU) != choose_lr(data, settings(lrs=(3e-3,)), CPU)


# ------------------------------------------------------------------------------------------------ protocol


def features(num: int, seed: int, strength: dict[str, float]) -> FeatureSet:
    """Inputs whose classes are apart by `strength`; labels from {2, 5, 7}, as they come."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([2, 5, 7])[torch.randint(0, 3, (num,), generator=generator)]
    centres = torch.randn(8, 6, generator=torch.Generator().manual_seed(7))
    inputs = {
        name: torch.randn(num, 6, generator=generator) + apart * centres[labels]
        for name, apart in strength.items()
    }
    return FeatureSet(inputs, labels)


STRENGTH = {
    "pixels.raw": 0.1,
    "untrained.mean_patch": 0.2,
    "untrained.cls": 0.15,
    "pretrained.mean_patch": 1.0,
    "pretrained.cls": 1.2,
}


@pytest.mark.parametrize(("aggregated", "first"), [(True, "cls"), (False, "mean_patch")])
def test_the_probe_is_cls_with_aggregation_and_mean_patch_without(aggregated, first):
    result = probe_features(
        features(400, 0, STRENGTH), features(300, 1, STRENGTH), settings(), aggregated=aggregated
    )
    assert (result.scores[0].model, result.scores[0].input) == ("pretrained", first)
    assert {f"{score.model}.{score.input}" for score in result.scores} == STRENGTH.keys()
    assert [(one.of, one.over) for one in result.comparisons] == [
        (result.scores[0].label, f"untrained {'[CLS]' if first == 'cls' else 'mean patch'}"),
        (result.scores[0].label, "pixels"),
    ]
    by_label = {score.label: score.top1 for score in result.scores}
    for one in result.comparisons:
        assert one.verdict == "gain"
        assert one.difference == pytest.approx(by_label[one.of] - by_label[one.over])
    assert (result.num_classes, result.num_train, result.num_val) == (3, 400, 300)
    assert result.largest_class == pytest.approx(
        max(np.bincount(features(300, 1, STRENGTH).labels.numpy())) / 300
    )
    table = result.table()
    assert table.count("a gain") == 2 and "within" not in table
    json.dumps(result.to_json(), allow_nan=False)


def test_a_gain_inside_its_interval_is_called_that():
    strength = {"pretrained.cls": 0.3, "untrained.cls": 0.3}
    result = probe_features(
        features(200, 0, strength), features(60, 1, strength), settings(), aggregated=True
    )
    [one] = result.comparisons
    assert one.low < 0 < one.high
    assert "no difference is shown" in result.table()
    assert result.to_json()["comparisons"][0]["verdict"] == "within"


def test_classes_unknown_to_training_count_as_wrong():
    train, val = features(300, 0, {"pretrained.cls": 3.0}), features(200, 1, {"pretrained.cls": 3.0})
    known = train.labels != 5
    fewer = FeatureSet({"pretrained.cls": train.inputs["pretrained.cls"][known]}, train.labels[known])
    result = probe_features(fewer, val, settings(), aggregated=True)
    assert result.num_classes == 2
    share = (val.labels != 5).double().mean().item()
    assert share - 0.05 < result.scores[0].top1 <= share


def test_labels_are_matched_by_class_name():
    labels = torch.tensor([0, 1, 1, -1])
    assert translate_labels(labels, ["ant", "cat"], ["ant", "bee", "cat"]).tolist() == [0, 2, 2, -1]
    assert translate_labels(labels, ["ant", "bee"], ["ant", "bee"]).tolist() == labels.tolist()
    assert translate_labels(labels, None, ["ant", "bee"]).tolist() == labels.tolist()
    # A class without images may be unknown; one with images may not.
    assert translate_labels(labels, ["ant", "bee", "dog"], ["bee", "ant"]).tolist() == [1, 0, 0, -1]
    with pytest.raises(InputError, match="'dog'"):
        translate_labels(labels, ["ant", "dog"], ["ant", "bee"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lrs": ()}, "lrs"),
        ({"lrs": (0.1, 0.0)}, "lrs"),
        ({"epochs": 0}, "epochs"),
        ({"holdout": 1.0}, "holdout"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, named):
    with pytest.raises(InputError, match=named):
        settings(**change)


# ------------------------------------------------------------------------------------------------ features


def test_features_are_the_backbones_own_whatever_the_batches():
    model = Backbone(BACKBONE).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (11, 16, 16, 3), np.uint8)
    labels = np.array([0, 1, -1, 2, 0, -1, -1, 1, 2, 0, 1])
    batches = [SimpleNamespace(pixels=pixels[i:j], labels=labels[i:j]) for i, j in ((0, 4), (4, 7), (7, 11))]
    batches[1].labels = np.full(3, -1)  # nothing labelled in it
    found = extract_features(
        batches,  # type: ignore[arg-type]
        [backbone_features(model, "pretrained"), pixel_features(side=8)],
        CPU,
        Progress("test", 11, "images"),
    )
    kept = [0, 1, 3, 7, 8, 9, 10]
    assert found.labels.tolist() == labels[kept].tolist()
    expected = model.features(model.normalize(torch.from_numpy(pixels[kept])))
    torch.testing.assert_close(found.inputs["pretrained.cls"], expected.cls)
    torch.testing.assert_close(found.inputs["pretrained.mean_patch"], expected.patches.mean(dim=1))
    raw = found.inputs["pixels.raw"]
    assert raw.shape == (7, 3 * 8 * 8) and raw.min() >= 0 and raw.max() <= 1
    means = torch.from_numpy(pixels[kept]).float().mean(dim=(1, 2)) / 255
    torch.testing.assert_close(raw.view(7, 3, 64).mean(dim=2), means, atol=0.02, rtol=0)


def test_pixels_already_small_are_left_alone():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(pixel_features(side=32)(images)["pixels.raw"], (images.float() / 255).flatten(1))


def test_features_that_are_not_finite_are_an_error():
    batch = SimpleNamespace(pixels=np.zeros((2, 16, 16, 3), np.uint8), labels=np.array([0, 1]))

    def broken(images: Tensor) -> dict[str, Tensor]:
        return {"pretrained.cls": torch.full((len(images), 3), torch.nan)}

    with pytest.raises(FloatingPointError, match=r"pretrained\.cls"):
        extract_features([batch], [broken], CPU, Progress("test", 2, "images"))  # type: ignore[list-item]


# ------------------------------------------------------------------------------------------------ whole job


def colour_of(label: int) -> tuple[int, int, int]:
    return ((220, 40, 40), (40, 200, 60), (50, 60, 230))[label]


@pytest.fixture
def write_images(tmp_path: Path) -> Callable[..., str]:
    """`write_images(name, labels, class_names)`: image shards of noisy one-coloured pictures."""

    def write(name: str, labels: Sequence[int | None], class_names: Sequence[str] | None = None) -> str:
        root = str(tmp_path / name)
        plan = Plan(
            kind="images",
            inputs={"images": name},
            recipe={},
            first_ids=(0, len(labels) // 2, len(labels)),
            views=1,
            header={"class_names": None if class_names is None else list(class_names)},
        )
        start(root, plan)
        rng = np.random.default_rng(len(labels))
        for item in pending(root, plan):
            samples = []
            for i in range(item.first_id, item.end_id):
                label = labels[i]
                colour = np.array(colour_of(label or 0)) + rng.normal(0, 40, (20, 24, 3))
                file = io.BytesIO()
                Image.fromarray(colour.clip(0, 255).astype(np.uint8)).save(file, "PNG")
                samples.append(
                    StoredSample(
                        sample_id=i, view=0, image=file.getvalue(), extension="png", source=f"{name}/{i}.png",
                        source_width=24, source_height=20, label=label,
                    )
                )  # fmt: skip
            commit(root, plan, item, build_shard(samples, [], grid=None, codebook_size=None))
        finish(root, plan, lambda data: decode_image(data, DecodeConfig()))
        return root

    return write


@pytest.fixture
def backbone_url(tmp_path: Path) -> str:
    torch.manual_seed(1)
    model = MIM(BACKBONE, MIMConfig(patch_aggregation=PatchAggregationConfig(layer=1)), 16)
    url = str(tmp_path / "backbone")
    save_backbone(url, model, mim=mim_header(model))
    return url


def cycle(num: int, *labels: int | None) -> list[int | None]:
    return [labels[i % len(labels)] for i in range(num)]


def test_probe_from_shards_to_artifact(tmp_path, write_images, backbone_url, capsys):
    names = ["blue", "green", "red"]
    train = write_images("train", cycle(48, 0, 1, 2, None), names)
    val = write_images("val", cycle(24, 2, 1, 0), names)
    assert read_labels(open_dataset(val)).tolist() == cycle(24, 2, 1, 0)
    assert read_labels(open_dataset(train)).tolist() == cycle(48, 0, 1, 2, -1)
    config = settings(
        backbone=backbone_url, train=train, val=val, output=str(tmp_path / "out"), images_per_batch=7
    )
    probe_linear(config)
    printed = capsys.readouterr().out
    header = json.loads((tmp_path / "out" / "probe.json").read_text())
    result = header["result"]
    assert result["skipped"] is None
    assert (result["num_classes"], result["num_train"], result["num_val"]) == (3, 36, 24)
    assert (result["scores"][0]["model"], result["scores"][0]["input"]) == ("pretrained", "cls")
    assert len(result["scores"]) == 5 and len(result["comparisons"]) == 2
    pixels = next(score for score in result["scores"] if score["model"] == "pixels")
    assert pixels["top1"] == 1.0  # one colour per class
    assert header["table"] in printed and "pretrained [CLS] over pixels" in printed
    assert header["inputs"]["train"] == open_dataset(train).fingerprint

    # Finished: printed again, not done again. Other settings: refused. The same in another place: the same.
    probe_linear(config)
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(InputError, match="epochs"):
        probe_linear(
            settings(backbone=backbone_url, train=train, val=val, output=str(tmp_path / "out"), epochs=3)
        )
    assert json.loads(json.dumps(run_probe(config).to_json())) == result


def test_baselines_can_be_left_out(write_images, backbone_url):
    train, val = write_images("train", cycle(20, 0, 1)), write_images("val", cycle(10, 0, 1))
    config = settings(
        backbone=backbone_url, train=train, val=val, untrained_baseline=False, pixel_baseline=False, epochs=2
    )
    result = run_probe(config)
    assert [score.model for score in result.scores] == ["pretrained", "pretrained"]
    assert result.comparisons == ()


@pytest.mark.parametrize(
    ("train_labels", "val_labels", "said"),
    [
        ((None,), (0, 1), "train has a label"),
        ((0, 1), (None,), "val has a label"),
        ((1,), (0, 1), "one class"),
    ],
)
def test_without_usable_labels_it_is_skipped_or_refused(
    tmp_path, write_images, backbone_url, capsys, train_labels, val_labels, said
):
    train, val = write_images("train", cycle(8, *train_labels)), write_images("val", cycle(8, *val_labels))
    out = tmp_path / "out"
    places = {"backbone": backbone_url, "train": train, "val": val, "output": str(out)}
    with pytest.raises(InputError, match=said):
        probe_linear(settings(**places, require_labels=True))
    assert not out.exists()

    probe_linear(settings(**places))
    assert "linear probe skipped: " in capsys.readouterr().out
    result = json.loads((out / "probe.json").read_text())["result"]
    assert said in result["skipped"]
    assert result["scores"] == []
    assert run_probe(settings(**places)).skipped == result["skipped"]


def test_inputs_that_do_not_fit_write_nothing(tmp_path, write_images, backbone_url):
    train = write_images("train", cycle(8, 0, 1), ["ant", "bee"])
    val = write_images("val", cycle(8, 0, 1), ["ant", "dog"])
    out = tmp_path / "out"
    with pytest.raises(InputError, match="'dog'"):
        probe_linear(settings(backbone=backbone_url, train=train, val=val, output=str(out)))
    with pytest.raises(InputError, match="no finished backbone"):
        probe_linear(settings(backbone=str(tmp_path), train=train, val=train, output=str(out)))
    with pytest.raises(InputError, match="no dataset"):
        probe_linear(settings(backbone=backbone_url, train=str(tmp_path / "no"), val=train, output=str(out)))
    assert not out.exists()

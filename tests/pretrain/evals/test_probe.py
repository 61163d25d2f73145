from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import parse
from pipeline.errors import InputError
from pretrain.evals.features import FeatureSet
from pretrain.evals.knn import knn_predictions
from pretrain.evals.linear import LabelledFeatures
from pretrain.evals.probe import ProbeConfig, probe_features, probe_linear, run_probe
from shards.dataset.dataset import open_dataset

CONFIGS = Path(__file__).resolve().parents[3] / "jobs" / "configs"


def settings(**changes: object) -> ProbeConfig:
    places = {"backbone": "b", "train": "t", "val": "v", "output": "o"}
    return ProbeConfig(**{**places, "epochs": 15, **changes})  # type: ignore[arg-type]


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
    few = features(60, 1, {"pretrained.cls": 0.0, "untrained.cls": 0.0})
    equal = probe_features(few, few, settings(epochs=1, knn=()), aggregated=True)
    assert equal.to_json()["comparisons"][0]["verdict"] == "within"
    assert "no difference is shown" in equal.table()
    json.dumps(result.to_json(), allow_nan=False)


def test_knn_is_reported_for_every_k_of_every_normed_input():
    train, val = features(400, 0, STRENGTH), features(300, 1, STRENGTH)
    result = probe_features(train, val, settings(epochs=1, knn=(5, 1)), aggregated=True)
    assert {(one.model, one.input, one.k) for one in result.knn} == {
        (*name.split("."), k) for name in STRENGTH if name != "pixels.raw" for k in (1, 5)
    }
    labels = [part.labels.sub(2).clamp_max(4).floor_divide(2) for part in (train, val)]  # 2, 5, 7 -> 0, 1, 2
    bank, queries = (
        LabelledFeatures(part.inputs["pretrained.cls"], own, 3)
        for part, own in zip((train, val), labels, strict=True)
    )
    [predicted] = knn_predictions(bank, queries, (5,), "cpu")
    [score] = [one for one in result.knn if one.label == "pretrained [CLS]" and one.k == 5]
    assert score.top1 == pytest.approx((predicted == queries.labels).double().mean().item())
    assert score.low < score.top1 < score.high
    [row] = [
        line for line in result.table().splitlines() if line.count("%") == 2 and "pretrained [CLS]" in line
    ]
    assert f"{100 * score.top1:.1f} %" in row
    assert probe_features(train, val, settings(epochs=1, knn=()), aggregated=True).knn == ()


def test_a_rate_at_the_end_of_the_sweep_is_said_aloud():
    train, val = features(400, 0, {"pretrained.cls": 0.4}), features(300, 1, {"pretrained.cls": 0.4})
    low, inside, high, alone = (
        probe_features(train, val, settings(lrs=lrs, knn=()), aggregated=True)
        for lrs in ((1e4, 1e-2), (1e-7, 1e-2, 1e4), (1e-2, 1e-7), (1e-2,))
    )
    edges = [result.scores[0].edge for result in (low, inside, high, alone)]
    assert edges == ["lowest", None, "highest", None]
    assert low.to_json()["scores"][0]["edge"] == "lowest"
    assert "add lower ones to --lrs" in low.table() and "add higher ones to --lrs" in high.table()
    assert "--lrs" not in inside.table() and "*" not in inside.table()


def test_classes_unknown_to_training_count_as_wrong():
    train, val = features(300, 0, {"pretrained.cls": 3.0}), features(200, 1, {"pretrained.cls": 3.0})
    known = train.labels != 5
    fewer = FeatureSet({"pretrained.cls": train.inputs["pretrained.cls"][known]}, train.labels[known])
    result = probe_features(fewer, val, settings(), aggregated=True)
    assert result.num_classes == 2
    share = (val.labels != 5).double().mean().item()
    assert share - 0.05 < result.scores[0].top1 <= share


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lrs": ()}, "lrs"),
        ({"lrs": (0.1, 0.0)}, "lrs"),
        ({"epochs": 0}, "epochs"),
        ({"holdout": 1.0}, "holdout"),
        ({"knn": (20, 0)}, "knn"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, named):
    with pytest.raises(InputError, match=named):
        settings(**change)


# ------------------------------------------------------------------------------------------------ whole job


def cycle(num: int, *labels: int | None) -> list[int | None]:
    return [labels[i % len(labels)] for i in range(num)]


def test_probe_from_shards_to_artifact(tmp_path, write_images, backbone_url, capsys):
    names = ["blue", "green", "red"]
    train = write_images("train", cycle(48, 0, 1, 2, None), names)
    val = write_images("val", cycle(24, 2, 1, 0), names)
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
    assert len(result["knn"]) == 4 * 4
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"run.json", "probe.json"}
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


def test_recipes_are_read():
    places = [f"--{name}=x" for name in ("backbone", "train", "val", "output")]
    quick = parse(ProbeConfig, [f"--config={CONFIGS}/quickstart/probe.yaml", *places])
    cifar = parse(ProbeConfig, [f"--config={CONFIGS}/cifar10/probe.yaml", *places])
    assert quick.epochs == 50 and quick.subset.is_all and cifar.knn == (10, 20, 100, 200)
    assert (cifar.epochs, cifar.batch_size, cifar.decode_threads) == (20, 1024, 1)

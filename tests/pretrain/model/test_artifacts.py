from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline.errors import InputError
from pretrain.model.artifacts import load_classifier, read_classifier_header, save_classifier
from pretrain.model.backbone import BackboneConfig
from pretrain.model.classifier import Classifier, ClassifierConfig

BACKBONE = BackboneConfig(image_size=16, patch_size=4, width=16, depth=2, heads=2, mean=(0.1, 0.2, 0.3))


def small(**settings: object) -> Classifier:
    torch.manual_seed(0)
    return Classifier(ClassifierConfig(backbone=BACKBONE, num_classes=3, **settings)).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{}, {"pooling": "cls"}, {"relative_positions": "shared"}])
def test_saved_and_loaded_is_the_same(tmp_path: Path, settings: dict[str, object]):
    model, url = small(**settings), str(tmp_path / "out")
    said = {
        "backbone": {"fingerprint": "b" * 64},
        "tokenizer": {"fingerprint": "t" * 64},
        "inputs": {"train": "f" * 64},
        "run": {"seed": 1},
        "metrics": {"top1": 0.5},
    }
    header = save_classifier(url, model, ["a", "b", "c"], **said)  # type: ignore[arg-type]
    assert {key: header[key] for key in said} == said and header["class_names"] == ["a", "b", "c"]
    loaded, read = load_classifier(url)
    assert read == json.loads(json.dumps(header)) == read_classifier_header(url)
    assert loaded.config == model.config
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(loaded(loaded.normalize(images)), model(model.normalize(images)))


def test_fingerprint_follows_the_weights_alone(tmp_path: Path):
    model = small()
    first = save_classifier(str(tmp_path / "a"), model, None)["fingerprint"]
    assert save_classifier(str(tmp_path / "b"), model, list("xyz"), run={"seed": 2})["fingerprint"] == first
    with torch.no_grad():
        model.head.bias[0] += 1e-3
    assert save_classifier(str(tmp_path / "c"), model, None)["fingerprint"] != first


def test_what_cannot_be_right_is_not_published(tmp_path: Path):
    with pytest.raises(ValueError, match="2 class names for 3 outputs"):
        save_classifier(str(tmp_path / "a"), small(), ["a", "b"])
    model = small()
    with torch.no_grad():
        model.head.bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"head\.bias"):
        save_classifier(str(tmp_path / "a"), model, None)
    assert not (tmp_path / "a").exists()


def _edit(folder: Path, key: str, value: object) -> None:
    path = folder / "classifier.json"
    header = json.loads(path.read_text())
    if key in header["config"]["backbone"]:
        header["config"]["backbone"][key] = value
    else:
        header["config"][key] = value
    path.write_text(json.dumps(header))


def _flip_a_bit(folder: Path) -> None:
    path = folder / "classifier.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "classifier.json").unlink(), "no finished classifier"),
        (lambda folder: (folder / "classifier.safetensors").unlink(), "classifier.safetensors"),
        (_flip_a_bit, "classifier.safetensors is damaged"),
        (lambda folder: _edit(folder, "num_classes", 4), r"head\.weight is 3x16 in the weights, but 4x16"),
        (lambda folder: _edit(folder, "pooling", "cls"), r"norm\.weight is absent"),
        (lambda folder: _edit(folder, "width", 32), r"cls_token is 1x1x16 in the weights, but 1x1x32"),
        (lambda folder: _edit(folder, "colour", 1), "colour"),
        (lambda folder: _edit(folder, "backbone", None), "backbone"),
    ],
)
def test_a_damaged_or_inconsistent_artifact_is_refused(tmp_path: Path, damage, says: str):
    save_classifier(str(tmp_path), small(), None)
    damage(tmp_path)
    with pytest.raises(InputError, match=says):
        load_classifier(str(tmp_path))

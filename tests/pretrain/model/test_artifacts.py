from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.errors import InputError
from pretrain.model.artifacts import (
    load_backbone,
    load_classifier,
    load_mim,
    read_backbone_header,
    read_classifier_header,
    save_backbone,
    save_classifier,
)
from pretrain.model.backbone import Backbone, BackboneConfig
from pretrain.model.classifier import Classifier, ClassifierConfig
from pretrain.model.mim import MIM, MIMConfig, PatchAggregationConfig

BACKBONE = BackboneConfig(image_size=16, patch_size=4, width=16, depth=2, heads=2, mean=(0.1, 0.2, 0.3))
INPUTS: dict[str, Any] = {
    "inputs": {"train": "f" * 64},
    "run": {"seed": 1},
    "tokenizer": {"fingerprint": "t"},
}


def mim(layer: int | None = 1) -> MIM:
    torch.manual_seed(0)
    heads = MIMConfig(patch_aggregation=PatchAggregationConfig(layer=layer))
    return MIM(BACKBONE, heads, codebook_size=8).eval()


def classifier(**settings: Any) -> Classifier:
    torch.manual_seed(0)
    return Classifier(ClassifierConfig(backbone=BACKBONE, num_classes=3, **settings)).eval()


@pytest.mark.parametrize("layer", [1, None])
def test_a_backbone_comes_back_with_or_without_its_heads(tmp_path: Path, layer: int | None):
    model, url = mim(layer), str(tmp_path / "out")
    header = save_backbone(url, model, **INPUTS)
    assert read_backbone_header(url) == json.loads(json.dumps(header))
    assert {key: header[key] for key in INPUTS} == INPUTS

    loaded = load_backbone(url)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert not any(key.startswith(("lm_head", "cls_pt")) for key in loaded.state_dict())
    pixels, mask = torch.randn(2, 3, 16, 16), torch.zeros(2, 16, dtype=torch.bool)
    mask[:, ::3] = True
    with torch.no_grad():
        assert torch.equal(loaded.features(pixels).patches, model.features(pixels).patches)
        whole, expected = load_mim(url)(pixels, mask), model(pixels, mask)
    assert torch.equal(whole.logits, expected.logits)
    if layer is None:
        assert whole.logits_cls is None
    else:
        assert torch.equal(whole.logits_cls, expected.logits_cls)


def test_a_backbone_alone_has_no_heads_to_load(tmp_path: Path):
    save_backbone(str(tmp_path), Backbone(BACKBONE))
    assert isinstance(load_backbone(str(tmp_path)), Backbone)
    with pytest.raises(InputError, match="no pretraining heads"):
        load_mim(str(tmp_path))


@pytest.mark.parametrize("settings", [{}, {"pooling": "cls"}, {"relative_positions": "shared"}])
def test_a_classifier_comes_back(tmp_path: Path, settings: dict[str, object]):
    model, url = classifier(**settings), str(tmp_path / "out")
    entries = {**INPUTS, "backbone": {"fingerprint": "b" * 64}, "metrics": {"top1": 0.5}}
    header = save_classifier(url, model, ["a", "b", "c"], **entries)
    assert {key: header[key] for key in entries} == entries and header["class_names"] == ["a", "b", "c"]
    loaded, read = load_classifier(url)
    assert read == json.loads(json.dumps(header)) == read_classifier_header(url)
    assert loaded.config == model.config
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(loaded(loaded.normalize(images)), model(model.normalize(images)))


def save(url: Path, model: nn.Module, **entries: Any) -> dict[str, Any]:
    if isinstance(model, Classifier):
        return save_classifier(str(url), model, None, **entries)
    assert isinstance(model, Backbone)
    return save_backbone(str(url), model, **entries)


@pytest.mark.parametrize("make", [mim, classifier])
def test_fingerprint_follows_the_weights_alone(tmp_path: Path, make: Callable[[], nn.Module]):
    model = make()
    first = save(tmp_path / "a", model)["fingerprint"]
    assert save(tmp_path / "b", model, run={"seed": 2})["fingerprint"] == first
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    assert save(tmp_path / "c", model)["fingerprint"] != first


def test_what_cannot_be_right_is_not_published(tmp_path: Path):
    with pytest.raises(ValueError, match="2 class names for 3 outputs"):
        save_classifier(str(tmp_path / "a"), classifier(), ["a", "b"])
    model = classifier()
    with torch.no_grad():
        model.head.bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"head\.bias"):
        save(tmp_path / "a", model)
    assert not (tmp_path / "a").exists()


def _edit(key: str, value: object) -> Callable[[Path, str], None]:
    """A change of the config in the header."""

    def edit(folder: Path, kind: str) -> None:
        path = folder / f"{kind}.json"
        header = json.loads(path.read_text())
        nested = header["config"].get("backbone") or {}
        (nested if key in nested else header["config"])[key] = value
        path.write_text(json.dumps(header))

    return edit


def _flip_a_bit(folder: Path, kind: str) -> None:
    path = folder / f"{kind}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _truncate(folder: Path, kind: str) -> None:
    path = folder / f"{kind}.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


BOTH = [
    (lambda folder, kind: (folder / f"{kind}.json").unlink(), "no finished KIND at"),
    (lambda folder, kind: (folder / f"{kind}.json").write_text("{"), r"KIND\.json"),
    (lambda folder, kind: (folder / f"{kind}.safetensors").unlink(), r"KIND\.safetensors"),
    (_flip_a_bit, r"KIND\.safetensors is damaged"),
    (_truncate, r"KIND\.safetensors is damaged"),
    (_edit("width", 32), r"cls_token is 1x1x16 in the weights, but 1x1x32"),
    (_edit("depth", 3), r"blocks\.2\.gamma_1 is absent in the weights"),
    (_edit("depth", 1), r"blocks\.1\.\S+ is .* but absent"),
    (_edit("width", "wide"), "damaged"),
    (_edit("colour", 1), "colour"),
]
OF_CLASSIFIERS = [
    (_edit("num_classes", 4), r"head\.weight is 3x16 in the weights, but 4x16"),
    (_edit("pooling", "cls"), r"norm\.weight is absent"),
    (_edit("backbone", None), "backbone"),
]


@pytest.mark.parametrize(
    ("kind", "damage", "text"),
    [(kind, *case) for kind in ("backbone", "classifier") for case in BOTH]
    + [("classifier", *case) for case in OF_CLASSIFIERS],
)
def test_an_absent_damaged_or_inconsistent_artifact_is_refused(tmp_path: Path, kind: str, damage, text: str):
    save(tmp_path, classifier() if kind == "classifier" else Backbone(BACKBONE))
    damage(tmp_path, kind)
    with pytest.raises(InputError, match=text.replace("KIND", kind)):
        load_classifier(str(tmp_path)) if kind == "classifier" else load_backbone(str(tmp_path))

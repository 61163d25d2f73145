"""`python -m jobs.export_backbone`: folders that timm, transformers and the official loaders take."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from jobs.export_backbone import ExportConfig, main
from pipeline import storage
from pipeline.errors import InputError
from pretrain.model.artifacts import save_backbone, save_classifier
from pretrain.model.backbone import Backbone, BackboneConfig
from pretrain.model.classifier import Classifier, ClassifierConfig
from pretrain.model.mim import MIM, MIMConfig, PatchAggregationConfig
from pretrain.model.official import official_finetuning
from tests.reference.shaken import shaken
from tokenizer.model.artifact import METRICS, save_tokenizer
from tokenizer.model.official import published_teacher, vqkd_from_official

SHAPE = BackboneConfig(image_size=24, patch_size=4, width=32, depth=2, heads=4)
EXACT = {"rtol": 1e-5, "atol": 1e-5}
NAMES = ["an apple", "a pear", "a | fig"]


@pytest.fixture
def backbone(tmp_path: Path) -> tuple[MIM, str]:
    """A pretrained model with its heads, and where it is."""
    model = shaken(MIM(SHAPE, MIMConfig(patch_aggregation=PatchAggregationConfig(layer=1)), 16))
    save_backbone(
        str(tmp_path / "backbone"),
        model,
        tokenizer={"fingerprint": "t" * 64, "teacher": {"name": "hog"}},
        inputs={"shards": "s" * 64},
        run={"metrics": {"loss": 5.4321}, "steps": 77},
    )
    return model, str(tmp_path / "backbone")


@pytest.fixture
def classifier(tmp_path: Path) -> tuple[Classifier, str]:
    """A fine-tuned model, and where it is."""
    model = shaken(Classifier(ClassifierConfig(backbone=SHAPE, num_classes=3)))
    save_classifier(str(tmp_path / "classifier"), model, NAMES, metrics={"top1": 0.875})
    return model, str(tmp_path / "classifier")


def export(url: str, output: Path | str, form: str, **settings: Any) -> Path:
    main(ExportConfig(backbone=url, format=form, output=str(output), **settings))  # type: ignore[arg-type]
    return Path(output)


def run_card(folder: Path, pixels: Tensor) -> dict[str, Any]:
    """What the Python of a model card leaves behind, run from the folder above."""
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    assert len([line for line in code.split("\n") if line]) == 3
    found: dict[str, Any] = {"pixels": pixels}
    with contextlib.chdir(folder.parent), torch.no_grad():
        exec(code, found)
    return found


def test_timm_loads_the_folder_by_the_lines_of_its_card(tmp_path: Path, backbone: tuple[MIM, str]):
    model, url = backbone
    folder = export(url, tmp_path / "out", "timm")
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors",
        "config.json",
        "README.md",
        "run.json",
    }
    pixels = torch.randn(2, 3, 24, 24)
    found = run_card(folder, pixels)
    theirs = found["model"]
    assert safetensors.torch.load_file(folder / "model.safetensors").keys() == theirs.state_dict().keys()
    with torch.no_grad():
        features = model.features(pixels)
    torch.testing.assert_close(found["tokens"][:, 0], features.cls, **EXACT)
    torch.testing.assert_close(found["tokens"][:, 1:], features.patches, **EXACT)
    assert tuple(theirs.pretrained_cfg["mean"]) == SHAPE.mean


def test_transformers_loads_the_folder_by_the_lines_of_its_card(tmp_path: Path, backbone: tuple[MIM, str]):
    model, url = backbone
    folder = export(url, tmp_path / "out", "transformers")
    pixels = torch.randn(2, 3, 24, 24)
    found = run_card(folder, pixels)
    with torch.no_grad():
        features = model.features(pixels)
    torch.testing.assert_close(found["tokens"][:, 1:], features.patches, **EXACT)
    _, told = found["BeitModel"].from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]


def test_transformers_classifies_and_prepares_images(tmp_path: Path, classifier: tuple[Classifier, str]):
    from PIL import Image
    from transformers import BeitImageProcessor

    model, url = classifier
    folder = export(url, tmp_path / "out", "transformers")
    picture = Image.effect_noise((30, 40), 80).convert("RGB")
    pixels = BeitImageProcessor.from_pretrained(folder)(picture, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 24, 24)
    found = run_card(folder, pixels)
    with torch.no_grad():
        torch.testing.assert_close(found["logits"], model(pixels), **EXACT)
    assert found["model"].config.id2label == dict(enumerate(NAMES))
    _, told = found["BeitForImageClassification"].from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]


def test_the_official_layouts_of_a_backbone(tmp_path: Path, backbone: tuple[MIM, str]):
    model, url = backbone
    folder = export(url, tmp_path / "out", "official")
    names = {
        f"{name}.{ending}" for name in ("pretraining", "finetuning") for ending in ("pth", "safetensors")
    }
    assert {path.name for path in folder.iterdir()} == {*names, "README.md", "run.json"}
    pretraining = torch.load(folder / "pretraining.pth", weights_only=True)["model"]
    assert pretraining.keys() == model.state_dict().keys() | {"rel_pos_bias.relative_position_index"}
    finetuning = torch.load(folder / "finetuning.pth", weights_only=True)["model"]
    table = model.state_dict()["rel_pos_bias.relative_position_bias_table"]
    for number in range(2):
        assert torch.equal(finetuning[f"blocks.{number}.attn.relative_position_bias_table"], table)
        index = finetuning[f"blocks.{number}.attn.relative_position_index"]
        assert index.shape == (37, 37) and index.dtype == torch.int64
    assert not any(key.startswith(("lm_head", "cls_pt", "mask", "rel_pos")) for key in finetuning)
    for name, state in (("pretraining", pretraining), ("finetuning", finetuning)):
        again = safetensors.torch.load_file(folder / f"{name}.safetensors")
        assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)

    one = export(url, tmp_path / "one", "official", layout="finetuning", image_size=32)
    assert {path.name for path in one.glob("*.pth")} == {"finetuning.pth"}
    resized = safetensors.torch.load_file(one / "finetuning.safetensors")
    assert resized["blocks.0.attn.relative_position_bias_table"].shape == (15 * 15 + 3, 4)


def test_the_official_layout_of_a_classifier(tmp_path: Path, classifier: tuple[Classifier, str]):
    model, url = classifier
    folder = export(url, tmp_path / "out", "official")
    state = torch.load(folder / "finetuning.pth", weights_only=True)["model"]
    expected = official_finetuning(model.state_dict(), SHAPE)
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)


def test_a_tokenizer_has_its_official_layout(
    tmp_path: Path, published_state: Callable[..., dict[str, Tensor]]
):
    given = published_state("vqkd_encoder_base_decoder_1x768x12_clip")
    save_tokenizer(
        str(tmp_path / "tokenizer"),
        vqkd_from_official(given, "file", heads=2),
        teacher=published_teacher(16),
        metrics=dict.fromkeys(METRICS, 0.5),
        inputs={"images": "i" * 64},
    )
    folder = export(str(tmp_path / "tokenizer"), tmp_path / "out", "official")
    state = torch.load(folder / "tokenizer.pth", weights_only=True)["model"]
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in state.items()} == {
        key: (tensor.shape, tensor.dtype) for key, tensor in given.items()
    }
    assert "i" * 64 in (folder / "README.md").read_text()
    with pytest.raises(InputError, match="official format"):
        export(str(tmp_path / "tokenizer"), tmp_path / "timm", "timm")


def test_the_card_tells_where_the_weights_come_from(
    tmp_path: Path, backbone: tuple[MIM, str], classifier: tuple[Classifier, str]
):
    card = (export(backbone[1], tmp_path / "a", "timm") / "README.md").read_text()
    for said in ("t" * 64, "s" * 64, "hog", "5.4321", "77", '"image_size": 24'):
        assert said in card
    card = (export(classifier[1], tmp_path / "b", "transformers") / "README.md").read_text()
    assert (
        re.search(r"^license:\s*(#.*)?$", card, re.M)
        and '"top1": 0.875' in card
        and "pipeline_tag: image-classification" in card
    )


@pytest.mark.filterwarnings("ignore:the store of memory")
def test_an_object_store_takes_it(backbone: tuple[MIM, str]):
    main(ExportConfig(backbone=backbone[1], format="timm", output="memory://exports/timm"))
    state = safetensors.torch.load(storage.read("memory://exports/timm/model.safetensors"))
    assert "blocks.1.attn.relative_position_bias_table" in state
    assert "local-dir:timm" in storage.read("memory://exports/timm/README.md").decode()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"image_size": 30}, "does not divide"),
        ({"layout": "pretraining", "form": "timm"}, "layout is for"),
        ({"layout": "pretraining", "form": "official", "url": "headless"}, "no pretraining heads"),
        ({"url": "nowhere"}, "no finished backbone, classifier or tokenizer at"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_anything_is_written(
    tmp_path: Path, backbone: tuple[MIM, str], settings: dict[str, Any], says: str
):
    save_backbone(str(tmp_path / "headless"), Backbone(SHAPE))
    settings = {"form": "timm", "url": "backbone", **settings}
    url, form = str(tmp_path / settings.pop("url")), settings.pop("form")
    with pytest.raises(InputError, match=says) as caught:
        export(url, tmp_path / "out", form, **settings)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_an_output_belongs_to_one_export(tmp_path: Path, backbone: tuple[MIM, str]):
    export(backbone[1], tmp_path / "out", "timm")
    with pytest.raises(InputError, match="belongs to another run"):
        export(backbone[1], tmp_path / "out", "transformers")

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from pipeline import artifacts, storage
from pipeline.errors import InputError
from tokenizer.model.artifact import WEIGHTS, VisualTokenizer, load_vqkd, read_tokenizer, save_tokenizer
from tokenizer.model.teacher import build_teacher
from tokenizer.model.teacher_config import TeacherConfig
from tokenizer.model.vqkd import VQKD, VQKDConfig, normalize_pixels

CONFIG = VQKDConfig(
    image_size=16,
    patch_size=4,
    width=32,
    depth=2,
    heads=2,
    decoder_depth=1,
    codebook_size=64,
    code_dim=8,
    kmeans_init=False,
)
METRICS = {"codebook_usage": 0.5, "perplexity": 20.0, "reconstruction_loss": 0.25}


def trained(seed: int = 0, **settings: Any) -> VQKD:
    """Some tokenizer; larger weights, so that images give many different codes."""
    torch.manual_seed(seed)
    model = VQKD(dataclasses.replace(CONFIG, **settings), 108)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def publish(url: str, model: VQKD, **changes: Any) -> dict[str, Any]:
    teacher = build_teacher(TeacherConfig(), 16, 4)
    given: dict[str, Any] = {
        "teacher": teacher,
        "metrics": METRICS,
        "inputs": {"images": "f" * 64},
        **changes,
    }
    return save_tokenizer(url, model, **given)


def pictures(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "tokenizer")


# ------------------------------------------------------------------------------------------------ round trip


@pytest.mark.parametrize("remote", [False, True])
def test_a_loaded_tokenizer_gives_the_codes_of_the_model(url: str, remote: bool):
    url = "memory://artifacts/tokenizer" if remote else url
    model, pixels = trained(), pictures(5)
    publish(url, model)
    tokenizer = VisualTokenizer.load(url)
    codes = tokenizer.encode(pixels)
    with torch.no_grad():
        assert torch.equal(codes, model.encode(normalize_pixels(pixels)))
    assert codes.shape == (5, 16) and codes.dtype == torch.int64
    assert len(codes.unique()) > 10 and int(codes.max()) < tokenizer.codebook_size
    assert torch.equal(tokenizer.encode(pixels.permute(0, 2, 3, 1).contiguous()), codes)


def test_the_whole_model_comes_back_with_its_decoder(url: str):
    model = trained()
    publish(url, model)
    back = load_vqkd(read_tokenizer(url))
    assert back.config == model.config.resolved() and not back.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)


def test_what_the_header_says(url: str):
    header = publish(url, trained(), run_config={"epochs": 3})
    artifact = read_tokenizer(url)
    assert artifact.header == header == json.loads(storage.read(storage.join(url, "tokenizer.json")))
    assert (artifact.codebook_usage, artifact.perplexity, artifact.reconstruction_loss) == (0.5, 20.0, 0.25)
    assert artifact.teacher["name"] == "hog" and artifact.target_dim == 108
    assert header["inputs"] == {"images": "f" * 64} and header["run_config"] == {"epochs": 3}
    assert header["files"].keys() == {WEIGHTS} and header["code_version"]


def test_the_spec_is_what_a_manifest_needs(url: str):
    publish(url, trained())
    spec = VisualTokenizer.load(url).spec.to_json()
    assert spec == json.loads(json.dumps(spec))
    assert (spec["codebook_size"], spec["code_dim"], spec["grid"]) == (64, 8, [4, 4])
    assert (spec["image_size"], spec["patch_size"], spec["precision"]) == (16, 4, "fp32")
    assert spec["teacher"]["name"] == "hog" and url not in json.dumps(spec)


def test_codes_can_be_targets_of_a_loss(url: str):
    """Tensors made in inference mode could not be saved for the backward pass."""
    publish(url, trained())
    codes = VisualTokenizer.load(url).encode(pictures(2)).flatten()
    logits = torch.zeros(len(codes), 64, requires_grad=True)
    torch.nn.functional.cross_entropy(logits, codes).backward()
    assert logits.grad is not None


# ------------------------------------------------------------------------------------------------ shapes


def test_codes_depend_on_the_image_alone(url: str):
    """Not on its place in the batch, the batch's size, or a fixed shape that short batches are padded to."""
    publish(url, trained())
    pixels = pictures(9)
    plain = VisualTokenizer.load(url)
    codes = plain.encode(pixels)
    for size in (1, 2, 4, 9, 16):
        assert torch.equal(torch.cat([plain.encode(part) for part in pixels.split(size)]), codes)
        assert torch.equal(VisualTokenizer.load(url, batch_size=size).encode(pixels), codes)
    order = torch.randperm(9)
    assert torch.equal(plain.encode(pixels[order]), codes[order])


def test_a_fixed_batch_size_is_the_only_shape_that_runs(url: str, monkeypatch: pytest.MonkeyPatch):
    publish(url, trained())
    tokenizer, seen = VisualTokenizer.load(url, batch_size=4), []
    encode = VQKD.encode_features
    monkeypatch.setattr(VQKD, "encode_features", lambda self, x: (seen.append(len(x)), encode(self, x))[1])
    for count in (1, 4, 7, 8):
        assert tokenizer.encode(pictures(count)).shape == (count, 16)
    assert seen == [4] * 6


@pytest.mark.parametrize(
    "pixels", [pictures(2).float(), pictures(2)[:, :, :15], pictures(2)[0], torch.zeros(1, 3, 32, 32).byte()]
)
def test_other_images_are_refused(url: str, pixels: Tensor):
    publish(url, trained())
    with pytest.raises(InputError, match=r"uint8|image size 16"):
        VisualTokenizer.load(url).encode(pixels)


# ------------------------------------------------------------------------------------------------ identity


def changed(model: VQKD, name: str) -> VQKD:
    with torch.no_grad():
        model.state_dict()[name].view(-1)[3] += 0.01
    return model


def fingerprint_of(tmp_path: Path, model: VQKD, name: str = "other", **changes: Any) -> str:
    return publish(str(tmp_path / name), model, **changes)["fingerprint"]


@pytest.mark.parametrize(
    ("name", "decides"),
    [
        ("decoder.blocks.0.mlp.fc1.weight", False),
        ("decode_task_layer.2.bias", False),
        ("quantize.cluster_size", False),
        ("encoder.blocks.1.attn.q_bias", True),
        ("encode_task_layer.2.weight", True),
        ("quantize.embedding.weight", True),
    ],
)
def test_the_fingerprint_follows_what_decides_codes(tmp_path: Path, name: str, decides: bool):
    base = fingerprint_of(tmp_path, trained(), "base")
    assert (fingerprint_of(tmp_path, changed(trained(), name)) != base) == decides


def test_metrics_inputs_and_place_do_not_change_the_fingerprint(tmp_path: Path):
    base = fingerprint_of(tmp_path, trained(), "base")
    others = {"metrics": {**METRICS, "perplexity": 3.0}, "inputs": {}, "run_config": {"seed": 1}}
    assert fingerprint_of(tmp_path, trained(), "elsewhere", **others) == base


def test_heads_change_the_fingerprint_though_the_tensors_are_the_same(tmp_path: Path):
    base = fingerprint_of(tmp_path, trained(), "base")
    assert fingerprint_of(tmp_path, trained(heads=4, decoder_heads=2)) != base


def test_precision_is_part_of_the_codes_identity(url: str):
    publish(url, trained())
    exact, half = VisualTokenizer.load(url), VisualTokenizer.load(url, precision="bf16")
    assert exact.fingerprint != half.fingerprint and half.spec.precision == "bf16"
    assert exact.spec.artifact_fingerprint == half.spec.artifact_fingerprint
    assert VisualTokenizer.load(url, precision="auto").fingerprint == exact.fingerprint  # on CPU
    agreement = (exact.encode(pictures(20)) == half.encode(pictures(20))).float().mean()
    assert agreement > 0.8


# ------------------------------------------------------------------------------------------------ refusals


def test_an_absent_or_unfinished_tokenizer_is_refused(url: str):
    with pytest.raises(InputError, match="no finished tokenizer"):
        VisualTokenizer.load(url)
    publish(url, trained())
    storage.remove(storage.join(url, "tokenizer.json"))
    with pytest.raises(InputError, match="no finished tokenizer"):
        VisualTokenizer.load(url)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damaged_weights_are_refused_by_name(url: str, damage: str):
    publish(url, trained())
    location = storage.join(url, WEIGHTS)
    data = bytearray(storage.read(location))
    match damage:
        case "flip":
            data[-100] ^= 1
            storage.put(location, bytes(data))
        case "cut":
            storage.put(location, bytes(data[:-1]))
        case "gone":
            storage.remove(location)
    with pytest.raises(InputError, match=WEIGHTS):
        VisualTokenizer.load(url)


def rewritten(url: str, header: dict[str, Any], tensors: bytes) -> None:
    """The artifact with other contents whose sizes and hashes are right."""
    kept = {key: value for key, value in header.items() if key not in ("files", "code_version")}
    artifacts.publish(url, "tokenizer", {WEIGHTS: tensors}, kept)


def test_weights_of_another_tokenizer_are_refused(url: str, tmp_path: Path):
    header = publish(url, trained(0))
    publish(str(tmp_path / "other"), trained(1))
    rewritten(url, header, storage.read(str(tmp_path / "other" / WEIGHTS)))
    with pytest.raises(InputError, match=rf"{WEIGHTS} has fingerprint .* tokenizer.json says"):
        VisualTokenizer.load(url)


def test_a_config_that_does_not_fit_the_weights_is_refused(url: str):
    header = publish(url, trained())
    rewritten(
        url, {**header, "config": {**header["config"], "depth": 3}}, storage.read(storage.join(url, WEIGHTS))
    )
    with pytest.raises(InputError, match=f"{WEIGHTS} does not fit"):
        VisualTokenizer.load(url)


def test_something_that_is_no_safetensors_is_refused(url: str):
    rewritten(url, publish(url, trained()), b"not tensors at all")
    with pytest.raises(InputError, match=f"{WEIGHTS} is not a safetensors file"):
        VisualTokenizer.load(url)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "backbone"},
        {"format_version": 2},
        {"metrics": {}},
        {"config": {"image_size": 16, "colour": "red"}},
        {"config": {"image_size": 17}},
    ],
)
def test_a_header_of_another_kind_is_refused(url: str, change: dict[str, Any]):
    header = publish(url, trained())
    rewritten(url, {**header, **change}, storage.read(storage.join(url, WEIGHTS)))
    with pytest.raises(InputError) as caught:
        read_tokenizer(url)
    assert "\n" not in str(caught.value)


def test_a_codebook_that_never_started_is_neither_published_nor_loaded(url: str):
    with pytest.raises(ValueError, match="non-finite"):
        publish(url, trained(kmeans_init=True))
    header = publish(url, trained())
    tensors = load_tensors(storage.read(storage.join(url, WEIGHTS)))
    tensors["quantize.embedding.initted"].zero_()
    rewritten(url, header, save_tensors(tensors))
    with pytest.raises(InputError, match="never started"):
        VisualTokenizer.load(url)


def test_metrics_that_were_not_measured_are_null_and_missing_ones_are_refused(url: str):
    publish(url, trained(), metrics={**METRICS, "perplexity": math.nan, "steps": 7})
    assert read_tokenizer(url).perplexity is None and read_tokenizer(url).header["metrics"]["steps"] == 7
    with pytest.raises(ValueError, match="codebook_usage"):
        publish(url, trained(), metrics={"perplexity": 1.0, "reconstruction_loss": 0.1})

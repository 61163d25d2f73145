"""`python -m jobs.import_checkpoint`: published files become artifacts, or one line says why not."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from jobs.import_checkpoint import ImportConfig, main
from pipeline.errors import InputError
from pretrain.model.artifacts import load_backbone, load_classifier, load_mim, read_backbone_header
from tokenizer.model.artifact import VisualTokenizer, read_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PublishedState = Callable[..., dict[str, Tensor]]

TOKENIZER = "vqkd_encoder_base_decoder_3x768x12_clip"
PRETRAINED = "beit_base_patch16_224_8k_vocab_cls_pt"
FINETUNED = "finetune_beit_base_patch16_224"


def checkpoint(path: Path, state: dict[str, Any]) -> Path:
    """As the official code saves it in training: with optimizer, arguments and the rest."""
    torch.save(
        {
            "model": state,
            "optimizer": {
                "state": {0: {"step": 3, "exp_avg": torch.zeros(4)}},
                "param_groups": [{"lr": 0.1}],
            },
            "epoch": 99,
            "scaler": {"scale": 65536.0},
            "args": argparse.Namespace(model="beit", input_size=224, opt_betas=[0.9, 0.98], output_dir=None),
        },
        path,
    )
    return path


def run(source: Path | str, output: Path, **settings: Any) -> None:
    main(ImportConfig(source=str(source), output=str(output), **settings))


def test_a_tokenizer(tmp_path: Path, published_state: PublishedState, capsys: pytest.CaptureFixture[str]):
    state = published_state(TOKENIZER)
    extra = {"teacher_model.visual.proj": torch.zeros(3), "scaling_layer.shift": torch.zeros(1, 3, 1, 1)}
    run(checkpoint(tmp_path / "x.pth", {**state, **extra}), tmp_path / "out", heads=12)
    artifact = read_tokenizer(str(tmp_path / "out"))
    assert artifact.config.decoder_depth == 3 and artifact.target_dim == 16
    assert artifact.perplexity is None and artifact.header["inputs"].keys() == {"checkpoint"}
    assert artifact.header["run_config"]["imported_from"] == str(tmp_path / "x.pth")
    codes = VisualTokenizer.load(str(tmp_path / "out")).encode(torch.zeros(1, 224, 224, 3, dtype=torch.uint8))
    assert codes.shape == (1, 196)
    said = capsys.readouterr().out
    assert "tokenizer, encoder 24 x 12 with 12 heads" in said and "not of unit length" in said


def test_what_is_assumed_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from tokenizer.model.vqkd import VQKD, VQKDConfig

    torch.manual_seed(0)
    shape = VQKDConfig(
        image_size=16, patch_size=8, width=64, depth=1, heads=1, decoder_depth=1, codebook_size=8, code_dim=4,
        kmeans_init=False,
    )  # fmt: skip
    safetensors.torch.save_file(VQKD(shape, 512).state_dict(), tmp_path / "x.safetensors")
    run(tmp_path / "x.safetensors", tmp_path / "out")
    said = capsys.readouterr().out
    assert "1 heads (assumed: width / 64)" in said and "unit length" not in said
    assert read_tokenizer(str(tmp_path / "out")).teacher["name"] == "open_clip:ViT-B-16"


def test_a_pretrained_backbone(
    tmp_path: Path, published_state: PublishedState, capsys: pytest.CaptureFixture[str]
):
    state = published_state(PRETRAINED)
    run(checkpoint(tmp_path / "x.pth", state), tmp_path / "out", mean=(0.5, 0.5, 0.5))
    loaded = load_mim(str(tmp_path / "out")).state_dict()
    assert loaded.keys() == state.keys() - {"rel_pos_bias.relative_position_index"}
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.items())
    assert load_backbone(str(tmp_path / "out")).config.mean == (0.5, 0.5, 0.5)
    assert read_backbone_header(str(tmp_path / "out"))["run"]["config"]["mean"] == [0.5, 0.5, 0.5]
    assert "a second head after block 9 (assumed: the third from the end)" in capsys.readouterr().out


def test_a_classifier_with_its_class_names(tmp_path: Path, published_state: PublishedState):
    state = published_state(FINETUNED)
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    names = [f"n{number:08d}" for number in range(1000)]
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
    run(tmp_path / "x.safetensors", tmp_path / "out", class_names=str(tmp_path / "names.txt"))
    model, header = load_classifier(str(tmp_path / "out"))
    assert header["class_names"] == names and model.config.pooling == "mean"
    assert torch.equal(model.state_dict()["blocks.7.attn.qkv.weight"], state["blocks.7.attn.qkv.weight"])

    (tmp_path / "names.txt").write_text("cat\ndog\n")
    with pytest.raises(InputError, match="2 class names, but the model 1000"):
        run(tmp_path / "x.safetensors", tmp_path / "other", class_names=str(tmp_path / "names.txt"))
    assert not (tmp_path / "other").exists()


def test_half_precision_comes_in_as_float32(tmp_path: Path, published_state: PublishedState):
    state = published_state(FINETUNED)
    half = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    run(checkpoint(tmp_path / "x.pth", half), tmp_path / "out")
    found = load_classifier(str(tmp_path / "out"))[0].state_dict()["head.weight"]
    assert found.dtype == torch.float32 and torch.equal(found, half["head.weight"].float())


def test_an_output_belongs_to_one_checkpoint(tmp_path: Path, published_state: PublishedState):
    first = checkpoint(tmp_path / "a.pth", published_state(FINETUNED))
    second = checkpoint(tmp_path / "b.pth", published_state(FINETUNED, seed=1))
    run(first, tmp_path / "out")
    run(first, tmp_path / "out")
    before = (tmp_path / "out" / "classifier.json").read_bytes()
    with pytest.raises(InputError, match="belongs to another run"):
        run(second, tmp_path / "out")
    assert (tmp_path / "out" / "classifier.json").read_bytes() == before


# ------------------------------------------------------------------------------------------------ bad input


class Trap:
    """What a hostile pickle does on loading: it makes a file."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.victim), "w")


def _truncated(path: Path, state: dict[str, Tensor]) -> None:
    data = checkpoint(path, state).read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _of_a_resnet(path: Path, state: dict[str, Tensor]) -> None:
    del state
    checkpoint(path, {"conv1.weight": torch.zeros(64, 3, 7, 7), "bn1.weight": torch.zeros(64)})


def _with_code(path: Path, state: dict[str, Tensor]) -> None:
    checkpoint(path, {**state, "blocks.0.norm1.bias": Trap(path.with_name("victim"))})


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (_truncated, "cut or damaged"),
        (_of_a_resnet, r"conv1\.weight is no key of BEiT v2"),
        (_with_code, r"asks for \S*open, which could run code; nothing was executed"),
        (lambda path, state: None, "no such file"),
    ],
)
def test_what_cannot_be_imported_is_refused_before_anything_is_written(
    tmp_path: Path, published_state: PublishedState, write: Callable[..., None], says: str
):
    path = tmp_path / "x.pth"
    write(path, published_state(PRETRAINED))
    with pytest.raises(InputError, match=says) as caught:
        run(path, tmp_path / "out")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert {found.name for found in tmp_path.iterdir()} <= {"x.pth"}

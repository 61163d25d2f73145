from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from pipeline.errors import InputError
from pretrain.finetune.start import from_backbone, from_scratch, from_teacher, from_tokenizer
from pretrain.finetune.train import finetune_classifier
from pretrain.model.artifacts import load_classifier, save_classifier
from pretrain.model.classifier import Classifier
from pretrain.model.size import BackboneSize
from tests.pretrain.finetune.conftest import (
    NAMES,
    PATCH,
    SIDE,
    Make,
    equal,
    goal_of,
    pictures,
    weights_of,
    write_images,
)
from tokenizer.model.artifact import load_vqkd, read_tokenizer, save_tokenizer
from tokenizer.model.teacher import build_teacher
from tokenizer.model.teacher_config import TeacherConfig
from tokenizer.model.vqkd import VQKD, VQKDConfig, normalize_pixels

FROM_NOTHING: dict[str, Any] = {"backbone": None, "patch_size": PATCH, "image_size": SIDE, "epochs": 1}


def test_a_backbone_gives_its_blocks_and_one_table_each(backbone: str) -> None:
    held = safetensors.torch.load_file(Path(backbone) / "backbone.safetensors")
    state = from_backbone(backbone, goal_of()).model.state_dict()
    table = held["rel_pos_bias.relative_position_bias_table"]
    for block in range(2):
        assert torch.equal(state[f"blocks.{block}.attn.relative_position_bias_table"], table)
    assert torch.equal(state["blocks.1.mlp.fc1.weight"], held["blocks.1.mlp.fc1.weight"])
    assert torch.equal(state["fc_norm.weight"], torch.ones(32)) and "norm.weight" not in state
    by_cls = from_backbone(backbone, goal_of(pooling="cls")).model.state_dict()
    assert torch.equal(by_cls["norm.weight"], held["norm.weight"]) and "fc_norm.weight" not in by_cls


def test_another_resolution_resizes_the_tables(backbone: str) -> None:
    start = from_backbone(backbone, goal_of(image_size=24, drop_path=0.3))
    assert start.image_size == 24
    table = start.model.state_dict()["blocks.0.attn.relative_position_bias_table"]
    assert table.shape == ((2 * 6 - 1) ** 2 + 3, 2)
    assert start.model(start.model.normalize(pictures(24))).shape == (3, 4)
    assert isinstance(start.model, Classifier) and start.model.config.backbone.drop_path == 0.3
    with pytest.raises(InputError, match="does not divide by patch_size"):
        from_backbone(backbone, goal_of(image_size=18))


def test_a_fresh_head_is_drawn_from_the_seed_and_scaled(backbone: str) -> None:
    def head(scale: float) -> Tensor:
        torch.manual_seed(5)
        return from_backbone(backbone, goal_of(head_init_scale=scale)).model.state_dict()["head.weight"]

    assert torch.equal(head(1.0), head(1.0)) and torch.allclose(head(0.001), 0.001 * head(1.0))
    assert 0.015 < float(head(1.0).std()) < 0.025


def test_a_classifier_is_an_input_of_the_next_run(make_config: Make, straight: str, tmp_path: Path) -> None:
    """Intermediate fine-tuning: the head stays where the classes are the same, and is new elsewhere."""
    held = weights_of(straight)
    kept = from_backbone(straight, goal_of()).model.state_dict()
    assert equal(kept, held)
    fresh = from_backbone(straight, goal_of(new_head=True)).model.state_dict()
    other = from_backbone(straight, goal_of(num_classes=3, class_names=NAMES[:3])).model.state_dict()
    for state in (fresh, other):
        assert not torch.equal(state["head.weight"][:3], held["head.weight"][:3])
        assert all(torch.equal(state[name], held[name]) for name in held if not name.startswith("head."))
    swapped = goal_of(class_names=("bee", "ant", "cat", "dog"))
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
    start = from_scratch(size, goal_of(image_size=SIDE), patch_size=PATCH)
    assert start.image_size == SIDE and start.origin == {"kind": "scratch"}
    config = make_config(tmp_path / "out", init="scratch", scratch=size, **FROM_NOTHING)
    finetune_classifier(config)
    assert load_classifier(config.output)[1]["inputs"].keys() == {"train", "val"}
    ours, theirs = weights_of(config.output), start.model.state_dict()
    assert {name: x.shape for name, x in ours.items()} == {name: x.shape for name, x in theirs.items()}


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
    start = from_tokenizer(tokenizer, goal_of())
    vqkd = load_vqkd(read_tokenizer(tokenizer))
    assert isinstance(start.model, Classifier)
    with torch.no_grad():
        found = start.model.eval().forward_tokens(start.model.normalize(pictures()))[:, 1:]
        expected = vqkd.encoder(normalize_pixels(pictures()))
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
    goal = goal_of(image_size=SIDE, drop_path=0.2)
    start = from_teacher(teacher, goal, patch_size=PATCH)
    frozen = build_teacher(teacher, SIDE, PATCH)
    with torch.no_grad():
        logits = start.model.eval()(start.model.normalize(pictures()))
        expected = start.model.head(frozen(pictures()).mean(dim=1))
    torch.testing.assert_close(logits, expected)
    start.model.train()(start.model.normalize(pictures())).sum().backward()
    assert all(p.grad is not None for p in start.model.parameters())  # as data parallelism needs
    assert sum(module.drop_prob or 0 for module in start.model.modules() if hasattr(module, "drop_prob")) > 0

    config = make_config(tmp_path / "out", init="teacher", teacher=teacher, **FROM_NOTHING)
    finetune_classifier(config)
    weights = weights_of(config.output)
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
    fixture = shared_dir / "reference" / "fixtures" / "vqkd_tiny_kmeans_init.safetensors"
    state, prefix = safetensors.torch.load_file(fixture), "teacher_model."
    tower = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
    safetensors.torch.save_file(tower, tmp_path / "clip.safetensors")
    clip = TeacherConfig(
        name="open_clip:ViT-finetuned", pretrained=str(tmp_path / "clip.safetensors"), force_quick_gelu=True
    )
    start = from_teacher(clip, goal_of(image_size=64), patch_size=16)
    assert start.model.head.in_features == 64
    frozen = build_teacher(clip, 64, 16)
    pixels = start.model.normalize(pictures(64))
    with torch.no_grad():
        projected = start.model.eval().body(pixels) @ frozen.body.visual.proj
        torch.testing.assert_close(projected, frozen(pictures(64)), atol=1e-5, rtol=1e-5)
    start.model.train()(pixels).sum().backward()
    assert all(p.grad is not None for p in start.model.parameters())
    with pytest.raises(InputError, match="set drop_path to 0"):
        from_teacher(clip, goal_of(image_size=64, drop_path=0.1), patch_size=16)


def test_save_classifier_is_what_the_next_run_reads(tmp_path: Path) -> None:
    """An artifact made elsewhere (an imported checkpoint) without class names keeps its head."""
    torch.manual_seed(0)
    size = BackboneSize(width=32, depth=1, heads=2)
    model = from_scratch(size, goal_of(image_size=SIDE), patch_size=PATCH).model
    assert isinstance(model, Classifier)
    save_classifier(str(tmp_path / "imported"), model, None)
    assert equal(from_backbone(str(tmp_path / "imported"), goal_of()).model.state_dict(), model.state_dict())

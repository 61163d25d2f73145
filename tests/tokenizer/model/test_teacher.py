from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import InputError
from tokenizer.model.hog import Hog
from tokenizer.model.teacher import build_teacher, hash_tensors
from tokenizer.model.teacher_config import TeacherConfig


def pictures(size: int, count: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


# ------------------------------------------------------------------------------------------------ hog


def test_hog_needs_nothing_and_describes_the_pixels():
    teacher = build_teacher(TeacherConfig(), 112, 8)
    pixels = pictures(112)
    assert (teacher.dim, teacher.grid, teacher.input_size) == (28, 14, 112)
    assert torch.equal(teacher(pixels), Hog(8)(pixels.float() / 255))
    assert torch.equal(teacher(pixels.permute(0, 2, 3, 1)), teacher(pixels))
    assert teacher.spec == {"name": "hog", "dim": 28, "input_size": 112, "fingerprint": teacher.fingerprint}
    json.dumps(teacher.spec)


def test_hog_at_another_input_size_keeps_the_grid():
    teacher = build_teacher(TeacherConfig(input_size=64), 32, 8)
    assert (teacher.grid, teacher.input_size) == (4, 64)
    pixels = pictures(32)
    larger = F.interpolate(pixels.float() / 255, (64, 64), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(teacher(pixels), Hog(16)(larger))
    assert teacher.fingerprint != build_teacher(TeacherConfig(), 32, 8).fingerprint


# ------------------------------------------------------------------------------------------------ timm


@pytest.fixture(scope="module")
def cifar(shared_dir: Path) -> TeacherConfig:
    described = json.loads((shared_dir / "data" / "cifar10-teacher.json").read_text())
    return TeacherConfig(
        name=f"timm:{described['timm_model']}",
        pretrained=str(shared_dir / "data" / "cifar10-teacher.safetensors"),
        mean=tuple(described["mean"]),
        std=tuple(described["std"]),
        model_kwargs=described["timm_kwargs"],
    )


def test_a_timm_checkpoint_gives_its_patch_features(cifar: TeacherConfig):
    import timm

    teacher = build_teacher(cifar, 32, 4)
    assert (teacher.dim, teacher.grid, teacher.input_size) == (192, 8, 32)
    model = timm.create_model("vit_tiny_patch16_224", **cifar.model_kwargs).eval()
    model.load_state_dict(load_file(str(cifar.pretrained)))
    pixels = pictures(32)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (cifar.mean, cifar.std))
    with torch.no_grad():
        expected = model.forward_features((pixels.float() / 255 - mean) / std)[:, 1:]
    found = teacher(pixels)
    torch.testing.assert_close(found, expected)
    assert found.dtype == torch.float32 and not found.requires_grad


def test_a_teacher_stays_frozen_and_in_evaluation_mode(cifar: TeacherConfig):
    teacher = build_teacher(cifar, 32, 4).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_input_size_resamples_the_positions(cifar: TeacherConfig):
    larger = build_teacher(TeacherConfig(**{**vars(cifar), "input_size": 48}), 48, 4)
    assert (larger.grid, larger.input_size) == (12, 48)
    assert larger(pictures(48)).shape == (2, 144, 192)


def test_a_grid_that_does_not_fit_is_refused_with_both_sizes_and_the_way_out(cifar: TeacherConfig):
    with pytest.raises(InputError, match=r"8x8.*14x14") as caught:
        build_teacher(cifar, 224, 16)
    assert "input_size to 56" in str(caught.value) and "\n" not in str(caught.value)
    mended = TeacherConfig(**{**vars(cifar), "input_size": 56})
    assert build_teacher(mended, 224, 16).grid == 14


def test_the_fingerprint_follows_the_weights_and_the_input_not_the_place(
    cifar: TeacherConfig, tmp_path: Path
):
    tensors = load_file(str(cifar.pretrained))
    elsewhere, other = str(tmp_path / "copy.safetensors"), str(tmp_path / "other.safetensors")
    save_file(tensors, elsewhere)
    tensors["blocks.5.mlp.fc2.bias"][7] += 1e-3
    save_file(tensors, other)

    def fingerprint(**changes: Any) -> str:
        return build_teacher(TeacherConfig(**{**vars(cifar), **changes}), 32, 4).fingerprint

    assert fingerprint(pretrained=elsewhere) == fingerprint()
    assert fingerprint(pretrained=other) != fingerprint()
    assert fingerprint(mean=(0.5, 0.5, 0.5)) != fingerprint()


def test_a_mean_pooled_model_gives_normalised_tokens(tmp_path: Path):
    """BEiT's last norm stands behind the pooling; its features without it have arbitrary scale."""
    import timm

    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    torch.manual_seed(0)
    model = timm.create_model("beitv2_base_patch16_224", num_classes=3, **kwargs).eval()
    save_file(model.state_dict(), str(tmp_path / "beit.safetensors"))
    config = TeacherConfig(
        name="timm:beitv2_base_patch16_224",
        pretrained=str(tmp_path / "beit.safetensors"),
        model_kwargs=kwargs,
    )
    found = build_teacher(config, 32, 8)(pictures(32))
    assert found.shape == (2, 16, 48)
    torch.testing.assert_close(found.mean(-1), torch.zeros(2, 16), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.std(-1, correction=0), torch.ones(2, 16), atol=1e-2, rtol=0)


# ------------------------------------------------------------------------------------------------ open_clip


@pytest.fixture(scope="module")
def clip(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TeacherConfig:
    """The fixtures' tiny CLIP image tower, under a name of its own, its weights in a file."""
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    vision = {"image_size": 64, "layers": 2, "width": 64, "head_width": 64, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 16, "width": 32, "heads": 1, "layers": 1}
    described = {"embed_dim": 512, "vision_cfg": vision, "text_cfg": text}
    (folder / "ViT-fixture.json").write_text(json.dumps(described))
    open_clip.add_model_config(folder / "ViT-fixture.json")
    init = load_file(str(shared_dir / "reference" / "fixtures" / "vqkd_tiny_kmeans_init.safetensors"))
    prefix = "teacher_model."
    weights = {n.removeprefix(prefix): t for n, t in init.items() if n.startswith(prefix)}
    save_file(weights, str(folder / "clip.safetensors"))
    torch.save({"state_dict": {f"module.{n}": t for n, t in weights.items()}}, folder / "clip.pt")
    return TeacherConfig(
        name="open_clip:ViT-fixture", pretrained=str(folder / "clip.safetensors"), force_quick_gelu=True
    )


def test_clip_targets_are_the_references(clip: TeacherConfig, shared_dir: Path):
    teacher = build_teacher(clip, 64, 16)
    assert (teacher.dim, teacher.grid, teacher.input_size) == (512, 4, 64)
    with np.load(shared_dir / "reference" / "fixtures" / "vqkd_tiny_kmeans_train_io.npz") as io:
        images, given, target = (torch.from_numpy(io[n]) for n in ("images", "teacher_input", "target"))
    torch.testing.assert_close((images - teacher.mean) / teacher.std, given, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(teacher.body(given), target, atol=1e-5, rtol=1e-5)
    pixels = (images * 255).round().to(torch.uint8)
    by_hand = teacher.body((pixels.float() / 255 - teacher.mean) / teacher.std)
    torch.testing.assert_close(teacher(pixels), by_hand)


def test_clip_weights_from_pt_and_at_another_size(clip: TeacherConfig):
    pt = TeacherConfig(**{**vars(clip), "pretrained": clip.pretrained.replace(".safetensors", ".pt")})  # type: ignore[union-attr]
    assert build_teacher(pt, 64, 16).fingerprint == build_teacher(clip, 64, 16).fingerprint
    larger = build_teacher(TeacherConfig(**{**vars(clip), "input_size": 96}), 96, 16)
    assert larger.grid == 6 and larger(pictures(96)).shape == (2, 36, 512)
    with pytest.raises(InputError, match=r"4x4.*6x6"):
        build_teacher(clip, 96, 16)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"name": "clip"}, "open_clip:<model>"),
        ({"name": "timm:"}, "timm:<model>"),
        ({"name": "timm:vit_tiny_patch16_22", "pretrained": "x.pt"}, "near it: vit_tiny_patch16_224"),
        ({"name": "timm:vit_tiny_patch16_224"}, "needs weights"),
        (
            {"name": "timm:vit_tiny_patch16_224", "pretrained": "/none/x.pt"},
            "cannot read /none/x.pt",
        ),
        (
            {"name": "timm:vit_tiny_patch16_224", "pretrained": "x.pt", "model_kwargs": {"dept": 3}},
            "'dept'",
        ),
        ({"name": "timm:resnet10t", "pretrained": "x.pt", "force_quick_gelu": True}, "open_clip"),
        ({"name": "open_clip:ViT-B-61", "pretrained": "openai"}, "ViT-B-16"),
        ({"name": "open_clip:ViT-B-16"}, "needs weights"),
        ({"name": "open_clip:ViT-B-16", "pretrained": "opnai"}, "openai"),
        ({"name": "open_clip:ViT-B-16", "pretrained": "openai", "model_kwargs": {"a": 1}}, "timm"),
        ({"pretrained": "openai"}, "hog takes no"),
        ({"input_size": 30}, "multiple of 4"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(settings: dict[str, Any], says: str):
    with pytest.raises(InputError) as caught:
        build_teacher(TeacherConfig(**settings), 32, 8)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_weights_that_do_not_fit_are_refused(cifar: TeacherConfig, tmp_path: Path):
    tensors = load_file(str(cifar.pretrained))
    del tensors["norm.weight"]
    save_file(tensors, str(tmp_path / "short.safetensors"))
    with pytest.raises(InputError, match=r"short.safetensors does not fit.*norm.weight"):
        build_teacher(
            TeacherConfig(**{**vars(cifar), "pretrained": str(tmp_path / "short.safetensors")}), 32, 4
        )
    with pytest.raises(InputError, match="does not fit"):
        build_teacher(TeacherConfig(**{**vars(cifar), "model_kwargs": {"img_size": 32}}), 32, 4)


def test_a_model_without_tokens_is_refused(tmp_path: Path):
    import timm

    model = timm.create_model("resnet10t", num_classes=0)
    save_file(model.state_dict(), str(tmp_path / "resnet.safetensors"))
    config = TeacherConfig(name="timm:resnet10t", pretrained=str(tmp_path / "resnet.safetensors"))
    with pytest.raises(InputError, match="not tokens"):
        build_teacher(config, 224, 16)


class Trap:
    """What a hostile pickle does on loading."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('code from data was run')",))


def test_code_in_a_file_of_weights_is_refused_and_not_run(cifar: TeacherConfig, tmp_path: Path):
    torch.save({"cls_token": Trap()}, tmp_path / "weights.pt")
    with pytest.raises(InputError, match=r"weights.pt asks for"):
        build_teacher(TeacherConfig(**{**vars(cifar), "pretrained": str(tmp_path / "weights.pt")}), 32, 4)


def test_hash_tensors_sees_names_shapes_types_and_bytes():
    base = {"a": torch.arange(6.0), "b": torch.ones(2, 3)}
    variants = [
        base,
        {"a": torch.arange(6.0), "c": torch.ones(2, 3)},
        {"a": torch.arange(6.0), "b": torch.ones(3, 2)},
        {"a": torch.arange(6.0), "b": torch.ones(2, 3).half()},
        {"a": torch.arange(6.0) + 1e-6, "b": torch.ones(2, 3)},
    ]
    assert len({hash_tensors(tensors) for tensors in variants}) == len(variants)
    strided = torch.stack([base["b"], base["b"]], dim=-1)[..., 0]
    assert hash_tensors({"b": strided, "a": base["a"]}) == hash_tensors(base)
    scalar = hashlib.sha256(b"s:torch.int64:[];" + (5).to_bytes(8, "little")).hexdigest()
    assert hash_tensors({"s": torch.tensor(5)}) == scalar

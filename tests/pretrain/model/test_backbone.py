from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import InputError
from pretrain.model.backbone import Backbone, BackboneConfig
from pretrain.model.mim import MIM, MIMConfig, PatchAggregationConfig
from pretrain.model.positions import relative_position_index
from pretrain.model.size import BackboneSize
from tests.reference.shaken import shaken

CONFIG = BackboneConfig(image_size=24, patch_size=4, width=32, depth=3, heads=4)


def build_mim(layer: int | None = 2, *, share: bool = True) -> MIM:
    aggregation = PatchAggregationConfig(layer=layer, share_mim_head=share)
    model = MIM(CONFIG, MIMConfig(patch_aggregation=aggregation), codebook_size=16)
    shaken(model)
    return model


@pytest.mark.parametrize("grid", [(2, 2), (3, 5), (14, 14)])
def test_relative_position_index_is_the_published_layout(grid):
    rows, columns = grid
    index = relative_position_index(grid)
    last = (2 * rows - 1) * (2 * columns - 1) + 2
    assert index[0, 0] == last
    assert (index[0, 1:] == last - 2).all() and (index[1:, 0] == last - 1).all()
    for query in range(rows * columns):
        for key in range(0, rows * columns, max(1, columns - 2)):
            dy = query // columns - key // columns
            dx = query % columns - key % columns
            row = (dy + rows - 1) * (2 * columns - 1) + dx + columns - 1
            assert index[1 + query, 1 + key] == row
    # Every displacement occurs, so no table row is dead.
    assert len(index.unique()) == last + 1


def test_features_are_timms_with_a_shared_table():
    from timm.models.beit import Beit

    theirs = Beit(
        img_size=24, patch_size=4, embed_dim=32, depth=3, num_heads=4, init_values=0.1, num_classes=0,
        use_abs_pos_emb=False, use_shared_rel_pos_bias=True, global_pool="token",
    ).eval()  # fmt: skip
    model = Backbone(CONFIG).eval()
    shaken(model)
    found = theirs.load_state_dict(model.state_dict(), strict=False)
    assert found.unexpected_keys == ["mask_token"]
    assert [key for key in found.missing_keys if "k_bias" not in key and "index" not in key] == []

    pixels = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        features = model.features(pixels)
        expected = theirs.forward_features(pixels)
    torch.testing.assert_close(features.cls, expected[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features.patches, expected[:, 1:], rtol=1e-5, atol=1e-5)


def test_mask_token_replaces_masked_patches_and_nothing_else():
    model = Backbone(CONFIG)
    shaken(model)
    pixels = torch.randn(2, 3, 24, 24)
    mask = torch.rand(2, 36, generator=torch.Generator().manual_seed(1)) < 0.4
    plain, masked = model.embed(pixels), model.embed(pixels, mask)
    torch.testing.assert_close(masked[:, 0], plain[:, 0], rtol=0, atol=0)
    torch.testing.assert_close(masked[:, 1:][~mask], plain[:, 1:][~mask], rtol=0, atol=0)
    token = model.mask_token.reshape(1, -1).expand(int(mask.sum()), -1)
    torch.testing.assert_close(masked[:, 1:][mask], token, rtol=0, atol=0)


def test_start_values_are_normal_cut_at_one_sigma():
    torch.manual_seed(0)
    model = Backbone(BackboneConfig(image_size=32, patch_size=8, width=256, depth=4, heads=4))
    rescaled = {"attn.proj.weight", "mlp.fc2.weight"}
    checked = 0
    for name, value in model.named_parameters():
        scale = 1.0
        if name.startswith("blocks.") and name.split(".", 2)[2] in rescaled:
            scale = (2.0 * (int(name.split(".")[1]) + 1)) ** -0.5
        if "norm" in name and name.endswith("weight"):
            assert (value == 1).all(), name
        elif "gamma" in name:
            assert (value == 0.1).all(), name
        elif name.endswith(("bias", "bias_table")):
            assert (value == 0).all(), name
        else:
            assert value.abs().max() <= 0.02 * scale * (1 + 1e-6), name
            if value.numel() > 10_000:
                assert value.std().item() == pytest.approx(0.0108 * scale, rel=0.02), name
                assert abs(value.mean().item()) < 5e-4 * scale, name
                # A cut normal has P(|x| < sigma / 2) = erf(0.5 / sqrt 2) / erf(1 / sqrt 2); a uniform, half.
                inner = (value.abs() < 0.01 * scale).float().mean().item()
                assert inner == pytest.approx(0.5609, abs=0.015), name
                checked += 1
    assert checked == 4 * 4 + 1


def test_drop_path_grows_with_depth_and_acts_in_training_only():
    model = Backbone(BackboneConfig(image_size=8, patch_size=4, width=8, depth=5, heads=2, drop_path=0.4))
    assert [block.drop_path for block in model.blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    shaken(model)
    pixels = torch.randn(64, 3, 8, 8)
    first, second = model.train().features(pixels), model.features(pixels)
    assert not torch.equal(first.cls, second.cls)
    first, second = model.eval().features(pixels), model.features(pixels)
    assert torch.equal(first.cls, second.cls)


@pytest.mark.parametrize(
    ("size", "shape"),
    [("tiny", (192, 12, 3)), ("small", (384, 12, 6)), ("base", (768, 12, 12)), ("large", (1024, 24, 16))],
)
def test_named_sizes(size, shape):
    config = BackboneSize(size=size).resolve(image_size=224, patch_size=16)
    assert (config.width, config.depth, config.heads) == shape
    assert config.layer_scale_init == (1e-5 if size == "large" else 0.1)
    assert config.grid == (14, 14) and config.num_patches == 196

    other = BackboneSize(size=size, width=96, depth=4, heads=3, layer_scale_init=0.0, drop_path=0.1)
    config = other.resolve(image_size=112, patch_size=8)
    assert (config.width, config.depth, config.heads) == (96, 4, 3)
    assert (config.layer_scale_init, config.drop_path) == (0.0, 0.1)
    assert not any("gamma" in name for name, _ in Backbone(config).named_parameters())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"image_size": 30, "patch_size": 8}, "image_size"),
        ({"width": 100, "heads": 12}, "heads"),
        ({"depth": 0}, "depth"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"std": (0.2, 0.0, 0.2)}, "std"),
    ],
)
def test_impossible_configs_are_refused(change, named):
    with pytest.raises(InputError, match=named):
        BackboneConfig(**change)


def test_an_unknown_size_is_refused():
    with pytest.raises(InputError, match="tiny, small, base, large"):
        BackboneSize(size="huge").resolve(image_size=224, patch_size=16)  # type: ignore[arg-type]


def test_pixels_of_another_size_are_an_error():
    with pytest.raises(ValueError, match="24"):
        Backbone(CONFIG).features(torch.zeros(1, 3, 32, 32))


def test_images_are_normalised_from_either_layout():
    images = torch.randint(
        0, 256, (2, 5, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 1.0)
    model = Backbone(
        BackboneConfig(image_size=8, patch_size=4, width=8, depth=1, heads=1, mean=mean, std=std)
    )
    expected = (images.numpy() / 255.0 - np.array(mean)) / np.array(std)
    for layout in (images, images.permute(0, 3, 1, 2)):
        normalised = model.normalize(layout)
        assert normalised.dtype == torch.float32 and normalised.shape == (2, 3, 5, 5)
        np.testing.assert_allclose(normalised.permute(0, 2, 3, 1).numpy(), expected, atol=1e-6)
    with pytest.raises(ValueError, match="uint8"):
        model.normalize(images.float())


@pytest.mark.parametrize(
    ("inventory", "size", "layer"),
    [
        ("keys_beit_base_patch16_224_8k_vocab_cls_pt", "base", 9),
        ("keys_beit_base_patch16_224_8k_vocab", "base", None),
        ("keys_beit_large_patch16_224_8k_vocab_cls_pt", "large", 21),
    ],
)
def test_state_dict_has_the_published_keys_and_shapes(shared_dir: Path, monkeypatch, inventory, size, layer):
    # Shapes need no storage; rates are numbers, which tensors without storage cannot give.
    for module in ("backbone", "mim"):
        monkeypatch.setattr(f"pretrain.model.{module}.drop_path_rates", lambda rate, depth: [rate] * depth)
    keys = json.loads((shared_dir / "reference" / f"{inventory}.json").read_text())["keys"]
    config = BackboneSize(size=size).resolve(image_size=224, patch_size=16)
    with torch.device("meta"):
        model = MIM(config, MIMConfig(patch_aggregation=PatchAggregationConfig(layer=layer)), 8192)
    ours = {key: list(value.shape) for key, value in model.state_dict().items()}
    buffers = {key for key, value in keys.items() if value["kind"] == "buffer"}
    assert buffers == {"rel_pos_bias.relative_position_index"}
    assert ours == {key: value["shape"] for key, value in keys.items() if key not in buffers}
    assert {key for key, _ in model.named_parameters()} == ours.keys()

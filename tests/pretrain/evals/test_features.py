from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.training.metrics import Progress
from pretrain.evals.features import (
    backbone_feature_names,
    backbone_features,
    extract_features,
    pixel_features,
)
from pretrain.model.backbone import Backbone, BackboneConfig

CPU = torch.device("cpu")
BACKBONE = BackboneConfig(image_size=16, patch_size=4, width=32, depth=2, heads=2)


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
        num_images=9,  # more than are labelled
    )
    kept = [0, 1, 3, 7, 8, 9, 10]
    assert found.labels.tolist() == labels[kept].tolist()
    expected = model.features(model.normalize(torch.from_numpy(pixels[kept])))
    torch.testing.assert_close(found.inputs["pretrained.cls"], expected.cls)
    torch.testing.assert_close(found.inputs["pretrained.mean_patch"], expected.patches.mean(dim=1))
    raw = found.inputs["pixels.raw"]
    assert raw.shape == (7, 3 * 8 * 8) and raw.dtype == torch.uint8
    means = torch.from_numpy(pixels[kept]).float().mean(dim=(1, 2))
    torch.testing.assert_close(raw.view(7, 3, 64).float().mean(dim=2), means, atol=5.0, rtol=0)


def test_pixels_already_small_are_left_alone():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(pixel_features(side=32)(images)["pixels.raw"], images.flatten(1))


def test_features_that_are_not_finite_are_an_error():
    batch = SimpleNamespace(pixels=np.zeros((2, 16, 16, 3), np.uint8), labels=np.array([0, 1]))

    def broken(images: Tensor) -> dict[str, Tensor]:
        return {"pretrained.cls": torch.full((len(images), 3), torch.nan)}

    with pytest.raises(FloatingPointError, match=r"pretrained\.cls"):
        extract_features(
            [batch],  # type: ignore[list-item]
            [broken],
            CPU,
            Progress("test", 2, "images"),
            num_images=2,
        )


def test_layers_are_the_raw_outputs_of_the_blocks():
    model = Backbone(BACKBONE).eval().requires_grad_(False)
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    seen: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, arguments, output: seen.append(output))
    found = backbone_features(model, "pretrained", layers=True)(images)
    assert tuple(found) == backbone_feature_names(2, "pretrained", layers=True)
    assert len(seen) == 2
    for number, tokens in enumerate(seen, start=1):
        expected = torch.stack([torch.cat([one[0], one[1:].mean(dim=0)]) for one in tokens])
        torch.testing.assert_close(found[f"pretrained.layer{number}"], expected)
    plain = backbone_features(model, "pretrained")(images)
    assert tuple(plain) == backbone_feature_names(2, "pretrained")
    assert all(torch.equal(plain[name], found[name]) for name in plain)

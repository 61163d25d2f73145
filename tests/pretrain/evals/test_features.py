from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from pretrain.evals.features import (
    Extractor,
    FeatureSet,
    backbone_features,
    extract_features,
    pixel_features,
)
from pretrain.model.backbone import Backbone, BackboneConfig
from shards.dataset.corpus import SubsetConfig, open_corpus
from shards.pixels.crops import FreshCrops
from shards.pixels.views import ViewPolicy
from shards.reader.reader import Batches

BACKBONE = BackboneConfig(image_size=48, patch_size=16, width=32, depth=2, heads=2)
LABELS = (0, 1, None, 2, 0, 1, None, None, None, 1, 2)


def extract(url: str, *extractors: Extractor, subset: SubsetConfig | None = None) -> FeatureSet:
    dataset = open_corpus(url, "images", subset=subset)
    crops = FreshCrops(ViewPolicy(image_size=48), center_fraction=0.875)
    batches = Batches(3, shuffle=False, drop_last=False, num_threads=1)  # the last but one has no label
    return extract_features(dataset, "test", extractors, crops, batches, torch.device("cpu"))


def raw(images: Tensor) -> Mapping[str, Tensor]:
    return {"raw": images.flatten(1)}


def test_features_are_those_of_all_labelled_images_in_their_order(write_images):
    url = write_images("images", LABELS)
    model = Backbone(BACKBONE).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    found = extract(url, raw, backbone_features(model, "pretrained"), pixel_features)
    assert found.labels.tolist() == [label for label in LABELS if label is not None]
    images = found.inputs["raw"].view(-1, 3, 48, 48)
    # A picture is red, green or blue by its label.
    assert images.float().mean(dim=(2, 3)).argmax(dim=1).tolist() == found.labels.tolist()
    expected = model.features(model.normalize(images))
    torch.testing.assert_close(found.inputs["pretrained.cls"], expected.cls)
    torch.testing.assert_close(found.inputs["pretrained.mean_patch"], expected.patches.mean(dim=1))
    small = found.inputs["pixels.raw"]
    assert small.shape == (len(images), 3 * 32 * 32) and small.dtype == torch.uint8
    means = images.float().mean(dim=(2, 3))
    torch.testing.assert_close(small.view(-1, 3, 1024).float().mean(dim=2), means, atol=5.0, rtol=0)
    part = extract(url, raw, subset=SubsetConfig(labels=("1", "2")))
    assert torch.equal(part.inputs["raw"], found.inputs["raw"][found.labels > 0])


def test_pixels_already_small_are_left_alone():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(pixel_features(images)["pixels.raw"], images.flatten(1))


def test_features_that_are_not_finite_are_an_error(write_images):
    def broken(images: Tensor) -> Mapping[str, Tensor]:
        return {"pretrained.cls": torch.full((len(images), 3), torch.nan)}

    with pytest.raises(FloatingPointError, match=r"pretrained\.cls"):
        extract(write_images("images", (0, 1)), broken)

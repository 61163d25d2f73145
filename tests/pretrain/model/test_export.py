"""Exports against the libraries they are for: nothing missing, nothing left over, the same features."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pretrain.model.backbone import Backbone, BackboneConfig
from pretrain.model.classifier import Classifier, ClassifierConfig
from pretrain.model.export import VisionModel, to_timm, to_transformers, vision_model
from pretrain.model.mim import MIM, MIMConfig, PatchAggregationConfig
from pretrain.model.official import at_image_size
from pretrain.model.size import BackboneSize
from tests.reference.shaken import shaken

TINY = BackboneConfig(image_size=24, patch_size=4, width=32, depth=3, heads=4)
EXACT = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def mim() -> MIM:
    model = shaken(MIM(TINY, MIMConfig(patch_aggregation=PatchAggregationConfig(layer=2)), 16))
    return model


CLASSIFIERS = {
    "mean": ClassifierConfig(backbone=TINY, num_classes=5),
    "cls": ClassifierConfig(backbone=TINY, num_classes=5, pooling="cls"),
    "shared table": ClassifierConfig(backbone=TINY, num_classes=5, relative_positions="shared"),
    "absolute": ClassifierConfig(
        backbone=BackboneConfig(**{**vars(TINY), "layer_scale_init": 0.0}),
        num_classes=5,
        absolute_positions=True,
        relative_positions="none",
    ),
}


def classifier(name: str) -> tuple[Classifier, VisionModel]:
    model = shaken(Classifier(CLASSIFIERS[name]))
    return model, vision_model(model.state_dict(), model.config, class_names="vwxyz")


# ------------------------------------------------------------------------------------------------ timm


def timm_model(exported: VisionModel) -> nn.Module:
    """timm's model by the arguments of the exported config, with the exported weights and no others."""
    import timm

    config = to_timm(exported).configs["config.json"]
    arguments = {**config["model_args"], "num_classes": config["num_classes"]}
    model = timm.create_model(config["architecture"], **arguments)
    model.load_state_dict(to_timm(exported).states["model"], strict=True)
    return model.eval()


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_timm_has_the_logits_of_a_classifier(name: str, pixels: Tensor):
    ours, exported = classifier(name)
    with torch.no_grad():
        torch.testing.assert_close(timm_model(exported)(pixels), ours(pixels), **EXACT)


def test_timm_at_another_resolution(mim: MIM):
    theirs = timm_model(vision_model(mim.state_dict(), TINY, image_size=40))
    resized, config = at_image_size(mim.state_dict(), TINY, 40)
    ours = Backbone(config).eval()
    ours.load_state_dict({key: resized[key] for key in ours.state_dict()})
    larger = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        torch.testing.assert_close(theirs(larger), ours.features(larger).cls, **EXACT)


@pytest.mark.parametrize(("size", "num_blocks"), [("base", 12), ("large", 24)])
@pytest.mark.parametrize("num_classes", [0, 1000])
def test_the_published_sizes_are_timms_by_name(size: str, num_blocks: int, num_classes: int):
    """Names and shapes alone: tensors without storage."""
    import timm

    config = BackboneSize(size=size).resolve(image_size=224, patch_size=16)  # type: ignore[arg-type]
    with torch.device("meta"):
        if num_classes:
            shape = ClassifierConfig(backbone=config, num_classes=num_classes)
            exported = to_timm(vision_model(Classifier(shape).state_dict(), shape))
            theirs = timm.create_model(f"beitv2_{size}_patch16_224")
        else:
            exported = to_timm(vision_model(MIM(config, MIMConfig(), 8192).state_dict(), config))
            theirs = timm.create_model(f"beitv2_{size}_patch16_224", num_classes=0, global_pool="token")
    assert exported.configs["config.json"]["architecture"] == f"beitv2_{size}_patch16_224"
    ours = {key: tensor.shape for key, tensor in exported.states["model"].items()}
    assert ours == {key: tensor.shape for key, tensor in theirs.state_dict().items()}
    assert sum(key.endswith("bias_table") for key in ours) == num_blocks


# ----------------------------------------------------------------------------------------------- transformers


def transformers_model(exported: VisionModel) -> nn.Module:
    """transformers' model by the exported config, its weights loaded as `from_pretrained` does."""
    import transformers

    found = to_transformers(exported)
    description = found.configs["config.json"]
    kind = getattr(transformers, description["architectures"][0])
    model, told = kind.from_pretrained(
        None,
        config=transformers.BeitConfig.from_dict(description),
        state_dict=dict(found.states["model"]),
        output_loading_info=True,
    )
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_transformers_has_the_logits_of_a_classifier(name: str, pixels: Tensor):
    ours, exported = classifier(name)
    theirs = transformers_model(exported)
    with torch.no_grad():
        torch.testing.assert_close(theirs(pixels).logits, ours(pixels), **EXACT)
    assert theirs.config.id2label == dict(enumerate("vwxyz"))  # type: ignore[union-attr]

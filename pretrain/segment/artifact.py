"""The segmenter's start, a pretrained ViT, and its artifact: weights with the score they reach."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.model.artifacts import (
    classifier_config,
    load_tensors,
    publish_model,
    read_model_header,
    read_pretrained,
    read_weights,
)
from pretrain.model.classifier import Classifier, ClassifierConfig, classifier_from_backbone
from pretrain.segment.config import SegmentationConfig
from pretrain.segment.upernet import Segmenter, UperNetConfig

ARTIFACT = "segmentation"


@dataclass(frozen=True, kw_only=True)
class Start:
    """The ViT that goes under the head: its shape, weights (None: random ones) and its fingerprint."""

    shape: ClassifierConfig
    weights: Mapping[str, Tensor] | None
    inputs: dict[str, str]


def read_start(config: SegmentationConfig) -> Start:
    """A backbone, or a classifier fine-tuned from one; its shape alone, or none of it, with init scratch."""
    if config.backbone is None:
        size = config.scratch.resolve(image_size=config.crops.size, patch_size=config.patch_size)
        return Start(shape=ClassifierConfig(backbone=size, num_classes=0), weights=None, inputs={})
    header, shape = read_pretrained(config.backbone)
    weights = None if config.init == "scratch" else read_weights(config.backbone, header)
    return Start(shape=shape, weights=weights, inputs={"backbone": header["fingerprint"]})


def build_segmenter(config: SegmentationConfig, start: Start) -> Segmenter:
    """The segmenter at the size of the crops, its position tables resized to it."""
    size = dataclasses.replace(start.shape.backbone, image_size=config.crops.size, drop_path=config.drop_path)
    shape = dataclasses.replace(start.shape, backbone=size, num_classes=0, pooling="mean")
    backbone = Classifier(shape)
    if start.weights is not None:
        backbone.load_state_dict(classifier_from_backbone(start.weights, shape))
    return Segmenter(backbone, config.head, config.num_classes)


def save_segmenter(
    url: str, model: Segmenter, *, result: dict[str, Any], inputs: dict[str, str], run: dict[str, Any]
) -> dict[str, Any]:
    """Publish a segmenter with its score, what it was trained on and how; returns the header."""
    config = {
        "backbone": dataclasses.asdict(model.backbone.config),
        "head": dataclasses.asdict(model.config),
        "num_classes": model.num_classes,
    }
    return publish_model(url, ARTIFACT, model, config, {"result": result, "inputs": inputs, "run": run})


def read_segmentation_header(url: str) -> dict[str, Any]:
    """The header that `save_segmenter` wrote; InputError when there is no finished segmenter at the URL."""
    return read_model_header(url, ARTIFACT, "finetune_segmentation")


def load_segmenter(url: str, device: str | torch.device = "cpu") -> Segmenter:
    """The segmenter at a URL, in eval mode; `predict` applies it to an image.

    Raises InputError when it is unfinished, damaged, or its tensors do not match its config.
    """
    header = read_segmentation_header(url)
    config = header["config"]
    head: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in config["head"].items()}
    backbone = Classifier(classifier_config(config["backbone"]))
    model = Segmenter(backbone, UperNetConfig(**head), config["num_classes"])
    load_tensors(model, read_weights(url, header), url)
    return model.eval().requires_grad_(False).to(device)

"""Features of a labelled image dataset by frozen models: each image's centre crop, once, in order of ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.training.metrics import Progress
from pipeline.training.step import to_device
from pretrain.model.backbone import Backbone
from shards.dataset.dataset import Dataset
from shards.dataset.labels import UNLABELLED, read_labels
from shards.pixels.crops import FreshCrops
from shards.reader.reader import Batches, ShardReader

Extractor = Callable[[Tensor], Mapping[str, Tensor]]
"""uint8 images [B, 3, S, S] -> inputs of a classifier by name, each [B, D]."""

PIXELS = "pixels.raw"
PIXEL_SIDE = 32


@dataclass(frozen=True)
class FeatureSet:
    """Features of a dataset's labelled images, on the CPU.

    inputs: float32 or uint8 [n, D] by name; labels: int64 [n], not negative.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor


def extract_features(
    dataset: Dataset,
    what: str,
    extractors: Sequence[Extractor],
    crops: FreshCrops,
    batches: Batches,
    device: torch.device,
) -> FeatureSet:
    """Features of a dataset's labelled images by all extractors, in one pass over the images.

    `batches` are not shuffled, and all of them are read; `what` names the images in progress lines.
    FloatingPointError names features that are not finite.
    """
    labels = read_labels(dataset)
    labels = torch.from_numpy(labels[labels != UNLABELLED])
    inputs: dict[str, Tensor] = {}
    end = 0
    with ShardReader(dataset, crops, batches) as reader:
        progress = Progress(f"features of {what}", reader.num_samples, "images")
        for batch in reader.batches(0):
            progress.update(len(batch.labels))
            labelled = batch.labels != UNLABELLED
            if not labelled.any():
                continue
            start, end = end, end + int(labelled.sum())
            images = to_device(batch.pixels[labelled], device)
            for extract in extractors:
                for name, features in extract(images).items():
                    if not features.isfinite().all():
                        raise FloatingPointError(
                            f"{name} features are not finite; the weights that made them are damaged"
                        )
                    # Copied at once to where they stay: small results that were kept for later pinned the
                    # memory that forward passes had freed around them, 5 MB for each batch.
                    if name not in inputs:
                        dtype = torch.uint8 if features.dtype == torch.uint8 else torch.float32
                        inputs[name] = torch.empty(len(labels), features.shape[1], dtype=dtype)
                    inputs[name][start:end] = features.cpu()
        progress.close()
    return FeatureSet(inputs, labels)


def backbone_features(model: Backbone, name: str) -> Extractor:
    """Extractor of `<name>.cls` and `<name>.mean_patch`, both after the final norm."""

    @torch.inference_mode()
    def extract(images: Tensor) -> Mapping[str, Tensor]:
        features = model.features(model.normalize(images))
        return {f"{name}.cls": features.cls, f"{name}.mean_patch": features.patches.mean(dim=1)}

    return extract


def pixel_features(images: Tensor) -> Mapping[str, Tensor]:
    """`pixels.raw`, uint8: the image itself, shrunk to at most 32 x 32 and rounded to 8 bits again.

    A byte for each value, as float32 they would be the largest features of all; a classifier standardises.
    """
    if images.shape[-1] > PIXEL_SIDE:
        side = (PIXEL_SIDE, PIXEL_SIDE)
        small = F.interpolate(images.float(), size=side, mode="bilinear", antialias=True)
        images = small.round().clamp(0, 255).to(torch.uint8)
    return {PIXELS: images.flatten(1)}

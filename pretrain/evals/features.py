"""What a frozen model makes of a labelled image dataset: each image's centre crop, once, in order of ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import InputError
from pipeline.metrics import Progress
from pipeline.step import to_device
from pretrain.backbone import Backbone
from shards.manifest import Dataset
from shards.reader import SampleBatch, ShardReader
from shards.views import ViewPolicy

Extractor = Callable[[Tensor], Mapping[str, Tensor]]
"""uint8 images [B, 3, S, S] -> inputs of a classifier by name, each [B, D]."""

UNLABELLED = -1


@dataclass(frozen=True)
class FeatureSet:
    """Features of a dataset's labelled images, on the CPU.

    inputs: float32 [n, D] by name; labels: int64 [n], not negative.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor


def extract_features(
    batches: Iterable[SampleBatch], extractors: Sequence[Extractor], device: torch.device, progress: Progress
) -> FeatureSet:
    """Run every extractor over the labelled images, in reading order; `batches` is read to its end."""
    parts: dict[str, list[Tensor]] = {}
    labels: list[np.ndarray] = []
    for batch in batches:
        labelled = batch.labels != UNLABELLED
        if labelled.any():
            labels.append(batch.labels[labelled])
            images = to_device(batch.pixels[labelled], device)
            for extract in extractors:
                for name, value in extract(images).items():
                    parts.setdefault(name, []).append(value.float().cpu())
        progress.update(len(batch.labels))
    inputs = {name: torch.cat(values) for name, values in parts.items()}
    for name, value in inputs.items():
        if not value.isfinite().all():
            raise FloatingPointError(
                f"{name} features are not finite; the weights that made them are damaged"
            )
    joined = np.concatenate(labels) if labels else np.zeros(0)
    return FeatureSet(inputs, torch.from_numpy(joined.astype(np.int64)))


def read_labels(dataset: Dataset) -> Tensor:
    """Labels int64 [N] of a dataset's images, -1 where there is none, from its indexes alone."""
    indexes = (dataset.read_index(0, number, ("label",)) for number in range(dataset.num_shards))
    columns = (index.column("label") for index in indexes)
    parts = [np.asarray(column.fill_null(UNLABELLED).to_pylist(), dtype=np.int64) for column in columns]
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *parts]))


def backbone_features(model: Backbone, name: str) -> Extractor:
    """`<name>.cls` and `<name>.mean_patch`, both after the final norm."""

    @torch.inference_mode()
    def extract(images: Tensor) -> Mapping[str, Tensor]:
        features = model.features(model.normalize(images))
        return {f"{name}.cls": features.cls, f"{name}.mean_patch": features.patches.mean(dim=1)}

    return extract


def pixel_features(side: int = 32) -> Extractor:
    """`pixels.raw`: the image itself, shrunk to at most side x side, in [0, 1]."""

    def extract(images: Tensor) -> Mapping[str, Tensor]:
        pixels = images.float() / 255.0
        if pixels.shape[-1] > side:
            pixels = F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
        return {"pixels.raw": pixels.flatten(1)}

    return extract


def center_crops(
    dataset: Dataset,
    *,
    image_size: int,
    interpolation: str,
    batch_size: int,
    num_threads: int,
) -> ShardReader:
    """A reader of every image's centre crop, once each, nothing dropped. InputError for an empty dataset."""
    if dataset.num_samples() == 0:
        raise InputError(f"{dataset.url} holds no images; prepare it from a folder that has some")
    return ShardReader(
        dataset,
        batch_size=batch_size,
        views=ViewPolicy(image_size=image_size, interpolation=interpolation),
        center_crop=True,
        shuffle=False,
        drop_last=False,
        num_threads=num_threads,
    )

"""What a frozen model makes of a labelled image dataset: each image's centre crop, once, in order of ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import InputError
from pipeline.training.metrics import Progress
from pipeline.training.step import to_device
from pretrain.model.backbone import Backbone
from shards.dataset.dataset import Dataset
from shards.pixels.crops import FreshCrops
from shards.pixels.views import CENTER_FRACTION, ViewPolicy
from shards.reader.reader import Batches, SampleBatch, ShardReader

Extractor = Callable[[Tensor], Mapping[str, Tensor]]
"""uint8 images [B, 3, S, S] -> inputs of a classifier by name, each [B, D]."""

UNLABELLED = -1

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
    batches: Iterable[SampleBatch],
    extractors: Sequence[Extractor],
    device: torch.device,
    progress: Progress,
    *,
    num_images: int,
) -> FeatureSet:
    """Run every extractor over the labelled images, in reading order; `batches` is read to its end.

    num_images: no fewer than the labelled ones. Their features go at once where they stay: small results that
    were kept for later pinned the memory that forward passes had freed around them, 5 MB for each batch.
    FloatingPointError names features that are not finite.
    """
    whole: dict[str, Tensor] = {}
    labels = np.empty(num_images, np.int64)
    done = 0
    for batch in batches:
        labelled = batch.labels != UNLABELLED
        num = int(labelled.sum())
        if num:
            rows = slice(done, done + num)
            labels[rows] = batch.labels[labelled]
            images = to_device(batch.pixels[labelled], device)
            for extract in extractors:
                for name, value in extract(images).items():
                    if not value.isfinite().all():
                        raise FloatingPointError(
                            f"{name} features are not finite; the weights that made them are damaged"
                        )
                    if name not in whole:
                        kind = torch.uint8 if value.dtype == torch.uint8 else torch.float32
                        whole[name] = torch.empty(num_images, value.shape[1], dtype=kind)
                    whole[name][rows] = value.cpu()
            done += num
        progress.update(len(batch.labels))
    return FeatureSet({name: value[:done] for name, value in whole.items()}, torch.from_numpy(labels[:done]))


def read_labels(dataset: Dataset) -> Tensor:
    """Labels int64 [N] of a dataset's images, -1 where there is none, from its indexes alone."""
    indexes = (dataset.read_index(0, number, ("label",)) for number in range(dataset.num_shards))
    columns = (index.column("label") for index in indexes)
    parts = [np.asarray(column.fill_null(UNLABELLED).to_pylist(), dtype=np.int64) for column in columns]
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *parts]))


def backbone_features(model: Backbone, name: str, *, layers: bool = False) -> Extractor:
    """`<name>.cls` and `<name>.mean_patch`, both after the final norm.

    With `layers` also `<name>.layer1` and so on, [B, 2 D] each: [CLS] and the mean patch of what each block
    puts out, without any norm.
    """

    @torch.inference_mode()
    def extract(images: Tensor) -> Mapping[str, Tensor]:
        outputs = model.layer_outputs(model.normalize(images))
        normed = model.norm(outputs[-1])
        found = {f"{name}.cls": normed[:, 0], f"{name}.mean_patch": normed[:, 1:].mean(dim=1)}
        if layers:
            for layer, x in enumerate(outputs, start=1):
                found[f"{name}.layer{layer}"] = torch.cat([x[:, 0], x[:, 1:].mean(dim=1)], dim=1)
        return found

    return extract


def backbone_feature_names(depth: int, name: str, *, layers: bool = False) -> tuple[str, ...]:
    """What `backbone_features` of a backbone with so many blocks gives."""
    of_layers = [f"{name}.layer{layer}" for layer in range(1, depth + 1)] if layers else []
    return (f"{name}.cls", f"{name}.mean_patch", *of_layers)


def pixel_features(side: int = PIXEL_SIDE) -> Extractor:
    """`pixels.raw`, uint8: the image itself, shrunk to at most side x side and rounded to 8 bits again.

    A byte for each value, as float32 they would be the largest features of all; a classifier standardises.
    """

    def extract(images: Tensor) -> Mapping[str, Tensor]:
        if images.shape[-1] > side:
            small = F.interpolate(images.float(), size=(side, side), mode="bilinear", antialias=True)
            images = small.round().clamp(0, 255).to(torch.uint8)
        return {PIXELS: images.flatten(1)}

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
        FreshCrops(
            ViewPolicy(image_size=image_size, interpolation=interpolation), center_fraction=CENTER_FRACTION
        ),
        Batches(batch_size, shuffle=False, drop_last=False, num_threads=num_threads),
    )

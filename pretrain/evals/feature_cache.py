"""Features that are kept: what a frozen model made of a dataset, found again by everything that decides it.

Every classifier input of every dataset is an artifact of its own, `<cache>/<name>-<key>/`, finished when its
`features.json` is there; the key is a hash of the identity that stands in it. So another sweep of learning
rates, or k-NN after a probe, reads features instead of running a backbone, and several runs may share a
folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pipeline import storage
from pipeline.artifacts import fingerprint, publish, read_file, read_header
from pipeline.errors import InputError
from pipeline.training.metrics import Progress
from pretrain.evals.features import (
    UNLABELLED,
    Extractor,
    FeatureSet,
    center_crops,
    extract_features,
    read_labels,
)
from shards.dataset.dataset import Dataset

ARTIFACT = "features"
FILE = "features.safetensors"

VERSION = 1
"""Of the code that makes features: to be raised where the same weights and images would give others."""


@dataclass(frozen=True, kw_only=True)
class FeatureSource:
    """A frozen model: the names of what `extract` gives, and what decides the values, as JSON."""

    names: tuple[str, ...]
    extract: Extractor
    identity: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """How features are made: the crop, which decides them, and speed, which does not."""

    image_size: int
    interpolation: str
    images_per_batch: int
    decode_threads: int
    device: torch.device

    def identity(self, source: FeatureSource, name: str, dataset: Dataset) -> dict[str, Any]:
        """Everything that decides one input of one dataset, except the machine's last bits."""
        return {
            "version": VERSION,
            "name": name,
            "source": dict(source.identity),
            "dataset": dataset.fingerprint,
            "crop": {"image_size": self.image_size, "interpolation": self.interpolation},
            "compute": {"device": self.device.type, "precision": "float32"},
        }


def load_or_extract(
    dataset: Dataset, what: str, sources: Sequence[FeatureSource], how: Extraction, cache: str | None
) -> FeatureSet:
    """Features of a dataset's labelled images by all sources: from the cache, or extracted and kept there.

    Only sources of which an input is missing run, together, in one pass over the images; with none missing
    no image is read. Without a cache nothing is kept. A damaged input is said aloud and made again.
    """
    labels = read_labels(dataset)
    labels = labels[labels != UNLABELLED]
    identities = {name: how.identity(one, name, dataset) for one in sources for name in one.names}
    found: dict[str, Tensor] = {}
    if cache is not None:
        for name, identity in identities.items():
            held = load_features(cache, identity, len(labels))
            if held is not None:
                found[name] = held
        if found:
            print(f"features of {what}: {len(found)} of {len(identities)} are in {cache}", flush=True)
    missing = [one for one in sources if not found.keys() >= set(one.names)]
    if missing:
        reader = center_crops(
            dataset,
            image_size=how.image_size,
            interpolation=how.interpolation,
            batch_size=how.images_per_batch,
            num_threads=how.decode_threads,
        )
        progress = Progress(f"features of {what}", reader.num_samples, "images")
        made = extract_features(
            reader.batches(0),
            [one.extract for one in missing],
            how.device,
            progress,
            num_images=len(labels),
        )
        reader.close()
        progress.close()
        new = {name: value for name, value in made.inputs.items() if name not in found}
        if cache is not None:
            for name, value in new.items():
                keep_features(cache, identities[name], value)
        found |= new
    return FeatureSet({name: found[name] for name in identities}, labels)


def keep_features(cache: str, identity: Mapping[str, Any], features: Tensor) -> None:
    """Publish one input of one dataset, [n, D]."""
    data = safetensors.torch.save({ARTIFACT: features.contiguous()})
    publish(_place(cache, identity), ARTIFACT, {FILE: data}, {"kind": ARTIFACT, "identity": dict(identity)})


def load_features(cache: str, identity: Mapping[str, Any], num_images: int) -> Tensor | None:
    """One input of one dataset, [num_images, D]; None where it is not kept or, said aloud, damaged."""
    url = _place(cache, identity)
    try:
        header = read_header(url, ARTIFACT)
        if header is None:
            return None
        if header.get("identity") != identity:
            raise InputError(f"{storage.join(url, ARTIFACT)}.json is not what its folder is named after")
        features = safetensors.torch.load(read_file(url, header, FILE))[ARTIFACT]
        if features.ndim != 2 or len(features) != num_images:
            raise InputError(f"{storage.join(url, FILE)} has not the {num_images:,} labelled images as rows")
    except (InputError, safetensors.SafetensorError, KeyError) as error:
        print(f"kept features are damaged and are made again: {error}", flush=True)
        return None
    return features


def _place(cache: str, identity: Mapping[str, Any]) -> str:
    return storage.join(cache, f"{identity['name']}-{fingerprint(dict(identity))[:16]}")

"""The classifier artifact: `classifier.safetensors` with `classifier.json`, beside the backbone's in form.

save_classifier("s3://bucket/finetuned", model, class_names, inputs=…, run=…, metrics=…)
classifier, header = load_classifier("s3://bucket/finetuned")
logits = classifier(classifier.normalize(images))  # uint8 [B, S, S, 3] -> [B, C]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pipeline import artifacts, storage
from pipeline.errors import InputError
from pretrain.model.backbone import backbone_config, load_tensors
from pretrain.model.classifier import Classifier, ClassifierConfig

ARTIFACT = "classifier"
WEIGHTS_FILE = "classifier.safetensors"


def save_classifier(
    url: str,
    classifier: Classifier,
    class_names: Sequence[str] | None,
    *,
    backbone: Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    inputs: Mapping[str, str] | None = None,
    run: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Publish a classifier and return its header, which is written last.

    class_names: one per output, in their order, None where they are not known; backbone: what it started
    from (fingerprint, and what its header says of its own inputs); tokenizer: the block of the backbone's
    header; inputs: fingerprints of what it was trained on; run: resolved config and how long it took;
    metrics: its scores. Raises ValueError for names that do not fit the outputs, or weights not finite.
    """
    config = dataclasses.asdict(classifier.config)
    if class_names is not None and len(class_names) != classifier.config.num_classes:
        raise ValueError(f"{len(class_names)} class names for {classifier.config.num_classes} outputs")
    tensors = {key: value.detach().cpu().contiguous() for key, value in classifier.state_dict().items()}
    if broken := [key for key, value in tensors.items() if not value.isfinite().all()]:
        raise ValueError(f"not publishing a classifier with non-finite values in {broken[:3]}")
    weights = safetensors.torch.save(tensors)
    header = {
        "kind": ARTIFACT,
        "config": config,
        "class_names": None if class_names is None else list(class_names),
        "backbone": None if backbone is None else dict(backbone),
        "tokenizer": None if tokenizer is None else dict(tokenizer),
        "inputs": dict(inputs or {}),
        "run": dict(run or {}),
        "metrics": dict(metrics or {}),
        "fingerprint": artifacts.fingerprint({"config": config, "weights": artifacts.sha256_hex(weights)}),
    }
    return artifacts.publish(url, ARTIFACT, {WEIGHTS_FILE: weights}, header)


def load_classifier(url: str, device: str | torch.device = "cpu") -> tuple[Classifier, dict[str, Any]]:
    """The classifier at a URL, in eval mode, and its header.

    Raises InputError when it is unfinished, damaged, or its tensors do not match its config.
    """
    header = read_classifier_header(url)
    tensors = read_classifier_weights(url, header)
    model = Classifier(classifier_config(header))
    load_tensors(model, tensors, url)
    return model.eval().requires_grad_(False).to(device), header


def read_classifier_header(url: str) -> dict[str, Any]:
    """The header that `save_classifier` wrote; InputError when there is no finished classifier at the URL."""
    header = artifacts.read_header(url, ARTIFACT)
    if header is None:
        raise InputError(f"no finished classifier at {url}; give the --output of a finished fine-tuning run")
    if header.get("kind") != ARTIFACT or not isinstance(header.get("config"), dict):
        raise InputError(f"{url} holds no classifier of this project; check the URL")
    return header


def classifier_config(header: Mapping[str, Any]) -> ClassifierConfig:
    """The config in a header; InputError when a key is unknown or a value makes no sense."""
    held = dict(header["config"])
    known = {field.name for field in dataclasses.fields(ClassifierConfig)}
    if held.keys() != known or not isinstance(held["backbone"], dict):
        names = ", ".join(sorted(held.keys() ^ known)) or "backbone"
        raise InputError(
            f"the classifier's config differs from this version's in {names}; use the other version"
        )
    return ClassifierConfig(**{**held, "backbone": backbone_config({"config": held["backbone"]})})


def read_classifier_weights(url: str, header: Mapping[str, Any]) -> dict[str, Tensor]:
    """All tensors of an artifact, checked against the header's size and hash."""
    try:
        return safetensors.torch.load(artifacts.read_file(url, header, WEIGHTS_FILE))
    except safetensors.SafetensorError as error:
        location = storage.join(url, WEIGHTS_FILE)
        raise InputError(f"{location} is damaged ({error}); make the classifier again") from None

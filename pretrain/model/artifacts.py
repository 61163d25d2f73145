"""Artifacts of trained models: the weights, `<kind>.safetensors`, and their header, `<kind>.json`.

save_backbone("s3://bucket/backbone", model, tokenizer=…, inputs=…, run=…)
backbone = load_backbone("s3://bucket/backbone")
classifier, header = load_classifier("s3://bucket/finetuned")
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline import artifacts, storage
from pipeline.errors import InputError
from pipeline.tensorfile import shape_text
from pretrain.model.backbone import HEAD_PREFIXES, Backbone, BackboneConfig
from pretrain.model.classifier import Classifier, ClassifierConfig
from pretrain.model.mim import MIM, MIMConfig, PatchAggregationConfig

BACKBONE = "backbone"
CLASSIFIER = "classifier"


def weights_file(kind: str) -> str:
    """Name of the weights of an artifact of this kind."""
    return f"{kind}.safetensors"


# ------------------------------------------------------------------------------------------------ any model


def publish_model(
    url: str, kind: str, model: nn.Module, config: Mapping[str, Any], entries: Mapping[str, Any]
) -> dict[str, Any]:
    """Publish a model and return its header, which is written last.

    config: what it takes to build the model again; entries: everything else the header says. The fingerprint
    covers config and weights. Raises ValueError for weights that are not finite.
    """
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    if broken := [key for key, value in tensors.items() if not value.isfinite().all()]:
        raise ValueError(f"not publishing a {kind} with non-finite values in {broken[:3]}")
    weights = safetensors.torch.save(tensors)
    fingerprint = artifacts.fingerprint({"config": config, "weights": artifacts.sha256_hex(weights)})
    header = {"kind": kind, "config": config, **entries, "fingerprint": fingerprint}
    return artifacts.publish(url, kind, {weights_file(kind): weights}, header)


def read_model_header(url: str, kind: str, made_by: str) -> dict[str, Any]:
    """The header of a finished artifact; InputError, naming what makes one, where there is none."""
    header = artifacts.read_header(url, kind)
    if header is None:
        raise InputError(f"no finished {kind} at {url}; give the --output of a finished {made_by}")
    if header.get("kind") != kind or not isinstance(header.get("config"), dict):
        raise InputError(f"{url} holds no {kind} of this project; check the URL")
    return header


def read_weights(url: str, header: Mapping[str, Any]) -> dict[str, Tensor]:
    """All tensors of an artifact, checked against its header's size and hash."""
    name = weights_file(header["kind"])
    try:
        return safetensors.torch.load(artifacts.read_file(url, header, name))
    except safetensors.SafetensorError as error:
        location = storage.join(url, name)
        raise InputError(f"{location} is damaged ({error}); make the {header['kind']} again") from None


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], url: str) -> None:
    """Load exactly these tensors; InputError names the first that is missing, left over or misshapen."""
    expected = model.state_dict()
    for key in [*expected, *sorted(tensors)]:
        ours, theirs = expected.get(key), tensors.get(key)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            in_weights, by_config = ("absent" if x is None else shape_text(x) for x in (theirs, ours))
            raise InputError(
                f"{url}: {key} is {in_weights} in the weights, but {by_config} by the config; "
                "the two do not belong together, make or import the model again"
            )
    model.load_state_dict(cast(dict[str, Any], tensors))


def _checked_fields(values: Mapping[str, Any], config_type: type, kind: str) -> dict[str, Any]:
    """A config's fields as a header has them; InputError when one is unknown or missing."""
    known = {field.name for field in dataclasses.fields(config_type)}
    if values.keys() != known:
        names = ", ".join(sorted(values.keys() ^ known))
        raise InputError(f"the {kind}'s config differs from this version's in {names}; use the other version")
    return dict(values)


# ------------------------------------------------------------------------------------------------ backbone


def save_backbone(
    url: str,
    model: Backbone,
    *,
    tokenizer: Mapping[str, Any] | None = None,
    inputs: Mapping[str, str] | None = None,
    run: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Publish a backbone, or a MIM model with its heads, and return the header.

    tokenizer: the manifest's block; inputs: fingerprints of what it was trained on; run: resolved config and
    final figures.
    """
    heads = None
    if isinstance(model, MIM):
        heads = {"config": dataclasses.asdict(model.mim_config), "codebook_size": model.codebook_size}
    entries = {
        "mim": heads,
        "tokenizer": None if tokenizer is None else dict(tokenizer),
        "inputs": dict(inputs or {}),
        "run": dict(run or {}),
    }
    return publish_model(url, BACKBONE, model, dataclasses.asdict(model.config), entries)


def read_backbone_header(url: str) -> dict[str, Any]:
    """The header that `save_backbone` wrote; InputError where there is no finished backbone."""
    return read_model_header(url, BACKBONE, "pretraining run")


def backbone_config(values: Mapping[str, Any]) -> BackboneConfig:
    """The config that a header holds; InputError when a key is unknown or a value makes no sense."""
    fields = _checked_fields(values, BackboneConfig, BACKBONE)
    try:
        return BackboneConfig(**{**fields, "mean": tuple(fields["mean"]), "std": tuple(fields["std"])})
    except TypeError as error:
        raise InputError(f"the backbone's config is damaged ({error}); make the backbone again") from None


def load_backbone(url: str, device: str | torch.device = "cpu") -> Backbone:
    """The backbone at a URL in eval mode, without the heads it was pretrained with.

    Raises InputError when it is unfinished, damaged, or its tensors do not match its config.
    """
    header = read_backbone_header(url)
    tensors = read_weights(url, header)
    model = Backbone(backbone_config(header["config"]))
    load_tensors(model, {key: x for key, x in tensors.items() if not key.startswith(HEAD_PREFIXES)}, url)
    return model.eval().requires_grad_(False).to(device)


def load_mim(url: str, device: str | torch.device = "cpu") -> MIM:
    """The whole pretraining model of a backbone artifact, heads included, in eval mode.

    Raises InputError when the artifact is unfinished, damaged, inconsistent, or holds no heads.
    """
    header = read_backbone_header(url)
    heads = header.get("mim")
    if heads is None:
        raise InputError(f"the backbone at {url} holds no pretraining heads; give one written by pretraining")
    try:
        aggregation = PatchAggregationConfig(**heads["config"]["patch_aggregation"])
        mim_config = MIMConfig(**{**heads["config"], "patch_aggregation": aggregation})
        model = MIM(backbone_config(header["config"]), mim_config, heads["codebook_size"])
    except (KeyError, TypeError) as error:
        raise InputError(
            f"the heads of the backbone at {url} are not described as this version does ({error!r}); "
            "use the version that made it"
        ) from None
    load_tensors(model, read_weights(url, header), url)
    return model.eval().requires_grad_(False).to(device)


# ------------------------------------------------------------------------------------------------ classifier


def read_pretrained(url: str) -> tuple[dict[str, Any], ClassifierConfig]:
    """Header and shape of a backbone (without a head then), or of a classifier fine-tuned from one."""
    if artifacts.read_header(url, BACKBONE) is not None:
        header = read_backbone_header(url)
        return header, ClassifierConfig(backbone=backbone_config(header["config"]), num_classes=0)
    if artifacts.read_header(url, CLASSIFIER) is not None:
        header = read_classifier_header(url)
        return header, classifier_config(header["config"])
    raise InputError(
        f"no finished backbone or classifier at {url}; give the --output of a finished pretrain_mim or "
        "finetune_classifier"
    )


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
    """Publish a classifier and return its header.

    class_names: one per output, in their order, None where they are not known; backbone: what it started
    from (fingerprint, and what its header says of its own inputs); tokenizer: the block of the backbone's
    header; inputs: fingerprints of what it was trained on; run: resolved config and how long it took;
    metrics: its scores. Raises ValueError for names that do not fit the outputs, or weights not finite.
    """
    if class_names is not None and len(class_names) != classifier.config.num_classes:
        raise ValueError(f"{len(class_names)} class names for {classifier.config.num_classes} outputs")
    entries = {
        "class_names": None if class_names is None else list(class_names),
        "backbone": None if backbone is None else dict(backbone),
        "tokenizer": None if tokenizer is None else dict(tokenizer),
        "inputs": dict(inputs or {}),
        "run": dict(run or {}),
        "metrics": dict(metrics or {}),
    }
    return publish_model(url, CLASSIFIER, classifier, dataclasses.asdict(classifier.config), entries)


def read_classifier_header(url: str) -> dict[str, Any]:
    """The header that `save_classifier` wrote; InputError where there is no finished classifier."""
    return read_model_header(url, CLASSIFIER, "fine-tuning run")


def classifier_config(values: Mapping[str, Any]) -> ClassifierConfig:
    """The config that a header holds; InputError when a key is unknown or a value makes no sense."""
    fields = _checked_fields(values, ClassifierConfig, CLASSIFIER)
    if not isinstance(fields["backbone"], dict):
        raise InputError("the classifier's config has no backbone; make the classifier again")
    return ClassifierConfig(**{**fields, "backbone": backbone_config(fields["backbone"])})


def load_classifier(url: str, device: str | torch.device = "cpu") -> tuple[Classifier, dict[str, Any]]:
    """The classifier at a URL, in eval mode, and its header.

    Raises InputError when it is unfinished, damaged, or its tensors do not match its config.
    """
    header = read_classifier_header(url)
    model = Classifier(classifier_config(header["config"]))
    load_tensors(model, read_weights(url, header), url)
    return model.eval().requires_grad_(False).to(device), header

"""Our weights for other programs: timm, transformers, and the official code.

python -m jobs.export_backbone --backbone runs/backbone --format timm --output runs/backbone-timm
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from pipeline import artifacts, storage
from pipeline.config import run_job
from pipeline.errors import InputError
from pretrain.model.artifacts import (
    backbone_config,
    classifier_config,
    read_backbone_header,
    read_classifier_header,
    read_weights,
)
from pretrain.model.backbone import BackboneConfig
from pretrain.model.export import (
    CardFacts,
    model_card,
    to_timm,
    to_transformers,
    vision_model_of_backbone,
    vision_model_of_classifier,
)
from pretrain.model.official import at_image_size, official_finetuning, official_pretraining
from tokenizer.model.artifact import load_vqkd, read_tokenizer
from tokenizer.model.official import official_vqkd

KINDS = ("backbone", "classifier", "tokenizer")

Layout = Literal["pretraining", "finetuning"]

_PAPER = "[arXiv 2208.06366](https://arxiv.org/abs/2208.06366)"
_LAYOUTS = {
    "pretraining": "one position table for all blocks, with the pretraining heads",
    "finetuning": "a position table in every block, as for fine-tuning",
}


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a backbone, a classifier or a tokenizer in another program's format, with a model card.

    timm and transformers: a folder that `timm.create_model("local-dir:…")` and `from_pretrained` load.
    official: the published layout as safetensors and as .pth ({"model": …}), for the code of microsoft/unilm;
    of a backbone both its pretraining layout (one shared position table, the heads) and the fine-tuning
    layout (a table in every block). A tokenizer has the official format only.
    """

    backbone: str
    """The artifact: output of pretrain_mim, finetune_classifier, train_tokenizer or import_checkpoint."""
    format: Literal["timm", "transformers", "official"]
    """Who shall read it."""
    output: str
    """Where the files go: a folder or any fsspec URL."""
    image_size: int | None = None
    """Side of the images in pixels, a multiple of the patch size; null is the artifact's. Resizes tables."""
    layout: Layout | None = None
    """official, of a backbone: write this layout only; null writes both."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """What is to be written: files made one after the other, since each may be a gigabyte."""

    states: Mapping[str, Mapping[str, Tensor]]
    """By file name without its ending."""
    as_pth: bool
    """As .pth, too."""
    configs: Mapping[str, Mapping[str, Any]]
    """JSON by file name."""
    card: CardFacts


def main(config: ExportConfig) -> None:
    """Everything is read and converted before the first byte is written; the model card comes last."""
    url, output = storage.absolute(config.backbone), storage.absolute(config.output)
    header, export = _export(url, config)
    asked = {"format": config.format, "image_size": config.image_size, "layout": config.layout}
    artifacts.claim(
        output, {"job": "export_backbone", "config": asked, "inputs": {header["kind"]: header["fingerprint"]}}
    )
    for name, data in _files(export):
        storage.put(storage.join(output, name), data)
        print(f"{storage.join(output, name)}: {len(data):,} bytes", flush=True)
    card = model_card(export.card).replace("FOLDER", storage.name(output))
    storage.put(storage.join(output, "README.md"), card.encode())
    print(
        f"{storage.join(output, 'README.md')}: the model card\n\n{export.card.loading}".replace(
            "FOLDER", output
        )
    )


def _export(url: str, config: ExportConfig) -> tuple[dict[str, Any], Export]:
    """The artifact's header, and what becomes of it."""
    kind = next((kind for kind in KINDS if artifacts.read_header(url, kind) is not None), None)
    if config.layout is not None and (config.format != "official" or kind != "backbone"):
        raise InputError("layout is for the official format of a backbone; leave it out")
    match kind:
        case "backbone":
            header = read_backbone_header(url)
            tensors, shape = read_weights(url, header), backbone_config(header["config"])
            if config.format == "official":
                return header, _official(header, tensors, shape, config)
            model = vision_model_of_backbone(tensors, shape, config.image_size)
        case "classifier":
            header = read_classifier_header(url)
            tensors, classifier = read_weights(url, header), classifier_config(header["config"])
            if config.format == "official":
                return header, _official(header, tensors, classifier.backbone, config)
            model = vision_model_of_classifier(tensors, classifier, header["class_names"], config.image_size)
        case "tokenizer":
            return _official_tokenizer(url, config)
        case _:
            raise InputError(
                f"no finished backbone, classifier or tokenizer at {url}; give the --output of a finished run"
            )
    exported = to_timm(model) if config.format == "timm" else to_transformers(model)
    card = _card(header, model.config, exported.library, exported.loading)
    return header, Export(
        states={"model": exported.tensors}, as_pth=False, configs=exported.configs, card=card
    )


def _official(
    header: Mapping[str, Any], tensors: Mapping[str, Tensor], shape: BackboneConfig, config: ExportConfig
) -> Export:
    tensors, shape = at_image_size(tensors, shape, config.image_size)
    states: dict[str, dict[str, Tensor]] = {}
    if config.layout != "finetuning" and header.get("mim") is not None:
        states["pretraining"] = official_pretraining(tensors, shape)
    if config.layout != "pretraining":
        states["finetuning"] = official_finetuning(tensors, shape)
    if not states:
        raise InputError(
            "the backbone has no pretraining heads, as the pretraining layout needs; take layout finetuning"
        )
    card = _card(header, shape, None, _official_loading(next(iter(states))))
    files = " and ".join(f"`{name}` ({_LAYOUTS[name]})" for name in states)
    card = dataclasses.replace(card, what=f"{card.what} In the published layout: {files}.")
    return Export(states=states, as_pth=True, configs={}, card=card)


def _official_tokenizer(url: str, config: ExportConfig) -> tuple[dict[str, Any], Export]:
    if config.format != "official" or config.image_size is not None:
        raise InputError(
            f"{url} is a tokenizer, which has the official format and its own image size only; "
            "take --format official without --image_size"
        )
    artifact = read_tokenizer(url)
    shape, encoder, decoder = artifact.config, artifact.config.encoder_size, artifact.config.decoder_size
    card = CardFacts(
        title="BEiT v2 visual tokenizer (VQ-KD)",
        what=f"Turns an image into a grid of discrete codes ({_PAPER}). In the layout of the published "
        "`vqkd_encoder_*_decoder_*` files.",
        library=None,
        task="image-feature-extraction",
        sizes={
            "encoder": f"{encoder.width} x {encoder.depth}, {encoder.heads} heads",
            "decoder": f"{decoder.width} x {decoder.depth}, {decoder.heads} heads",
            "codes": f"{shape.codebook_size} of dimension {shape.code_dim}",
            "images": f"{shape.image_size} px in patches of {shape.patch_size}, values from -1 to 1",
        },
        provenance={
            "fingerprint": artifact.fingerprint,
            "teacher": artifact.teacher.get("name"),
            **artifact.header["inputs"],
        },
        metrics=artifact.header["metrics"],
        loading=_official_loading("tokenizer"),
    )
    states = {"tokenizer": official_vqkd(load_vqkd(artifact).state_dict())}
    return artifact.header, Export(states=states, as_pth=True, configs={}, card=card)


def _official_loading(name: str) -> str:
    return (
        "import torch\n\n"
        f'state = torch.load("FOLDER/{name}.pth", weights_only=True)["model"]\n'
        "model.load_state_dict(state)  # the model of microsoft/unilm, beit2"
    )


def _card(header: Mapping[str, Any], shape: BackboneConfig, library: str | None, loading: str) -> CardFacts:
    """What the header of a backbone or classifier says, as far as it says it."""
    tokenizer, run = header.get("tokenizer") or {}, header.get("run") or {}
    teacher = (tokenizer.get("teacher") or {}).get("name")
    is_classifier = header["kind"] == "classifier"
    what = (
        f"A vision Transformer, pretrained as BEiT v2 ({_PAPER}) by predicting the visual tokens of masked "
        "patches"
    )
    return CardFacts(
        title="BEiT v2 classifier" if is_classifier else "BEiT v2 backbone",
        what=f"{what}, then fine-tuned to classify images." if is_classifier else f"{what}.",
        library=library,
        task="image-classification" if is_classifier else "image-feature-extraction",
        sizes={
            "width x depth, heads": f"{shape.width} x {shape.depth}, {shape.heads}",
            "images": f"{shape.image_size} px in patches of {shape.patch_size}",
            "image mean": ", ".join(f"{value:g}" for value in shape.mean),
            "image std": ", ".join(f"{value:g}" for value in shape.std),
            "classes": header["config"]["num_classes"] if is_classifier else None,
        },
        provenance={
            "fingerprint": header["fingerprint"],
            **{f"{name} fingerprint": value for name, value in header["inputs"].items()},
            "tokenizer fingerprint": tokenizer.get("fingerprint"),
            "tokenizer's teacher": teacher,
            "backbone fingerprint": (header.get("backbone") or {}).get("fingerprint"),
            "imported from": run.get("imported_from"),
            "training steps": run.get("steps"),
            "code version": header.get("code_version"),
        },
        metrics={**(run.get("metrics") or {}), **(header.get("metrics") or {})},
        loading=loading,
    )


def _files(export: Export) -> Iterator[tuple[str, bytes]]:
    for name, state in export.states.items():
        tensors = {key: tensor.contiguous() for key, tensor in state.items()}
        yield f"{name}.safetensors", safetensors.torch.save(tensors, metadata={"format": "pt"})
        if export.as_pth:
            buffer = io.BytesIO()
            torch.save({"model": tensors}, buffer)
            yield f"{name}.pth", buffer.getvalue()
    for name, value in export.configs.items():
        yield name, json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


if __name__ == "__main__":
    run_job(main, ExportConfig)

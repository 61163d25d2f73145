"""Our weights for other programs: timm, transformers, and the official code.

python -m jobs.export_backbone --backbone runs/backbone --format timm --output runs/backbone-timm
"""

from __future__ import annotations

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
from pretrain.model.classifier import ClassifierConfig
from pretrain.model.export import Exported, model_card, to_timm, to_transformers, vision_model
from pretrain.model.official import at_image_size, official_finetuning, official_pretraining
from tokenizer.model.artifact import TokenizerArtifact, load_vqkd, read_tokenizer
from tokenizer.model.official import official_vqkd

KINDS = ("backbone", "classifier", "tokenizer")

Layout = Literal["pretraining", "finetuning"]

_PAPER = "BEiT v2 ([arXiv 2208.06366](https://arxiv.org/abs/2208.06366))"
_TEXTS = {
    "backbone": f"A vision Transformer, pretrained as {_PAPER} by predicting the visual tokens of masked "
    "patches. In the published layouts: `pretraining` has one position table for all blocks, with the "
    "pretraining heads, `finetuning` a position table in every block.",
    "classifier": f"A vision Transformer, pretrained as {_PAPER}, then fine-tuned to classify images.",
    "tokenizer": f"Turns an image, with values from -1 to 1, into a grid of the discrete codes of {_PAPER}. "
    "In the layout of the published `vqkd_encoder_*_decoder_*` files.",
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


def main(config: ExportConfig) -> None:
    """Everything is read and converted before the first byte is written; the model card comes last."""
    url, output = storage.absolute(config.backbone), storage.absolute(config.output)
    kind = next((kind for kind in KINDS if artifacts.read_header(url, kind) is not None), None)
    if config.layout is not None and (config.format != "official" or kind != "backbone"):
        raise InputError("layout is for the official format of a backbone; leave it out")
    match kind:
        case "backbone":
            header = read_backbone_header(url)
            exported = _exported(url, header, backbone_config(header["config"]), config)
        case "classifier":
            header = read_classifier_header(url)
            exported = _exported(url, header, classifier_config(header["config"]), config)
        case "tokenizer":
            artifact = read_tokenizer(url)
            header, exported = artifact.header, _exported_tokenizer(artifact, config)
        case _:
            raise InputError(
                f"no finished backbone, classifier or tokenizer at {url}; give the --output of a finished run"
            )
    asked = {"format": config.format, "image_size": config.image_size, "layout": config.layout}
    inputs = {kind: header["fingerprint"]}
    artifacts.claim(output, {"job": "export_backbone", "config": asked, "inputs": inputs})
    for name, data in _files(exported):
        storage.put(storage.join(output, name), data)
        print(f"{storage.join(output, name)}: {len(data):,} bytes", flush=True)
    task = "image-classification" if kind == "classifier" else "image-feature-extraction"
    front = {**({"library_name": exported.library} if exported.library else {}), "pipeline_tag": task}
    loading = exported.loading.replace("FOLDER", storage.name(output))
    card = model_card(f"BEiT v2 {kind}", _TEXTS[kind], loading, front, header)
    storage.put(storage.join(output, "README.md"), card.encode())
    print(f"{storage.join(output, 'README.md')}: the model card")
    print(f"\n{exported.loading.replace('FOLDER', output)}")


def _exported(
    url: str, header: Mapping[str, Any], shape: BackboneConfig | ClassifierConfig, config: ExportConfig
) -> Exported:
    """A backbone or classifier in the format that is asked for."""
    tensors = read_weights(url, header)
    if config.format != "official":
        names = header.get("class_names")
        model = vision_model(tensors, shape, class_names=names, image_size=config.image_size)
        return to_timm(model) if config.format == "timm" else to_transformers(model)
    backbone = shape.backbone if isinstance(shape, ClassifierConfig) else shape
    tensors, backbone = at_image_size(tensors, backbone, config.image_size)
    states: dict[str, dict[str, Tensor]] = {}
    if config.layout != "finetuning" and header.get("mim") is not None:
        states["pretraining"] = official_pretraining(tensors, backbone)
    if config.layout != "pretraining":
        states["finetuning"] = official_finetuning(tensors, backbone)
    if not states:
        raise InputError(
            "the backbone has no pretraining heads, as the pretraining layout needs; take layout finetuning"
        )
    return Exported(states=states, loading=_official_loading(next(iter(states))))


def _exported_tokenizer(artifact: TokenizerArtifact, config: ExportConfig) -> Exported:
    if config.format != "official" or config.image_size is not None:
        raise InputError(
            f"{artifact.url} is a tokenizer, which has the official format and its own image size only; "
            "take --format official without --image_size"
        )
    states = {"tokenizer": official_vqkd(load_vqkd(artifact).state_dict())}
    return Exported(states=states, loading=_official_loading("tokenizer"))


def _official_loading(name: str) -> str:
    return (
        "import torch\n\n"
        f'state = torch.load("FOLDER/{name}.pth", weights_only=True)["model"]\n'
        "model.load_state_dict(state)  # the model of microsoft/unilm, beit2"
    )


def _files(exported: Exported) -> Iterator[tuple[str, bytes]]:
    for name, state in exported.states.items():
        tensors = {key: tensor.contiguous() for key, tensor in state.items()}
        yield f"{name}.safetensors", safetensors.torch.save(tensors, metadata={"format": "pt"})
        if exported.library is None:
            buffer = io.BytesIO()
            torch.save({"model": tensors}, buffer)
            yield f"{name}.pth", buffer.getvalue()
    for name, value in exported.configs.items():
        yield name, json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


if __name__ == "__main__":
    run_job(main, ExportConfig)

"""Published weights as artifacts of this project: tokenizers, pretrained backbones, fine-tuned classifiers.

python -m jobs.import_checkpoint --source vqkd_encoder_base_decoder_3x768x12_clip.pth --output runs/tokenizer
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pipeline import artifacts, storage
from pipeline.config import ASIDE, PLACE, identity, run_job
from pipeline.errors import InputError
from pipeline.tensorfile import TensorFile, read_tensors
from pretrain.model.artifacts import save_backbone, save_classifier
from pretrain.model.backbone import IMAGENET_MEAN, IMAGENET_STD, Backbone
from pretrain.model.classifier import Classifier
from pretrain.model.mim import MIM
from pretrain.model.official import backbone_from_official, classifier_from_official, kind_of
from tokenizer.model.artifact import METRICS, save_tokenizer
from tokenizer.model.official import DROPPED, HEAD_DIM, is_tokenizer, published_teacher, vqkd_from_official
from tokenizer.model.vqkd import VQKD


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Read a published checkpoint (.pth or safetensors) and write it as a finished artifact of this project.

    Whether it is a VQ-KD tokenizer, a pretrained backbone or a fine-tuned classifier is recognised from its
    keys, sizes from its shapes. Nothing in it is executed, and nothing is written unless all of it fits.
    """

    source: str = field(metadata=ASIDE)
    """Path or URL (https, s3, …) of the file."""
    output: str = field(metadata=PLACE)
    """Where the artifact goes: a folder or any fsspec URL."""
    heads: int | None = None
    """Attention heads; null reads them off the position tables. A tokenizer has none: null is width / 64."""
    layer: int | None = None
    """Block, from 1, the second pretraining head branches from; null: the third from the end (9 of 12)."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Backbones and classifiers: mean per channel, in [0, 1], of the images the model was trained on."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Backbones and classifiers: standard deviation per channel by which images were divided."""
    class_names: str | None = field(default=None, metadata=ASIDE)
    """Classifiers: text file, path or URL, with one class name per line in the order of the outputs."""


def main(config: ImportConfig) -> None:
    """Everything is read and checked before the first byte is written."""
    source = read_tensors(config.source, drop=DROPPED)
    output = storage.absolute(config.output)
    model = _model(source, config)
    names = _class_names(config, model)
    inputs = {"checkpoint": source.sha256}
    run = {"imported_from": source.url, "config": identity(config)}
    artifacts.claim(output, {"job": "import_checkpoint", "inputs": inputs, "config": identity(config)})
    match model:
        case VQKD():
            target_dim = model.state_dict()["decode_task_layer.2.bias"].shape[0]
            save_tokenizer(
                output,
                model,
                teacher=published_teacher(target_dim),
                metrics=dict.fromkeys(METRICS, math.nan),
                inputs=inputs,
                run_config=run,
            )
        case Classifier():
            save_classifier(output, model, names, inputs=inputs, run=run)
        case _:
            save_backbone(output, model, inputs=inputs, run=run)
    print(f"{output}: {_described(model, config)}, from {source.url}", flush=True)


def _model(source: TensorFile, config: ImportConfig) -> VQKD | Backbone | Classifier:
    tensors, url, heads, mean, std = source.tensors, source.url, config.heads, config.mean, config.std
    if is_tokenizer(tensors):
        return vqkd_from_official(tensors, url, heads=heads)
    match kind_of(tensors):
        case "pretraining":
            return backbone_from_official(tensors, url, heads=heads, layer=config.layer, mean=mean, std=std)
        case "classifier":
            return classifier_from_official(tensors, url, heads=heads, mean=mean, std=std)
        case None:
            first = next(iter(tensors), "nothing left, its first key,")
            raise InputError(f"{url}: {first} is no key of BEiT v2; is it another model's file?")


def _class_names(config: ImportConfig, model: VQKD | Backbone | Classifier) -> list[str] | None:
    if config.class_names is None:
        return None
    outputs = model.config.num_classes if isinstance(model, Classifier) else 0
    try:
        lines = storage.read(config.class_names).decode().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read class_names {config.class_names}: {error}; check the path") from None
    names = [line.strip() for line in lines if line.strip()]
    if len(names) != outputs:
        raise InputError(
            f"{config.class_names} has {len(names)} class names, but the model {outputs} classes"
        )
    return names


def _described(model: VQKD | Backbone | Classifier, config: ImportConfig) -> str:
    """The model that was recognised, and its parts that are convention because weights do not tell."""
    assumed = "" if config.heads is not None else f" (assumed: width / {HEAD_DIM})"
    if isinstance(model, VQKD):
        shape, size, decoder = model.config, model.config.encoder_size, model.config.decoder_size
        unit = bool((model.quantize.codebook.norm(dim=1) - 1.0).abs().max() < 1e-3)
        return (
            f"tokenizer, encoder {size.width} x {size.depth} with {size.heads} heads{assumed}, decoder "
            f"{decoder.width} x {decoder.depth}, {shape.codebook_size} codes of {shape.code_dim}, "
            f"{shape.image_size} px in patches of {shape.patch_size}"
            f"{'' if unit else '; warning: its codes are not of unit length'}"
        )
    backbone = model.config.backbone if isinstance(model, Classifier) else model.config
    sizes = (
        f"{backbone.width} x {backbone.depth} with {backbone.heads} heads, {backbone.image_size} px in "
        f"patches of {backbone.patch_size}"
    )
    if isinstance(model, Classifier):
        kind = f"classifier of {model.config.num_classes} classes, {model.config.pooling} pooling"
        return f"{kind}, {sizes}{assumed if model.config.relative_positions == 'none' else ''}"
    if not isinstance(model, MIM):
        return f"backbone without pretraining heads, {sizes}"
    layer = model.mim_config.patch_aggregation.layer
    branch = " (assumed: the third from the end)" if config.layer is None else ""
    head = "no second head" if layer is None else f"a second head after block {layer}{branch}"
    return f"backbone with heads for {model.codebook_size} codes, {head}, {sizes}"


if __name__ == "__main__":
    run_job(main, ImportConfig)

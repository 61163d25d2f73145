"""What fine-tuning starts from (Table 6): a backbone, chance, the encoder of a tokenizer, or a teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline import artifacts
from pipeline.errors import InputError
from pretrain.model.artifacts import CLASSIFIER, read_pretrained, read_weights, save_classifier, weights_file
from pretrain.model.backbone import BackboneConfig, normalize_images
from pretrain.model.classifier import Classifier, ClassifierConfig, Pooling, classifier_from_backbone
from pretrain.model.size import BackboneSize
from tokenizer.model.artifact import load_vqkd, read_tokenizer
from tokenizer.model.teacher import ClipTokens, build_teacher
from tokenizer.model.teacher_config import TeacherConfig

TEACHER_KIND = "teacher_classifier"

_RANGE = (0.5, 0.5, 0.5)  # mean and std that map [0, 1] to the tokenizer's [-1, 1]


@dataclass(frozen=True, kw_only=True)
class Goal:
    """Requirements on the classifier, wherever its weights come from."""

    num_classes: int
    class_names: tuple[str, ...] | None
    image_size: int | None
    """Pixels a side; None is the size of whatever it starts from."""
    pooling: Pooling
    drop_path: float
    head_init_scale: float
    new_head: bool
    """Never keep a head, even where its classes are the same."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """A model ready for fine-tuning, and what it came from."""

    model: Classifier | TeacherClassifier
    origin: dict[str, Any]
    """For the header: kind, fingerprint and inputs of what it came from."""
    tokenizer: dict[str, Any] | None = None
    """For the header: the tokenizer whose codes pretrained it."""

    @property
    def image_size(self) -> int:
        """Pixels a side of what the model sees."""
        model = self.model
        return model.config.backbone.image_size if isinstance(model, Classifier) else model.image_size


class TeacherClassifier(nn.Module):
    """A teacher's own network with a linear classifier on the mean of its patch features.

    Table 6 fine-tunes DINO and CLIP; the paper does not say with which pooling. Patch features are those
    after the network's last norm, CLIP's before the projection into the joint space.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: TeacherConfig, goal: Goal, *, image_size: int, patch_size: int) -> None:
        super().__init__()
        if config.name == "hog":
            raise InputError(
                "teacher hog has no weights to fine-tune; give timm:<model> or open_clip:<model>"
            )
        if config.name.startswith("timm:"):
            kwargs = {"drop_path_rate": goal.drop_path, **config.model_kwargs}
            config = dataclasses.replace(config, model_kwargs=kwargs)
        elif config.name.startswith("open_clip:") and goal.drop_path:
            raise InputError(f"{config.name} has no stochastic depth; set drop_path to 0")
        teacher = build_teacher(config, image_size, patch_size)
        if teacher.input_size != image_size:
            raise InputError(
                f"{config.name} reads {teacher.input_size} pixels, image_size is {image_size}; make "
                "image_size and teacher.input_size equal"
            )
        self.image_size = image_size
        self.fingerprint = teacher.fingerprint
        self.body = teacher.body.requires_grad_(True)
        if isinstance(self.body, ClipTokens):
            self.body.visual.register_parameter("proj", None)
        with torch.no_grad():
            width = self.body(torch.zeros(1, 3, image_size, image_size)).shape[2]
            self.head = nn.Linear(width, goal.num_classes)
            nn.init.trunc_normal_(self.head.weight, std=0.02).mul_(goal.head_init_scale)
            nn.init.zeros_(self.head.bias)
        self.register_buffer("pixel_mean", teacher.mean, persistent=False)
        self.register_buffer("pixel_std", teacher.std, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits [B, C] of normalised pixels [B, 3, S, S]."""
        return self.head(self.body(pixels).mean(dim=1))

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, S, S] -> float32 [B, 3, S, S], as in the teacher's training."""
        return normalize_images(images, self.pixel_mean, self.pixel_std)


# ------------------------------------------------------------------------------------------------ four starts


def from_backbone(url: str, goal: Goal) -> Start:
    """A pretrained backbone, or a classifier (intermediate fine-tuning), whose head stays where it fits.

    It fits when it has as many classes. InputError when these have other names, or nothing usable is there.
    """
    header, config = read_pretrained(url)
    _check_classes(url, header.get("class_names"), goal)
    tensors = read_weights(url, header)
    if goal.new_head:
        tensors = {key: value for key, value in tensors.items() if not key.startswith("head.")}
    origin = {"kind": header["kind"], "fingerprint": header["fingerprint"], "inputs": header["inputs"]}
    model = _classifier(tensors, config, goal)
    return Start(model=model, origin=origin, tokenizer=header["tokenizer"])


def from_scratch(size: BackboneSize, goal: Goal, *, patch_size: int) -> Start:
    """Fresh weights, drawn from torch's generator."""
    shape = size.resolve(image_size=goal.image_size or 224, patch_size=patch_size)
    model = _classifier(None, ClassifierConfig(backbone=shape, num_classes=0), goal)
    return Start(model=model, origin={"kind": "scratch"})


def from_tokenizer(url: str, goal: Goal) -> Start:
    """The encoder of a visual tokenizer: absolute positions, no layer scale, pixels in [-1, 1]."""
    artifact = read_tokenizer(url)
    tokenizer = artifact.config
    shape = BackboneConfig(
        image_size=tokenizer.image_size,
        patch_size=tokenizer.patch_size,
        **dataclasses.asdict(tokenizer.encoder_size),
        layer_scale_init=0.0,
        mean=_RANGE,
        std=_RANGE,
    )
    positions: dict[str, Any] = {"absolute_positions": True, "relative_positions": "none"}
    config = ClassifierConfig(backbone=shape, num_classes=0, **positions)
    model = _classifier(load_vqkd(artifact).encoder.state_dict(), config, goal)
    return Start(model=model, origin={"kind": "tokenizer", "fingerprint": artifact.fingerprint})


def from_teacher(config: TeacherConfig, goal: Goal, *, patch_size: int) -> Start:
    """A teacher's network with its own architecture and input range."""
    if goal.pooling != "mean":
        raise InputError("a teacher is pooled over its patches; leave pooling at mean")
    model = TeacherClassifier(config, goal, image_size=goal.image_size or 224, patch_size=patch_size)
    return Start(model=model, origin={"kind": "teacher", "fingerprint": model.fingerprint})


# ------------------------------------------------------------------------------------------------ the result


def save_finetuned(
    url: str,
    start: Start,
    goal: Goal,
    *,
    inputs: Mapping[str, str],
    run: Mapping[str, Any],
    metrics: Mapping[str, float],
) -> dict[str, Any]:
    """Publish the model of a start, fine-tuned by now, as `classifier.json` with its weights.

    A teacher's network keeps the tensor names of its library; its header says so by another kind, because
    nothing but fine-tuning reads it here.
    """
    if isinstance(start.model, Classifier):
        made_of = {"backbone": start.origin, "tokenizer": start.tokenizer, "inputs": inputs}
        return save_classifier(url, start.model, goal.class_names, **made_of, run=run, metrics=metrics)
    state = start.model.state_dict()
    weights = safetensors.torch.save({key: value.cpu().contiguous() for key, value in state.items()})
    header = {
        "kind": TEACHER_KIND,
        "class_names": None if goal.class_names is None else list(goal.class_names),
        "backbone": start.origin,
        "inputs": dict(inputs),
        "run": dict(run),
        "metrics": dict(metrics),
        "fingerprint": artifacts.sha256_hex(weights),
    }
    return artifacts.publish(url, CLASSIFIER, {weights_file(CLASSIFIER): weights}, header)


def _classifier(tensors: Mapping[str, Tensor] | None, base: ClassifierConfig, goal: Goal) -> Classifier:
    """A model of this shape, changed as the goal requires, with these weights or (None) fresh ones."""
    image_size = goal.image_size or base.backbone.image_size
    backbone = dataclasses.replace(base.backbone, image_size=image_size, drop_path=goal.drop_path)
    kept = {name: getattr(goal, name) for name in ("num_classes", "pooling", "head_init_scale")}
    config = dataclasses.replace(base, backbone=backbone, **kept)
    if tensors is None:
        return Classifier(config)
    state = classifier_from_backbone(tensors, config)  # first: it draws the new head
    model = Classifier(config)
    model.load_state_dict(state)
    return model


def _check_classes(url: str, names: list[str] | None, goal: Goal) -> None:
    """InputError where a head that would be kept means other classes, or the same in another order."""
    ours = goal.class_names
    if goal.new_head or names is None or ours is None or len(names) != len(ours):
        return
    for theirs, needed in zip(names, ours, strict=True):
        if theirs != needed:
            raise InputError(
                f"the head of {url} knows class {theirs!r} where the training images have {needed!r}; train "
                "on images of the same class folders, or start with a fresh head: --new_head true"
            )

"""Tables 1 to 7 of the paper as data: which runs their rows are, and what the paper measured.

A row is a recipe (size and length of pretraining), a teacher, and overrides per stage; what those mean at a
scale is said in `jobs/configs/reproduce/<scale>.yaml`. Only rows of BEiT v2 itself are here, none of the
methods it is compared with. A number that could not be established is absent, and printed as a dash.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Start = Literal["backbone", "scratch", "tokenizer", "teacher"]
"""What is fine-tuned: the `init` of finetune_classifier."""

INTERMEDIATE = "intermediate"
"""The fine-tuning on ImageNet-21k that comes before the one on ImageNet-1k: finetune_classifier too."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One column."""

    title: str
    stage: str
    """Job whose artifact holds it."""
    lower_is_better: bool = False
    percent: bool = True
    """The artifact holds a share; tables show per cent."""


METRICS: dict[str, Metric] = {
    "rec_loss": Metric(
        title="reconstruction loss", stage="train_tokenizer", lower_is_better=True, percent=False
    ),
    "usage": Metric(title="codebook usage (%)", stage="train_tokenizer"),
    "finetune": Metric(title="fine-tuning top-1 (%)", stage="finetune_classifier"),
    "probe": Metric(title="linear probe top-1 (%)", stage="probe_linear"),
    "miou": Metric(title="ADE20K mIoU (%)", stage="finetune_segmentation"),
    "imagenet_a": Metric(title="ImageNet-A top-1 (%)", stage="evaluate_robustness"),
    "imagenet_r": Metric(title="ImageNet-R top-1 (%)", stage="evaluate_robustness"),
    "imagenet_sketch": Metric(title="ImageNet-Sketch top-1 (%)", stage="evaluate_robustness"),
    "corruptions": Metric(title="corrupted val top-1 (%)", stage="evaluate_robustness"),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line: what is run, and the paper's numbers in the units of its columns."""

    label: str
    recipe: str = "base_300"
    """Size, epochs of pretraining, and `_21k` for an intermediate fine-tuning."""
    teacher: str = "clip"
    """Whose features the tokenizer learns."""
    start: Start = "backbone"
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Stage -> dotted key of its config -> value, on top of the recipe."""
    paper: Mapping[str, float] = field(default_factory=dict)
    """By key of METRICS."""
    probed: Literal["pretrained", "untrained", "pixels"] = "pretrained"
    """Which of the probe's classifiers the row is; the baselines have nothing but a probe."""


@dataclass(frozen=True, kw_only=True)
class Ordering:
    """A row that is better than another, in some columns."""

    better: str
    worse: str
    metrics: tuple[str, ...]
    said: str
    """Where the paper says so: `cells`, where both numbers stand in the table, or a section of its text."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table of the paper."""

    number: int
    title: str
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]
    default: str
    """Label of the row with the default settings, which controls are held against."""
    orderings: tuple[Ordering, ...] = ()
    note: str = ""

    def row(self, label: str) -> Row:
        """The row of this label."""
        return next(row for row in self.rows if row.label == label)


def _tokenizer(**model: Any) -> dict[str, dict[str, Any]]:
    """A tokenizer's settings for a backbone without patch aggregation, as all of Table 4 (§3.4)."""
    return {
        "train_tokenizer": {f"model.{key}": value for key, value in model.items()},
        "pretrain_mim": {"mim.patch_aggregation.layer": None},
    }


def _aggregation(layer: int | None, head_depth: int = 2, share: bool = True) -> dict[str, dict[str, Any]]:
    """Patch aggregation from a layer of 12 (None: without), as in Table 5."""
    keys: dict[str, Any] = {"mim.patch_aggregation.layer": layer}
    if layer is not None:
        keys |= {
            "mim.patch_aggregation.head_depth": head_depth,
            "mim.patch_aggregation.share_mim_head": share,
        }
    return {"pretrain_mim": keys}


FINETUNING = Table(
    number=1,
    title="fine-tuning on ImageNet-1k and ADE20K",
    metrics=("finetune", "miou"),
    default="ViT-B, 300 epochs",
    rows=(
        Row(label="ViT-B, 300 epochs", recipe="base_300", paper={"finetune": 85.0, "miou": 52.7}),
        Row(label="ViT-B, 1600 epochs", recipe="base_1600", paper={"finetune": 85.5, "miou": 53.1}),
        Row(
            label="ViT-B, 1600 epochs, ImageNet-21k between",
            recipe="base_1600_21k",
            paper={"finetune": 86.5, "miou": 53.5},
        ),
        Row(label="ViT-L, 300 epochs", recipe="large_300", paper={"finetune": 86.6}),
        Row(label="ViT-L, 1600 epochs", recipe="large_1600", paper={"finetune": 87.3, "miou": 56.7}),
        Row(
            label="ViT-L, 1600 epochs, ImageNet-21k between",
            recipe="large_1600_21k",
            paper={"finetune": 88.4, "miou": 57.5},
        ),
    ),
    orderings=(
        Ordering(
            better="ViT-B, 1600 epochs",
            worse="ViT-B, 300 epochs",
            metrics=("finetune", "miou"),
            said="cells",
        ),
        Ordering(better="ViT-L, 1600 epochs", worse="ViT-L, 300 epochs", metrics=("finetune",), said="cells"),
        Ordering(better="ViT-L, 300 epochs", worse="ViT-B, 300 epochs", metrics=("finetune",), said="cells"),
        Ordering(
            better="ViT-L, 1600 epochs",
            worse="ViT-B, 1600 epochs",
            metrics=("finetune", "miou"),
            said="cells",
        ),
        Ordering(
            better="ViT-B, 1600 epochs, ImageNet-21k between",
            worse="ViT-B, 1600 epochs",
            metrics=("finetune", "miou"),
            said="cells",
        ),
        Ordering(
            better="ViT-L, 1600 epochs, ImageNet-21k between",
            worse="ViT-L, 1600 epochs",
            metrics=("finetune", "miou"),
            said="cells",
        ),
    ),
    note="The rows with ImageNet-21k are those of the official model zoo.",
)

LINEAR_PROBE = Table(
    number=2,
    title="linear probe on ImageNet-1k",
    metrics=("probe",),
    default="ViT-B, 300 epochs",
    rows=(Row(label="ViT-B, 300 epochs", recipe="base_300", paper={"probe": 80.1}),),
)

ROBUSTNESS = Table(
    number=3,
    title="robustness on variants of ImageNet",
    metrics=("imagenet_a", "imagenet_r", "imagenet_sketch"),
    default="ViT-B, 1600 epochs",
    rows=(
        Row(
            label="ViT-B, 1600 epochs",
            recipe="base_1600",
            paper={"imagenet_a": 54.4, "imagenet_r": 61.0, "imagenet_sketch": 45.6},
        ),
        Row(
            label="ViT-L, 1600 epochs",
            recipe="large_1600",
            paper={"imagenet_a": 69.0, "imagenet_r": 69.9, "imagenet_sketch": 53.5},
        ),
    ),
    orderings=(
        Ordering(
            better="ViT-L, 1600 epochs",
            worse="ViT-B, 1600 epochs",
            metrics=("imagenet_a", "imagenet_r", "imagenet_sketch"),
            said="cells",
        ),
    ),
)

TOKENIZER = Table(
    number=4,
    title="VQ-KD: decoder, encoder and code dimension; backbones without patch aggregation",
    metrics=("rec_loss", "usage", "finetune", "probe", "miou"),
    default="base encoder, decoder of 3 blocks, code dimension 32",
    rows=(
        Row(
            label="base encoder, decoder of 1 block, code dimension 32",
            overrides=_tokenizer(decoder_depth=1, code_dim=32),
            paper={"rec_loss": 0.164, "usage": 100.0},
        ),
        Row(
            label="base encoder, decoder of 3 blocks, code dimension 32",
            overrides=_tokenizer(decoder_depth=3, code_dim=32),
            paper={"rec_loss": 0.145, "usage": 95.0},
        ),
        Row(
            label="base encoder, decoder of 6 blocks, code dimension 32",
            overrides=_tokenizer(decoder_depth=6, code_dim=32),
        ),
        Row(
            label="base encoder, decoder of 3 blocks, code dimension 16",
            overrides=_tokenizer(decoder_depth=3, code_dim=16),
        ),
        Row(
            label="base encoder, decoder of 3 blocks, code dimension 64",
            overrides=_tokenizer(decoder_depth=3, code_dim=64),
        ),
        Row(
            label="small encoder, decoder of 1 block, code dimension 32",
            overrides=_tokenizer(encoder="small", decoder_depth=1, code_dim=32),
        ),
    ),
    orderings=(
        Ordering(
            better="base encoder, decoder of 3 blocks, code dimension 32",
            worse="base encoder, decoder of 1 block, code dimension 32",
            metrics=("rec_loss",),
            said="cells",
        ),
        Ordering(
            better="base encoder, decoder of 1 block, code dimension 32",
            worse="base encoder, decoder of 3 blocks, code dimension 32",
            metrics=("usage",),
            said="cells",
        ),
        Ordering(
            better="base encoder, decoder of 1 block, code dimension 32",
            worse="base encoder, decoder of 3 blocks, code dimension 32",
            metrics=("finetune",),
            said="§3.4",
        ),
        Ordering(
            better="base encoder, decoder of 6 blocks, code dimension 32",
            worse="base encoder, decoder of 3 blocks, code dimension 32",
            metrics=("rec_loss",),
            said="§3.4",
        ),
        Ordering(
            better="base encoder, decoder of 3 blocks, code dimension 32",
            worse="base encoder, decoder of 6 blocks, code dimension 32",
            metrics=("usage", "finetune"),
            said="§3.4",
        ),
        Ordering(
            better="base encoder, decoder of 3 blocks, code dimension 32",
            worse="base encoder, decoder of 3 blocks, code dimension 64",
            metrics=("usage",),
            said="§3.4",
        ),
        Ordering(
            better="base encoder, decoder of 3 blocks, code dimension 16",
            worse="base encoder, decoder of 3 blocks, code dimension 32",
            metrics=("usage",),
            said="§3.4",
        ),
    ),
    note=(
        "The decoders of 1 and 3 blocks are the paper's cells; the other rows vary what its text says is "
        "varied."
    ),
)

_WITHOUT_AGGREGATION = "without patch aggregation"
_DEFAULT_AGGREGATION = "l = 9, head of 2 blocks, shared MIM head"

AGGREGATION = Table(
    number=5,
    title="patch aggregation",
    metrics=("finetune", "probe", "miou"),
    default=_DEFAULT_AGGREGATION,
    rows=(
        Row(label=_WITHOUT_AGGREGATION, overrides=_aggregation(None)),
        Row(
            label=_DEFAULT_AGGREGATION,
            overrides=_aggregation(9),
            paper={"finetune": 85.0, "probe": 80.1, "miou": 52.7},
        ),
        Row(label="l = 9, head of 1 block, shared MIM head", overrides=_aggregation(9, head_depth=1)),
        Row(label="l = 9, head of 3 blocks, shared MIM head", overrides=_aggregation(9, head_depth=3)),
        Row(label="l = 9, head of 2 blocks, MIM head of its own", overrides=_aggregation(9, share=False)),
        Row(label="l = 6, head of 2 blocks, shared MIM head", overrides=_aggregation(6)),
        Row(label="l = 11, head of 2 blocks, shared MIM head", overrides=_aggregation(11)),
    ),
    orderings=(
        Ordering(
            better=_DEFAULT_AGGREGATION,
            worse=_WITHOUT_AGGREGATION,
            metrics=("finetune", "probe"),
            said="§3.4",
        ),
        Ordering(
            better="l = 9, head of 1 block, shared MIM head",
            worse="l = 9, head of 3 blocks, shared MIM head",
            metrics=("finetune", "probe"),
            said="§3.4",
        ),
        Ordering(
            better=_DEFAULT_AGGREGATION,
            worse="l = 9, head of 3 blocks, shared MIM head",
            metrics=("finetune", "probe"),
            said="§3.4",
        ),
        Ordering(
            better=_DEFAULT_AGGREGATION,
            worse="l = 9, head of 2 blocks, MIM head of its own",
            metrics=("finetune", "probe"),
            said="§3.4",
        ),
    ),
    note=(
        "The default row's numbers are those of Tables 1 and 2; the other rows vary what the paper's text "
        "says is varied."
    ),
)

TEACHERS = Table(
    number=6,
    title="teachers of VQ-KD",
    metrics=("finetune", "miou"),
    default="CLIP: BEiT v2",
    rows=(
        Row(label="DINO: the teacher itself", teacher="dino", start="teacher"),
        Row(label="DINO: the VQ-KD encoder", teacher="dino", start="tokenizer"),
        Row(label="DINO: BEiT v2", teacher="dino", paper={"finetune": 84.4, "miou": 49.2}),
        Row(label="CLIP: the teacher itself", start="teacher"),
        Row(label="CLIP: the VQ-KD encoder", start="tokenizer"),
        Row(label="CLIP: BEiT v2", paper={"finetune": 85.0, "miou": 52.7}),
    ),
    orderings=(
        *(
            Ordering(better=f"{name}: {better}", worse=f"{name}: {worse}", metrics=("finetune",), said="§3.4")
            for name in ("DINO", "CLIP")
            for better, worse in (
                ("BEiT v2", "the teacher itself"),
                ("BEiT v2", "the VQ-KD encoder"),
                ("the teacher itself", "the VQ-KD encoder"),
            )
        ),
        Ordering(better="CLIP: BEiT v2", worse="DINO: BEiT v2", metrics=("finetune", "miou"), said="cells"),
    ),
    note="The numbers of CLIP: BEiT v2 are those of Table 1.",
)

INTERMEDIATE_FINETUNING = Table(
    number=7,
    title="ImageNet-21k between pretraining and ImageNet-1k",
    metrics=("finetune",),
    default="ViT-B, 224 pixels",
    rows=(
        Row(label="ViT-B, 224 pixels", recipe="base_1600_21k", paper={"finetune": 86.5}),
        Row(
            label="ViT-B, 384 pixels",
            recipe="base_1600_21k",
            overrides={"finetune_classifier": {"image_size": 384}},
        ),
        Row(label="ViT-L, 224 pixels", recipe="large_1600_21k", paper={"finetune": 88.4}),
        Row(
            label="ViT-L, 384 pixels",
            recipe="large_1600_21k",
            overrides={"finetune_classifier": {"image_size": 384}},
            paper={"finetune": 89.0},
        ),
    ),
    orderings=(
        Ordering(better="ViT-L, 224 pixels", worse="ViT-B, 224 pixels", metrics=("finetune",), said="cells"),
        Ordering(better="ViT-L, 384 pixels", worse="ViT-L, 224 pixels", metrics=("finetune",), said="cells"),
    ),
)

TABLES: dict[int, Table] = {
    table.number: table
    for table in (
        FINETUNING,
        LINEAR_PROBE,
        ROBUSTNESS,
        TOKENIZER,
        AGGREGATION,
        TEACHERS,
        INTERMEDIATE_FINETUNING,
    )
}

CONTROLS: dict[str, Row] = {
    "beit_v2": Row(label="BEiT v2 of this scale"),
    "no_aggregation": Row(label=_WITHOUT_AGGREGATION, overrides=_aggregation(None)),
    "hog": Row(label="HOG for a teacher", teacher="hog"),
    "hog_no_aggregation": Row(
        label="HOG for a teacher, without patch aggregation", teacher="hog", overrides=_aggregation(None)
    ),
    "scratch": Row(label="the same network, not pretrained", start="scratch"),
    "untrained": Row(label="the same network, not trained at all", probed="untrained"),
    "pixels": Row(label="raw pixels", probed="pixels"),
}
"""Rows that the paper does not have: what its numbers would be worth without what it proposes."""

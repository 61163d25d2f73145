"""Linear probe (paper §3.3, Table 5) and k-NN: how much of the labels lies open in frozen features.

The protocol is unpublished for BEiT v2 (no code, no flags; the paper says a linear classifier on [CLS], or on
the mean patch without patch aggregation), so ours is stated here.

- Each image is seen once, as a centre crop, without augmentation, in fp32.
- Inputs are [CLS] and the mean patch, both after the final norm, and both are reported. The first score is
  [CLS] where the backbone was pretrained with patch aggregation, else the mean patch.
- Features are standardised. One linear layer is trained on them from zero with Adam, batches of 256, 50
  epochs and a cosine schedule, for every learning rate of a sweep. The rate is chosen on a held-out fifth
  of the training images, then the layer is trained again on all of them. A score says where the chosen rate
  is an end of the sweep.
- The same backbone with fresh weights, and raw pixels of at most 32x32, go through the same protocol.
- With `per_layer`, as in BEiT-1's run_linear_eval.py: one classifier for each layer, on [CLS] and mean patch
  of the block's raw output side by side, without the final norm.
  DEVIATION: the best layer, like its rate, is chosen on the held-out part; the script reports the best on
  val, which chooses by the figure that is reported. Here the accuracy on val is reported of every layer.
  DEVIATION: trained as above, on centre crops; the script uses AdamW at 4e-3 with weight decay 1e-4 for 100
  epochs from a random start, random crops and flips.
- Weighted k-NN on the two normed inputs, for every k (`knn.py`); none is chosen.

Features are extracted once and kept (`feature_cache.py`).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline import storage
from pipeline.artifacts import claim, publish, read_header
from pipeline.cluster.config import ClusterConfig
from pipeline.cluster.items import map_items
from pipeline.config import ASIDE, PLACE, PLACES, absolute_places, identity, to_dict
from pipeline.errors import InputError
from pipeline.training.metrics import Progress
from pretrain.evals.feature_cache import Extraction, FeatureSource, load_or_extract
from pretrain.evals.features import (
    PIXEL_SIDE,
    PIXELS,
    UNLABELLED,
    FeatureSet,
    backbone_feature_names,
    backbone_features,
    pixel_features,
    read_labels,
)
from pretrain.evals.intervals import compare, wilson_interval
from pretrain.evals.knn import knn_predictions
from pretrain.evals.linear import LabelledFeatures, Sweep, choose_lr, train_classifiers
from pretrain.evals.probe_result import KnnScore, ProbeResult, Score, percent
from pretrain.model.artifacts import load_backbone, read_backbone_header
from pretrain.model.backbone import Backbone
from shards.dataset.corpus import SubsetConfig, open_corpus
from shards.dataset.dataset import Dataset, open_dataset

ARTIFACT = "probe"


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Measure a pretrained backbone by its frozen features: top-1 of a linear classifier, and of k-NN.

    Train and val are image shards with labels. Without labels the probe is skipped, with its reason.

    The paper's protocol is unpublished; this is ours. Centre crops, no augmentation; [CLS] and the mean patch
    after the final norm; features standardised; a linear layer trained with Adam and a cosine schedule at
    every rate of a sweep, the rate chosen on held-out training images, the layer then trained on all of them.
    The first score is that of [CLS] where the backbone was pretrained with patch aggregation, else of the
    mean patch. Fresh weights and raw pixels go through the same. per_layer adds BEiT-1's protocol, with the
    layer chosen on the held-out images instead of val. k-NN is that of Wu et al. 2018, for every k.
    """

    backbone: str = field(metadata=PLACE)
    """The backbone artifact, the output of pretrain_mim."""
    train: str = field(metadata=PLACES)
    """Image shards the classifier is trained on, an output of prepare_images."""
    subset: SubsetConfig = field(default=SubsetConfig(), metadata=ASIDE)
    """Part of the images of train instead of all: some classes, or a frozen list."""
    val: str = field(metadata=PLACE)
    """Image shards the accuracy is measured on."""
    output: str = field(metadata=PLACE)
    """Where probe.json goes: a folder or any fsspec URL."""
    lrs: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    """Learning rates to choose from; the table says where the chosen one is the highest or the lowest."""
    epochs: int = 50
    """Passes over the features."""
    batch_size: int = 256
    """Features per step of the classifier."""
    holdout: float = 0.2
    """Share of the training images on which the learning rate, and the layer, is chosen."""
    seed: int = 0
    """Decides the held-out part, the order of features, and the weights of the untrained backbone."""
    untrained_baseline: bool = True
    """Probe the same backbone with fresh weights too."""
    pixel_baseline: bool = True
    """Probe raw pixels, shrunk to 32x32, too."""
    per_layer: bool = False
    """Probe the output of every layer too. Takes 8 x width x depth bytes of memory and of cache per image:
    0.3 GB for CIFAR-10 with 128 x 6, but 94 GB for ImageNet-1k with 768 x 12; give a subset there."""
    knn: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of neighbours for k-NN, each reported; an empty list leaves it out."""
    feature_cache: str | None = field(default=None, metadata=PLACE)
    """Folder or URL where features are kept, for several probes; null is features/ in the output. They take
    16 x width + 3072 bytes per image with both baselines: 20 GB for ImageNet-1k with 768."""
    require_labels: bool = field(default=False, metadata=ASIDE)
    """Fail where there are no labels, instead of writing a result that says so."""
    interpolation: str = "bicubic"
    """How centre crops are resized."""
    images_per_batch: int = field(default=64, metadata=ASIDE)
    """Images per forward pass of the backbone."""
    decode_threads: int = field(default=2, metadata=ASIDE)
    """Threads that decode."""
    cluster: ClusterConfig = field(default=ClusterConfig(num_workers=0), metadata=ASIDE)
    """The probe is one process: 0 runs it here, 1 or more on a worker, with a GPU where there is one."""

    def __post_init__(self) -> None:
        if not self.lrs or min(self.lrs) <= 0:
            raise InputError(f"lrs is {list(self.lrs)}; give one or more positive learning rates")
        if min(self.epochs, self.batch_size, self.images_per_batch) < 1:
            raise InputError("epochs, batch_size and images_per_batch must be at least 1")
        if not 0 < self.holdout < 1:
            raise InputError(f"holdout is {self.holdout}; give a share between 0 and 1, such as 0.2")
        if any(k < 1 for k in self.knn):
            raise InputError(
                f"knn is {list(self.knn)}; give numbers of neighbours from 1 on, or an empty list"
            )

    @property
    def sweep(self) -> Sweep:
        """What the training of classifiers needs of it."""
        return Sweep(
            lrs=self.lrs,
            epochs=self.epochs,
            batch_size=self.batch_size,
            holdout=self.holdout,
            seed=self.seed,
        )


def probe_linear(config: ProbeConfig) -> None:
    """Probe the backbone and publish `probe.json` at `config.output`; a finished probe is printed again."""
    config = absolute_places(config)
    output = config.output
    config = dataclasses.replace(
        config, feature_cache=config.feature_cache or storage.join(output, "features")
    )
    header = read_backbone_header(config.backbone)
    train = open_corpus(config.train, "images", subset=config.subset)
    val = open_dataset(config.val, "images")
    inputs = {"backbone": header["fingerprint"], "train": train.fingerprint, "val": val.fingerprint}
    settings = identity(config)

    # Everything that can be refused is refused before anything is written.
    reason = why_not(train, val)
    if reason is not None and config.require_labels:
        raise InputError(f"{reason}; prepare images from class folders, or leave require_labels out")
    translate_labels(read_labels(val), val.manifest.class_names, train.manifest.class_names)
    claim(output, {"job": "probe_linear", "config": settings, "inputs": inputs})
    if (held := read_header(output, ARTIFACT)) is not None:
        print(f"{held['table']}\n{output} is finished already, with the same settings and inputs", flush=True)
        return

    start = time.monotonic()
    cluster = dataclasses.replace(config.cluster, num_workers=min(config.cluster.num_workers, 1))
    result = ProbeResult(skipped=reason)
    if reason is None:
        [result] = map_items([config], _make_runner, cluster)
    publish(
        output,
        ARTIFACT,
        {},
        {
            "kind": ARTIFACT,
            "config": settings,
            "inputs": inputs,
            "result": result.to_json(),
            "table": result.table(),
            "seconds": time.monotonic() - start,
        },
    )
    print(result.table(), flush=True)


def run_probe(config: ProbeConfig) -> ProbeResult:
    """The whole measurement, in this process, on a GPU if it has one.

    Writes nothing but features, where `config.feature_cache` says; without it nothing.
    """
    train_set = open_corpus(config.train, "images", subset=config.subset)
    val_set = open_dataset(config.val, "images")
    if (reason := why_not(train_set, val_set)) is not None:
        return ProbeResult(skipped=reason)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    header = read_backbone_header(config.backbone)
    pretrained = load_backbone(config.backbone, device)
    sources = feature_sources(pretrained, header["fingerprint"], config)
    how = Extraction(
        image_size=pretrained.config.image_size,
        interpolation=config.interpolation,
        images_per_batch=config.images_per_batch,
        decode_threads=config.decode_threads,
        device=device,
    )
    train = load_or_extract(train_set, "train", sources, how, config.feature_cache)
    val = load_or_extract(val_set, "val", sources, how, config.feature_cache)
    labels = translate_labels(val.labels, val_set.manifest.class_names, train_set.manifest.class_names)
    val = dataclasses.replace(val, labels=labels)
    return probe_features(train, val, config, aggregated=_was_aggregated(header), device=device)


def feature_sources(pretrained: Backbone, fingerprint: str, config: ProbeConfig) -> list[FeatureSource]:
    """The backbone, whose artifact has this fingerprint, and the baselines that were asked for."""
    depth = pretrained.config.depth
    found = [
        FeatureSource(
            names=backbone_feature_names(depth, "pretrained", layers=config.per_layer),
            extract=backbone_features(pretrained, "pretrained", layers=config.per_layer),
            identity={"backbone": fingerprint},
        )
    ]
    if config.untrained_baseline:
        found.append(
            FeatureSource(
                names=backbone_feature_names(depth, "untrained"),
                extract=backbone_features(_untrained(pretrained, config.seed), "untrained"),
                identity={"config": to_dict(pretrained.config), "seed": config.seed},
            )
        )
    if config.pixel_baseline:
        found.append(FeatureSource(names=(PIXELS,), extract=pixel_features(), identity={"side": PIXEL_SIDE}))
    return found


def probe_features(
    train: FeatureSet,
    val: FeatureSet,
    config: ProbeConfig,
    *,
    aggregated: bool,
    device: torch.device | str = "cpu",
) -> ProbeResult:
    """The protocol, from features on; both sets have images.

    aggregated: the backbone was pretrained with patch aggregation, so [CLS] is its summary of an image.
    Validation images of a class that training lacks count as wrong.
    """
    classes, train_labels = train.labels.unique(return_inverse=True)
    val_labels = _positions_in(classes, val.labels)

    def labelled(name: str) -> tuple[LabelledFeatures, LabelledFeatures]:
        return (
            LabelledFeatures(train.inputs[name], train_labels, len(classes)),
            LabelledFeatures(val.inputs[name], val_labels, len(classes)),
        )

    names = _ordered((name for name in train.inputs if ".layer" not in name), aggregated)
    scores: dict[str, Score] = {}
    correct: dict[str, Tensor] = {}
    for name in names:
        scores[name], correct[name] = probe_input(name, *labelled(name), config.sweep, device)
    layer_names = [name for name in train.inputs if ".layer" in name]
    layers = [probe_input(name, *labelled(name), config.sweep, device)[0] for name in layer_names]
    neighbours = [
        score
        for name in (names if config.knn else ())
        if name != PIXELS
        for score in knn_scores(name, *labelled(name), config.knn, device)
    ]

    main, *others = scores
    summary = main.split(".")[1]
    baselines = [name for name in others if name in (f"untrained.{summary}", PIXELS)]
    return ProbeResult(
        skipped=None,
        num_classes=len(classes),
        num_train=len(train.labels),
        num_val=len(val.labels),
        largest_class=int(val.labels.unique(return_counts=True)[1].max()) / len(val.labels),
        scores=tuple(scores.values()),
        comparisons=tuple(
            compare(correct[main], correct[name], of=scores[main].label, over=scores[name].label)
            for name in baselines
        ),
        layers=tuple(layers),
        best_layer=max(layers, key=lambda one: one.holdout_top1).layer if layers else None,
        knn=tuple(neighbours),
    )


def probe_input(
    name: str, train: LabelledFeatures, val: LabelledFeatures, sweep: Sweep, device: torch.device | str
) -> tuple[Score, Tensor]:
    """The score of one input (`pretrained.cls`), and which validation images were right, bool [n]."""
    lr, holdout_top1 = choose_lr(train, sweep, device)
    [fit] = train_classifiers(train, val, [lr], sweep, device)
    low, high = wilson_interval(int(fit.correct.sum()), len(fit.correct))
    model, source = name.split(".")
    layer = int(source.removeprefix("layer")) if source.startswith("layer") else None
    score = Score(
        model=model,  # type: ignore[arg-type]
        input="layer" if layer is not None else source,  # type: ignore[arg-type]
        top1=fit.correct.double().mean().item(),
        low=low,
        high=high,
        lr=lr,
        holdout_top1=holdout_top1,
        edge=sweep.edge(lr),
        layer=layer,
    )
    print(f"{score.label}: top-1 {percent(score.top1)} at lr {lr:.0e}", flush=True)
    return score, fit.correct


def knn_scores(
    name: str, bank: LabelledFeatures, val: LabelledFeatures, ks: Sequence[int], device: torch.device | str
) -> list[KnnScore]:
    """Scores of one input (`pretrained.cls`) for every number of neighbours."""
    model, source = name.split(".")
    progress = Progress(f"k-NN on {name}", len(val.labels), "images")
    found = []
    for k, predicted in zip(ks, knn_predictions(bank, val, ks, device, progress=progress), strict=True):
        right = int((predicted == val.labels).sum())
        low, high = wilson_interval(right, len(val.labels))
        found.append(
            KnnScore(
                model=model,  # type: ignore[arg-type]
                input=source,  # type: ignore[arg-type]
                k=k,
                top1=right / len(val.labels),
                low=low,
                high=high,
            )
        )
    said = ", ".join(f"{percent(one.top1)} with k = {one.k}" for one in found)
    print(f"{found[0].label}: k-NN top-1 {said}", flush=True)
    return found


# ------------------------------------------------------------------------------------------------ labels


def why_not(train: Dataset, val: Dataset) -> str | None:
    """The reason why these datasets allow no probe, or None."""
    for dataset in (train, val):
        if not (read_labels(dataset) != UNLABELLED).any():
            return f"none of the {dataset.num_samples():,} images of {dataset.url} has a label"
    labels = read_labels(train)
    if len(labels[labels != UNLABELLED].unique()) < 2:
        return f"all labelled images of {train.url} are of one class"
    return None


def translate_labels(labels: Tensor, names: Sequence[str] | None, into: Sequence[str] | None) -> Tensor:
    """Labels [n] that index `names` as labels that index `into`; unchanged where either is not named.

    Two datasets number their classes separately: a class folder missing in one shifts all that follow.
    Images without a label keep -1. InputError names a class that occurs in `labels` but not in `into`.
    """
    if names is None or into is None or list(names) == list(into):
        return labels
    place = {name: i for i, name in enumerate(into)}
    for i in labels[labels != UNLABELLED].unique().tolist():
        if names[i] not in place:
            raise InputError(
                f"val has images of class {names[i]!r}, which train lacks; give two parts of one dataset"
            )
    table = torch.tensor([*(place.get(name, UNLABELLED) for name in names), UNLABELLED])
    return table[labels]


def _positions_in(classes: Tensor, labels: Tensor) -> Tensor:
    """Place of each label in the sorted `classes`, -1 where it is not there."""
    place = torch.searchsorted(classes, labels).clamp_max(len(classes) - 1)
    return torch.where(classes[place] == labels, place, -1)


# ------------------------------------------------------------------------------------------------ inside


def _make_runner() -> Callable[[ProbeConfig], ProbeResult]:
    return run_probe


def _untrained(model: Backbone, seed: int) -> Backbone:
    """The same backbone with start values of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = Backbone(model.config)
    return fresh.eval().requires_grad_(False).to(next(model.parameters()).device)


def _was_aggregated(header: dict[str, Any]) -> bool:
    mim = header.get("mim")
    return mim is not None and mim["config"]["patch_aggregation"]["layer"] is not None


def _ordered(names: Iterable[str], aggregated: bool) -> list[str]:
    """Classifier inputs in the order of the report: the probe's own first, then baselines."""
    models = ["pretrained", "untrained", "pixels"]
    inputs = ["cls", "mean_patch", "raw"] if aggregated else ["mean_patch", "cls", "raw"]

    def place(name: str) -> tuple[int, int]:
        model, source = name.split(".")
        return models.index(model), inputs.index(source)

    return sorted(names, key=place)

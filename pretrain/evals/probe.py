"""Linear probe (paper §3.3, Table 5) and k-NN: how much of the labels lies open in frozen features.

The paper's protocol is unpublished (no code, no flags; it says a linear classifier on [CLS], or on the mean
patch without patch aggregation). Ours stands in `ProbeConfig`, k-NN in `knn.py`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pipeline.artifacts import claim, publish, read_header
from pipeline.cluster.config import ClusterConfig
from pipeline.cluster.items import map_items
from pipeline.config import ASIDE, PLACE, PLACES, absolute_places, identity
from pipeline.errors import InputError
from pipeline.training.metrics import Progress
from pretrain.evals.features import PIXELS, FeatureSet, backbone_features, extract_features, pixel_features
from pretrain.evals.intervals import Comparison, compare, percent, share_of, wilson_interval
from pretrain.evals.knn import knn_predictions
from pretrain.evals.linear import Edge, LabelledFeatures, Sweep, choose_lr, train_classifiers
from pretrain.model.artifacts import load_backbone, read_backbone_header
from pretrain.model.backbone import Backbone
from shards.dataset.corpus import SubsetConfig, open_corpus
from shards.dataset.dataset import Dataset, open_dataset
from shards.dataset.labels import UNLABELLED, read_labels, translate_labels
from shards.pixels.crops import FreshCrops
from shards.pixels.views import CENTER_FRACTION, ViewPolicy
from shards.reader.reader import Batches

ARTIFACT = "probe"

Model = Literal["pretrained", "untrained", "pixels"]

_INPUT_NAMES = {"cls": "[CLS]", "mean_patch": "mean patch", "raw": "pixels"}

_VERDICTS = {
    "gain": "a gain",
    "loss": "a loss",
    "within": "within the confidence interval: no difference is shown",
}


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(Sweep):
    """Measure a pretrained backbone by its frozen features: top-1 of a linear classifier, and of k-NN.

    Train and val are image shards with labels. Without labels the probe is skipped, with its reason.

    Each image is seen once, as a centre crop, without augmentation, in fp32. Inputs are [CLS] and the mean
    patch, both after the final norm; the first score is that of [CLS] where the backbone was pretrained with
    patch aggregation, else of the mean patch. Features are standardised. A linear layer is trained on them
    from zero with Adam and a cosine schedule at every rate of a sweep; the rate is chosen on held-out
    training images, and the layer then trained again on all of them. The same backbone with fresh weights,
    and raw pixels, go through the same. k-NN is that of Wu et al. 2018, for every k; none is chosen.
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
    untrained_baseline: bool = True
    """Probe the same backbone with fresh weights too."""
    pixel_baseline: bool = True
    """Probe raw pixels, shrunk to 32x32, too."""
    knn: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of neighbours for k-NN, each reported; an empty list leaves it out."""
    require_labels: bool = field(default=False, metadata=ASIDE)
    """Fail where there are no labels, instead of writing a result that says so."""
    interpolation: str = "bicubic"
    """How centre crops are resized."""
    images_per_batch: int = field(default=64, metadata=ASIDE)
    """Images per forward pass of the backbone. Features take 16 x width + 3072 bytes of memory per image with
    both baselines: 20 GB for ImageNet-1k with 768."""
    decode_threads: int = field(default=2, metadata=ASIDE)
    """Threads that decode."""
    cluster: ClusterConfig = field(default=ClusterConfig(num_workers=0), metadata=ASIDE)
    """The probe is one process: 0 runs it here, 1 or more on a worker, with a GPU where there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images_per_batch < 1:
            raise InputError(f"images_per_batch is {self.images_per_batch}; give at least 1")
        if any(k < 1 for k in self.knn):
            raise InputError(
                f"knn is {list(self.knn)}; give numbers of neighbours from 1 on, or an empty list"
            )


# ------------------------------------------------------------------------------------------------ result


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Top-1 accuracy on one input, with its Wilson 95 % confidence interval; shares, not percent."""

    model: Model
    input: Literal["cls", "mean_patch", "raw"]
    top1: float
    low: float
    high: float

    @property
    def label(self) -> str:
        """`pretrained [CLS]`."""
        name = _INPUT_NAMES[self.input]
        return name if self.model == "pixels" else f"{self.model} {name}"


@dataclass(frozen=True, kw_only=True)
class Score(Accuracy):
    """Accuracy of a linear classifier."""

    lr: float
    """The chosen learning rate."""
    holdout_top1: float
    """Accuracy on the held-out training images by which the rate was chosen."""
    edge: Edge = None
    """The end of the sweep that the chosen rate is: a better one may lie beyond it."""


@dataclass(frozen=True, kw_only=True)
class KnnScore(Accuracy):
    """Accuracy of weighted k-NN."""

    k: int
    """Number of neighbours."""


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """Scores of a probe, or why there are none.

    The first score is the probe's: the pretrained backbone, seen as its pretraining suggests.
    """

    skipped: str | None
    """The reason why there are no scores."""
    num_classes: int = 0
    """Classes of the training images."""
    num_train: int = 0
    num_val: int = 0
    largest_class: float = 0.0
    """Share of the most frequent class in val: what guessing reaches."""
    scores: tuple[Score, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    knn: tuple[KnnScore, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The result for the artifact's header; labels and verdicts are written out."""
        result = dataclasses.asdict(self)
        for name in ("scores", "knn"):
            result[name] = [{**vars(score), "label": score.label} for score in getattr(self, name)]
        result["comparisons"] = [{**vars(each), "verdict": each.verdict} for each in self.comparisons]
        return result

    def table(self) -> str:
        """The result for people."""
        if self.skipped is not None:
            return f"linear probe skipped: {self.skipped}"
        head = (
            f"linear probe: {self.num_classes} classes, {self.num_train:,} training and {self.num_val:,} "
            f"validation images, the largest class holds {percent(self.largest_class)} of these"
        )
        return "\n".join([head, *self._score_lines(), *self._knn_lines()])

    def _score_lines(self) -> Iterator[str]:
        yield f"  {'':<24}{'top-1':>8}   {'95 % interval':<18}{'lr':>8}"
        for score in self.scores:
            interval = f"{percent(score.low)} to {percent(score.high)}"
            mark = " *" if score.edge else ""
            yield f"  {score.label:<24}{percent(score.top1):>8}   {interval:<18}{score.lr:>8.0e}{mark}"
        for each in self.comparisons:
            yield (
                f"  {each.of} over {each.over}: {100 * each.difference:+.1f} points "
                f"(95 %: {100 * each.low:+.1f} to {100 * each.high:+.1f}), {_VERDICTS[each.verdict]}"
            )
        for edge, advice in (("highest", "add higher ones to --lrs"), ("lowest", "add lower ones to --lrs")):
            if any(score.edge == edge for score in self.scores):
                yield f"  * the {edge} rate of the sweep; a better one may lie beyond it: {advice}"

    def _knn_lines(self) -> Iterator[str]:
        if not self.knn:
            return
        ks = sorted({score.k for score in self.knn})
        yield "  weighted k-NN, top-1     " + "".join(f"{f'k = {k}':>9}" for k in ks)
        for label in dict.fromkeys(score.label for score in self.knn):
            top1 = {score.k: score.top1 for score in self.knn if score.label == label}
            yield f"  {label:<23}" + "".join(f"{percent(top1[k]):>9}" for k in ks)


# ------------------------------------------------------------------------------------------------ job


def probe_linear(config: ProbeConfig) -> None:
    """Probe the backbone and publish `probe.json` at `config.output`; a finished probe is printed again."""
    config = absolute_places(config)
    output = config.output
    header = read_backbone_header(config.backbone)
    train = open_corpus(config.train, "images", subset=config.subset)
    val = open_dataset(config.val, "images")
    inputs = {"backbone": header["fingerprint"], "train": train.fingerprint, "val": val.fingerprint}
    # run.json and probe.json name a setting that has no other value.
    settings = {**identity(config), "per_layer": False}

    # Everything that can be refused is refused before anything is written.
    reason = why_not(train, val)
    if reason is not None and config.require_labels:
        raise InputError(f"{reason}; prepare images from class folders, or leave require_labels out")
    translate_labels(read_labels(val), val.manifest.class_names, train.manifest.class_names)
    claim(output, {"job": "probe_linear", "config": settings, "inputs": inputs})
    if (finished := read_header(output, ARTIFACT)) is not None:
        print(
            f"{finished['table']}\n{output} is finished already, with the same settings and inputs",
            flush=True,
        )
        return

    start = time.monotonic()
    cluster = dataclasses.replace(config.cluster, num_workers=min(config.cluster.num_workers, 1))
    result = ProbeResult(skipped=reason)
    if reason is None:
        [result] = map_items([config], lambda: run_probe, cluster)
    header = {
        "kind": ARTIFACT,
        "config": settings,
        "inputs": inputs,
        "result": result.to_json(),
        "table": result.table(),
        "seconds": time.monotonic() - start,
    }
    publish(output, ARTIFACT, {}, header)
    print(result.table(), flush=True)


def why_not(train: Dataset, val: Dataset) -> str | None:
    """The reason why these datasets allow no probe, or None."""
    for dataset in (train, val):
        if not (read_labels(dataset) != UNLABELLED).any():
            return f"none of the {dataset.num_samples():,} images of {dataset.url} has a label"
    labels = read_labels(train)
    if len(set(labels[labels != UNLABELLED].tolist())) < 2:
        return f"all labelled images of {train.url} are of one class"
    return None


# ------------------------------------------------------------------------------------------------ protocol


def run_probe(config: ProbeConfig) -> ProbeResult:
    """The whole measurement, in this process, on a GPU if it has one; `why_not` has nothing against it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    header = read_backbone_header(config.backbone)
    pretrained = load_backbone(config.backbone, device)
    extractors = [backbone_features(pretrained, "pretrained")]
    if config.untrained_baseline:
        extractors.append(backbone_features(_untrained(pretrained, config.seed), "untrained"))
    if config.pixel_baseline:
        extractors.append(pixel_features)
    views = ViewPolicy(image_size=pretrained.config.image_size, interpolation=config.interpolation)
    crops = FreshCrops(views, center_fraction=CENTER_FRACTION)
    batches = Batches(
        config.images_per_batch, shuffle=False, drop_last=False, num_threads=config.decode_threads
    )
    train_set = open_corpus(config.train, "images", subset=config.subset)
    val_set = open_dataset(config.val, "images")
    train = extract_features(train_set, "train", extractors, crops, batches, device)
    val = extract_features(val_set, "val", extractors, crops, batches, device)
    names = (val_set.manifest.class_names, train_set.manifest.class_names)
    labels = torch.from_numpy(translate_labels(val.labels.numpy(), *names))
    val = dataclasses.replace(val, labels=labels)
    return probe_features(train, val, config, aggregated=_was_aggregated(header), device=device)


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
    place = torch.searchsorted(classes, val.labels).clamp_max(len(classes) - 1)
    val_labels = torch.where(classes[place] == val.labels, place, -1)

    # The summary of an image that the pretraining suggests comes first, and the pretrained backbone.
    summary, other = ("cls", "mean_patch") if aggregated else ("mean_patch", "cls")
    names = [f"{model}.{input}" for model in get_args(Model) for input in (summary, other, "raw")]
    scores: dict[str, Score] = {}
    correct: dict[str, Tensor] = {}
    neighbours: list[KnnScore] = []
    for name in (name for name in names if name in train.inputs):
        bank = LabelledFeatures(train.inputs[name], train_labels, len(classes))
        queries = LabelledFeatures(val.inputs[name], val_labels, len(classes))
        scores[name], correct[name] = probe_input(name, bank, queries, config, device)
        if config.knn and name != PIXELS:
            neighbours += knn_scores(name, bank, queries, config.knn, device)

    main, *others = scores
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
        knn=tuple(neighbours),
    )


def probe_input(
    name: str, train: LabelledFeatures, val: LabelledFeatures, sweep: Sweep, device: torch.device | str
) -> tuple[Score, Tensor]:
    """The score of one input (`pretrained.cls`), and which validation images were right, bool [n]."""
    lr, holdout_top1 = choose_lr(train, sweep, device)
    [fit] = train_classifiers(train, val, [lr], sweep, device)
    accuracy = _accuracy(name, fit.correct)
    score = Score(**vars(accuracy), lr=lr, holdout_top1=holdout_top1, edge=sweep.edge(lr))
    print(f"{score.label}: top-1 {percent(score.top1)} at lr {lr:.0e}", flush=True)
    return score, fit.correct


def knn_scores(
    name: str, bank: LabelledFeatures, val: LabelledFeatures, ks: Sequence[int], device: torch.device | str
) -> list[KnnScore]:
    """Scores of one input (`pretrained.cls`) for every number of neighbours."""
    progress = Progress(f"k-NN on {name}", len(val.labels), "images")
    predictions = knn_predictions(bank, val, ks, device, progress=progress)
    accuracies = [_accuracy(name, predicted == val.labels) for predicted in predictions]
    scores = [KnnScore(**vars(each), k=k) for each, k in zip(accuracies, ks, strict=True)]
    by_k = ", ".join(f"{percent(score.top1)} with k = {score.k}" for score in scores)
    print(f"{scores[0].label}: k-NN top-1 {by_k}", flush=True)
    return scores


def _accuracy(name: str, correct: Tensor) -> Accuracy:
    """The accuracy on an input (`pretrained.cls`) from per-image correctness, bool [n]."""
    model, input = name.split(".")
    low, high = wilson_interval(int(correct.sum()), len(correct))
    return Accuracy(model=model, input=input, top1=share_of(correct), low=low, high=high)  # type: ignore[arg-type]


def _untrained(model: Backbone, seed: int) -> Backbone:
    """The same backbone with start values of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = Backbone(model.config)
    return fresh.eval().requires_grad_(False).to(next(model.parameters()).device)


def _was_aggregated(header: dict[str, Any]) -> bool:
    mim = header.get("mim")
    return mim is not None and mim["config"]["patch_aggregation"]["layer"] is not None

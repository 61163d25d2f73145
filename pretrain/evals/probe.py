"""Linear probe (paper §3.3, Table 5): how much of the labels a linear classifier finds in frozen features.

The protocol is unpublished for BEiT v2, so ours is stated here. Each image is seen once, as a centre crop.
The input is [CLS] after the final norm where the backbone was pretrained with patch aggregation, the mean
of the normed patches otherwise; both are reported. Features are standardised, and one linear layer is
trained on them with Adam and a cosine schedule, for every learning rate of a sweep. The rate is chosen on a
held-out part of the training images, then the layer is trained again on all of them. The same backbone with
fresh weights, and raw pixels, go through the same protocol.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import storage
from pipeline.artifacts import claim, publish, read_header
from pipeline.cluster import ClusterConfig, map_items
from pipeline.config import identity
from pipeline.errors import InputError
from pipeline.metrics import Progress
from pretrain.backbone import Backbone, load_backbone, read_backbone_header
from pretrain.evals.features import (
    UNLABELLED,
    FeatureSet,
    backbone_features,
    center_crops,
    extract_features,
    pixel_features,
    read_labels,
)
from shards.corpus import SubsetConfig, open_corpus
from shards.manifest import Dataset, open_dataset

ARTIFACT = "probe"

Z_95 = 1.959964  # two-sided 95 % of a normal distribution

_INPUT_NAMES = {"cls": "[CLS]", "mean_patch": "mean patch", "raw": "pixels"}


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Measure a pretrained backbone: top-1 accuracy of a linear classifier on its frozen features.

    Train and val are image shards with labels. Without labels the probe is skipped, with its reason.
    """

    backbone: str
    """The backbone artifact, the output of pretrain_mim."""
    train: str
    """Image shards the classifier is trained on, an output of prepare_images."""
    subset: SubsetConfig = SubsetConfig()
    """Part of the images of train instead of all: some classes, or a frozen list."""
    val: str
    """Image shards the accuracy is measured on."""
    output: str
    """Where probe.json goes: a folder or any fsspec URL."""
    lrs: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    """Learning rates to choose from."""
    epochs: int = 50
    """Passes over the features."""
    batch_size: int = 256
    """Features per step of the classifier."""
    holdout: float = 0.2
    """Share of the training images on which the learning rate is chosen."""
    seed: int = 0
    """Decides the held-out part, the order of features, and the weights of the untrained backbone."""
    untrained_baseline: bool = True
    """Probe the same backbone with fresh weights too."""
    pixel_baseline: bool = True
    """Probe raw pixels, shrunk to 32x32, too."""
    require_labels: bool = False
    """Fail where there are no labels, instead of writing a result that says so."""
    interpolation: str = "bicubic"
    """How centre crops are resized."""
    images_per_batch: int = 64
    """Images per forward pass of the backbone."""
    decode_threads: int = 2
    """Threads that decode."""
    cluster: ClusterConfig = field(default_factory=lambda: ClusterConfig(num_workers=0))
    """The probe is one process: 0 runs it here, 1 or more on a worker, with a GPU where there is one."""

    def __post_init__(self) -> None:
        if not self.lrs or min(self.lrs) <= 0:
            raise InputError(f"lrs is {list(self.lrs)}; give one or more positive learning rates")
        if min(self.epochs, self.batch_size, self.images_per_batch) < 1:
            raise InputError("epochs, batch_size and images_per_batch must be at least 1")
        if not 0 < self.holdout < 1:
            raise InputError(f"holdout is {self.holdout}; give a share between 0 and 1, such as 0.2")


PLACES = (
    "backbone",
    "train",
    "val",
    "output",
    "subset",
    "cluster",
    "images_per_batch",
    "decode_threads",
    "require_labels",
)
"""Settings that do not decide the result, or whose meaning the fingerprints of the inputs say."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Top-1 accuracy of one classifier, with its Wilson 95 % confidence interval; shares, not percent."""

    model: Literal["pretrained", "untrained", "pixels"]
    input: Literal["cls", "mean_patch", "raw"]
    top1: float
    low: float
    high: float
    lr: float
    """The chosen learning rate."""
    holdout_top1: float
    """Accuracy on the held-out training images by which it was chosen."""

    @property
    def label(self) -> str:
        """`pretrained [CLS]`."""
        return _INPUT_NAMES["raw"] if self.model == "pixels" else f"{self.model} {_INPUT_NAMES[self.input]}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Accuracy of one classifier minus another's on the same images; the 95 % interval is for pairs."""

    of: str
    over: str
    difference: float
    low: float
    high: float

    @property
    def verdict(self) -> Literal["gain", "loss", "within"]:
        """What the interval allows to say; "within" when it holds zero."""
        if self.low > 0:
            return "gain"
        return "loss" if self.high < 0 else "within"


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What the probe found, or why it could not be done.

    The first score is the probe's: the pretrained backbone, seen as its pretraining suggests.
    """

    skipped: str | None
    num_classes: int = 0
    """Classes of the training images."""
    num_train: int = 0
    num_val: int = 0
    largest_class: float = 0.0
    """Share of the most frequent class in val: what guessing reaches."""
    scores: tuple[Score, ...] = ()
    comparisons: tuple[Comparison, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For the artifact's header; verdicts are written out."""
        result = dataclasses.asdict(self)
        result["scores"] = [{**dataclasses.asdict(one), "label": one.label} for one in self.scores]
        result["comparisons"] = [
            {**dataclasses.asdict(one), "verdict": one.verdict} for one in self.comparisons
        ]
        return result

    def table(self) -> str:
        """For people."""
        if self.skipped is not None:
            return f"linear probe skipped: {self.skipped}"
        lines = [
            f"linear probe: {self.num_classes} classes, {self.num_train:,} training and {self.num_val:,} "
            f"validation images, the largest class holds {_percent(self.largest_class)} of these",
            f"  {'':<24}{'top-1':>8}   {'95 % interval':<18}{'lr':>8}",
        ]
        for score in self.scores:
            interval = f"{_percent(score.low)} to {_percent(score.high)}"
            lines.append(f"  {score.label:<24}{_percent(score.top1):>8}   {interval:<18}{score.lr:>8.0e}")
        for one in self.comparisons:
            said = {
                "gain": "a gain",
                "loss": "a loss",
                "within": "within the confidence interval: no difference is shown",
            }[one.verdict]
            lines.append(
                f"  {one.of} over {one.over}: {100 * one.difference:+.1f} points "
                f"(95 %: {100 * one.low:+.1f} to {100 * one.high:+.1f}), {said}"
            )
        return "\n".join(lines)


def probe_linear(config: ProbeConfig) -> None:
    """Probe the backbone and publish `probe.json` at `config.output`; a finished probe is printed again."""
    output = storage.absolute(config.output)
    config = dataclasses.replace(
        config,  # complete places: a worker runs in another folder
        backbone=storage.absolute(config.backbone),
        train=storage.absolute(config.train),
        val=storage.absolute(config.val),
    )
    header = read_backbone_header(config.backbone)
    train = open_corpus(config.train, "images", subset=config.subset)
    val = open_dataset(config.val, "images")
    inputs = {"backbone": header["fingerprint"], "train": train.fingerprint, "val": val.fingerprint}
    settings = identity(config, PLACES)

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
    """The whole measurement, in this process, on a GPU if it has one; writes nothing."""
    train_set = open_corpus(config.train, "images", subset=config.subset)
    val_set = open_dataset(config.val, "images")
    if (reason := why_not(train_set, val_set)) is not None:
        return ProbeResult(skipped=reason)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    aggregated = _was_aggregated(read_backbone_header(config.backbone))
    pretrained = load_backbone(config.backbone, device)

    extractors = [backbone_features(pretrained, "pretrained")]
    if config.untrained_baseline:
        extractors.append(backbone_features(_untrained(pretrained, config.seed), "untrained"))
    if config.pixel_baseline:
        extractors.append(pixel_features())

    def features_of(dataset: Dataset, what: str) -> FeatureSet:
        reader = center_crops(
            dataset,
            image_size=pretrained.config.image_size,
            interpolation=config.interpolation,
            batch_size=config.images_per_batch,
            num_threads=config.decode_threads,
        )
        progress = Progress(f"features of {what}", reader.num_samples, "images")
        found = extract_features(reader.batches(0), extractors, device, progress)
        reader.close()
        progress.close()
        return found

    train, val = features_of(train_set, "train"), features_of(val_set, "val")
    labels = translate_labels(val.labels, val_set.manifest.class_names, train_set.manifest.class_names)
    return probe_features(
        train, dataclasses.replace(val, labels=labels), config, aggregated=aggregated, device=device
    )


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
    scores: dict[str, Score] = {}
    correct: dict[str, Tensor] = {}
    for name in _ordered(train.inputs, aggregated):
        model, source = name.split(".")
        data = LabelledFeatures(train.inputs[name], train_labels, len(classes))
        lr, holdout_top1 = choose_lr(data, config, device)
        tested = LabelledFeatures(val.inputs[name], val_labels, len(classes))
        [fit] = train_classifiers(data, tested, [lr], config, device)
        correct[name] = fit.correct
        low, high = wilson_interval(int(fit.correct.sum()), len(val_labels))
        scores[name] = Score(
            model=model,  # type: ignore[arg-type]
            input=source,  # type: ignore[arg-type]
            top1=fit.correct.double().mean().item(),
            low=low,
            high=high,
            lr=lr,
            holdout_top1=holdout_top1,
        )
        print(f"{scores[name].label}: top-1 {_percent(scores[name].top1)} at lr {lr:.0e}", flush=True)

    main, *others = scores
    summary = main.split(".")[1]
    baselines = [name for name in others if name in (f"untrained.{summary}", "pixels.raw")]
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
    )


# ------------------------------------------------------------------------------------------------ classifier


@dataclass(frozen=True)
class LabelledFeatures:
    """features float32 [n, D] and labels int64 [n] below num_classes; -1 is a class nobody can predict."""

    features: Tensor
    labels: Tensor
    num_classes: int

    def rows(self, chosen: Tensor) -> LabelledFeatures:
        """Some of the images."""
        return LabelledFeatures(self.features[chosen], self.labels[chosen], self.num_classes)


@dataclass(frozen=True)
class Fit:
    """One trained classifier on the images it was tested on: correct bool [n], and mean cross-entropy."""

    correct: Tensor
    loss: float


def choose_lr(data: LabelledFeatures, config: ProbeConfig, device: torch.device | str) -> tuple[float, float]:
    """The learning rate with the best accuracy on a held-out part of the data, and that accuracy.

    Of equally accurate ones, the one with the smaller cross-entropy.
    """
    num = len(data.labels)
    order = torch.randperm(num, generator=torch.Generator().manual_seed(config.seed))
    num_held = min(max(1, round(config.holdout * num)), num - 1)
    held, kept = data.rows(order[:num_held]), data.rows(order[num_held:])
    fits = train_classifiers(kept, held, config.lrs, config, device)
    best = max(range(len(fits)), key=lambda i: (int(fits[i].correct.sum()), -fits[i].loss))
    return config.lrs[best], fits[best].correct.double().mean().item()


def train_classifiers(
    train: LabelledFeatures,
    test: LabelledFeatures,
    lrs: Sequence[float],
    config: ProbeConfig,
    device: torch.device | str,
) -> list[Fit]:
    """Train one linear classifier per learning rate, side by side on the same batches, and test each."""
    mean, std = train.features.mean(dim=0), train.features.std(dim=0, correction=0)
    scale = torch.where(std > 1e-6, 1.0 / std.clamp_min(1e-6), torch.zeros_like(std))  # constants say nothing
    x, y = ((train.features - mean) * scale).to(device), train.labels.to(device)
    heads = [nn.Linear(x.shape[1], train.num_classes, device=device) for _ in lrs]
    for head in heads:
        # The problem is convex: starting from zero favours nothing and draws nothing.
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    groups = [{"params": head.parameters(), "lr": lr} for head, lr in zip(heads, lrs, strict=True)]
    optimizer = torch.optim.Adam(groups, fused=True)
    num_steps = config.epochs * math.ceil(len(y) / config.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(config.epochs):
        for rows in torch.randperm(len(y), generator=generator).to(device).split(config.batch_size):
            batch, target = x[rows], y[rows]
            loss = torch.stack([F.cross_entropy(head(batch), target) for head in heads]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.inference_mode():
        x, y = ((test.features - mean) * scale).to(device), test.labels.to(device)
        logits = [head(x) for head in heads]
        return [
            Fit((one.argmax(dim=1) == y).cpu(), F.cross_entropy(one, y, ignore_index=-1).item())
            for one in logits
        ]


# ------------------------------------------------------------------------------------------------ statistics


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson 1927): sound near 0 and 1 and for few trials."""
    share = successes / trials
    denominator = 1.0 + Z_95**2 / trials
    centre = (share + Z_95**2 / (2 * trials)) / denominator
    half = Z_95 / denominator * math.sqrt(share * (1 - share) / trials + Z_95**2 / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def compare(ours: Tensor, theirs: Tensor, *, of: str, over: str) -> Comparison:
    """Difference of two accuracies from per-image correctness, bool [n] each, on the same images.

    Interval for paired shares (Agresti and Min 2005: Wald with half an image added to each cell of the 2x2
    table). Pairing takes out how hard the images are, which two separate intervals would count twice.
    """
    num = len(ours)
    only_ours, only_theirs = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    b, c, n = only_ours + 0.5, only_theirs + 0.5, num + 2.0
    centre = (b - c) / n
    half = Z_95 * math.sqrt(b + c - (b - c) ** 2 / n) / n
    return Comparison(
        of=of,
        over=over,
        difference=(only_ours - only_theirs) / num,
        low=max(-1.0, centre - half),
        high=min(1.0, centre + half),
    )


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


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"

"""Linear probe (paper §3.3, Table 5): how much of the labels a linear classifier finds in frozen features.

The protocol is unpublished for BEiT v2, so ours is stated here. Images are seen once, as centre crops. The
classifier's input is [CLS] after the final norm where the backbone was pretrained with patch aggregation, the
mean of the normed patches otherwise; both are reported. Features are standardised, one linear layer is trained
on them with Adam and a cosine schedule for every learning rate of a sweep, the rate is chosen on a held-out part
of the training images, and the layer is trained again on all of them. The same backbone with fresh weights, and
raw pixels, go through the same protocol.
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
    FeatureSet,
    backbone_features,
    center_crops,
    extract_features,
    pixel_features,
)
from shards.decode import DecodeConfig
from shards.manifest import Dataset, open_dataset, read_shard_index

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
    val: str
    """Image shards the accuracy is measured on."""
    output: str
    """Where probe.json goes: a folder or any fsspec URL."""
    lrs: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
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
    decode: DecodeConfig = DecodeConfig()
    """How source images become pixels."""
    images_per_batch: int = 64
    """Images per forward pass of the backbone."""
    decode_threads: int = 2
    """Threads that decode."""
    cluster: ClusterConfig = ClusterConfig(num_workers=0)
    """The probe is one process: 0 runs it here, 1 or more on a worker, which gets a GPU where there is one."""

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
    "cluster",
    "images_per_batch",
    "decode_threads",
    "require_labels",
)
"""Settings that do not decide the result."""


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
    """Accuracy of one classifier minus another's on the same images, with a paired 95 % confidence interval."""

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
    header = read_backbone_header(storage.absolute(config.backbone))
    train, val = open_dataset(config.train, "images"), open_dataset(config.val, "images")
    inputs = {"backbone": header["fingerprint"], "train": train.fingerprint, "val": val.fingerprint}
    settings = identity(config, PLACES)
    claim(output, {"job": "probe_linear", "config": settings, "inputs": inputs})
    if (held := read_header(output, ARTIFACT)) is not None:
        print(f"{held['table']}\n{output} is finished already, with the same settings and inputs", flush=True)
        return
    start = time.monotonic()
    cluster = dataclasses.replace(config.cluster, num_workers=min(config.cluster.num_workers, 1))
    [result] = map_items([config], _make_runner, cluster)
    if result.skipped is not None and config.require_labels:
        raise InputError(
            f"{result.skipped}; prepare the images from class folders, or leave require_labels out"
        )
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
    train_set, val_set = open_dataset(config.train, "images"), open_dataset(config.val, "images")
    for dataset in (train_set, val_set):
        if not _has_labels(dataset):
            return ProbeResult(skipped=f"no image of {dataset.url} has a label")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone_url = storage.absolute(config.backbone)
    aggregated = _was_aggregated(read_backbone_header(backbone_url))
    pretrained = load_backbone(backbone_url, device)

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
            decode=config.decode,
            batch_size=config.images_per_batch,
            num_threads=config.decode_threads,
        )
        progress = Progress(f"features of {what}", reader.num_samples, "images")
        found = extract_features(reader.batches(0), extractors, device, progress)
        reader.close()
        progress.close()
        return found

    train, val = features_of(train_set, "train"), features_of(val_set, "val")
    translated = translate_labels(val.labels, _class_names(val_set), _class_names(train_set))
    val = dataclasses.replace(val, labels=translated)
    names = _class_names(train_set)
    return probe_features(
        train, val, config, aggregated=aggregated, num_classes=len(names) if names else None, device=device
    )


def probe_features(
    train: FeatureSet,
    val: FeatureSet,
    config: ProbeConfig,
    *,
    aggregated: bool,
    num_classes: int | None = None,
    device: torch.device | str = "cpu",
) -> ProbeResult:
    """The protocol, from features on.

    aggregated: the backbone was pretrained with patch aggregation, so [CLS] is its summary of an image.
    num_classes: null takes the largest label.
    """
    reason = _why_not(train, val)
    if reason is not None:
        return ProbeResult(skipped=reason)
    if num_classes is None:
        num_classes = 1 + int(torch.cat([train.labels, val.labels]).max())

    scores: dict[str, Score] = {}
    correct: dict[str, Tensor] = {}
    for name in _ordered(train.inputs, aggregated):
        model, source = name.split(".")
        lr, holdout_top1 = choose_lr(train.inputs[name], train.labels, num_classes, config, device)
        correct[name] = _fit(
            train.inputs[name], train.labels, val.inputs[name], val.labels, num_classes, [lr], config, device
        )[0].correct
        low, high = wilson_interval(int(correct[name].sum()), len(val.labels))
        scores[name] = Score(
            model=model,  # type: ignore[arg-type]
            input=source,  # type: ignore[arg-type]
            top1=correct[name].double().mean().item(),
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
        num_classes=num_classes,
        num_train=len(train.labels),
        num_val=len(val.labels),
        largest_class=val.labels.bincount().max().item() / len(val.labels),
        scores=tuple(scores.values()),
        comparisons=tuple(
            compare(correct[main], correct[name], of=scores[main].label, over=scores[name].label)
            for name in baselines
        ),
    )


# ------------------------------------------------------------------------------------------------ classifier


@dataclass(frozen=True)
class _Fit:
    """One trained classifier on the images it was tested on: correct bool [n], and mean cross-entropy."""

    correct: Tensor
    loss: float


def choose_lr(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    config: ProbeConfig,
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """The learning rate with the best accuracy on a held-out part of features [n, D], and that accuracy.

    Of equally accurate ones, the one with the smaller cross-entropy.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(config.seed))
    num_held = min(max(1, round(config.holdout * len(labels))), len(labels) - 1)
    held, kept = order[:num_held], order[num_held:]
    fits = _fit(
        features[kept], labels[kept], features[held], labels[held], num_classes, config.lrs, config, device
    )
    best = max(range(len(fits)), key=lambda i: (int(fits[i].correct.sum()), -fits[i].loss))
    return config.lrs[best], fits[best].correct.double().mean().item()


def _fit(
    features: Tensor,
    labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    num_classes: int,
    lrs: Sequence[float],
    config: ProbeConfig,
    device: torch.device | str,
) -> list[_Fit]:
    """Train one linear classifier per learning rate on features [n, D], side by side, and test each."""
    mean, std = features.mean(dim=0), features.std(dim=0, correction=0)
    scale = torch.where(
        std > 1e-6, 1.0 / std.clamp_min(1e-6), torch.zeros_like(std)
    )  # constants carry nothing
    x, y = ((features - mean) * scale).to(device), labels.to(device)
    heads = [nn.Linear(x.shape[1], num_classes, device=device) for _ in lrs]
    for head in heads:
        # The problem is convex: starting from zero favours nothing and draws nothing.
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    optimizer = torch.optim.Adam(
        [{"params": head.parameters(), "lr": lr} for head, lr in zip(heads, lrs, strict=True)], fused=True
    )
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
        test_x, test_y = ((test_features - mean) * scale).to(device), test_labels.to(device)
        logits = [head(test_x) for head in heads]
        return [
            _Fit((one.argmax(dim=1) == test_y).cpu(), F.cross_entropy(one, test_y).item()) for one in logits
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


# ------------------------------------------------------------------------------------------------ inside


def translate_labels(labels: Tensor, names: Sequence[str] | None, into: Sequence[str] | None) -> Tensor:
    """Labels [n] that index `names` as labels that index `into`; unchanged where either is not named.

    Two datasets number their classes separately: a class folder missing in one shifts all that follow.
    InputError names a class that occurs in `labels` but not in `into`.
    """
    if names is None or into is None or list(names) == list(into):
        return labels
    place = {name: i for i, name in enumerate(into)}
    present = [names[i] for i in labels.unique().tolist()]
    unknown = [name for name in present if name not in place]
    if unknown:
        raise InputError(
            f"val has images of class {unknown[0]!r}, which train does not know; use two parts of one data set"
        )
    table = torch.tensor([place.get(name, -1) for name in names], dtype=torch.int64)
    return table[labels]


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


def _has_labels(dataset: Dataset) -> bool:
    """Whether any image has a label; looked up in the indexes, before hours go into features."""
    labels = (read_shard_index(shard, ("label",)).column("label") for shard in dataset.shards())
    return any(column.null_count < len(column) for column in labels)


def _class_names(dataset: Dataset) -> tuple[str, ...] | None:
    return dataset.manifest.class_names


def _why_not(train: FeatureSet, val: FeatureSet) -> str | None:
    """The reason why there can be no probe, or None."""
    for what, found in (("training", train), ("validation", val)):
        if len(found.labels) == 0:
            return f"none of the {found.num_unlabelled:,} {what} images has a label"
    if len(train.labels.unique()) < 2:
        return f"all {len(train.labels):,} labelled training images are of one class"
    return None


def _ordered(names: Iterable[str], aggregated: bool) -> list[str]:
    """Classifier inputs in the order of the report: the probe's own first, then its sibling, then baselines."""
    models = ["pretrained", "untrained", "pixels"]
    inputs = ["cls", "mean_patch", "raw"] if aggregated else ["mean_patch", "cls", "raw"]

    def place(name: str) -> tuple[int, int]:
        model, source = name.split(".")
        return models.index(model), inputs.index(source)

    return sorted(names, key=place)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"

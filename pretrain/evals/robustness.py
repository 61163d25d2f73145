"""Robustness (paper §3.3, Table 3): a fine-tuned classifier on clean and on shifted images, side by side.

ImageNet-A and -R have images of 200 of the 1000 classes. As published, only the logits of these 200 compete
there, so that no answer outside them can be given (reference.md §6.4); on ImageNet-Sketch all do. Classes are
matched by name, so the order of a classifier's outputs does not matter. Each shifted set is compared with the
clean images of its classes, with the same answers allowed; corrupted copies with their originals, in pairs.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline import storage
from pipeline.artifacts import claim, publish, read_header
from pipeline.cluster.config import ClusterConfig, device_type
from pipeline.cluster.items import map_items
from pipeline.config import ASIDE, PLACE, absolute_places, identity
from pipeline.errors import InputError
from pipeline.training.metrics import Progress
from pipeline.training.optim import Precision, autocast, resolve_precision
from pipeline.training.step import to_device
from pretrain.evals.corruptions import Corruption, StrengthTable, default_table, parse_corruptions
from pretrain.evals.image_sets import (
    BENCHMARKS,
    CLEAN,
    Answers,
    ImageSet,
    Outputs,
    answers_of,
    check_classes,
    look_at,
    outputs_of,
    parse_sets,
    prepare,
)
from pretrain.evals.intervals import Difference, difference_to_clean, percent, share_of, wilson_interval
from pretrain.finetune.train import TOP_K, default_center_fraction
from pretrain.model.artifacts import classifier_config, load_classifier, read_classifier_header
from shards.dataset.dataset import open_dataset
from shards.dataset.labels import translate_labels
from shards.pixels.crops import FreshCrops
from shards.pixels.views import ViewPolicy
from shards.reader.reader import Batches, ShardReader

ARTIFACT = "robustness"


@dataclass(frozen=True, kw_only=True)
class RobustnessConfig:
    """Measure a fine-tuned classifier on clean and on shifted images, side by side.

    Images come as image shards with labels, or as a folder of class folders, which is prepared into images/
    of the output; files that cannot be read are counted as rejects. Classes are matched by name. Every
    shifted set is compared with the clean images of its classes. A finished evaluation is printed again.
    """

    classifier: str = field(metadata=PLACE)
    """The classifier artifact, an output of finetune_classifier or import_checkpoint."""
    clean: str = field(metadata=PLACE)
    """Images without a shift, such as the validation images of the fine-tuning."""
    output: str = field(metadata=PLACE)
    """Where robustness.json goes: a folder or any fsspec URL."""
    imagenet_a: str | None = field(default=None, metadata=PLACE)
    """ImageNet-A, folders by wnid: only the logits of its 200 classes compete, as published."""
    imagenet_r: str | None = field(default=None, metadata=PLACE)
    """ImageNet-R, folders by wnid: only the logits of its 200 classes compete, as published."""
    imagenet_sketch: str | None = field(default=None, metadata=PLACE)
    """ImageNet-Sketch, folders by wnid: all logits compete."""
    shifted: str | None = field(default=None, metadata=ASIDE)
    """Shifted images of your own, as name=URL with commas between several; their classes are among the
    classifier's."""
    restrict_shifted: bool = False
    """On shifted sets of your own, let only the logits of the set's classes compete: it is then known that no
    other class occurs. Off: all logits compete, as in use."""
    corruptions: str | None = None
    """Corrupted copies of the clean images: some of gaussian_noise,gaussian_blur,contrast,jpeg."""
    severities: str = "1,2,3,4,5"
    """How strong they are, from 1 to 5, with commas between."""
    strengths: StrengthTable | None = None
    """What a severity means, the constants of imagenet_c or cifar10_c; null: imagenet_c from 128 pixels a
    side."""
    center_fraction: float | None = None
    """Side of the centre crop over the shorter side of the image; null: as in the fine-tuning, else 0.875
    below 384 pixels, 1 from there."""
    interpolation: str | None = None
    """How crops are resized: bicubic, bilinear or lanczos; null: as in the fine-tuning, else bicubic."""
    precision: Precision = "auto"
    """Compute type: auto is bf16 or fp16 on CUDA, fp32 on CPU."""
    seed: int = 0
    """Draws the noise of corrupted copies."""
    images_per_batch: int = field(default=64, metadata=ASIDE)
    """Images per forward pass."""
    decode_threads: int = field(default=2, metadata=ASIDE)
    """Threads that decode and corrupt, for each set that is being read."""
    cluster: ClusterConfig = field(default=ClusterConfig(num_workers=0), metadata=ASIDE)
    """Workers that share the sets, two at a time each: 0 runs here, on a GPU where there is one."""

    def __post_init__(self) -> None:
        if not (self.benchmarks or parse_sets(self.shifted) or self.corrupted("cifar10_c")):
            raise InputError(
                "there is nothing to compare with the clean images; give --imagenet_a, --imagenet_r, "
                "--imagenet_sketch, --shifted or --corruptions"
            )
        if self.center_fraction is not None and not 0.0 < self.center_fraction <= 1.0:
            raise InputError(f"center_fraction is {self.center_fraction}; give more than 0, at most 1")
        if self.images_per_batch < 1:
            raise InputError(f"images_per_batch is {self.images_per_batch}; give at least 1")
        if not 0 <= self.seed < 1 << 63:
            raise InputError(f"seed is {self.seed}; give 0 to 2^63 - 1")

    @property
    def benchmarks(self) -> dict[str, str]:
        """The published sets that were given, by name."""
        urls = {name: getattr(self, name) for name in BENCHMARKS}
        return {name: url for name, url in urls.items() if url is not None}

    def corrupted(self, table: StrengthTable) -> list[Corruption]:
        """The corruptions that were given, with the constants of a table."""
        return parse_corruptions(self.corruptions, self.severities, table=table, seed=self.seed)


# ------------------------------------------------------------------------------------------------ result


@dataclass(frozen=True, kw_only=True)
class Row:
    """Accuracies on one set of images, or on copies with one corruption; shares, a 95 % interval of top-1."""

    name: str
    """clean, the name of a set, or `contrast 3`."""
    corruption: str | None
    severity: int | None
    num_images: int
    num_classes: int
    """Classes of its images."""
    num_answers: int
    """Classes whose logits compete."""
    top1: float
    low: float
    high: float
    top5: float | None
    """None where no more than five classes compete."""
    difference: Difference | None
    """None for the clean images, and where these have no image of the row's classes."""


@dataclass(frozen=True, kw_only=True)
class SetAccount:
    """The files of one set: number of images evaluated, and of files rejected, by reason."""

    name: str
    num_images: int
    rejected: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class RobustnessResult:
    """The comparison; the first row is that of the clean images."""

    image_size: int
    center_fraction: float
    interpolation: str
    strengths: StrengthTable | None
    """Table of the corruptions' constants; None where nothing was corrupted."""
    sets: tuple[SetAccount, ...]
    rows: tuple[Row, ...]

    @property
    def mean_corrupted(self) -> float | None:
        """Top-1 accuracy, mean over all corruptions and severities."""
        top1 = [row.top1 for row in self.rows if row.corruption is not None]
        return sum(top1) / len(top1) if top1 else None

    def to_json(self) -> dict[str, Any]:
        """The result for the artifact's header."""
        return {**dataclasses.asdict(self), "mean_corrupted": self.mean_corrupted}

    def table(self) -> str:
        """The result for people."""
        width = max(len(row.name) for row in self.rows) + 2
        lines = [
            f"robustness: centre crops of {self.image_size} pixels a side, {self.center_fraction:.4g} of the "
            f"shorter side, {self.interpolation}",
            f"  {'':<{width}}{'images':>8}{'classes':>9}{'answers':>9}{'top-1':>9}   {'95 % interval':<18}"
            f"{'top-5':>8}   difference to clean images of the same classes",
        ]
        for row in self.rows:
            interval = f"{percent(row.low)} to {percent(row.high)}"
            change = "" if row.name == CLEAN else "no clean image of its classes"
            if row.difference is not None:
                change = row.difference.in_words()
            top5 = "-" if row.top5 is None else percent(row.top5)
            lines.append(
                f"  {row.name:<{width}}{row.num_images:>8,}{row.num_classes:>9,}{row.num_answers:>9,}"
                f"{percent(row.top1):>9}   {interval:<18}{top5:>8}   {change}".rstrip()
            )
        lines.append("  answers: so many classes compete")
        if self.mean_corrupted is not None:
            lines.append(
                f"  mean over corruptions and severities: {percent(self.mean_corrupted)} "
                f"(constants of {self.strengths})"
            )
        for account in self.sets:
            if account.rejected:
                reasons = ", ".join(f"{reason} {count:,}" for reason, count in account.rejected.items())
                lines.append(
                    f"  {account.name}: {sum(account.rejected.values()):,} files rejected when prepared, not "
                    f"evaluated ({reasons})"
                )
        return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ job


def evaluate_robustness(config: RobustnessConfig) -> None:
    """Measure and publish `robustness.json` at `config.output`; a finished one is printed again.

    Whatever labels, names of files and settings say is refused before anything is written; what only reading
    the files of a folder shows, such as that none is an image, once they are prepared.
    """
    config = absolute_places(config)
    header = read_classifier_header(config.classifier)
    outputs = outputs_of(config.classifier, header)
    crops = _crops(config, header)
    if config.precision == "fp16":
        resolve_precision(config.precision, torch.device(device_type(config.cluster)))
    own = {name: storage.absolute(url) for name, url in parse_sets(config.shifted).items()}
    urls = {CLEAN: config.clean, **config.benchmarks, **own}
    sets = [look_at(name, url, config.cluster) for name, url in urls.items()]
    for images in sets:
        if not images.is_shards and f"{config.output}/".startswith(f"{images.url}/"):
            raise InputError(
                f"{config.output} lies in the image folder {images.url}; choose another --output"
            )
    table = config.strengths or default_table(crops.policy.side)
    plan_passes(config, sets, outputs, table)

    settings = identity(config)
    fingerprints = {images.name: images.fingerprint for images in sets}
    inputs = {"classifier": header["fingerprint"], "images": fingerprints}
    claim(config.output, {"job": "evaluate_robustness", "config": settings, "inputs": inputs})
    if (finished := read_header(config.output, ARTIFACT)) is not None:
        print(
            f"{finished['table']}\n{config.output} is finished already, with the same settings and inputs",
            flush=True,
        )
        return

    start = time.monotonic()
    prepared = storage.join(config.output, "images")
    sets = [prepare(images, storage.join(prepared, images.name), config.cluster) for images in sets]
    passes = plan_passes(config, sets, outputs, table)
    hits = dict(map_items(passes, functools.partial(make_runner, config, crops), config.cluster))
    assert crops.center_fraction is not None
    result = RobustnessResult(
        image_size=crops.policy.side,
        center_fraction=crops.center_fraction,
        interpolation=crops.policy.interpolation,
        strengths=table if config.corrupted(table) else None,
        sets=tuple(
            SetAccount(name=images.name, num_images=len(images.labels), rejected=images.rejected)
            for images in sets
        ),
        rows=summarize(passes, hits, outputs.num_classes),
    )
    header = {
        "kind": ARTIFACT,
        "config": settings,
        "inputs": inputs,
        "result": result.to_json(),
        "table": result.table(),
        "seconds": time.monotonic() - start,
    }
    publish(config.output, ARTIFACT, {}, header)
    print(result.table(), flush=True)


def _crops(config: RobustnessConfig, header: Mapping[str, Any]) -> FreshCrops:
    """The evaluation crop of the fine-tuning, where that is known and nothing else is asked for."""
    image_size = classifier_config(header["config"]).backbone.image_size
    run: Mapping[str, Any] = header["run"].get("config", {})
    interpolation = config.interpolation or run.get("views", {}).get("interpolation") or "bicubic"
    fraction = config.center_fraction or run.get("center_fraction") or default_center_fraction(image_size)
    views = ViewPolicy(image_size=image_size, interpolation=interpolation)
    return FreshCrops(views, center_fraction=fraction)


# ------------------------------------------------------------------------------------------------ passes


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One reading of one set of images, as they are or corrupted."""

    name: str
    """Name of its row."""
    shards: str
    corruption: Corruption | None
    answers: tuple[Answers, ...]
    """Outputs that compete; images are scored once for each choice, the first is the row's own."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Hits:
    """Scores of the n images of a pass, in their order.

    truth: the true output, int64 [n]. right: for each of the pass's A choices of answers, whether the true
    output has the highest logit, and one of the five highest, bool [A, n, 2].
    """

    truth: Tensor
    right: Tensor


def plan_passes(
    config: RobustnessConfig, sets: Sequence[ImageSet], outputs: Outputs, table: StrengthTable
) -> list[Pass]:
    """The clean images first, then each shifted set, then each corruption at each severity.

    The clean images are scored with every choice of answers that a shifted set has, to compare it with.
    InputError where a set does not fit the classifier.
    """
    for images in sets:
        check_classes(images, outputs)
    clean, *shifted = sets
    answers = [answers_of(images, outputs, restrict=config.restrict_shifted) for images in shifted]
    choices = tuple(dict.fromkeys([None, *answers]))
    passes = [Pass(name=CLEAN, shards=clean.url, corruption=None, answers=choices)]
    passes += [
        Pass(name=images.name, shards=images.url, corruption=None, answers=(choice,))
        for images, choice in zip(shifted, answers, strict=True)
    ]
    passes += [
        Pass(name=corruption.label, shards=clean.url, corruption=corruption, answers=(None,))
        for corruption in config.corrupted(table)
    ]
    return passes


def make_runner(config: RobustnessConfig, crops: FreshCrops) -> Callable[[Pass], tuple[str, Hits]]:
    """Scores the images of a pass, in order of ids, with the classifier, on a GPU where there is one."""
    on_gpu = torch.cuda.is_available() and config.cluster.use_gpu is not False
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = resolve_precision(config.precision, device)
    model, header = load_classifier(config.classifier, device)
    batches = Batches(
        config.images_per_batch, shuffle=False, drop_last=False, num_threads=config.decode_threads
    )

    @torch.inference_mode()
    def run(item: Pass) -> tuple[str, Hits]:
        dataset = open_dataset(item.shards, "images")
        truths: list[Tensor] = []
        right: list[Tensor] = []
        with ShardReader(dataset, dataclasses.replace(crops, augment=item.corruption), batches) as reader:
            progress = Progress(item.name, reader.num_samples, "images")
            for batch in reader.batches(0):
                labels = translate_labels(batch.labels, dataset.manifest.class_names, header["class_names"])
                truth = torch.from_numpy(labels).to(device)
                with autocast(device, dtype):
                    logits = model(model.normalize(to_device(batch.pixels, device))).float()
                if not logits.isfinite().all():
                    raise FloatingPointError(
                        f"logits of {config.classifier} are not finite on {item.name}, batch "
                        f"{', '.join(batch.keys[:8])}…; its weights are damaged, or too large for "
                        f"{dtype}: try --precision fp32"
                    )
                right.append(torch.stack([score(logits, truth, choice) for choice in item.answers]).cpu())
                truths.append(truth.cpu())
                progress.update(len(truth))
            progress.close()
        return item.name, Hits(truth=torch.cat(truths), right=torch.cat(right, dim=1))

    return run


def score(logits: Tensor, truth: Tensor, answers: Answers) -> Tensor:
    """Whether the true output has the highest logit, and one of the five highest: bool [B, 2].

    logits [B, C], truth int64 [B]. Only `answers` compete, if given; an image of another class is then never
    right.
    """
    chosen = torch.arange(logits.shape[1]) if answers is None else torch.tensor(answers)
    chosen = chosen.to(logits.device)
    best = chosen[logits[:, chosen].topk(min(TOP_K, len(chosen)), dim=1).indices]
    right = best == truth[:, None]
    return torch.stack([right[:, 0], right.any(dim=1)], dim=1)


# ------------------------------------------------------------------------------------------------ comparison


def summarize(passes: Sequence[Pass], hits: Mapping[str, Hits], num_outputs: int) -> tuple[Row, ...]:
    """The rows of the passes, in their order; the first pass is that of the clean images."""
    rows: list[Row] = []
    for each in passes:
        truth, (top1, top5) = hits[each.name].truth, hits[each.name].right[0].unbind(dim=1)
        [answers, *_] = each.answers
        num_answers = num_outputs if answers is None else len(answers)
        low, high = wilson_interval(int(top1.sum()), len(top1))
        rows.append(
            Row(
                name=each.name,
                corruption=None if each.corruption is None else each.corruption.name,
                severity=None if each.corruption is None else each.corruption.severity,
                num_images=len(truth),
                num_classes=len(truth.unique()),
                num_answers=num_answers,
                top1=share_of(top1),
                low=low,
                high=high,
                top5=share_of(top5) if num_answers > TOP_K else None,
                difference=None if each is passes[0] else _difference(each, passes[0], hits),
            )
        )
    return tuple(rows)


def _difference(shifted: Pass, clean: Pass, hits: Mapping[str, Hits]) -> Difference | None:
    """None where there are no clean images to compare with."""
    truth, clean_truth = hits[shifted.name].truth, hits[clean.name].truth
    top1 = hits[shifted.name].right[0, :, 0]
    clean_top1 = hits[clean.name].right[clean.answers.index(shifted.answers[0]), :, 0]
    if shifted.corruption is None:
        return difference_to_clean(top1, clean_top1[torch.isin(clean_truth, truth)], paired=False)
    if not torch.equal(truth, clean_truth):
        raise RuntimeError(f"{shifted.name} has other images than the clean set it was made of")
    return difference_to_clean(top1, clean_top1, paired=True)

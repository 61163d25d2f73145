"""Robustness (paper §3.3, Table 3): a fine-tuned classifier on clean and on shifted images, side by side.

ImageNet-A and -R have images of 200 of the 1000 classes. As published, only the logits of these 200 compete
there, so that no answer outside them can be given (reference.md §6.4); on ImageNet-Sketch all do. Classes are
found by name, so the order of a classifier's outputs does not matter. Each shift is held against the clean
images of the same classes, with the same answers allowed; corrupted copies against their originals, in pairs.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
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
from pretrain.evals.corruptions import CORRUPTIONS, SEVERITIES, Corruption, StrengthTable, default_table
from pretrain.evals.image_sets import BENCHMARKS, ImageSet, Outputs, check_classes, look_at, prepare, wnids
from pretrain.evals.intervals import compare, wilson_interval
from pretrain.evals.robustness_plot import Curve, Point, draw
from pretrain.evals.robustness_result import (
    CLEAN,
    Difference,
    RobustnessResult,
    Row,
    SetAccount,
    difference_interval,
)
from pretrain.finetune.train import TOP_K, default_center_fraction
from pretrain.model.artifacts import classifier_config, load_classifier, read_classifier_header
from shards.dataset.dataset import open_dataset
from shards.dataset.labels import translate_labels
from shards.pixels.crops import FreshCrops
from shards.pixels.views import ViewPolicy
from shards.reader.reader import Batches, ShardReader

ARTIFACT = "robustness"
PLOT_FILE = "robustness.png"
PREPARED = "images"
"""Folder, in the output, of what is prepared from image folders."""

# ------------------------------------------------------------------------------------------------ settings


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
    """Where robustness.json and robustness.png go: a folder or any fsspec URL."""
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
        if not (self.benchmarks or self.own_sets or self.corruption_names):
            raise InputError(
                "there is nothing to compare with the clean images; give --imagenet_a, --imagenet_r, "
                "--imagenet_sketch, --shifted or --corruptions"
            )
        for name in self.corruption_names:
            if name not in CORRUPTIONS:
                raise InputError(f"corruptions names {name!r}; give some of {','.join(CORRUPTIONS)}")
        if not self.severity_levels:
            raise InputError("severities is empty; give some of 1,2,3,4,5")
        if self.strengths not in (None, "imagenet_c", "cifar10_c"):
            raise InputError(f"strengths is {self.strengths}; give imagenet_c, cifar10_c or null")
        if self.center_fraction is not None and not 0.0 < self.center_fraction <= 1.0:
            raise InputError(f"center_fraction is {self.center_fraction}; give more than 0, at most 1")
        if self.images_per_batch < 1:
            raise InputError(f"images_per_batch is {self.images_per_batch}; give at least 1")
        if not 0 <= self.seed < 1 << 63:
            raise InputError(f"seed is {self.seed}; give 0 to 2^63 - 1")

    @property
    def benchmarks(self) -> dict[str, str]:
        """The published sets that were given, by name."""
        given = {
            "imagenet_a": self.imagenet_a,
            "imagenet_r": self.imagenet_r,
            "imagenet_sketch": self.imagenet_sketch,
        }
        return {name: url for name, url in given.items() if url is not None}

    @property
    def own_sets(self) -> dict[str, str]:
        """The shifted sets of one's own, by name; InputError where they are not name=URL."""
        sets: dict[str, str] = {}
        for part in _parts(self.shifted):
            name, _, url = part.partition("=")
            if not url or not re.fullmatch(r"\w[\w.-]*", name):
                raise InputError(f"shifted has {part!r}; give name=URL, the name of letters, digits, _ . -")
            if name in sets or name == CLEAN or name in BENCHMARKS:
                raise InputError(f"shifted uses the name {name} for a second set; choose another")
            sets[name] = url
        return sets

    @property
    def corruption_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(_parts(self.corruptions)))

    @property
    def severity_levels(self) -> tuple[int, ...]:
        """Ascending, each once; InputError for anything but 1 to 5."""
        given = _parts(self.severities)
        for level in given:
            if level not in map(str, SEVERITIES):
                raise InputError(f"severities has {level!r}; give some of 1,2,3,4,5")
        return tuple(sorted({int(level) for level in given}))


def _parts(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


# ------------------------------------------------------------------------------------------------ the job


Answers = tuple[int, ...] | None
"""Outputs whose logits compete, ascending; None: all."""


@dataclass(frozen=True, kw_only=True)
class Crops:
    """How images become what the model sees."""

    policy: ViewPolicy
    center_fraction: float


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One reading of one set of images, as they are or corrupted."""

    name: str
    """Of its row."""
    shards: str
    corruption: Corruption | None
    answers: tuple[Answers, ...]
    """What competes; images are scored once for each, the first is the row's own."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Hits:
    """What became of the n images of a pass, in their order: the true output, and whether it was found.

    truth int64 [n]; top1 and top5 (top-2 of two, and so on) bool [n], one for each of the pass's answers.
    """

    truth: Tensor
    top1: tuple[Tensor, ...]
    top5: tuple[Tensor, ...]


def evaluate_robustness(config: RobustnessConfig) -> None:
    """Measure and publish `robustness.json` and its plot at `config.output`; a finished one is printed again.

    Whatever labels, names of files and settings say is refused before anything is written; what only reading
    the files of a folder shows, such as that none is an image, once they are prepared.
    """
    config = absolute_places(config)
    header = read_classifier_header(config.classifier)
    outputs = _outputs(config.classifier, header)
    crops = _crops(config, header)
    if config.precision == "fp16":
        resolve_precision(config.precision, torch.device(device_type(config.cluster)))
    own = {name: storage.absolute(url) for name, url in config.own_sets.items()}
    urls = {CLEAN: config.clean, **config.benchmarks, **own}
    sets = [look_at(name, url, config.cluster) for name, url in urls.items()]
    for found in sets:
        check_classes(found, outputs)
        if not found.is_shards and f"{config.output}/".startswith(f"{found.url}/"):
            raise InputError(f"{config.output} lies in the image folder {found.url}; choose another --output")
    # Planned here once already: what does not fit is refused before anything is written.
    plan_passes(config, sets, outputs, crops)

    settings = identity(config)
    fingerprints = {found.name: found.fingerprint for found in sets}
    inputs = {"classifier": header["fingerprint"], "images": fingerprints}
    claim(config.output, {"job": "evaluate_robustness", "config": settings, "inputs": inputs})
    if (held := read_header(config.output, ARTIFACT)) is not None:
        print(
            f"{held['table']}\n{config.output} is finished already, with the same settings and inputs",
            flush=True,
        )
        return

    start = time.monotonic()
    prepared = storage.join(config.output, PREPARED)
    sets = [prepare(found, storage.join(prepared, found.name), config.cluster) for found in sets]
    for found in sets:
        check_classes(found, outputs)
    passes = plan_passes(config, sets, outputs, crops)
    make_runner = functools.partial(_Evaluator, config, crops)
    hits = dict(map_items(passes, make_runner, config.cluster))
    result = RobustnessResult(
        image_size=crops.policy.side,
        center_fraction=crops.center_fraction,
        interpolation=crops.policy.interpolation,
        strengths=_strengths(config, crops) if config.corruption_names else None,
        sets=tuple(
            SetAccount(name=found.name, num_images=len(found.labels), rejected=found.rejected)
            for found in sets
        ),
        rows=summarize(passes, hits, outputs.num_classes),
    )
    publish(
        config.output,
        ARTIFACT,
        {PLOT_FILE: plot(result)},
        {
            "kind": ARTIFACT,
            "config": settings,
            "inputs": inputs,
            "result": result.to_json(),
            "table": result.table(),
            "seconds": time.monotonic() - start,
        },
    )
    print(f"{result.table()}\nplot: {storage.join(config.output, PLOT_FILE)}", flush=True)


def _outputs(url: str, header: Mapping[str, Any]) -> Outputs:
    num_classes, names = classifier_config(header["config"]).num_classes, header["class_names"]
    if num_classes == 0:
        raise InputError(f"{url} has no head and so tells no classes apart; give a fine-tuned classifier")
    return Outputs(url=url, num_classes=num_classes, class_names=None if names is None else tuple(names))


def _crops(config: RobustnessConfig, header: Mapping[str, Any]) -> Crops:
    """The evaluation crop of the fine-tuning, where that is known and nothing else is asked for."""
    image_size = classifier_config(header["config"]).backbone.image_size
    run: Mapping[str, Any] = header["run"].get("config", {})
    interpolation = config.interpolation or run.get("views", {}).get("interpolation") or "bicubic"
    fraction = config.center_fraction or run.get("center_fraction") or default_center_fraction(image_size)
    return Crops(
        policy=ViewPolicy(image_size=image_size, interpolation=interpolation), center_fraction=fraction
    )


def _strengths(config: RobustnessConfig, crops: Crops) -> StrengthTable:
    return config.strengths or default_table(crops.policy.side)


def plan_passes(
    config: RobustnessConfig, sets: Sequence[ImageSet], outputs: Outputs, crops: Crops
) -> list[Pass]:
    """The clean images first, then each shifted set, then each corruption at each severity.

    The clean images are scored with every choice of answers that a shifted set has, to compare it with.
    """
    clean, *shifted = sets
    answers = {found.name: _answers(config, found, outputs) for found in shifted}
    passes = [
        Pass(
            name=CLEAN,
            shards=clean.url,
            corruption=None,
            answers=tuple(dict.fromkeys([None, *answers.values()])),
        )
    ]
    passes += [
        Pass(name=found.name, shards=found.url, corruption=None, answers=(answers[found.name],))
        for found in shifted
    ]
    table = _strengths(config, crops)
    corruptions = [
        Corruption(name=name, severity=severity, table=table, seed=config.seed)
        for name in CORRUPTIONS
        if name in config.corruption_names
        for severity in config.severity_levels
    ]
    passes += [Pass(name=one.label, shards=clean.url, corruption=one, answers=(None,)) for one in corruptions]
    return passes


def _answers(config: RobustnessConfig, found: ImageSet, outputs: Outputs) -> Answers:
    if found.name in ("imagenet_a", "imagenet_r"):
        return tuple(sorted(outputs.places(wnids(found.name))))
    if found.name in BENCHMARKS or not config.restrict_shifted:
        return None
    labels = translate_labels(found.labels, found.class_names, outputs.class_names)
    answers = tuple(np.unique(labels).tolist())
    if len(answers) < 2:
        raise InputError(
            f"all images of {found.url} are of one class, and restrict_shifted lets no other compete; leave "
            "it out, or give images of more classes"
        )
    return answers


# ------------------------------------------------------------------------------------------------ one pass


class _Evaluator:
    """Scores the images of passes with one classifier, on a GPU where there is one."""

    def __init__(self, config: RobustnessConfig, crops: Crops) -> None:
        on_gpu = torch.cuda.is_available() and config.cluster.use_gpu is not False
        self._config, self._crops = config, crops
        self._device = torch.device("cuda" if on_gpu else "cpu")
        self._dtype = resolve_precision(config.precision, self._device)
        self._model, header = load_classifier(config.classifier, self._device)
        self._class_names: Sequence[str] | None = header["class_names"]

    @torch.inference_mode()
    def __call__(self, item: Pass) -> tuple[str, Hits]:
        """The name of the pass and what it found; every image is seen once, in order of ids."""
        dataset = open_dataset(item.shards, "images")
        truths: list[Tensor] = []
        found: list[list[Tensor]] = [[] for _ in item.answers]  # bool [b, 2] each
        crops = FreshCrops(
            self._crops.policy, center_fraction=self._crops.center_fraction, augment=item.corruption
        )
        batches = Batches(
            self._config.images_per_batch,
            shuffle=False,
            drop_last=False,
            num_threads=self._config.decode_threads,
        )
        with ShardReader(dataset, crops, batches) as reader:
            progress = Progress(item.name, reader.num_samples, "images")
            for batch in reader.batches(0):
                truth = torch.from_numpy(
                    translate_labels(batch.labels, dataset.manifest.class_names, self._class_names)
                )
                with autocast(self._device, self._dtype):
                    logits = self._model(self._model.normalize(to_device(batch.pixels, self._device)))
                logits = logits.float()
                if not logits.isfinite().all():
                    raise FloatingPointError(
                        f"logits of {self._config.classifier} are not finite on {item.name}, batch "
                        f"{', '.join(batch.keys[:8])}…; its weights are damaged, or too large for "
                        f"{self._dtype}: try --precision fp32"
                    )
                for scores, answers in zip(found, item.answers, strict=True):
                    scores.append(score(logits, truth.to(self._device), answers).cpu())
                truths.append(truth)
                progress.update(len(truth))
            progress.close()
        joined = [torch.cat(scores) for scores in found]
        return item.name, Hits(
            truth=torch.cat(truths),
            top1=tuple(scores[:, 0] for scores in joined),
            top5=tuple(scores[:, 1] for scores in joined),
        )


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
    clean_pass, clean = passes[0], hits[passes[0].name]
    rows: list[Row] = []
    for one in passes:
        found, [answers, *_] = hits[one.name], one.answers
        right, num_answers = found.top1[0], num_outputs if answers is None else len(answers)
        low, high = wilson_interval(int(right.sum()), len(right))
        difference = None
        if one.corruption is not None:
            if not torch.equal(found.truth, clean.truth):
                raise RuntimeError(f"{one.name} has other images than the clean set it was made of")
            difference = _paired(right, clean.top1[0])
        elif one is not clean_pass:
            clean_right = clean.top1[clean_pass.answers.index(answers)]
            difference = _unpaired(right, clean_right[torch.isin(clean.truth, found.truth)])
        rows.append(
            Row(
                name=one.name,
                corruption=None if one.corruption is None else one.corruption.name,
                severity=None if one.corruption is None else one.corruption.severity,
                num_images=len(right),
                num_classes=len(found.truth.unique()),
                num_answers=num_answers,
                top1=_share(right),
                low=low,
                high=high,
                top5=_share(found.top5[0]) if num_answers > TOP_K else None,
                difference=difference,
            )
        )
    return tuple(rows)


def _paired(right: Tensor, clean_right: Tensor) -> Difference:
    found = compare(right, clean_right, of="shifted", over=CLEAN)
    return Difference(
        clean_top1=_share(clean_right),
        num_clean=len(clean_right),
        difference=found.difference,
        low=found.low,
        high=found.high,
        paired=True,
    )


def _unpaired(right: Tensor, clean_right: Tensor) -> Difference | None:
    """None where there are no clean images to compare with."""
    if not len(clean_right):
        return None
    low, high = difference_interval(int(right.sum()), len(right), int(clean_right.sum()), len(clean_right))
    return Difference(
        clean_top1=_share(clean_right),
        num_clean=len(clean_right),
        difference=_share(right) - _share(clean_right),
        low=low,
        high=high,
        paired=False,
    )


def plot(result: RobustnessResult) -> bytes:
    """The comparison as a PNG."""
    clean, *shifted = result.rows
    curves: list[Curve] = []
    for name in dict.fromkeys(row.corruption for row in shifted if row.corruption is not None):
        rows = [row for row in shifted if row.corruption == name]
        severities = [row.severity for row in rows if row.severity is not None]
        curves.append(Curve(label=name, severities=severities, points=[_point(row) for row in rows]))
    return draw(
        f"A classifier on clean and on shifted images, {clean.num_images:,} clean ones of "
        f"{clean.num_classes:,} classes",
        _point(clean),
        [_point(row) for row in shifted if row.corruption is None],
        curves,
    )


def _point(row: Row) -> Point:
    clean = None if row.difference is None else row.difference.clean_top1
    label = f"{row.name}\none of {row.num_answers:,}"
    return Point(label=label, value=row.top1, low=row.low, high=row.high, clean=clean)


def _share(right: Tensor) -> float:
    return right.double().mean().item()

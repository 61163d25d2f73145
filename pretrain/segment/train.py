"""Semantic segmentation (paper §3.4 and Table 11): UperNet on a pretrained backbone, trained on label maps.

Numbers without a table are those of the published ADE20K configuration (reference.md §6.5). Read `_train`
from top to bottom: it is the whole loop.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import artifacts, storage
from pipeline.cluster.training import run_training
from pipeline.config import ASIDE, PLACE, absolute_places
from pipeline.errors import InputError
from pipeline.threads import in_order
from pipeline.training.checkpoints import TrainState
from pipeline.training.config import TrainingConfig, claim_output
from pipeline.training.journal import Journal
from pipeline.training.metrics import Progress
from pipeline.training.optim import autocast, grad_scaler, resolve_precision
from pipeline.training.step import require_finite, synchronized, to_device
from pipeline.training.worker import Worker
from pretrain.finetune.layer_decay import layerwise_groups, set_layerwise_lr
from pretrain.model.artifacts import (
    CLASSIFIER,
    backbone_config,
    classifier_config,
    load_tensors,
    publish_model,
    read_backbone_header,
    read_classifier_header,
    read_model_header,
    read_weights,
)
from pretrain.model.backbone import BackboneSize
from pretrain.model.classifier import Classifier, ClassifierConfig, classifier_from_backbone
from pretrain.segment.label_maps import (
    IGNORED,
    CropPolicy,
    CropReader,
    LabelRules,
    Pair,
    check_pairs,
    list_pairs,
    read_pair,
    resize_image,
)
from pretrain.segment.score import Score, confusion_matrix, picture
from pretrain.segment.upernet import (
    Segmenter,
    UperNetConfig,
    segmentation_loss,
    slide_logits,
    synchronize_batch_norm,
)

ARTIFACT = "segmentation"
PICTURES = "pictures"


@dataclass(frozen=True, kw_only=True)
class PolyOptimConfig:
    """AdamW with layer-wise rates and a polynomial schedule. Defaults: base size."""

    peak_lr: float = 5e-5
    """Learning rate of the head after warm-up; not scaled by the batch size."""
    min_lr: float = 0.0
    """Learning rate at the end."""
    warmup_steps: int = 1500
    """Steps of linear warm-up."""
    warmup_ratio: float = 1e-6
    """Share of the learning rate at the first step."""
    power: float = 1.0
    """Exponent of the decay; 1 is a straight line."""
    layer_decay: float = 0.75
    """Factor on the learning rate from one block to the block below it."""
    weight_decay: float = 0.05
    """Constant decay; not on biases, norms, scales and [CLS]."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    clip_grad_norm: float | None = None
    """Largest gradient norm; null leaves gradients alone."""

    def __post_init__(self) -> None:
        if self.peak_lr <= 0 or self.min_lr < 0:
            raise InputError(
                f"optim.peak_lr {self.peak_lr} must be positive and optim.min_lr {self.min_lr} not negative"
            )
        if not 0 < self.layer_decay <= 1:
            raise InputError(f"optim.layer_decay is {self.layer_decay}; give more than 0, at most 1")


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig(TrainingConfig):
    """Train UperNet on folders of images and label maps, and measure mIoU. Defaults: ADE20K, base size.

    An image and its label map have the same name but for the extension, in the same subfolder; label maps are
    grey or palette images (PNG) whose values are classes. A killed run started again with the same settings
    goes on from its last checkpoint; a finished one is left alone. The last line printed is `mIoU …`.
    """

    train_images: str = field(metadata=PLACE)
    """Images to train on: a folder or any fsspec URL."""
    train_labels: str = field(metadata=PLACE)
    """Their label maps."""
    val_images: str = field(metadata=PLACE)
    """Images on which mIoU is measured."""
    val_labels: str = field(metadata=PLACE)
    """Their label maps."""
    num_classes: int
    """Classes to tell apart: label values 0 to num_classes - 1; with reduce_zero_label 1 to num_classes."""
    backbone: str | None = field(default=None, metadata=PLACE)
    """The backbone artifact, the output of pretrain_mim; with init scratch only its shape counts."""
    init: Literal["backbone", "scratch"] = "backbone"
    """Where the backbone's weights come from: the artifact, or chance."""
    scratch: BackboneSize = BackboneSize()
    """Shape of a random backbone when no artifact gives one."""
    patch_size: int = 16
    """Pixels a side of a patch of such a backbone."""
    ignore_index: int = 255
    """Label value of pixels that count nowhere."""
    reduce_zero_label: bool = False
    """Label 0 counts nowhere, and label 1 is the first class, as in ADE20K."""
    class_names: tuple[str, ...] | None = field(default=None, metadata=ASIDE)
    """Names of the classes, for the table of results."""
    drop_path: float = 0.15
    """Stochastic depth of the last block."""
    head: UperNetConfig = UperNetConfig()
    """What is put on the backbone."""
    crops: CropPolicy = CropPolicy()
    """Resizing and augmentation."""
    optim: PolyOptimConfig = PolyOptimConfig()
    """AdamW and its schedule."""
    steps: int = 160_000
    """Optimizer steps."""
    batch_size: int = 16
    """Crops per optimizer step, over all workers."""
    micro_batch_size: int | None = None
    """Crops per forward pass and worker, over which batch norm averages; null takes them all at once."""
    window_stride: int | None = None
    """Pixels between windows at evaluation; null is two thirds of a crop (341 of 512)."""
    evaluate_every_steps: int | None = field(default=None, metadata=ASIDE)
    """Steps between evaluations; null evaluates at the end only."""
    num_pictures: int = field(default=16, metadata=ASIDE)
    """Pictures of the final predictions on val: image, truth, prediction side by side."""
    check_threads: int = field(default=8, metadata=ASIDE)
    """Threads that decode all images and label maps once, before training."""
    checkpoint_every_s: float = field(default=600.0, metadata=ASIDE)
    """Seconds between checkpoints; one is also written on SIGTERM, and before the last evaluation."""
    checkpoint_keep: int = field(default=2, metadata=ASIDE)
    """How many of the newest checkpoints stay."""
    log_every_steps: int = field(default=50, metadata=ASIDE)

    def __post_init__(self) -> None:
        counts = (self.num_classes, self.steps, self.batch_size, self.log_every_steps)
        threads = (self.decode_threads, self.check_threads, self.evaluate_every_steps or 1)
        if min(*counts, *threads) < 1 or min(self.seed, self.num_pictures) < 0:
            raise InputError(
                "num_classes, steps, batch_size, log_every_steps, evaluate_every_steps, decode_threads and "
                "check_threads must be at least 1, seed and num_pictures at least 0"
            )
        if self.init == "backbone" and self.backbone is None:
            raise InputError("give --backbone, the output of pretrain_mim, or --init scratch")
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise InputError(f"{len(self.class_names)} class_names for num_classes {self.num_classes}")
        workers = max(self.cluster.num_workers, 1)
        if self.batch_size % workers:
            raise InputError(
                f"batch_size {self.batch_size} does not divide by {workers} workers; "
                "their batch norm needs equal shares"
            )
        if self.stride < 1 or self.stride > self.crops.size:
            raise InputError(
                f"window_stride is {self.window_stride}; give 1 to crops.size {self.crops.size} pixels"
            )
        share = self.batch_size // workers
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise InputError(f"micro_batch_size is {self.micro_batch_size}; give 1 or more")
        if workers * (share // self.num_passes(share)) < 2:
            raise InputError(
                f"batch_size {self.batch_size} and micro_batch_size {self.micro_batch_size} leave single "
                "crops; batch norm needs two or more in a forward pass over all workers"
            )

    @property
    def stride(self) -> int:
        """Pixels between evaluation windows."""
        return max(1, self.crops.size * 2 // 3) if self.window_stride is None else self.window_stride

    @property
    def rules(self) -> LabelRules:
        """What label values mean."""
        return LabelRules(
            num_classes=self.num_classes,
            ignore_index=self.ignore_index,
            reduce_zero_label=self.reduce_zero_label,
        )

    def num_passes(self, share: int) -> int:
        """Forward passes in which a worker takes its share of a batch."""
        return 1 if self.micro_batch_size is None else math.ceil(share / self.micro_batch_size)


def finetune_segmentation(config: SegmentationConfig) -> Score:
    """Train, or finish training, the segmenter at `config.output`; its score on val, also printed."""
    config = absolute_places(config)
    output = config.output
    # Everything that can be refused is refused before anything is written.
    start = _read_start(config)
    _model(config, start)
    train = list_pairs(config.train_images, config.train_labels)
    val = list_pairs(config.val_images, config.val_labels)
    checked = check_pairs(train, config.rules, "train", config.check_threads)
    checked_val = check_pairs(val, config.rules, "val", config.check_threads)
    names = config.class_names or tuple(f"class {i}" for i in range(config.num_classes))
    if unseen := [names[i] for i in np.flatnonzero(checked.pixels_per_class == 0)]:
        print(f"warning: no training pixel is labelled {', '.join(unseen)}", flush=True)

    inputs = {**start.inputs, "train": checked.fingerprint, "val": checked_val.fingerprint}
    if claim_output(config, "finetune_segmentation", ARTIFACT, inputs):
        run_training(_train, _Run(config=config, inputs=inputs), config.cluster)
    score = Score.from_json(read_segmentation_header(output)["result"])
    print(f"{score.table(names)}\nmIoU {score.miou:.4f}", flush=True)
    return score


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What every worker is given: the settings, and fingerprints of what was checked before."""

    config: SegmentationConfig
    inputs: dict[str, str]


def _train(run: _Run, worker: Worker) -> None:
    """One worker's part of the training and of the evaluation."""
    config, device = run.config, worker.device
    optim = config.optim

    # Model and optimizer. Every rank draws the same weights.
    torch.manual_seed(config.seed)
    dtype = resolve_precision(config.precision, device)
    model = _model(config, _read_start(config)).to(device)
    synchronize_batch_norm(model, worker)
    groups = layerwise_groups(model, weight_decay=optim.weight_decay, layer_decay=optim.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=optim.peak_lr, betas=optim.betas, eps=optim.eps)
    scaler = grad_scaler(device, dtype)
    lr = poly_schedule(optim, config.steps)

    # Data: equal shares of the global batches.
    train = list_pairs(config.train_images, config.train_labels)
    val = list_pairs(config.val_images, config.val_labels)
    reader = CropReader(
        train,
        config.rules,
        config.crops,
        worker,
        fill=_mean_colour(model),
        batch_size=config.batch_size,
        seed=config.seed,
        num_threads=config.decode_threads,
    )
    share = config.batch_size // worker.world_size
    num_pixels = config.batch_size * config.crops.size**2

    # Resume. Steps since the last record travel along: a resumed run's records are a straight one's.
    journal = Journal(config, worker, {"model": model, "optimizer": optimizer, "scaler": scaler})
    step, metrics, unlogged = journal.state.step, dict[str, float](), list[Tensor]()
    if (resumed := journal.resumed) is not None:
        metrics, unlogged = resumed["metrics"], [row.to(device) for row in resumed["unlogged"]]
    replica = worker.replicate(model)

    def tensors() -> dict[str, Any]:
        if unlogged:
            # What is newest is loaded first: it must be good.
            _require_finite(torch.stack(unlogged), step, reader, scaled=scaler.is_enabled())
        return {"metrics": metrics, "unlogged": unlogged}

    journal.begin(
        f"{len(train):,} training and {len(val):,} validation images, {config.num_classes} classes, "
        f"{config.steps:,} steps of {config.batch_size} crops of {config.crops.size}, levels from blocks "
        f"{', '.join(map(str, model.layers))}, init {config.init}, {worker.world_size} workers, "
        f"{device}, {dtype}",
        Progress("segment", config.steps, "steps", done=step),
        tensors,
    )

    def evaluate(*, pictures: bool) -> Score:
        score = _evaluate(config, model, val, worker, dtype, journal.save_if_asked, pictures=pictures)
        journal.record(journal.state, score.figures(), split="val")
        return score

    model.train()
    for batch in reader.batches(step, config.steps):
        set_layerwise_lr(optimizer, lr(step))
        # Dropped channels and branches are a function of the step too, so a resumed run drops the same.
        torch.manual_seed(hash((config.seed, step, worker.rank)))
        sums = torch.zeros(4, dtype=torch.float64, device=device)
        passes = np.array_split(np.arange(share), config.num_passes(share))
        for rows in passes:
            pixels = to_device(batch.pixels[rows], device)
            classes = torch.from_numpy(batch.classes[rows]).to(device, torch.int64)
            with synchronized(replica, rows is passes[-1]), autocast(device, dtype):
                output = replica(model.backbone.normalize(pixels))
                loss = segmentation_loss(output, classes, ignored=IGNORED)
                # The mean over all pixels, ignored ones included, as in the reference.
                total = loss.decode + config.head.auxiliary_weight * loss.auxiliary
                scaler.scale(total * (worker.world_size / num_pixels)).backward()
            sums += loss.sums()
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad_norm or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        # Over all ranks in every step, so that the main rank may save after any.
        unlogged.append(torch.cat([worker.sum(sums), grad_norm.detach().double().view(1)]))
        step += 1

        here = TrainState(position=step * config.batch_size, step=step)
        evaluates = config.evaluate_every_steps is not None and step % config.evaluate_every_steps == 0
        if recorded := step % config.log_every_steps == 0 or step == config.steps or evaluates:
            since = torch.stack(unlogged)
            unlogged.clear()
            _require_finite(since, step, reader, scaled=scaler.is_enabled())
            metrics = _figures(since.sum(dim=0).tolist(), len(since) * num_pixels, config)
            journal.record(here, {**metrics, "lr": lr(step - 1), "grad_norm": float(grad_norm)})
            if evaluates and step < config.steps:
                score = evaluate(pictures=False)
                if worker.is_main:
                    print(f"step {step:,}: mIoU {score.miou:.4f}", flush=True)
                model.train()
        journal.after_step(here, 1, metrics, may_save=recorded)

    journal.save_together(journal.state)
    score = evaluate(pictures=True)
    if worker.is_main:
        # The other ranks are done: none of them waits in a collective while this one saves.
        about = {"metrics": metrics, **journal.account()}
        save_segmenter(config.output, model, result=score.to_json(), inputs=run.inputs, run=about)
        journal.finish(**metrics)


def poly_schedule(config: PolyOptimConfig, steps: int) -> Callable[[int], float]:
    """Learning rate as a function of the step: a power of the share that is left, times a linear warm-up.

    The reference's numbers: step 0 has warmup_ratio of its rate, and the last step lies one short of min_lr.
    """

    def lr(step: int) -> float:
        rate = config.min_lr + (config.peak_lr - config.min_lr) * (1.0 - step / steps) ** config.power
        if step < config.warmup_steps:
            rate *= 1.0 - (1.0 - step / config.warmup_steps) * (1.0 - config.warmup_ratio)
        return rate

    return lr


def _figures(sums: Sequence[float], num_pixels: int, config: SegmentationConfig) -> dict[str, float]:
    """Losses and accuracy of some steps, from their summed rows (see `SegmentationLoss.sums`)."""
    decode, auxiliary, correct, labelled = sums[:4]
    figures = {"loss": decode / num_pixels}
    if config.head.auxiliary_weight > 0:
        figures["loss_auxiliary"] = auxiliary / num_pixels
        figures["loss_total"] = figures["loss"] + config.head.auxiliary_weight * figures["loss_auxiliary"]
    return {**figures, "accuracy": correct / max(labelled, 1.0)}


def _require_finite(rows: Tensor, step: int, reader: CropReader, *, scaled: bool) -> None:
    """NonFiniteLossError that names the first of the last len(rows) steps with a loss or gradient not finite.

    scaled: gradients overflow in normal operation, and such steps are skipped.
    """
    for number, row in enumerate(rows.tolist(), start=step - len(rows) + 1):
        figures = {"loss": row[0] + row[1]} if scaled else {"loss": row[0] + row[1], "grad_norm": row[4]}
        require_finite(figures, number, reader.keys(number - 1))


# ------------------------------------------------------------------------------------------------ evaluation


def predict(
    model: Segmenter, image: np.ndarray, crops: CropPolicy, stride: int, dtype: torch.dtype
) -> Tensor:
    """Classes int64 [H, W] of an image uint8 [H, W, 3] of any size, by windows, on the model's device.

    The image is resized as in training, without the random ratio; logits return to its own size.
    """
    device = model.backbone.pixel_mean.device
    resized = resize_image(image, *crops.resized(*image.shape[:2]))
    pixels = model.backbone.normalize(to_device(resized[None], device))[0]
    with torch.inference_mode(), autocast(device, dtype):
        logits = slide_logits(model.segment, pixels, window=crops.size, stride=stride)
        whole = F.interpolate(logits[None], size=image.shape[:2], mode="bilinear", align_corners=False)
    return whole[0].argmax(dim=0)


def _evaluate(
    config: SegmentationConfig,
    model: Segmenter,
    pairs: Sequence[Pair],
    worker: Worker,
    dtype: torch.dtype,
    after_image: Callable[[], None],
    *,
    pictures: bool,
) -> Score:
    """The score on all pairs, each predicted by one worker; with pictures of some, evenly spread.

    `after_image` is called between images: an evaluation may take longer than a preempted node has.
    """
    model.eval()
    num_classes = config.num_classes
    shown = np.linspace(0, len(pairs) - 1, min(config.num_pictures, len(pairs))) if pictures else np.zeros(0)
    chosen = {pairs[i].key for i in shown.round().astype(int)}
    own = pairs[worker.rank :: worker.world_size]
    progress = Progress("validate", len(own), "images") if worker.is_main else None
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=worker.device)
    contents = in_order(lambda pair: read_pair(pair, config.rules), own, config.decode_threads)
    for pair, (image, classes) in zip(own, contents, strict=True):
        predicted = predict(model, image, config.crops, config.stride, dtype)
        labels = torch.from_numpy(classes).to(worker.device, torch.int64)
        confusion += confusion_matrix(labels, predicted, num_classes)
        if pair.key in chosen:
            png = picture(image, classes, predicted.cpu().numpy(), num_classes)
            storage.put(storage.join(config.output, PICTURES, f"{pair.key}.png"), png)
        after_image()
        if progress is not None:
            progress.update()
    if progress is not None:
        progress.close()
    return Score.of(worker.sum(confusion).cpu().numpy(), len(pairs))


# ------------------------------------------------------------------------------------------------ model


@dataclass(frozen=True, kw_only=True)
class _Start:
    """The ViT that goes under the head: its shape, weights (None: random ones) and its fingerprint."""

    shape: ClassifierConfig
    weights: Mapping[str, Tensor] | None
    inputs: dict[str, str]


def _read_start(config: SegmentationConfig) -> _Start:
    """A backbone, or a classifier fine-tuned from one; its shape alone, or none of it, with init scratch."""
    if config.backbone is None:
        size = config.scratch.resolve(image_size=config.crops.size, patch_size=config.patch_size)
        return _Start(shape=ClassifierConfig(backbone=size, num_classes=0), weights=None, inputs={})
    url, scratch = config.backbone, config.init == "scratch"
    if artifacts.read_header(url, CLASSIFIER) is not None:
        header = read_classifier_header(url)
        shape = classifier_config(header["config"])
    else:
        header = read_backbone_header(url)
        shape = ClassifierConfig(backbone=backbone_config(header["config"]), num_classes=0)
    weights = None if scratch else read_weights(url, header)
    return _Start(shape=shape, weights=weights, inputs={"backbone": header["fingerprint"]})


def _model(config: SegmentationConfig, start: _Start) -> Segmenter:
    """The segmenter at the size of the crops, its position tables resized to it."""
    size = dataclasses.replace(start.shape.backbone, image_size=config.crops.size, drop_path=config.drop_path)
    shape = dataclasses.replace(start.shape, backbone=size, num_classes=0, pooling="mean")
    backbone = Classifier(shape)
    if start.weights is not None:
        backbone.load_state_dict(classifier_from_backbone(start.weights, shape))
    return Segmenter(backbone, config.head, config.num_classes)


def _mean_colour(model: Segmenter) -> tuple[int, int, int]:
    """The colour that is zero after normalisation, to within a level."""
    red, green, blue = (round(255 * value) for value in model.backbone.config.backbone.mean)
    return red, green, blue


def save_segmenter(
    url: str,
    model: Segmenter,
    *,
    result: Mapping[str, Any],
    inputs: Mapping[str, str],
    run: Mapping[str, Any],
) -> dict[str, Any]:
    """Publish a segmenter with its score, what it was trained on and how; returns the header."""
    config = {
        "backbone": dataclasses.asdict(model.backbone.config),
        "head": dataclasses.asdict(model.config),
        "num_classes": model.num_classes,
    }
    entries = {"result": dict(result), "inputs": dict(inputs), "run": dict(run)}
    return publish_model(url, ARTIFACT, model, config, entries)


def read_segmentation_header(url: str) -> dict[str, Any]:
    """The header that `save_segmenter` wrote; InputError when there is no finished segmenter at the URL."""
    return read_model_header(url, ARTIFACT, "finetune_segmentation")


def load_segmenter(url: str, device: str | torch.device = "cpu") -> Segmenter:
    """The segmenter at a URL, in eval mode; `predict` applies it to an image.

    Raises InputError when it is unfinished, damaged, or its tensors do not match its config.
    """
    header = read_segmentation_header(url)
    config = header["config"]
    head: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in config["head"].items()}
    backbone = Classifier(classifier_config(config["backbone"]))
    model = Segmenter(backbone, UperNetConfig(**head), config["num_classes"])
    load_tensors(model, read_weights(url, header), url)
    return model.eval().requires_grad_(False).to(device)

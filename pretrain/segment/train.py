"""Semantic segmentation (paper §3.4 and Table 11): UperNet on a pretrained backbone, trained on label maps.

Numbers without a table are those of the published ADE20K configuration (reference.md §6.5). Read `_train`
from top to bottom: it is the whole loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import storage
from pipeline.cluster.training import run_training
from pipeline.threads import in_order
from pipeline.training.checkpoints import TrainState
from pipeline.training.config import claim_output, resolve
from pipeline.training.journal import Journal
from pipeline.training.metrics import Progress
from pipeline.training.optim import autocast, grad_scaler, resolve_precision
from pipeline.training.step import require_finite, synchronized, to_device
from pipeline.training.worker import Worker
from pretrain.finetune.layer_decay import layerwise_groups, set_layerwise_lr
from pretrain.segment.artifact import (
    ARTIFACT,
    build_segmenter,
    read_segmentation_header,
    read_start,
    save_segmenter,
)
from pretrain.segment.config import SegmentationConfig, poly_schedule
from pretrain.segment.label_maps import (
    IGNORED,
    CropPolicy,
    CropReader,
    Pair,
    check_pairs,
    list_pairs,
    read_pair,
    resize_image,
)
from pretrain.segment.score import Score, confusion_matrix, picture
from pretrain.segment.upernet import Segmenter, segmentation_loss, slide_logits, synchronize_batch_norm

PICTURES = "pictures"


def finetune_segmentation(config: SegmentationConfig) -> Score:
    """Train, or finish training, the segmenter at `config.output`; its score on val, also printed."""
    config = resolve(config)
    output = config.output
    # Everything that can be refused is refused before anything is written.
    start = read_start(config)
    build_segmenter(config, start)
    train = list_pairs(config.train_images, config.train_labels)
    val = list_pairs(config.val_images, config.val_labels)
    checked = check_pairs(train, config.rules, "train", config.check_threads)
    checked_val = check_pairs(val, config.rules, "val", config.check_threads)
    names = config.class_names or tuple(f"class {i}" for i in range(config.num_classes))
    if unseen := [names[i] for i in np.flatnonzero(checked.pixels_per_class == 0)]:
        print(f"warning: no training pixel is labelled {', '.join(unseen)}", flush=True)

    inputs = {**start.inputs, "train": checked.fingerprint, "val": checked_val.fingerprint}
    if claim_output(config, "finetune_segmentation", ARTIFACT, inputs, fixed_batch=True):
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
    model = build_segmenter(config, read_start(config)).to(device)
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


def _mean_colour(model: Segmenter) -> tuple[int, int, int]:
    """The colour that is zero after normalisation, to within a level."""
    red, green, blue = (round(255 * value) for value in model.backbone.config.backbone.mean)
    return red, green, blue

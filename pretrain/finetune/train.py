"""Fine-tuning for image classification (Table 10; reference.md §6.1), also on ImageNet-21k (Table 7).

Read `_train` from top to bottom: it is the whole loop.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from torch import Tensor, nn

from pipeline import storage
from pipeline.artifacts import read_header
from pipeline.cluster.training import run_training
from pipeline.training.checkpoints import TrainState
from pipeline.training.config import claim_output, resolve
from pipeline.training.journal import Journal
from pipeline.training.metrics import Progress
from pipeline.training.optim import autocast, grad_scaler, resolve_precision
from pipeline.training.step import require_finite, synchronized, to_device
from pipeline.training.worker import Worker
from pretrain.finetune.augment import MixedBatch, RandAugment, erase_each, mix_batch
from pretrain.finetune.config import FinetuneConfig
from pretrain.finetune.labels import Labels, check_labels
from pretrain.finetune.layer_decay import layerwise_groups, set_layerwise_lr
from pretrain.finetune.start import (
    Goal,
    Start,
    from_backbone,
    from_scratch,
    from_teacher,
    from_tokenizer,
    save_finetuned,
)
from pretrain.model.artifacts import CLASSIFIER
from shards.dataset.corpus import open_corpus
from shards.dataset.dataset import Dataset, open_dataset
from shards.dataset.labels import translate_labels
from shards.pixels.crops import FreshCrops
from shards.pixels.views import CENTER_FRACTION, ViewPolicy
from shards.reader.reader import Batches, SampleBatch, ShardReader
from tokenizer.model.teacher_config import with_absolute_weights

TOP_K = 5
LAST = "last"
"""Folder, in the output, of the classifier as it was after the last epoch."""

_UNCROPPED_FROM = 384  # pixels a side


@dataclass(frozen=True, kw_only=True)
class Finetuning:
    """What every worker is told."""

    config: FinetuneConfig
    labels: Labels


def finetune_classifier(config: FinetuneConfig) -> None:
    """Fine-tune, or finish fine-tuning, the classifier at `config.output`."""
    config = resolve(config)
    config = dataclasses.replace(config, teacher=with_absolute_weights(config.teacher))
    output = config.output
    train, val = open_splits(config)
    run = Finetuning(config=config, labels=check_labels(train, val))
    # Built here once already: what does not fit is refused before anything is written.
    start = _start(run)
    _train_reader(config, train, start, Worker()).close()
    inputs = _inputs(train, val, start)
    if not claim_output(config, "finetune_classifier", CLASSIFIER, inputs):
        return
    run_training(_train, run, config.cluster)
    header = read_header(output, CLASSIFIER)
    assert header is not None
    figures = ", ".join(f"{name} {value:.4g}" for name, value in header["metrics"].items())
    print(f"classifier {header['fingerprint'][:12]} at {output}: {figures}", flush=True)


def _train(run: Finetuning, worker: Worker) -> None:
    """One worker's part of the fine-tuning."""
    config, labels = run.config, run.labels
    device = worker.device

    # Model and optimizer. Every rank draws the same fresh weights.
    torch.manual_seed(config.seed)
    dtype = resolve_precision(config.precision, device)
    start = _start(run)
    model = start.model.to(device)
    optimizer = torch.optim.AdamW(
        layerwise_groups(model, weight_decay=config.optim.weight_decay, layer_decay=config.layer_decay),
        lr=config.optim.effective_lr(config.batch_size),
        betas=config.optim.betas,
        eps=config.optim.eps,
    )
    scaler = grad_scaler(device, dtype)
    cross_entropy = SoftTargetCrossEntropy()

    # Data: a rank's slices of the global batches.
    train, val = open_splits(config)
    reader = _train_reader(config, train, start, worker)
    steps_per_epoch = reader.steps_per_epoch
    lr = config.optim.schedule(config.batch_size, steps_per_epoch, config.epochs)

    # Resume.
    journal = Journal(config, worker, {"model": model, "optimizer": optimizer, "scaler": scaler})
    state, metrics, losses = journal.state, dict[str, float](), list[float]()
    if (resumed := journal.resumed) is not None:
        metrics, losses = resumed["metrics"], resumed["losses"]
    replica = worker.replicate(model)

    def tensors() -> dict[str, Any]:
        return {"metrics": metrics, "losses": losses}

    per_epoch = steps_per_epoch * config.batch_size
    done = state.epoch * per_epoch + state.position
    journal.begin(
        f"{reader.num_samples:,} images of {labels.num_classes:,} classes, from {start.origin['kind']}, "
        f"{config.epochs} epochs of {steps_per_epoch} steps of {config.batch_size}, "
        f"lr {config.optim.effective_lr(config.batch_size):.2e}, {worker.world_size} workers, "
        f"{device}, {dtype}",
        Progress("fine-tune", config.epochs * per_epoch, "images", done=done),
        tensors,
        epochs=config.epochs,
    )

    step = state.step
    for epoch in range(state.epoch, config.epochs):
        model.train()
        for samples in reader.batches(epoch, state.position if epoch == state.epoch else 0):
            place = epoch * steps_per_epoch + samples.position / config.batch_size
            set_layerwise_lr(optimizer, lr(place))
            batch = _augmented(run, start, samples, epoch, worker)
            # Stochastic depth is a function of the position too, so a resumed run drops the same branches.
            torch.manual_seed(hash((config.seed, epoch, samples.position, worker.rank)))
            share = batch.pixels.shape[0]
            micro = config.micro_batch_size or share
            summed = torch.zeros((), dtype=torch.float64, device=device)
            for first in range(0, share, micro):
                pixels, targets = batch.pixels[first : first + micro], batch.targets[first : first + micro]
                with synchronized(replica, first + micro >= share), autocast(device, dtype):
                    loss = cross_entropy(replica(pixels).float(), targets)
                    # Averaged over ranks by DDP, this is the mean over the global batch, however it is cut.
                    weight = pixels.shape[0] * worker.world_size / samples.global_size
                    scaler.scale(loss * weight).backward()
                summed += loss.detach() * pixels.shape[0]
            scaler.unscale_(optimizer)
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_grad_norm or math.inf)
            # Looked at before every step of the weights, so that all that is ever saved is sound. Overflow in
            # fp16 is no error: the scaler leaves such a step out.
            figures = {"loss": float(worker.sum(summed)) / samples.global_size}
            if not scaler.is_enabled():
                figures["grad_norm"] = float(grad_norm)
            require_finite(figures, step + 1, samples.keys)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            losses.append(figures["loss"])

            here = TrainState(epoch=epoch, position=samples.next_position, step=step)
            last_of_epoch = here.position + config.batch_size > reader.num_samples
            if step % config.log_every_steps == 0 or last_of_epoch:
                metrics["loss"] = sum(losses) / len(losses)
                losses = []
                record = {"loss": metrics["loss"], "lr": lr(place), "grad_norm": float(grad_norm)}
                journal.record(here, record)
            journal.after_step(here, samples.global_size, metrics, may_save=not last_of_epoch)

        if val is not None:
            metrics |= evaluate(run, start, val, worker, journal.save_if_asked)
            require_finite(metrics, step, [f"all of {val.url}"])
        journal.save_together(
            TrainState(epoch=epoch + 1, step=step),
            # The best one is the first of those with the highest accuracy.
            score=-metrics["val_top1"] if val is not None else None,
            figures=metrics,
        )

    reader.close()
    if worker.is_main:
        # The other ranks are done: none of them waits in a collective while this one saves.
        about, goal, inputs = journal.account(), _goal(run), _inputs(train, val, start)
        last = storage.join(config.output, LAST)
        save_finetuned(
            last, start, goal, inputs=inputs, run=about, metrics={"epoch": config.epochs, **metrics}
        )
        epoch = config.epochs
        if (best := journal.best()) is not None:
            model.load_state_dict(best[1]["model"])
            epoch, metrics = best[0].epoch, best[1]["metrics"]
        save_finetuned(
            config.output, start, goal, inputs=inputs, run=about, metrics={"epoch": epoch, **metrics}
        )
        journal.finish(**metrics)


def _augmented(run: Finetuning, start: Start, samples: SampleBatch, epoch: int, worker: Worker) -> MixedBatch:
    """A rank's whole part of a batch, on the device; crops and RandAugment were the reader's.

    Mixed before it is cut into micro-batches, so that the objective does not depend on their size.
    """
    config = run.config
    pixels = start.model.normalize(to_device(samples.pixels, worker.device)).contiguous()
    erase_each(pixels, samples.sample_ids, epoch, prob=config.augment.erase_prob, seed=config.seed)
    return mix_batch(
        pixels,
        torch.from_numpy(samples.labels).to(worker.device),
        run.labels.num_classes,
        config.augment,
        seed=config.seed,
        epoch=epoch,
        position=samples.position,
        rank=worker.rank,
    )


# ------------------------------------------------------------------------------------------------ evaluation


def evaluate(
    run: Finetuning, start: Start, val: Dataset, worker: Worker, after_batch: Callable[[], None]
) -> dict[str, float]:
    """Cross-entropy, top-1 and top-5 accuracy (shares) on the centre crops of val, shared by all ranks.

    Every image counts once, however many ranks there are. With five classes or fewer, top-5 is 1.
    """
    sums = worker.sum(sum_scores(run, start, val, worker, after_batch))
    loss, top1, top5, num = sums.tolist()
    if num != val.num_samples():
        raise RuntimeError(f"{num:.0f} of {val.num_samples()} images of {val.url} were evaluated")
    return {"val_loss": loss / num, "val_top1": top1 / num, "val_top5": top5 / num}


@torch.no_grad()
def sum_scores(
    run: Finetuning, start: Start, val: Dataset, worker: Worker, after_batch: Callable[[], None]
) -> Tensor:
    """Sums over a rank's part of val: [4] float64, loss, top-1 hits, top-5 hits, images."""
    config, labels, device = run.config, run.labels, worker.device
    dtype = resolve_precision(config.precision, device)
    reader = _val_reader(config, val, start, worker)
    progress = Progress("evaluate", reader.num_samples, "images") if worker.is_main else None
    model = start.model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for batch in reader.batches(0):
        truth = torch.from_numpy(translate_labels(batch.labels, labels.val_class_names, labels.class_names))
        images = to_device(batch.pixels, device)
        micro = config.micro_batch_size or max(1, len(truth))
        for pixels, classes in zip(images.split(micro), truth.to(device).split(micro), strict=True):
            if not len(classes):
                continue  # a rank may have no part in the last batch
            with autocast(device, dtype):
                logits = model(model.normalize(pixels)).float()
            hits = logits.topk(min(TOP_K, labels.num_classes), dim=1).indices == classes[:, None]
            loss = nn.functional.cross_entropy(logits, classes, reduction="sum")
            counts = [loss, hits[:, 0].sum(), hits.sum(), torch.tensor(len(classes), device=device)]
            sums += torch.stack([count.double() for count in counts])
        if progress is not None:
            progress.update(batch.global_size)
        after_batch()
    reader.close()
    return sums


# ------------------------------------------------------------------------------------------------ data


def open_splits(config: FinetuneConfig) -> tuple[Dataset, Dataset | None]:
    """The training and the validation images; InputError for one that is not there."""
    train = open_corpus(config.train, "images", subset=config.subset)
    return train, None if config.val is None else open_dataset(config.val, "images")


def _train_reader(config: FinetuneConfig, train: Dataset, start: Start, worker: Worker) -> ShardReader:
    augment = None
    if config.augment.rand_augment is not None:
        red, green, blue = start.model.pixel_mean.flatten().tolist()
        augment = RandAugment(config.augment.rand_augment, mean=(red, green, blue), seed=config.seed)
    return ShardReader(
        train,
        FreshCrops(config.views.resolve(start.image_size), augment=augment),
        Batches(
            config.batch_size,
            seed=config.seed,
            rank=worker.rank,
            world_size=worker.world_size,
            num_threads=config.decode_threads,
        ),
    )


def default_center_fraction(image_size: int) -> float:
    """Side of the evaluation crop over the shorter side of the image, where nothing else is asked for."""
    return 1.0 if image_size >= _UNCROPPED_FROM else CENTER_FRACTION


def _val_reader(config: FinetuneConfig, val: Dataset, start: Start, worker: Worker) -> ShardReader:
    image_size = start.image_size
    return ShardReader(
        val,
        FreshCrops(
            ViewPolicy(image_size=image_size, interpolation=config.views.interpolation),
            center_fraction=config.center_fraction or default_center_fraction(image_size),
        ),
        Batches(
            max(worker.world_size, min(config.batch_size, val.num_samples())),
            rank=worker.rank,
            world_size=worker.world_size,
            shuffle=False,
            drop_last=False,
            num_threads=config.decode_threads,
        ),
    )


# ------------------------------------------------------------------------------------------------ inside


def _goal(run: Finetuning) -> Goal:
    config = run.config
    return Goal(
        num_classes=run.labels.num_classes,
        class_names=run.labels.class_names,
        image_size=config.image_size,
        pooling=config.pooling,
        drop_path=config.drop_path,
        head_init_scale=config.head_init_scale,
        new_head=config.new_head,
    )


def _start(run: Finetuning) -> Start:
    config, goal = run.config, _goal(run)
    match config.init:
        case "backbone":
            assert config.backbone is not None
            return from_backbone(config.backbone, goal)
        case "scratch":
            return from_scratch(config.scratch, goal, patch_size=config.patch_size)
        case "tokenizer":
            assert config.tokenizer is not None
            return from_tokenizer(config.tokenizer, goal)
        case "teacher":
            return from_teacher(config.teacher, goal, patch_size=config.patch_size)


def _inputs(train: Dataset, val: Dataset | None, start: Start) -> dict[str, str]:
    """Fingerprints of everything that decides the result beside the settings."""
    inputs = {"train": train.fingerprint}
    if val is not None:
        inputs["val"] = val.fingerprint
    if "fingerprint" in start.origin:
        inputs[start.origin["kind"]] = start.origin["fingerprint"]
    return inputs

"""Training the visual tokenizer by vector-quantised knowledge distillation (§2.2, Table 8).

Read `_train` from top to bottom: it is the whole loop.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.artifacts import read_header
from pipeline.cluster.training import run_training
from pipeline.training.checkpoints import TrainState
from pipeline.training.config import claim_output, resolve
from pipeline.training.journal import Journal
from pipeline.training.metrics import Progress
from pipeline.training.optim import (
    autocast,
    build_optimizer,
    grad_scaler,
    resolve_precision,
    set_lr,
)
from pipeline.training.step import RunningMeans, require_finite, synchronized, to_device
from pipeline.training.worker import Worker
from shards.dataset.corpus import open_corpus
from shards.dataset.dataset import Dataset, open_dataset
from shards.pixels.crops import FreshCrops
from shards.pixels.views import CENTER_FRACTION
from shards.reader.figures import ReaderReports
from shards.reader.reader import Batches, ShardReader
from tokenizer.config import TokenizerTrainConfig
from tokenizer.model.artifact import save_tokenizer
from tokenizer.model.quantizer import CodeSums, CodeUsage
from tokenizer.model.teacher import Teacher, build_teacher
from tokenizer.model.teacher_config import with_absolute_weights
from tokenizer.model.vqkd import VQKD, VQKDOutput, normalize_pixels

FIGURES = ("loss", "rec_loss", "emb_loss")
"""Means over images, of `VQKDOutput`."""


def train_tokenizer(config: TokenizerTrainConfig) -> None:
    """Train, or finish training, the tokenizer at `config.output`."""
    config = resolve(config, "lanes", "window")
    config = dataclasses.replace(config, teacher=with_absolute_weights(config.teacher))
    output = config.output
    images = open_corpus(config.images, "images", subset=config.subset)
    inputs = {"images": images.fingerprint}
    if config.val_images is not None:
        inputs["val_images"] = open_dataset(config.val_images, "images").fingerprint
    # Built here once already: a teacher that does not load or fit is refused before anything is written.
    inputs["teacher"] = _teacher(config, torch.device("cpu")).fingerprint
    with _reader(config, images, Worker()) as reader:
        # The order belongs to the run: with another cache it goes on at the next unseen sample too.
        config = dataclasses.replace(config, lanes=reader.lanes, window=reader.window)
    if not claim_output(config, "train_tokenizer", "tokenizer", inputs):
        return
    run_training(_train, config, config.cluster)
    header = read_header(output, "tokenizer")
    assert header is not None
    figures = ", ".join(f"{name} {value:.4g}" for name, value in header["metrics"].items())
    print(f"tokenizer {header['fingerprint'][:12]} at {output}: {figures}", flush=True)


def _train(config: TokenizerTrainConfig, worker: Worker) -> None:
    """One worker's part of the training."""
    device = worker.device

    # Data: a rank's slices of the global batches.
    images = open_corpus(config.images, "images", subset=config.subset)
    reader = _reader(config, images, worker)
    val_images = None if config.val_images is None else open_dataset(config.val_images, "images")

    # Model, teacher, optimizer. Every rank draws the same weights.
    torch.manual_seed(config.seed)
    dtype = resolve_precision(config.precision, device)
    teacher = _teacher(config, device)
    model = VQKD(config.model, teacher.dim).to(device)
    optimizer = build_optimizer(model, config.optim, config.batch_size)
    scaler = grad_scaler(device, dtype)
    steps_per_epoch = reader.steps_per_epoch
    lr = config.optim.schedule(config.batch_size, steps_per_epoch, config.epochs)

    # Resume, or start the codebook from the first batches.
    journal = Journal(config, worker, {"model": model, "optimizer": optimizer, "scaler": scaler})
    state, figures, metrics = journal.state, dict[str, float](), dict[str, float]()
    means, usage = RunningMeans(device, *FIGURES), CodeUsage(config.model.codebook_size, device)
    if (resumed := journal.resumed) is not None:
        figures, metrics = resumed["figures"], resumed["metrics"]
        means.load_state_dict(resumed["means"])
        usage.counts += resumed["usage"].to(device)
    elif model.quantize.needs_kmeans:
        model.eval()
        with autocast(device, dtype):
            first = (normalize_pixels(to_device(batch.pixels, device)) for batch in reader.batches(0))
            start = model.start_codebook_(first, worker, seed=config.seed)
        if worker.is_main:
            print(start, flush=True)
    replica = worker.replicate(model)

    def tensors() -> dict[str, Any]:
        return {"metrics": metrics, "figures": figures, "means": means.state_dict(), "usage": usage.counts}

    per_epoch = steps_per_epoch * config.batch_size
    done = state.epoch * per_epoch + state.position
    journal.begin(
        f"{reader.num_samples:,} images, {config.epochs} epochs of {steps_per_epoch} steps of "
        f"{config.batch_size}, lr {config.optim.effective_lr(config.batch_size):.2e}, "
        f"{worker.world_size} workers, {device}, {dtype}\n{reader.begin(state.epoch, state.position)}",
        Progress("train tokenizer", config.epochs * per_epoch, "images", done=done),
        tensors,
        epochs=config.epochs,
        reports=ReaderReports(config.output, reader.telemetry, config.decode_threads, resume_step=state.step),
    )

    step = state.step
    for epoch in range(state.epoch, config.epochs):
        model.train()
        for batch in reader.batches(epoch, state.position if epoch == state.epoch else 0):
            place = epoch * steps_per_epoch + batch.position / config.batch_size
            set_lr(optimizer, lr(place))
            code_sums: list[CodeSums] = []
            tokens: list[Tensor] = []
            share = batch.pixels.shape[0]
            micro = config.micro_batch_size or share
            for row in range(0, share, micro):
                pixels = to_device(batch.pixels[row : row + micro], device)
                with torch.no_grad(), autocast(device, dtype):
                    target = teacher(pixels)
                with synchronized(replica, row + micro >= share), autocast(device, dtype):
                    out: VQKDOutput = replica(normalize_pixels(pixels), target)
                    # Averaged over ranks by DDP, this is the mean over the global batch, however it is cut.
                    weight = pixels.shape[0] * worker.world_size / batch.global_size
                    scaler.scale(out.loss * weight).backward()
                means.add(pixels.shape[0], loss=out.loss, rec_loss=out.rec_loss, emb_loss=out.emb_loss)
                assert out.code_sums is not None
                code_sums.append(out.code_sums)
                tokens.append(out.features.flatten(0, 1))
            scaler.unscale_(optimizer)
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_grad_norm or math.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            # The codes follow the tokens of the whole step, gathered over micro-batches and ranks.
            usage.counts += model.quantize.update_(functools.reduce(operator.add, code_sums), worker)
            if config.model.restart_dead_codes and (step + 1) % config.model.restart_every == 0:
                model.quantize.restart_dead_(
                    torch.cat(tokens), worker, steps=config.model.restart_every, seed=config.seed + step
                )
            # Gathered in every step, as the counts of codes are, so that the main rank may save after any.
            means.gather(worker)
            step += 1

            here = TrainState(epoch=epoch, position=batch.next_position, step=step)
            last_of_epoch = here.position + config.batch_size > reader.num_samples
            if recorded := step % config.log_every_steps == 0 or last_of_epoch:
                figures = means.take()
                require_finite(figures, step, batch.keys)
                model.quantize.check_equal_on_all_ranks(worker)
                journal.record(here, {**figures, "lr": lr(place), "grad_norm": float(grad_norm)})
            journal.after_step(here, batch.global_size, figures, may_save=recorded and not last_of_epoch)

        metrics = {
            "train_rec_loss": figures.get("rec_loss", math.nan),
            "train_codebook_usage": usage.used_fraction,
            "train_perplexity": usage.perplexity,
        }
        if val_images is not None:
            scores = validate(model, teacher, config, val_images, worker, journal.save_if_asked)
            metrics |= {f"val_{name}": value for name, value in scores.items()}
        usage = CodeUsage(config.model.codebook_size, device)
        journal.save_together(
            TrainState(epoch=epoch + 1, step=step),
            # Scored where an epoch ends: there the figures are of these weights.
            score=metrics.get("val_loss", metrics["train_rec_loss"]),
            figures=metrics,
        )

    reader.close()
    if worker.is_main:
        # The other ranks are done: none of them waits in a collective while this one saves.
        # Without validation images, the last epoch's training figures say what they can.
        kind = "train" if val_images is None else "val"
        run = journal.account()
        save_tokenizer(
            config.output,
            model,
            teacher=teacher,
            metrics={
                "reconstruction_loss": metrics[f"{kind}_rec_loss"],
                "codebook_usage": metrics[f"{kind}_codebook_usage"],
                "perplexity": metrics[f"{kind}_perplexity"],
                "steps": step,
                "seconds": run["seconds"],
            },
            inputs={"images": images.fingerprint, "teacher": teacher.fingerprint},
            run_config=run["config"],
        )
        journal.finish()


@torch.no_grad()
def validate(
    model: VQKD,
    teacher: Teacher,
    config: TokenizerTrainConfig,
    images: Dataset,
    worker: Worker,
    after_batch: Callable[[], None],
) -> dict[str, float]:
    """Losses, codebook usage (ever hit, Table 4) and perplexity over centre crops, shared by all ranks."""
    device = worker.device
    dtype = resolve_precision(config.precision, device)
    batch_size = min(config.batch_size, images.num_samples(0))
    reader = _reader(config, images, worker, batch_size=max(batch_size, worker.world_size), validation=True)
    usage = CodeUsage(config.model.codebook_size, device)
    figures = RunningMeans(device, *FIGURES)
    model.eval()
    for batch in reader.batches(0):
        share = len(batch.pixels)  # none of a last batch that is smaller than the number of ranks
        parts = to_device(batch.pixels, device).split(config.micro_batch_size or share) if share else ()
        for pixels in parts:
            with autocast(device, dtype):
                out = model(normalize_pixels(pixels), teacher(pixels))
            usage.add(out.codes)
            figures.add(pixels.shape[0], loss=out.loss, rec_loss=out.rec_loss, emb_loss=out.emb_loss)
        after_batch()
    reader.close()
    gathered = usage.gather(worker)
    figures.gather(worker)
    return {
        **figures.take(),
        "codebook_usage": gathered.used_fraction,
        "perplexity": gathered.perplexity,
    }


def _reader(
    config: TokenizerTrainConfig,
    images: Dataset,
    worker: Worker,
    *,
    batch_size: int | None = None,
    validation: bool = False,
) -> ShardReader:
    return ShardReader(
        images,
        FreshCrops(
            config.views.resolve(config.model.image_size),
            center_fraction=CENTER_FRACTION if validation else None,
        ),
        Batches(
            batch_size or config.batch_size,
            seed=config.seed,
            rank=worker.rank,
            world_size=worker.world_size,
            shuffle=not validation,
            drop_last=not validation,
            lanes=None if validation else config.lanes,
            window=None if validation else config.window,
            epochs=0 if validation else config.epochs,
            num_threads=config.decode_threads,
        ),
        config.cache,
    )


def _teacher(config: TokenizerTrainConfig, device: torch.device) -> Teacher:
    return build_teacher(config.teacher, config.model.image_size, config.model.patch_size, device)

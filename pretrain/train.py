"""Masked image modelling (§2.3, Eq. 3-4, Table 9): predict the codes of masked patches.

Codes come with the crops from token shards, or are made on the way from image shards and a tokenizer. Read
`_train` from top to bottom: it is the whole loop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

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
from pretrain.config import PretrainConfig
from pretrain.masking import draw_block_masks
from pretrain.model.artifacts import BACKBONE, read_backbone_header, save_backbone
from pretrain.model.mim import LOSS_SUMS, MIM, masked_patches, mim_figures, mim_loss
from shards.dataset.corpus import open_corpus
from shards.dataset.dataset import Dataset
from shards.format.manifest import TokenizerSpec
from shards.pixels.crops import FreshCrops, StoredCrops
from shards.reader.figures import ReaderReports
from shards.reader.reader import Batches, SampleBatch, ShardReader
from tokenizer.model.artifact import VisualTokenizer


def pretrain_mim(config: PretrainConfig) -> None:
    """Pretrain, or finish pretraining, the backbone at `config.output`."""
    config = resolve(config, "stored_views", "lanes", "window")
    output = config.output
    source = open_source(config)
    if config.shards is not None:
        # Views that are added later are not for this run, also when it is resumed (FORMAT.md, Views).
        config = replace(config, stored_views=source.dataset.num_views)
    # Built here once already: what does not fit is refused before anything is written.
    _model(config, source)
    with _reader(config, source, Worker()) as reader:
        # The order belongs to the run: with another cache it goes on at the next unseen sample too.
        config = replace(config, lanes=reader.lanes, window=reader.window)
    if not claim_output(config, "pretrain_mim", BACKBONE, source.inputs):
        return
    run_training(_train, config, config.cluster)
    header = read_backbone_header(output)
    figures = ", ".join(f"{name} {value:.4g}" for name, value in header["run"]["metrics"].items())
    print(f"backbone {header['fingerprint'][:12]} at {output}: {figures}", flush=True)


@dataclass(frozen=True, kw_only=True)
class CodeSource:
    """Where samples and codes come from, precomputed or online, and whose codes they are."""

    dataset: Dataset
    tokenizer: TokenizerSpec
    online: VisualTokenizer | None
    inputs: dict[str, str]
    """Fingerprints."""

    @property
    def grid(self) -> tuple[int, int]:
        """Codes per column and row."""
        return self.tokenizer.grid

    def codes(self, samples: SampleBatch, rows: slice, pixels: Tensor) -> Tensor:
        """Integers [B, N] of these rows: those that are stored, or of pixels uint8 [B, 3, S, S] made here."""
        if self.online is not None:
            return self.online.encode(pixels)
        assert samples.codes is not None
        return torch.from_numpy(samples.codes[rows].astype("int64")).to(pixels.device, non_blocking=True)


def open_source(config: PretrainConfig, device: torch.device | str = "cpu") -> CodeSource:
    """Token shards, or image shards with a tokenizer on `device`."""
    if config.shards is not None:
        dataset = open_corpus(
            config.shards, "tokens", views=config.stored_views, codes=config.codes, subset=config.subset
        )
        tokenizer = dataset.manifest.require_tokenizer()
        inputs = {"shards": dataset.fingerprint, "tokenizer": tokenizer.fingerprint}
        return CodeSource(dataset=dataset, tokenizer=tokenizer, online=None, inputs=inputs)
    assert config.images is not None and config.tokenizer is not None
    dataset = open_corpus(config.images, "images", subset=config.subset)
    online = VisualTokenizer.load(config.tokenizer, device=device, precision=config.precision)
    inputs = {"images": dataset.fingerprint, "tokenizer": online.fingerprint}
    return CodeSource(dataset=dataset, tokenizer=online.spec, online=online, inputs=inputs)


def _train(config: PretrainConfig, worker: Worker) -> None:
    """One worker's part of the pretraining."""
    device = worker.device

    # Data: a rank's slices of the global batches.
    source = open_source(config, device)
    reader = _reader(config, source, worker)
    steps_per_epoch = reader.steps_per_epoch

    # Model and optimizer. Every rank draws the same weights.
    torch.manual_seed(config.seed)
    dtype = resolve_precision(config.precision, device)
    model = _model(config, source).to(device)
    optimizer = build_optimizer(model, config.optim, config.batch_size)
    scaler = grad_scaler(device, dtype)
    lr = config.optim.schedule(config.batch_size, steps_per_epoch, config.epochs)
    masks = config.mask.resolve(source.grid)

    # Resume.
    journal = Journal(config, worker, {"model": model, "optimizer": optimizer, "scaler": scaler})
    state, metrics, means = journal.state, dict[str, float](), RunningMeans(device, *LOSS_SUMS)
    if (resumed := journal.resumed) is not None:
        metrics = resumed["metrics"]
        means.load_state_dict(dict(zip([*LOSS_SUMS, ""], resumed["sums"], strict=True)))
    replica = worker.replicate(model)

    def tensors() -> dict[str, Any]:
        return {"metrics": metrics, "sums": torch.stack(list(means.state_dict().values()))}

    per_epoch = steps_per_epoch * config.batch_size
    done = state.epoch * per_epoch + state.position
    journal.begin(
        f"{reader.num_samples:,} samples, {config.epochs} epochs of {steps_per_epoch} steps of "
        f"{config.batch_size}, {masks.num_masked} of {math.prod(source.grid)} patches masked, "
        f"{'online' if source.online else 'precomputed'} codes, "
        f"lr {config.optim.effective_lr(config.batch_size):.2e}, {worker.world_size} workers, "
        f"{device}, {dtype}\n{reader.begin(state.epoch, state.position)}",
        Progress("pretrain", config.epochs * per_epoch, "images", done=done),
        tensors,
        epochs=config.epochs,
        reports=ReaderReports(config.output, reader.telemetry, config.decode_threads, resume_step=state.step),
    )

    step = state.step
    model.train()
    for epoch in range(state.epoch, config.epochs):
        for samples in reader.batches(epoch, state.position if epoch == state.epoch else 0):
            place = epoch * steps_per_epoch + samples.position / config.batch_size
            set_lr(optimizer, lr(place))
            # Stochastic depth is a function of the position too, so a resumed run drops the same branches.
            torch.manual_seed(hash((config.seed, epoch, samples.position, worker.rank)))
            share = samples.pixels.shape[0]
            micro = config.micro_batch_size or share
            for first in range(0, share, micro):
                rows = slice(first, first + micro)
                pixels = to_device(samples.pixels[rows], device)
                codes = source.codes(samples, rows, pixels)
                drawn = draw_block_masks(samples.positions[rows], masks, seed=config.seed, epoch=epoch)
                # Which patches are masked is found on the CPU, where it does not wait for the device.
                mask = torch.from_numpy(drawn.mask)
                masked = masked_patches(mask).to(device, non_blocking=True)
                mask = mask.to(device, non_blocking=True)
                with synchronized(replica, first + micro >= share), autocast(device, dtype):
                    loss = mim_loss(replica(model.normalize(pixels), mask, masked), codes)
                    objective = loss.objective(samples.global_size * masks.num_masked, worker.world_size)
                    scaler.scale(objective).backward()
                means.add_sums(loss.num_masked, **loss.sums())
            scaler.unscale_(optimizer)
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_grad_norm or math.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            # Over all ranks in every step, so that the main rank may save after any.
            means.gather(worker)
            step += 1

            here = TrainState(epoch=epoch, position=samples.next_position, step=step)
            last_of_epoch = here.position + config.batch_size > reader.num_samples
            if recorded := step % config.log_every_steps == 0 or last_of_epoch:
                metrics = mim_figures(*means.take_sums(), aggregated=model.cls_pt_layers is not None)
                require_finite(metrics, step, samples.keys)
                journal.record(here, {**metrics, "lr": lr(place), "grad_norm": float(grad_norm)})
            journal.after_step(here, samples.global_size, metrics, may_save=recorded and not last_of_epoch)
        # Scored where an epoch ends, so that the best one is the best of epochs.
        journal.save_together(TrainState(epoch=epoch + 1, step=step), score=metrics.get("loss_total"))

    reader.close()
    if worker.is_main:
        # The other ranks are done: none of them waits in a collective while this one saves.
        save_backbone(
            config.output,
            model,
            tokenizer=source.tokenizer.to_json(),
            inputs=source.inputs,
            run={"metrics": metrics, **journal.account()},
        )
        journal.finish(**metrics)


def _model(config: PretrainConfig, source: CodeSource) -> MIM:
    tokenizer = source.tokenizer
    size = config.backbone.resolve(image_size=tokenizer.image_size, patch_size=tokenizer.patch_size)
    return MIM(size, config.mim, tokenizer.codebook_size)


def _reader(config: PretrainConfig, source: CodeSource, worker: Worker) -> ShardReader:
    crops = StoredCrops()
    if source.online is not None:
        # Online crops pass through JPEG as stored ones do: both modes see the same pixels, bit for bit.
        crops = FreshCrops(config.views.resolve(source.tokenizer.image_size), stored_pixels=True)
    batches = Batches(
        config.batch_size,
        seed=config.seed,
        rank=worker.rank,
        world_size=worker.world_size,
        lanes=config.lanes,
        window=config.window,
        epochs=config.epochs,
        num_threads=config.decode_threads,
    )
    return ShardReader(source.dataset, crops, batches, config.cache)

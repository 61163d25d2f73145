"""Samples/s of the reader beside litData and MosaicML streaming, on the same crops and codes on a local disk.

python -m benchmarks.other_loaders [--images FOLDER] [--samples 4000] [--rounds 5] [--loaders '[litdata]']

The two are no dependencies of the project. From the root of a checkout, in an environment of their own:

    python3 -m venv others
    others/bin/pip install -e . 'litdata>=0.2.76' 'mosaicml-streaming>=0.13'
    others/bin/python -m benchmarks.other_loaders

One line of JSON per number of workers; the first describes the machine. The loops take turns, `rounds` times,
and medians count. All shuffle, decode with `decode_crop` and give batches of uint8 pixels [B, S, S, 3] and
uint16 codes [B, N]; `decode_only` decodes the crops from memory, with as many threads as the reader has
workers. The others decode in their worker processes, each batch into memory that the consumer shares: one
copy less than torch's `default_collate` makes. Their samples are stored as bytes and an array, uncompressed,
about as many to a file as in a shard; their other settings are the defaults. Rounds are epochs of one loader,
whose workers stay. The first epoch is not timed: it fills caches, and its samples are compared with what was
written. Leave the machine idle meanwhile.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from benchmarks.crops import GRID, CropsConfig, decode_only, encoded_crops, write_tokens
from benchmarks.timing import emit, machine, median_ratio, medians, take_turns
from pipeline.config import run_job
from pipeline.errors import InputError
from shards.dataset.dataset import Dataset, open_dataset
from shards.pixels.crops import StoredCrops
from shards.pixels.views import decode_crop
from shards.reader.reader import Batches, ShardReader

DISTRIBUTIONS = {"litdata": "litdata", "mosaic": "mosaicml-streaming"}


@dataclass(frozen=True, kw_only=True)
class OtherLoadersConfig(CropsConfig):
    """Time the reader beside loaders of others."""

    loaders: tuple[str, ...] = tuple(DISTRIBUTIONS)
    """The others: litdata, mosaic."""

    def __post_init__(self) -> None:
        if unknown := set(self.loaders) - DISTRIBUTIONS.keys():
            raise InputError(f"loaders names {', '.join(unknown)}; give some of {', '.join(DISTRIBUTIONS)}")


def main(config: OtherLoadersConfig) -> None:
    """Make the dataset once in every format, then print one line per number of workers."""
    emit("machine", **machine("torch", *(DISTRIBUTIONS[name] for name in config.loaders)))
    with tempfile.TemporaryDirectory(prefix="loaders-bench-") as folder:
        root = os.path.join(folder, "tokens")
        write_tokens(config, root, config.samples)
        dataset = open_dataset(root)
        crops = encoded_crops(dataset)
        for name in config.loaders:
            _rewrite(name, config, dataset, os.path.join(folder, name), sum(map(len, crops)))
        for workers in config.workers:
            _compare(config, dataset, crops, folder, workers)


def _compare(
    config: OtherLoadersConfig, dataset: Dataset, crops: list[bytes], folder: str, workers: int
) -> None:
    """All loops in turn with so many workers."""
    gc.collect()  # a fork must not find the loaders of the case before
    expected = _checksum(
        (decode_crop(sample["jpg"])[None], sample["codes"][None]) for sample in _samples(dataset)
    )
    loops: dict[str, Callable[[], float]] = {
        "decode_only": functools.partial(decode_only, config, crops, workers)
    }
    with contextlib.ExitStack() as stack:
        # The others first: their workers are forks, and a process that forks had better have no threads.
        for name in config.loaders:
            loader = _loader(name, config, os.path.join(folder, name), workers)
            loops[name] = functools.partial(_consume, functools.partial(iter, loader), config.samples)
            _check(name, loader, expected)
        batches = Batches(config.batch_size, num_threads=workers, drop_last=False)
        reader = stack.enter_context(ShardReader(dataset, StoredCrops(), batches))
        _check("the reader", ((batch.pixels, batch.codes) for batch in reader.batches(0)), expected)
        loops["reader"] = functools.partial(_consume, functools.partial(reader.batches, 1), config.samples)
        rates = take_turns(loops, config.rounds)
    emit(
        f"other loaders, {config.image_size} px crops and codes, local, {workers} workers",
        samples=config.samples,
        batch_size=config.batch_size,
        rounds=config.rounds,
        samples_per_s=medians(rates),
        of_decode_only={name: median_ratio(rates[name], rates["decode_only"]) for name in rates},
        reader_over={name: median_ratio(rates["reader"], rates[name]) for name in config.loaders},
        runs=rates,
    )


def _consume(epoch: Callable[[], Iterator[Any]], samples: int) -> float:
    """Samples/s of one epoch."""
    began = time.perf_counter()
    for _ in epoch():
        pass
    return samples / (time.perf_counter() - began)


def _check(name: str, batches: Iterable[tuple[Any, Any]], expected: int) -> None:
    if _checksum(batches) != expected:
        raise RuntimeError(f"an epoch of {name} did not give every sample once, as it was written")


def _checksum(batches: Iterable[tuple[Any, Any]]) -> int:
    """A checksum of all pairs of pixels and codes, in whatever order and batches they come."""
    return sum(
        1 + zlib.crc32(np.asarray(row).tobytes(), zlib.crc32(np.asarray(image).tobytes()))
        for pixels, codes in batches
        for image, row in zip(np.asarray(pixels), np.asarray(codes), strict=True)
    )


def _loader(
    name: str, config: OtherLoadersConfig, folder: str, workers: int
) -> Iterable[tuple[Tensor, Tensor]]:
    """(pixels, codes) of each batch of another epoch with every iteration."""
    settings: dict[str, Any] = {
        "batch_size": config.batch_size,
        "num_workers": workers,
        "collate_fn": functools.partial(_decoded, config.image_size),
        "persistent_workers": workers > 0,
    }
    if name == "litdata":
        import litdata  # pyright: ignore[reportMissingImports]

        samples = litdata.StreamingDataset(folder, shuffle=True, drop_last=False)
        return litdata.StreamingDataLoader(samples, **settings)
    import streaming  # pyright: ignore[reportMissingImports]

    samples = streaming.StreamingDataset(local=folder, shuffle=True, batch_size=config.batch_size)
    return streaming.StreamingDataLoader(samples, **settings)


def _decoded(side: int, samples: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Pixels, uint8 [B, S, S, 3], and codes, uint16 [B, N]; a worker's pixels lie in shared memory."""
    pixels = torch.empty((len(samples), side, side, 3), dtype=torch.uint8)
    if get_worker_info() is not None:
        pixels.share_memory_()
    for sample, place in zip(samples, pixels.numpy(), strict=True):
        decode_crop(sample["jpg"], place)
    return pixels, torch.from_numpy(np.stack([sample["codes"] for sample in samples]))


def _rewrite(name: str, config: OtherLoadersConfig, dataset: Dataset, output: str, num_bytes: int) -> None:
    """The samples of a token dataset, whose crops have so many bytes, written by what belongs to a loader."""
    if name == "litdata":
        import litdata  # pyright: ignore[reportMissingImports]

        with contextlib.redirect_stdout(sys.stderr):
            litdata.optimize(
                fn=_samples,
                inputs=[dataset],
                output_dir=output,
                chunk_size=config.samples_per_shard,
                num_workers=1,
                start_method="fork",  # it sets that of this process, which torch's loaders use
                verbose=False,
            )
        return
    import streaming  # pyright: ignore[reportMissingImports]

    num_codes = GRID[0] * GRID[1]
    columns = {"jpg": "bytes", "codes": f"ndarray:uint16:{num_codes}"}
    limit = config.samples_per_shard * (num_bytes // config.samples + 2 * num_codes)
    with streaming.MDSWriter(columns=columns, out=output, size_limit=limit) as writer:
        for sample in _samples(dataset):
            writer.write(sample)


def _samples(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Every sample of a token dataset as the others store it: `jpg`, bytes, and `codes`, uint16 [N]."""
    batches = Batches(256, shuffle=False, drop_last=False, num_threads=0)
    with ShardReader(dataset, None, batches) as reader:
        for batch in reader.batches(0):
            assert batch.codes is not None
            for crop, codes in zip(batch.encoded, batch.codes, strict=True):
                yield {"jpg": bytes(crop), "codes": codes}


if __name__ == "__main__":
    run_job(main, OtherLoadersConfig)

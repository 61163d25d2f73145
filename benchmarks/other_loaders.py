"""Samples/s of the reader beside litData and MosaicML streaming, on the same crops and codes on a local disk.

python -m benchmarks.other_loaders [--images FOLDER] [--samples 4000] [--rounds 5] [--loaders '[litdata]']

The two are no dependencies of the project. From the root of a checkout, in an environment of their own:

    python3 -m venv others
    others/bin/pip install -e . 'litdata>=0.2.76' 'mosaicml-streaming>=0.13'
    others/bin/python -m benchmarks.other_loaders

One line of JSON per number of workers, one for reading without decoding; the first describes the machine.
Within a case the loops take turns, `rounds` times, and medians count:

- `decode_only`: decodes the crops from memory into one array, with as many threads as the reader has workers;
- `reader`: `ShardReader`, as training uses it, decoding in so many threads;
- `litdata`: its `StreamingDataset` and `StreamingDataLoader` over what `litdata.optimize` wrote;
- `mosaic`: its `StreamingDataset` and `StreamingDataLoader` over what `MDSWriter` wrote.

All shuffle, decode with `decode_crop` and give batches of uint8 pixels [B, S, S, 3] and uint16 codes [B, N].
The others decode in their worker processes, each batch into memory that the consumer shares: one copy less
than torch's `default_collate` makes. Their samples are stored as bytes and an array, uncompressed, about as
many to a file as in a shard; their other settings are the defaults. Rounds are epochs of one loader, whose
workers stay. The first epoch is not timed: it fills caches, and its samples are compared with what was
written. `start` says what it took: `first_batch_s` from the making of the loader to a batch, and the most
`processes` and, in all of them, `threads` besides the calling one, which decodes where there are 0 workers.
Without decoding, the reader hands out views of mapped tars, the others copies. Leave the machine idle
meanwhile.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from benchmarks import reader as ours
from pipeline.config import run_job
from pipeline.errors import InputError
from shards.dataset.dataset import Dataset, open_dataset
from shards.pixels.crops import StoredCrops
from shards.pixels.views import decode_crop
from shards.reader.reader import Batches, ShardReader

PACKAGES = {"litdata": ("litdata", "litdata"), "mosaic": ("streaming", "mosaicml-streaming")}
"""Module and distribution of each of the others."""


@dataclass(frozen=True, kw_only=True)
class OtherLoadersConfig:
    """Time the reader beside loaders of others."""

    images: str | None = None
    """Folder of photographs that the crops are cut from; null makes noise over gradients."""
    image_size: int = 224
    """Side of the crops."""
    samples: int = 4000
    """Crops in the dataset; each loop reads all of them once."""
    samples_per_shard: int = 250
    """Crops per tar, and about as many in the files of the others."""
    batch_size: int = 128
    """Crops per batch."""
    workers: tuple[int, ...] = (0, 1, 2)
    """Threads of the reader, processes of the others."""
    loaders: tuple[str, ...] = tuple(PACKAGES)
    """The others: litdata, mosaic."""
    rounds: int = 5
    """How often the loops take turns."""

    @property
    def data(self) -> ours.BenchmarkConfig:
        """The same for the parts of the reader's own benchmark."""
        return ours.BenchmarkConfig(
            images=self.images,
            image_size=self.image_size,
            samples=self.samples,
            samples_per_shard=self.samples_per_shard,
            batch_size=self.batch_size,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Data:
    """The same samples in every format."""

    folder: str
    """Holds a folder for each of the others."""
    dataset: Dataset
    crops: list[bytes]
    """The encoded crops, in memory."""
    checksum: int
    """What `_checksum` makes of an epoch."""


def main(config: OtherLoadersConfig) -> None:
    """Make the dataset once in every format, then print one line per case."""
    for name in config.loaders:
        _require(name)
    versions = {PACKAGES[name][1]: metadata.version(PACKAGES[name][1]) for name in config.loaders}
    print(json.dumps({**ours._machine(), "torch": torch.__version__, **versions}), flush=True)
    with tempfile.TemporaryDirectory(prefix="loaders-bench-") as folder:
        data = _written(config, folder)
        for workers in config.workers:
            print(json.dumps(_case(config, data, workers)), flush=True)
        print(json.dumps(_without_decode(config, data)), flush=True)


def _case(config: OtherLoadersConfig, data: _Data, workers: int) -> dict[str, Any]:
    """All loops in turn with so many workers."""
    loops: dict[str, Callable[[], float]] = {
        "decode_only": functools.partial(ours._decode_only, config.data, data.crops, workers)
    }
    loaders: dict[str, Iterable[tuple[Any, Any]]] = {}
    starts: dict[str, dict[str, float]] = {}
    # The others first: their workers are forks, and a process that forks had better have no threads.
    for name in (*config.loaders, "reader"):
        loaders[name], starts[name] = _started(name, config, data, workers)
        loops[name] = functools.partial(ours._consumed, loaders[name])

    rates: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(config.rounds):
        for name, loop in loops.items():
            rates[name].append(loop())
    for loader in loaders.values():
        if isinstance(loader, _ReaderEpochs):
            loader.reader.close()
    median = {name: statistics.median(found) for name, found in rates.items()}
    return {
        "case": f"other loaders, {config.image_size} px crops and codes, local, {workers} workers",
        "workers": workers,
        "samples": config.samples,
        "batch_size": config.batch_size,
        "rounds": config.rounds,
        "samples_per_s": {name: round(rate, 1) for name, rate in median.items()},
        "of_decode_only": {
            name: round(_median_ratio(rates[name], rates["decode_only"]), 3) for name in starts
        },
        "reader_over": {
            name: round(_median_ratio(rates["reader"], rates[name]), 2) for name in config.loaders
        },
        "start": starts,
        "runs": {name: [round(rate, 1) for rate in found] for name, found in rates.items()},
    }


def _without_decode(config: OtherLoadersConfig, data: _Data) -> dict[str, Any]:
    """Microseconds per sample of everything but decoding, in the calling thread."""
    gc.collect()
    names = (*config.loaders, "reader")
    loaders = {name: _loader(name, config, data, 0, decoded=False) for name in names}
    found: dict[str, list[float]] = {name: [] for name in loaders}
    for turn in range(1 + config.rounds):
        for name, loader in loaders.items():
            began = time.perf_counter()
            touched = sum(crop[-1] for encoded, _ in loader for crop in encoded)
            if turn > 0:  # the first opens, and the reader hashes
                found[name].append((time.perf_counter() - began) / config.samples * 1e6)
            assert touched > 0
    medians = {name: round(statistics.median(seconds), 2) for name, seconds in found.items()}
    return {"case": "other loaders without decoding, 0 workers", "us_per_sample": medians}


# ---------------------------------------------------------------------------------------------- the loaders


class _ReaderEpochs:
    """A `ShardReader` looked at as the others are: every iteration is the next epoch."""

    def __init__(self, reader: ShardReader) -> None:
        self.reader = reader
        self.epoch = 0

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        batches = self.reader.batches(self.epoch)
        self.epoch += 1
        for batch in batches:
            yield batch.encoded if self.reader.crops is None else batch.pixels, batch.codes


def _loader(
    name: str, config: OtherLoadersConfig, data: _Data, workers: int, *, decoded: bool
) -> Iterable[tuple[Any, Any]]:
    """(pixels, codes) of each batch of another epoch with every iteration; encoded crops if not `decoded`."""
    collate = functools.partial(_decoded, config.image_size) if decoded else _encoded
    own, size, stay = os.path.join(data.folder, name), config.batch_size, workers > 0
    match name:
        case "reader":
            crops = StoredCrops() if decoded else None
            batches = Batches(size, num_threads=workers, drop_last=False)
            return _ReaderEpochs(ShardReader(data.dataset, crops, batches))
        case "litdata":
            import litdata  # pyright: ignore[reportMissingImports]

            samples = litdata.StreamingDataset(own, shuffle=True, drop_last=False)
            return litdata.StreamingDataLoader(
                samples, batch_size=size, num_workers=workers, collate_fn=collate, persistent_workers=stay
            )
        case _:
            import streaming  # pyright: ignore[reportMissingImports]

            samples = streaming.StreamingDataset(local=own, shuffle=True, batch_size=size)
            return streaming.StreamingDataLoader(
                samples, batch_size=size, num_workers=workers, collate_fn=collate, persistent_workers=stay
            )


def _decoded(side: int, samples: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Pixels, uint8 [B, S, S, 3], and codes, uint16 [B, N]; a worker's pixels lie in shared memory."""
    pixels = torch.empty((len(samples), side, side, 3), dtype=torch.uint8)
    if get_worker_info() is not None:
        pixels.share_memory_()
    for sample, place in zip(samples, pixels.numpy(), strict=True):
        decode_crop(sample["jpg"], place)
    return pixels, _codes(samples)


def _encoded(samples: list[dict[str, Any]]) -> tuple[list[bytes], Tensor]:
    return [sample["jpg"] for sample in samples], _codes(samples)


def _codes(samples: list[dict[str, Any]]) -> Tensor:
    return torch.from_numpy(np.stack([sample["codes"] for sample in samples]))


def _started(
    name: str, config: OtherLoadersConfig, data: _Data, workers: int
) -> tuple[Iterable[tuple[Any, Any]], dict[str, float]]:
    """A loader after its first epoch, and what it took; RuntimeError where that gave other samples."""
    gc.collect()  # a fork must not find the loaders of the case before
    before, first_s = _tasks(), 0.0
    most = {"processes": 0, "threads": 0}
    began = time.perf_counter()
    loader = _loader(name, config, data, workers, decoded=True)

    def watched() -> Iterator[tuple[Any, Any]]:
        nonlocal first_s
        for batch in loader:
            first_s = first_s or time.perf_counter() - began
            new = _tasks() - before
            most["processes"] = max(most["processes"], len({process for process, _ in new} - {os.getpid()}))
            most["threads"] = max(most["threads"], len(new))
            yield batch

    if _checksum(watched()) != data.checksum:
        raise RuntimeError(f"an epoch of {name} did not give every sample once, as it was written")
    return loader, {"first_batch_s": round(first_s, 3), **most}


def _tasks() -> set[tuple[int, int]]:
    """(process, thread) of all threads of this process and its workers."""
    found = set()
    for process in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
        with contextlib.suppress(FileNotFoundError):  # a worker that has ended meanwhile
            found |= {(process, int(task)) for task in os.listdir(f"/proc/{process}/task")}
    return found


def _checksum(batches: Iterable[tuple[Any, Any]]) -> int:
    """Of all pairs of pixels and codes, in whatever order and batches they come."""
    return sum(
        1 + zlib.crc32(np.asarray(row).tobytes(), zlib.crc32(np.asarray(image).tobytes()))
        for pixels, codes in batches
        for image, row in zip(np.asarray(pixels), np.asarray(codes), strict=True)
    )


def _median_ratio(rates: list[float], others: list[float]) -> float:
    """The median over the rounds, whose loops ran one after the other."""
    return statistics.median(rate / other for rate, other in zip(rates, others, strict=True))


# ------------------------------------------------------------------------------------- the others' formats


def _require(name: str) -> None:
    """InputError where the loader is not one of the others, or is not installed."""
    if name not in PACKAGES:
        raise InputError(f"loaders names {name}; give some of {', '.join(PACKAGES)}")
    module, distribution = PACKAGES[name]
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{distribution} cannot be imported here ({error}); make an environment for it as "
            f"benchmarks/other_loaders.py says, or leave {name} out of loaders"
        ) from None


def _written(config: OtherLoadersConfig, folder: str) -> _Data:
    """The token dataset, and its samples in the formats of the others."""
    root = os.path.join(folder, "tokens")
    ours._write(config.data, root, config.data.samples)
    dataset = open_dataset(root)
    crops = ours._crops(dataset)
    for name in config.loaders:
        _rewrite(name, config, root, os.path.join(folder, name), sum(map(len, crops)))
    pairs = ((decode_crop(sample["jpg"])[None], sample["codes"][None]) for sample in _samples(root))
    return _Data(folder=folder, dataset=dataset, crops=crops, checksum=_checksum(pairs))


def _rewrite(name: str, config: OtherLoadersConfig, root: str, output: str, num_bytes: int) -> None:
    """The samples of a token dataset, whose crops have so many bytes, written by what belongs to a loader."""
    match name:
        case "litdata":
            import litdata  # pyright: ignore[reportMissingImports]

            with contextlib.redirect_stdout(sys.stderr):
                litdata.optimize(
                    fn=_samples,
                    inputs=[root],
                    output_dir=output,
                    chunk_size=config.samples_per_shard,
                    num_workers=1,
                    start_method="fork",  # it sets that of this process, which torch's loaders use
                    verbose=False,
                )
        case _:
            import streaming  # pyright: ignore[reportMissingImports]

            num_codes = ours.GRID[0] * ours.GRID[1]
            columns = {"jpg": "bytes", "codes": f"ndarray:uint16:{num_codes}"}
            limit = config.samples_per_shard * (num_bytes // config.samples + 2 * num_codes)
            with streaming.MDSWriter(columns=columns, out=output, size_limit=limit) as writer:
                for sample in _samples(root):
                    writer.write(sample)


def _samples(root: str) -> Iterator[dict[str, Any]]:
    """Every sample of a token dataset as the others store it: `jpg`, bytes, and `codes`, uint16 [N]."""
    batches = Batches(256, num_threads=0, shuffle=False, drop_last=False)
    with ShardReader(open_dataset(root), None, batches) as reader:
        for batch in reader.batches(0):
            assert batch.codes is not None
            for crop, codes in zip(batch.encoded, batch.codes, strict=True):
                yield {"jpg": bytes(crop), "codes": codes}


if __name__ == "__main__":
    run_job(main, OtherLoadersConfig)

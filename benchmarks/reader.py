"""Samples/s of the reader against decoding alone and against webdataset, on the same crops and codes.

python -m benchmarks.reader [--images FOLDER] [--samples 6000] [--rounds 5]

One line of JSON per case (store x workers), three for a consumer with a pace of its own, one for reading
without decoding, one for the first batch after a resume, one for the order; the first describes the machine.
Within a case the loops take turns, `rounds` times, and medians count:

- `decode_only`: decodes the crops from memory into one array, with as many threads as the reader has workers;
- `reader`: `ShardReader`, as training uses it, with codes;
- `web_loader`: `wds.WebLoader` over `wds.WebDataset(…).shuffle().decode()…`, as its documentation shows;
- `lean_webdataset`: the same tars with a decoder of three lines, batched inside the workers.

`s3` is moto's server behind a proxy that holds every answer back for 30 ms. A round of the reader begins
there with an empty cache, and its time counts from the fifth batch on; `first_batch_s` is what came first.
Locally the rounds are epochs of one reader, as in training, after one that hashes: `first_epoch_per_s`.
With 0 workers the calling thread decodes. The paced cases read two epochs from `s3`, with a cache for all
shards and with one for half of them, and sleep between batches as if a training step took that long:
`first_batch_s` is what the first batch of each epoch took, `wait_share` the part of the time after it in
which such a step would wait for data. Leave the machine idle meanwhile.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from webdataset.compat import WebDataset, WebLoader

from benchmarks.crops import GRID, CropsConfig, decode_only, encoded_crops, write_tokens
from benchmarks.timing import emit, machine, median_ratio, medians, take_turns
from pipeline import storage
from pipeline.config import run_job
from shards.dataset.dataset import open_dataset
from shards.pixels.crops import StoredCrops
from shards.reader.disk_cache import CacheConfig
from shards.reader.figures import ReaderFigures
from shards.reader.order import Order
from shards.reader.reader import Batches, ShardReader

DELAY_S = 0.03
WARM_BATCHES = 4
"""After so many the memory of batches is there, which a run touches for the first time only once."""
TOKENS, MANY_SHARDS = "tokens", "many_shards"
PACED = ((1.0, None), (0.5, None), (0.5, 16))
"""Part of all shards that the cache has room for, and lanes; None takes as many as fit. With half of the
shards there is room for twice 16 lanes: shards of the next epoch come before it begins."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(CropsConfig):
    """Time the reader beside its yardsticks."""

    stores: tuple[str, ...] = ("local", "s3")
    """Where the tars lie."""
    paced_shards: int = 96
    """Tars that the paced cases read: more than lanes, so that some come while others are read."""
    pace: float = 0.4
    """Rate at which the paced cases take samples, as a part of decoding alone in as many threads; the store
    runs on the same cores."""
    order_samples: int = 1_281_167
    """Samples of the order that is timed."""


def main(config: BenchmarkConfig) -> None:
    """Make the datasets once, then print one line per case."""
    emit("machine", **machine("numpy", "simplejpeg", "webdataset"))
    with tempfile.TemporaryDirectory(prefix="reader-bench-") as folder:
        local = os.path.join(folder, "data")
        write_tokens(config, os.path.join(local, TOKENS), config.samples)
        if "s3" in config.stores:
            num_samples = config.paced_shards * config.samples_per_shard
            write_tokens(config, os.path.join(local, MANY_SHARDS), num_samples)
        with contextlib.ExitStack() as stack:
            for store in config.stores:
                root = local if store == "local" else stack.enter_context(_slow_s3(local))
                for workers in config.workers:
                    _compare(
                        config, store, storage.join(root, TOKENS), workers, os.path.join(folder, "cache")
                    )
                for part, lanes in PACED if store == "s3" else ():
                    _paced(
                        config, storage.join(root, MANY_SHARDS), os.path.join(folder, "paced"), part, lanes
                    )
        _without_decoding(config, os.path.join(local, TOKENS))
        _resume(config, os.path.join(local, TOKENS))
    _order(config)


# ------------------------------------------------------------------------------------------------ cases


def _compare(config: BenchmarkConfig, store: str, root: str, workers: int, cache: str) -> None:
    """All loops in turn over one store with so many workers."""
    dataset = open_dataset(root)
    tars = [shard.tar for shard in dataset.shards()]
    first_batches: list[float] = []
    batches = Batches(config.batch_size, num_threads=workers, drop_last=False)

    def make() -> ShardReader:
        return ShardReader(dataset, StoredCrops(), batches, CacheConfig(folder=cache))

    with make() as kept:
        first_epoch = None if dataset.is_remote else _epoch(kept, 0)

        def read() -> float:
            if first_epoch is not None:
                return _epoch(kept, 1)
            shutil.rmtree(cache, ignore_errors=True)
            rate, first_s = _read_remote(make())
            first_batches.append(first_s)
            return rate

        loops: dict[str, Callable[[], float]] = {
            "decode_only": functools.partial(decode_only, config, encoded_crops(dataset), workers),
            "reader": read,
            "web_loader": functools.partial(_web_loader, config, tars, workers),
            "lean_webdataset": functools.partial(_lean_webdataset, config, tars, workers),
        }
        rates = take_turns(loops, config.rounds)
    median = medians(rates)
    emit(
        f"reader, {config.image_size} px crops and codes, {store}, {workers} workers",
        samples=config.samples,
        batch_size=config.batch_size,
        rounds=config.rounds,
        samples_per_s=median,
        of_decode_only=median_ratio(rates["reader"], rates["decode_only"]),
        over_web_loader=median["reader"] / median["web_loader"],
        over_lean_webdataset=median["reader"] / median["lean_webdataset"],
        first_batch_s=statistics.median(first_batches) if first_batches else None,
        first_epoch_per_s=first_epoch,
        runs=rates,
    )


def _paced(config: BenchmarkConfig, root: str, cache: str, part: float, lanes: int | None) -> None:
    """What a loop whose steps take a fixed time waits for, with a cache for a part of all shards."""
    dataset, workers = open_dataset(root), max(config.workers)
    step_s = config.batch_size / (config.pace * decode_only(config, encoded_crops(dataset), workers))
    shutil.rmtree(cache, ignore_errors=True)
    total = int(dataset.shard_bytes(0).sum())
    window = None if lanes is None else 1
    batches = Batches(config.batch_size, num_threads=workers, lanes=lanes, window=window, epochs=2)
    first_batches, epochs, largest = list[float](), list[ReaderFigures](), 0
    with ShardReader(
        dataset, StoredCrops(), batches, CacheConfig(folder=cache, bytes=int(part * total))
    ) as reader:
        for epoch in range(2):
            began = time.perf_counter()
            for batch in reader.batches(epoch):
                if batch.position == 0:
                    first_batches.append(time.perf_counter() - began)
                    reader.telemetry.take()
                time.sleep(step_s)
                if batch.position % (16 * config.batch_size) == 0:
                    largest = max(largest, _bytes_in(cache))
            epochs.append(reader.telemetry.take())
        lanes = reader.lanes
    emit(
        f"reader, paced, s3, {workers} workers, a cache for {part:.0%} of {total / 1e6:.0f} MB",
        step_ms=1e3 * step_s,
        lanes=lanes,
        shards=dataset.num_shards,
        first_batch_s=first_batches,
        wait_share=[figures.wait_share for figures in epochs],
        gets_after_it=[figures.gets for figures in epochs],
        get_p50_s=epochs[0].get_p50_s,
        samples_per_s=[figures.samples_per_s for figures in epochs],
        cache_mb=part * total / 1e6,
        largest_mb=largest / 1e6,
    )


def _without_decoding(config: BenchmarkConfig, root: str) -> None:
    """Microseconds per sample of everything but decoding: order, look-up, codes, labels, bytes."""
    dataset, spent = open_dataset(root), list[float]()
    batches = Batches(config.batch_size, num_threads=0, drop_last=False)
    with ShardReader(dataset, None, batches) as reader:
        list(reader.batches(0))  # opens and hashes
        for _ in range(config.rounds):
            began = time.perf_counter()
            touched = sum(data[-1] for batch in reader.batches(0) for data in batch.encoded)
            spent.append((time.perf_counter() - began) / dataset.num_samples() * 1e6)
            assert touched > 0
    emit("reader without decoding", us_per_sample=statistics.median(spent))


def _resume(config: BenchmarkConfig, root: str) -> None:
    """Seconds until a new reader gives its first batch, at the start of an epoch and near its end."""
    last = config.samples // config.batch_size - 1

    def first_batch_s(position: int) -> float:
        began = time.perf_counter()
        with ShardReader(open_dataset(root), StoredCrops(), Batches(config.batch_size)) as reader:
            next(reader.batches(0, position))
            return time.perf_counter() - began

    places = {"at_start_s": 0, "at_end_s": last * config.batch_size}
    loops = {name: functools.partial(first_batch_s, position) for name, position in places.items()}
    emit("first batch of a new reader, shards hashed included", **medians(take_turns(loops, config.rounds)))


def _order(config: BenchmarkConfig) -> None:
    """Seconds for all places of an epoch, and memory and time to resume in one of a billion."""
    shards = max(config.order_samples // 2000, 1)
    sizes, billion = np.full(shards, config.order_samples // shards), np.full(250_000, 4000)

    def locate(sizes: np.ndarray, places: np.ndarray) -> float:
        began = time.perf_counter()
        Order(sizes, 0, 0).locate(places)
        return time.perf_counter() - began

    seconds = [locate(sizes, np.arange(sizes.sum())) for _ in range(config.rounds)]
    later = np.arange(777_777_777, 777_777_777 + 1024)
    resume_s = locate(billion, later)
    tracemalloc.start()
    locate(billion, later)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    emit(
        "order",
        samples=int(sizes.sum()),
        whole_epoch_s=statistics.median(seconds),
        billion_resume_s=resume_s,
        billion_peak_mb=peak / 1e6,
    )


# ------------------------------------------------------------------------------------------------ loops


def _epoch(reader: ShardReader, epoch: int) -> float:
    """Samples/s of a whole epoch."""
    began = time.perf_counter()
    seen = sum(len(batch.pixels) for batch in reader.batches(epoch))
    return seen / (time.perf_counter() - began)


def _read_remote(reader: ShardReader) -> tuple[float, float]:
    """(samples/s from the fifth batch on, seconds to the first) of an epoch; the reader is closed."""
    asked = time.perf_counter()
    with reader:
        batches = reader.batches(0)
        next(batches)
        first_s = time.perf_counter() - asked
        for _ in range(WARM_BATCHES - 1):
            next(batches)
        began = time.perf_counter()
        seen = sum(len(batch.pixels) for batch in batches)
        return seen / (time.perf_counter() - began), first_s


def _web_loader(config: BenchmarkConfig, tars: list[str], workers: int) -> float:
    """As in webdataset's documentation: decode by its handlers, samples to tuples, batches by the loader."""
    samples = WebDataset(_urls(tars), shardshuffle=len(tars), seed=0).shuffle(1000)
    samples = samples.decode("rgb8").to_tuple("jpg", "codes.npy")
    return _consumed(WebLoader(samples, batch_size=config.batch_size, num_workers=workers, shuffle=False))


def _lean_webdataset(config: BenchmarkConfig, tars: list[str], workers: int) -> float:
    """The same tars with nothing that is not needed: our decoder, and batches made in the workers."""
    samples = WebDataset(_urls(tars), shardshuffle=len(tars), seed=0).shuffle(1000)
    samples = samples.map(_lean_sample).batched(config.batch_size, collation_fn=_stacked)
    return _consumed(WebLoader(samples, batch_size=None, num_workers=workers))


def _lean_sample(sample: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    data: bytes = sample["codes.npy"]
    codes = np.frombuffer(data, "<u2", count=GRID[0] * GRID[1], offset=len(data) - 2 * GRID[0] * GRID[1])
    pixels = simplejpeg.decode_jpeg(sample["jpg"], colorspace="RGB", fastdct=False, fastupsample=False)
    return pixels, codes


def _stacked(samples: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return np.stack([pixels for pixels, _ in samples]), np.stack([codes for _, codes in samples])


def _consumed(loader: Any) -> float:
    began = time.perf_counter()
    seen = sum(len(pixels) for pixels, _ in loader)
    return seen / (time.perf_counter() - began)


def _urls(tars: list[str]) -> list[str]:
    """For webdataset: local paths, or plain HTTP; moto does not check signatures, but wants to see one."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
    return [tar if storage.is_local(tar) else f"{endpoint}/{tar[5:]}?Signature=x" for tar in tars]


def _bytes_in(folder: str) -> int:
    """Bytes of the files of a folder, of which some come and go."""
    total = 0
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):
            total += entry.stat().st_size
    return total


# ------------------------------------------------------------------------------------------------ store


@contextlib.contextmanager
def _slow_s3(local: str) -> Iterator[str]:
    """The datasets of a folder in a bucket whose every answer comes 30 ms late."""
    from tests.chaos.proxy import FaultProxy, Faults

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        request = urllib.request.Request(f"{endpoint}/bench", method="PUT")
        for _ in range(300):
            try:
                urllib.request.urlopen(request, timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        with FaultProxy(endpoint) as proxy:
            os.environ.update(
                AWS_ACCESS_KEY_ID="testing",
                AWS_SECRET_ACCESS_KEY="testing",
                AWS_DEFAULT_REGION="us-east-1",
                AWS_EC2_METADATA_DISABLED="true",
                AWS_ENDPOINT_URL=proxy.endpoint,
            )
            for file in storage.list_files(local):
                storage.put(f"s3://bench{file.url.removeprefix(local)}", storage.read(file.url))
            proxy.faults = Faults(delay=1.0, delay_s=DELAY_S)
            yield "s3://bench"
    finally:
        server.terminate()
        server.wait(30)


if __name__ == "__main__":
    run_job(main, BenchmarkConfig)

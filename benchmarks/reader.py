"""Samples/s of the reader against decoding alone and against webdataset, on the same crops and codes.

python -m benchmarks.reader [--images FOLDER] [--samples 6000] [--rounds 5] [--plot reader.png]

One line of JSON per case (store x workers), two for a consumer with a pace of its own, one for reading
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
shards and with one for half of them (which has room for twice 16 lanes, so that the next epoch's shards come
before it begins), and sleep between batches as if a training step took that long:
`first_batch_s` is what the first batch of each epoch took, `wait_share` the part of the time after it in
which such a step would wait for data. Leave the machine idle meanwhile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import platform
import random
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image
from webdataset.compat import WebDataset, WebLoader

from pipeline import storage
from pipeline.config import run_job
from pipeline.errors import InputError
from shards.dataset.dataset import Dataset, open_dataset
from shards.format.build import build_shard
from shards.format.plan import Plan
from shards.format.records import StoredSample
from shards.pixels.crops import StoredCrops
from shards.pixels.views import CropBox, decode_crop, encode_crop
from shards.reader.disk_cache import CacheConfig
from shards.reader.figures import ReaderFigures
from shards.reader.order import Order
from shards.reader.reader import Batches, ShardReader
from shards.writer.commit import commit, finish, pending, start

DELAY_S = 0.03
WARM_BATCHES = 4
"""After so many the memory of batches is there, which a run touches for the first time only once."""
GRID = (14, 14)
CODEBOOK_SIZE = 8192
TOKENS, MANY_SHARDS = "tokens", "many_shards"
PACED = ((1.0, None), (0.5, None), (0.5, 16))
"""Part of all shards that the cache has room for, and lanes; None are as many as fit."""
LOOPS = ("decode_only", "reader", "web_loader", "lean_webdataset")


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Time the reader beside its yardsticks."""

    images: str | None = None
    """Folder of photographs that the crops are cut from; null makes noise over gradients."""
    image_size: int = 224
    """Side of the crops."""
    samples: int = 6000
    """Crops in the dataset; each loop reads all of them once."""
    samples_per_shard: int = 250
    """Crops per tar."""
    batch_size: int = 128
    """Crops per batch; 128 is what each GPU takes of the paper's 2,048."""
    workers: tuple[int, ...] = (0, 1, 2)
    """Threads of the reader, processes of webdataset's loaders."""
    stores: tuple[str, ...] = ("local", "s3")
    """Where the tars lie."""
    rounds: int = 5
    """How often the loops take turns."""
    paced_shards: int = 96
    """Tars that the paced cases read: more than lanes, so that some come while others are read."""
    pace: float = 0.4
    """Rate at which the paced cases take samples, as a part of decoding alone in as many threads; the store
    runs on the same cores."""
    order_samples: int = 1_281_167
    """Samples of the order that is timed."""
    plot: str | None = None
    """Where a PNG of the figures goes."""


def main(config: BenchmarkConfig) -> None:
    """Make the dataset once, then print one line per case."""
    print(json.dumps(_machine()), flush=True)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="reader-bench-") as folder:
        local = os.path.join(folder, "data")
        _write(config, os.path.join(local, TOKENS), config.samples)
        if "s3" in config.stores:
            _write(config, os.path.join(local, MANY_SHARDS), config.paced_shards * config.samples_per_shard)
        with contextlib.ExitStack() as stack:
            for store in config.stores:
                root = local if store == "local" else stack.enter_context(_slow_s3(local))
                for workers in config.workers:
                    results.append(_case(config, store, storage.join(root, TOKENS), workers, folder))
                    print(json.dumps(results[-1]), flush=True)
                for part, lanes in PACED if store == "s3" else ():
                    case = _paced(config, storage.join(root, MANY_SHARDS), folder, part, lanes)
                    print(json.dumps(case), flush=True)
        print(json.dumps(_without_decode(config, os.path.join(local, TOKENS))), flush=True)
        print(json.dumps(_resume(config, os.path.join(local, TOKENS))), flush=True)
    print(json.dumps(_order(config)), flush=True)
    if config.plot is not None:
        _draw(results, config.plot)


def _case(config: BenchmarkConfig, store: str, root: str, workers: int, folder: str) -> dict[str, Any]:
    """All loops in turn over one store with so many workers."""
    dataset = open_dataset(root)
    crops = _crops(dataset)
    tars = [shard.tar for shard in dataset.shards()]
    cache = os.path.join(folder, "cache")
    first_batches: list[float] = []

    kept = _reader(config, dataset, workers, cache)
    first_epoch = None if dataset.is_remote else _epoch(kept, 0)

    def reader() -> float:
        if first_epoch is not None:
            return _epoch(kept, 1)
        shutil.rmtree(cache, ignore_errors=True)
        rate, first_s = _read_remote(_reader(config, dataset, workers, cache))
        first_batches.append(first_s)
        return rate

    loops: dict[str, Callable[[], float]] = {
        "decode_only": functools.partial(_decode_only, config, crops, workers),
        "reader": reader,
        "web_loader": functools.partial(_web_loader, config, tars, workers),
        "lean_webdataset": functools.partial(_lean_webdataset, config, tars, workers),
    }
    rates: dict[str, list[float]] = {name: [] for name in LOOPS}
    for _ in range(config.rounds):
        for name in LOOPS:
            rates[name].append(loops[name]())
    kept.close()
    median = {name: statistics.median(found) for name, found in rates.items()}
    pairs = zip(rates["reader"], rates["decode_only"], strict=True)
    return {
        "case": f"reader, {config.image_size} px crops and codes, {store}, {workers} workers",
        "store": store,
        "workers": workers,
        "samples": config.samples,
        "batch_size": config.batch_size,
        "rounds": config.rounds,
        "samples_per_s": {name: round(rate, 1) for name, rate in median.items()},
        "of_decode_only": round(statistics.median(ours / bound for ours, bound in pairs), 3),
        "over_web_loader": round(median["reader"] / median["web_loader"], 2),
        "over_lean_webdataset": round(median["reader"] / median["lean_webdataset"], 2),
        "first_batch_s": round(statistics.median(first_batches), 3) if first_batches else None,
        "first_epoch_per_s": None if first_epoch is None else round(first_epoch, 1),
        "runs": {name: [round(rate, 1) for rate in found] for name, found in rates.items()},
    }


def _paced(config: BenchmarkConfig, root: str, folder: str, part: float, lanes: int | None) -> dict[str, Any]:
    """What a loop whose steps take a fixed time waits for, with a cache for a part of all shards."""
    dataset, workers, cache = open_dataset(root), max(config.workers), os.path.join(folder, "paced")
    step_s = config.batch_size / (config.pace * _decode_only(config, _crops(dataset), workers))
    shutil.rmtree(cache, ignore_errors=True)
    total = int(dataset.shard_bytes(0).sum())
    bound = int(part * total)
    reader = ShardReader(
        dataset,
        StoredCrops(),
        Batches(
            config.batch_size,
            num_threads=workers,
            lanes=lanes,
            window=None if lanes is None else 1,
            epochs=2,
        ),
        CacheConfig(folder=cache, bytes=bound),
    )
    first_batches, epochs, most = list[float](), list[ReaderFigures](), 0
    with reader:
        for epoch in range(2):
            began = time.perf_counter()
            for batch in reader.batches(epoch):
                if batch.position == 0:
                    first_batches.append(time.perf_counter() - began)
                    reader.telemetry.take()
                time.sleep(step_s)
                if batch.position % (16 * config.batch_size) == 0:
                    most = max(most, _bytes_in(cache))
            epochs.append(reader.telemetry.take())
    return {
        "case": f"reader, paced, s3, {workers} workers, a cache for {part:.0%} of {total / 1e6:.0f} MB",
        "step_ms": round(1e3 * step_s, 1),
        "lanes": reader.lanes,
        "shards": dataset.num_shards,
        "first_batch_s": [round(seconds, 3) for seconds in first_batches],
        "wait_share": [round(figures.wait_share, 4) for figures in epochs],
        "gets_after_it": [figures.gets for figures in epochs],
        "get_p50_s": round(epochs[0].get_p50_s, 4),
        "samples_per_s": [round(figures.samples_per_s, 1) for figures in epochs],
        "cache_mb": round(bound / 1e6, 1),
        "largest_mb": round(most / 1e6, 1),
    }


def _bytes_in(folder: str) -> int:
    """What the files of a folder take, of which some come and go."""
    total = 0
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):
            total += entry.stat().st_size
    return total


# ------------------------------------------------------------------------------------------------ the loops


def _reader(config: BenchmarkConfig, dataset: Dataset, workers: int, cache: str) -> ShardReader:
    return ShardReader(
        dataset,
        StoredCrops(),
        Batches(config.batch_size, num_threads=workers, drop_last=False),
        CacheConfig(folder=cache),
    )


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


def _crops(dataset: Dataset) -> list[bytes]:
    """The encoded crops of a dataset, in memory."""
    with ShardReader(dataset, None, Batches(dataset.num_samples(), num_threads=0, shuffle=False)) as reader:
        [batch] = reader.batches(0)
        return [bytes(data) for data in batch.encoded]


def _decode_only(config: BenchmarkConfig, crops: list[bytes], workers: int) -> float:
    side = config.image_size
    out = np.empty((config.batch_size, side, side, 3), np.uint8)

    def decode(places: range) -> None:
        for place in places:
            decode_crop(crops[place], out[place % config.batch_size])

    began = time.perf_counter()
    if workers == 0:
        decode(range(len(crops)))
    else:
        chunks = [range(first, min(first + 16, len(crops))) for first in range(0, len(crops), 16)]
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(decode, chunks))
    return len(crops) / (time.perf_counter() - began)


def _web_loader(config: BenchmarkConfig, tars: list[str], workers: int) -> float:
    """As in webdataset's documentation: decode by its handlers, samples to tuples, batches by the loader."""
    dataset = (
        WebDataset(_urls(tars), shardshuffle=len(tars), seed=0)
        .shuffle(1000)
        .decode("rgb8")
        .to_tuple("jpg", "codes.npy")
    )
    loader = WebLoader(dataset, batch_size=config.batch_size, num_workers=workers, shuffle=False)
    return _consumed(loader)


def _lean_webdataset(config: BenchmarkConfig, tars: list[str], workers: int) -> float:
    """The same tars with nothing that is not needed: our decoder, and batches made in the workers."""
    dataset = (
        WebDataset(_urls(tars), shardshuffle=len(tars), seed=0)
        .shuffle(1000)
        .map(_lean_sample)
        .batched(config.batch_size, collation_fn=_stacked)
    )
    return _consumed(WebLoader(dataset, batch_size=None, num_workers=workers))


def _lean_sample(sample: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    data: bytes = sample["codes.npy"]
    codes = np.frombuffer(data, "<u2", count=GRID[0] * GRID[1], offset=len(data) - 2 * GRID[0] * GRID[1])
    pixels = simplejpeg.decode_jpeg(sample["jpg"], colorspace="RGB", fastdct=False, fastupsample=False)
    return pixels, codes


def _stacked(samples: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return np.stack([pixels for pixels, _ in samples]), np.stack([codes for _, codes in samples])


def _consumed(loader: Any) -> float:
    seen, began = 0, time.perf_counter()
    for pixels, _ in loader:
        seen += len(pixels)
    return seen / (time.perf_counter() - began)


def _urls(tars: list[str]) -> list[str]:
    """For webdataset: local paths, or plain HTTP; moto does not check signatures, but wants to see one."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
    return [tar if storage.is_local(tar) else f"{endpoint}/{tar[5:]}?Signature=x" for tar in tars]


# ------------------------------------------------------------------------------------ without decoding, order


def _without_decode(config: BenchmarkConfig, root: str) -> dict[str, Any]:
    """Microseconds per sample of everything but decoding: order, look-up, codes, labels, bytes."""
    dataset, found = open_dataset(root), []
    with ShardReader(dataset, None, Batches(config.batch_size, num_threads=0, drop_last=False)) as reader:
        list(reader.batches(0))  # opens and hashes
        for _ in range(config.rounds):
            began = time.perf_counter()
            touched = sum(data[-1] for batch in reader.batches(0) for data in batch.encoded)
            found.append((time.perf_counter() - began) / dataset.num_samples() * 1e6)
            assert touched > 0
    return {"case": "reader without decoding", "us_per_sample": round(statistics.median(found), 2)}


def _resume(config: BenchmarkConfig, root: str) -> dict[str, Any]:
    """Seconds until a new reader gives its first batch, at the start of an epoch and near its end."""
    found: dict[str, list[float]] = {}
    last = config.samples // config.batch_size - 1
    for _ in range(config.rounds):
        for name, position in (("start", 0), ("end", last * config.batch_size)):
            began = time.perf_counter()
            with ShardReader(open_dataset(root), StoredCrops(), Batches(config.batch_size)) as reader:
                next(reader.batches(0, position))
                found.setdefault(name, []).append(time.perf_counter() - began)
    return {
        "case": "first batch of a new reader, shards hashed included",
        **{f"at_{name}_s": round(statistics.median(seconds), 4) for name, seconds in found.items()},
    }


def _order(config: BenchmarkConfig) -> dict[str, Any]:
    """Seconds for all places of an epoch, and memory and time to resume in one of a billion."""
    shards = max(config.order_samples // 2000, 1)
    sizes = np.full(shards, config.order_samples // shards)
    seconds = []
    for _ in range(config.rounds):
        began = time.perf_counter()
        Order(sizes, 0, 0).locate(np.arange(sizes.sum()))
        seconds.append(time.perf_counter() - began)
    billion = np.full(250_000, 4000)
    began = time.perf_counter()
    Order(billion, 0, 0).locate(np.arange(777_777_777, 777_777_777 + 1024))
    resume_s = time.perf_counter() - began
    tracemalloc.start()
    Order(billion, 0, 0).locate(np.arange(777_777_777, 777_777_777 + 1024))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {
        "case": "order",
        "samples": int(sizes.sum()),
        "whole_epoch_s": round(statistics.median(seconds), 4),
        "billion_resume_s": round(resume_s, 4),
        "billion_peak_mb": round(peak / 1e6, 1),
    }


# ----------------------------------------------------------------------------------------------- data, stores


def _write(config: BenchmarkConfig, root: str, num_samples: int) -> None:
    """Token shards of random crops with random codes; beyond `samples` of them they come again."""
    bounds = [*range(0, num_samples, config.samples_per_shard), num_samples]
    side = config.image_size
    spec = {"fingerprint": "0" * 64, "grid": list(GRID), "codebook_size": CODEBOOK_SIZE, "image_size": side}
    plan = Plan(
        kind="tokens",
        inputs={},
        recipe={},
        first_ids=tuple(bounds),
        views=1,
        header={"tokenizer": spec, "class_names": None},
    )
    photographs = _photographs(config)
    made: dict[int, StoredSample] = {}
    start(root, plan)
    for item in pending(root, plan):
        samples = []
        for i in range(item.first_id, item.end_id):
            number = i % config.samples
            if number not in made:
                made[number] = _sample(config, number, photographs[number % len(photographs)])
            samples.append(dataclasses.replace(made[number], sample_id=i))
        commit(root, plan, item, build_shard(samples, [], grid=GRID, codebook_size=CODEBOOK_SIZE))
    finish(root, plan, decode_crop)


def _photographs(config: BenchmarkConfig) -> list[Image.Image]:
    if config.images is not None:
        files = [file.url for file in storage.list_files(storage.absolute(config.images))]
        if not files:
            raise InputError(f"there are no images at {config.images}; name a folder of photographs")
        return [Image.open(io.BytesIO(storage.read(url))).convert("RGB") for url in files[:250]]
    side = 2 * config.image_size
    y, x = np.mgrid[:side, :side]
    made = []
    for number in range(16):
        rng = np.random.default_rng(number)
        waves = [np.sin(x * rng.uniform(0.01, 0.2) + y * rng.uniform(0.01, 0.2)) for _ in range(3)]
        pixels = 128 + 90 * np.stack(waves, axis=-1) + rng.normal(0, 8, (side, side, 3))
        made.append(Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)))
    return made


def _sample(config: BenchmarkConfig, number: int, photograph: Image.Image) -> StoredSample:
    rng, side = random.Random(number), config.image_size
    width, height = photograph.size
    edge = rng.randint(max(1, min(width, height) // 2), min(width, height))
    left, top = rng.randint(0, width - edge), rng.randint(0, height - edge)
    crop = photograph.resize((side, side), Image.Resampling.BICUBIC, (left, top, left + edge, top + edge))
    codes = np.random.default_rng(number).integers(0, CODEBOOK_SIZE, GRID, np.uint16)
    return StoredSample(
        sample_id=number,
        view=0,
        image=encode_crop(np.asarray(crop), 95),
        extension="jpg",
        source=f"{number}.jpg",
        source_width=width,
        source_height=height,
        label=None,
        crop=CropBox(top=top, left=left, height=edge, width=edge),
        codes=codes,
    )


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
            for found in storage.list_files(local):
                storage.put(f"s3://bench{found.url.removeprefix(local)}", storage.read(found.url))
            proxy.faults = Faults(delay=1.0, delay_s=DELAY_S)
            yield "s3://bench"
    finally:
        server.terminate()
        server.wait(30)


# ------------------------------------------------------------------------------------------------ output


def _machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), cpu)
    return {
        "case": "machine",
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "simplejpeg": simplejpeg.__version__,
        "webdataset": metadata.version("webdataset"),
    }


def _draw(results: list[dict[str, Any]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(1.5 + 1.6 * len(results), 4))
    width = 0.8 / len(LOOPS)
    for place, name in enumerate(LOOPS):
        at = np.arange(len(results)) + (place - (len(LOOPS) - 1) / 2) * width
        axes.bar(
            at, [result["samples_per_s"][name] for result in results], width, label=name.replace("_", " ")
        )
    axes.set_xticks(
        range(len(results)), [f"{result['store']}\n{result['workers']} workers" for result in results]
    )
    axes.set_ylabel("samples/s, median")
    axes.set_title(results[0]["case"].split(", ")[1])
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    storage.put(storage.absolute(path), image.getvalue())


if __name__ == "__main__":
    run_job(main, BenchmarkConfig)

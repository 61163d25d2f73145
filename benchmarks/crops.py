"""A token dataset of random crops and codes to read in benchmarks, and decoding alone as a yardstick."""

from __future__ import annotations

import dataclasses
import io
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline import storage
from pipeline.errors import InputError
from shards.dataset.dataset import Dataset
from shards.format.build import build_shard
from shards.format.manifest import TokenizerSpec
from shards.format.plan import Plan
from shards.format.records import StoredSample
from shards.pixels.views import CropBox, decode_crop, encode_crop
from shards.reader.reader import Batches, ShardReader
from shards.writer.commit import commit, finish, pending, start

GRID = (14, 14)
CODEBOOK_SIZE = 8192


@dataclass(frozen=True, kw_only=True)
class CropsConfig:
    """Crops to read, and how."""

    images: str | None = None
    """Folder of photographs that the crops are cut from; null makes noise over gradients."""
    image_size: int = 224
    """Side of the crops, in pixels."""
    samples: int = 6000
    """Crops in the dataset; each loop reads all of them once."""
    samples_per_shard: int = 250
    """Crops per tar."""
    batch_size: int = 128
    """Crops per batch; 128 is what each GPU takes of the paper's 2,048."""
    workers: tuple[int, ...] = (0, 1, 2)
    """Threads of the reader, processes of the other loaders."""
    rounds: int = 5
    """How often the loops take turns."""


def write_tokens(config: CropsConfig, root: str, num_samples: int) -> None:
    """Token shards of random crops with random codes; beyond `samples` of them they come again."""
    bounds = [*range(0, num_samples, config.samples_per_shard), num_samples]
    spec = TokenizerSpec(
        fingerprint="0" * 64, grid=GRID, codebook_size=CODEBOOK_SIZE, image_size=config.image_size
    )
    plan = Plan(kind="tokens", inputs={}, first_ids=tuple(bounds), views=1, tokenizer=spec)
    photographs = list(_photographs(config))
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


def encoded_crops(dataset: Dataset) -> list[bytes]:
    """The encoded crops of a dataset, in memory, in the order of their ids."""
    batches = Batches(dataset.num_samples(), shuffle=False, drop_last=False, num_threads=0)
    with ShardReader(dataset, None, batches) as reader:
        return [bytes(data) for batch in reader.batches(0) for data in batch.encoded]


def decode_only(config: CropsConfig, crops: list[bytes], workers: int) -> float:
    """Crops/s of decoding from memory into one array, in `workers` threads; 0 is the calling one."""
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


def _photographs(config: CropsConfig) -> Iterator[Image.Image]:
    if config.images is not None:
        files = [file.url for file in storage.list_files(storage.absolute(config.images))]
        if not files:
            raise InputError(f"there are no images at {config.images}; name a folder of photographs")
        yield from (Image.open(io.BytesIO(storage.read(url))).convert("RGB") for url in files[:250])
        return
    side = 2 * config.image_size
    y, x = np.mgrid[:side, :side]
    for number in range(16):
        rng = np.random.default_rng(number)
        waves = [np.sin(x * rng.uniform(0.01, 0.2) + y * rng.uniform(0.01, 0.2)) for _ in range(3)]
        pixels = 128 + 90 * np.stack(waves, axis=-1) + rng.normal(0, 8, (side, side, 3))
        yield Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _sample(config: CropsConfig, number: int, photograph: Image.Image) -> StoredSample:
    rng, side = random.Random(number), config.image_size
    width, height = photograph.size
    edge = rng.randint(max(1, min(width, height) // 2), min(width, height))
    left, top = rng.randint(0, width - edge), rng.randint(0, height - edge)
    crop = photograph.resize((side, side), Image.Resampling.BICUBIC, (left, top, left + edge, top + edge))
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
        codes=np.random.default_rng(number).integers(0, CODEBOOK_SIZE, GRID, np.uint16),
    )

"""Time per shard and memory of the driver as a dataset grows, with an encoder that does nothing.

python -m benchmarks.scale --shards 100000 --root /dev/shm/scale

One line of JSON per case. Shards of a few 8-pixel images go through the whole write pass: plan, build,
re-open, hash, put, receipt, manifest. Every object is synced; on tmpfs that costs nothing. Drivers and
readers run in processes of their own, in which nothing else takes memory. What is written is removed again.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from benchmarks._scale_process import Measured, scale_plan
from pipeline import storage
from pipeline.artifacts import sha256_hex
from pipeline.cluster.config import ClusterConfig
from pipeline.cluster.items import map_items
from pipeline.config import run_job
from shards.format.build import build_shard
from shards.format.manifest import MANIFEST, Manifest, ShardInfo, TableName, TableWriter, shard_name
from shards.format.plan import Item, Plan
from shards.format.records import StoredSample
from shards.pixels.views import CropBox, encode_crop
from shards.writer.commit import commit, start, unfinished

SAMPLES_PER_SHARD = 4000  # of the generated manifest


@dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """Simulate the write pass, and open a large manifest."""

    shards: int = 1000
    """Shards of the largest pass; another has a tenth of them."""
    samples: int = 2
    """Samples per shard; one case has ten times as many."""
    manifest_shards: int = 500_000
    """Shards, of 4,000 samples each, in the generated manifest; 0 leaves it out."""
    root: str | None = None
    """Local folder to write below, such as one on a disk or in /dev/shm; null takes a temporary one."""


def main(config: ScaleConfig) -> None:
    """Run all cases."""
    with _folder(config.root) as root:
        if config.shards:
            tenth = max(1, config.shards // 10)
            drivers: dict[str, Measured] = {}
            for name, shards, samples in (
                ("tenth", tenth, config.samples),
                ("tenth, 10 times the samples", tenth, 10 * config.samples),
                ("all", config.shards, config.samples),
            ):
                url = os.path.join(root, name.replace(" ", "-").replace(",", ""))
                _print_pass(url, shards, samples)
                drivers[name] = _in_process("drive", url, str(shards), str(samples))
                shutil.rmtree(url)
            _print_drivers("10 times the shards", drivers["tenth"], drivers["all"])
            _print_drivers("10 times the samples", drivers["tenth"], drivers["tenth, 10 times the samples"])
        if config.manifest_shards:
            url = os.path.join(root, "manifest")
            _write_manifest(url, config.manifest_shards)
            _print_open(url, config.manifest_shards)


# ------------------------------------------------------------------------------------------------ write pass


class _Writer:
    """Builds and commits one shard per call; returns when it was done, in seconds."""

    def __init__(self, root: str, plan: Plan) -> None:
        self._root = root
        self._plan = plan
        self._image = encode_crop(np.zeros((8, 8, 3), np.uint8), 95)
        self._codes = np.zeros(self._plan.header["tokenizer"]["grid"], np.uint16)

    def __call__(self, item: Item) -> float:
        samples = [
            StoredSample(
                sample_id=sample_id,
                view=item.view,
                image=self._image,
                extension="jpg",
                source=f"s3://bucket/images/{sample_id}.jpg",
                source_width=500,
                source_height=375,
                label=sample_id % 1000,
                crop=CropBox(top=0, left=0, height=375, width=500),
                codes=self._codes,
            )
            for sample_id in range(item.first_id, item.first_id + item.samples)
        ]
        tokenizer = self._plan.header["tokenizer"]
        rows, columns = tokenizer["grid"]
        built = build_shard(samples, [], grid=(rows, columns), codebook_size=tokenizer["codebook_size"])
        commit(self._root, self._plan, item, built)
        return time.perf_counter()


def _print_pass(url: str, shards: int, samples: int) -> None:
    """Write all shards in this process, two at a time like any worker, and print the time of each tenth."""
    began = time.perf_counter()
    plan = start(url, scale_plan(shards, samples))
    todo = unfinished(url, plan)
    planned_s = time.perf_counter() - began
    ends = [time.perf_counter()]
    cluster = ClusterConfig(num_workers=0)
    ends += sorted(map_items(todo, lambda: _Writer(url, plan), cluster))
    tenths = [ends[part * shards // 10] for part in range(11)]
    ms = [1000 * 10 * (end - begin) / shards for begin, end in itertools.pairwise(tenths)]
    _print(
        case="write pass, no-op encoder",
        shards=shards,
        samples_per_shard=samples,
        file_system=_file_system(url),
        plan_s=round(planned_s, 2),
        write_s=round(ends[-1] - ends[0], 1),
        ms_per_shard=round(1000 * (ends[-1] - ends[0]) / shards, 2),
        ms_per_shard_by_tenth=[round(each, 2) for each in ms],
        last_tenth_over_first=round(ms[-1] / ms[0], 3),
    )


# ------------------------------------------------------------------------------------------------ processes


def _in_process(*arguments: str) -> Measured:
    """What `benchmarks._scale_process` says of itself."""
    command = [sys.executable, "-m", "benchmarks._scale_process", *arguments]
    answer = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return Measured(**json.loads(answer.stdout.splitlines()[-1]))


def _print_drivers(what: str, one: Measured, other: Measured) -> None:
    _print(
        case=f"driver, {what}",
        shards=[one.shards, other.shards],
        samples=[one.samples, other.samples],
        pending_s=[one.pending_s, other.pending_s],
        finish_s=[one.finish_s, other.finish_s],
        plan_bytes=[one.plan_bytes, other.plan_bytes],
        imported_mb=[one.imported_mb, other.imported_mb],
        peak_mb=[one.peak_mb, other.peak_mb],
        peak_ratio=round(other.peak_mb / one.peak_mb, 3),
    )


def _print_open(url: str, shards: int) -> None:
    opened = _in_process("open", url)
    _print(
        case="open a manifest",
        shards=shards,
        samples=shards * SAMPLES_PER_SHARD,
        table_mb=round(os.path.getsize(_table(url)) / 1e6, 1),
        open_s=opened.open_s,
        imported_mb=opened.imported_mb,
        peak_mb=opened.peak_mb,
    )


# ------------------------------------------------------------------------------------------------ manifest


def _write_manifest(url: str, shards: int) -> None:
    """A manifest of shards that do not exist, with names and hashes as random as real ones."""
    rng = np.random.default_rng(0)
    writer = TableWriter()
    for number in range(shards):
        tar, index = rng.bytes(32).hex(), rng.bytes(32).hex()
        name = shard_name(0, number)
        writer.append(
            ShardInfo(
                view=0,
                number=number,
                first_id=number * SAMPLES_PER_SHARD,
                end_id=(number + 1) * SAMPLES_PER_SHARD,
                samples=SAMPLES_PER_SHARD,
                rejected=0,
                tar=f"shards/{name}-{tar[:8]}.tar",
                tar_bytes=int(rng.integers(90_000_000, 100_000_000)),
                tar_sha256=tar,
                tar_version=None,
                index=f"index/{name}-{index[:8]}.parquet",
                index_bytes=int(rng.integers(1_300_000, 1_400_000)),
                index_sha256=index,
            )
        )
    table = writer.finish()
    sha256 = sha256_hex(table)
    plan = scale_plan(1, 1)
    manifest = Manifest(
        kind=plan.kind,
        plan=plan.fingerprint,
        inputs=plan.inputs,
        recipe=plan.recipe,
        first_view=0,
        shards_per_view=shards,
        written_per_view=(shards * SAMPLES_PER_SHARD,),
        samples_in=shards * SAMPLES_PER_SHARD,
        samples_written=shards * SAMPLES_PER_SHARD,
        samples_rejected={},
        class_names=None,
        tokenizer=plan.header["tokenizer"],
        details={},
        probe=(),
        table=TableName(path=f"manifest-{sha256[:8]}.parquet", bytes=len(table), sha256=sha256),
    )
    storage.put(storage.join(url, manifest.table.path), table)
    storage.put(storage.join(url, MANIFEST), manifest.to_bytes())


def _table(url: str) -> str:
    [name] = [name for name in os.listdir(url) if name.endswith(".parquet")]
    return os.path.join(url, name)


# ------------------------------------------------------------------------------------------------ inside


@contextmanager
def _folder(root: str | None) -> Iterator[str]:
    """A new folder below `root`, removed afterwards."""
    if root is not None:
        os.makedirs(root, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="scale-", dir=root) as folder:
        yield folder


def _file_system(path: str) -> str:
    """Type of the file system a path lies on, such as ext4 or tmpfs (Linux)."""
    with open("/proc/mounts") as mounts:
        kinds = {place: kind for _, place, kind, *_ in (line.split() for line in mounts)}
    while path not in kinds:
        path = os.path.dirname(path)
    return kinds[path]


def _print(**figures: object) -> None:
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    run_job(main, ScaleConfig)

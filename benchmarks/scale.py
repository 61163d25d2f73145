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
from dataclasses import dataclass

import numpy as np

from benchmarks.timing import emit
from pipeline import storage
from pipeline.artifacts import sha256_hex
from pipeline.cluster.config import ClusterConfig
from pipeline.cluster.items import map_items
from pipeline.config import run_job
from shards.dataset.dataset import open_dataset
from shards.format.build import build_shard
from shards.format.manifest import (
    MANIFEST,
    Manifest,
    Recipe,
    ShardInfo,
    TableName,
    TableWriter,
    TokenizerSpec,
    shard_name,
)
from shards.format.plan import Item, Plan
from shards.format.records import StoredSample
from shards.pixels.views import CropBox, decode_crop, encode_crop
from shards.writer.commit import PLAN, Unfinished, commit, finish, start

GRID = (14, 14)
CODEBOOK_SIZE = 8192
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
    if config.root is not None:
        os.makedirs(config.root, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="scale-", dir=config.root) as root:
        if config.shards:
            few = max(1, config.shards // 10)
            tenth, more_samples, whole = (
                _write_and_drive(os.path.join(root, f"{shards}-{samples}"), shards, samples)
                for shards, samples in (
                    (few, config.samples),
                    (few, 10 * config.samples),
                    (config.shards, config.samples),
                )
            )
            _emit_drivers("10 times the shards", tenth, whole)
            _emit_drivers("10 times the samples", tenth, more_samples)
        if config.manifest_shards:
            url = os.path.join(root, "manifest")
            table_bytes = _write_manifest(url, config.manifest_shards)
            emit("open a manifest", table_mb=table_bytes / 1e6, **_in_process("open_manifest", url))


# ------------------------------------------------------------------------------------------------ write pass


def scale_plan(shards: int, samples: int) -> Plan:
    """The plan of a token dataset: `shards` ranges of `samples` ids, and a gap of one behind every third."""
    tokenizer = TokenizerSpec(fingerprint="f" * 64, grid=GRID, codebook_size=CODEBOOK_SIZE, image_size=224)
    return Plan(
        kind="tokens",
        inputs={"images": "a" * 64, "tokenizer": "f" * 64},
        recipe=Recipe(views={"seed": 0}),
        first_ids=tuple(number * samples + number // 3 for number in range(shards + 1)),
        samples=(samples,) * shards,
        views=1,
        tokenizer=tokenizer,
    )


class _Writer:
    """Builds and commits one shard per call; returns when it was done, in seconds."""

    def __init__(self, root: str, plan: Plan) -> None:
        self._root = root
        self._plan = plan
        self._image = encode_crop(np.zeros((8, 8, 3), np.uint8), 95)

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
                codes=np.zeros(GRID, np.uint16),
            )
            for sample_id in range(item.first_id, item.first_id + item.samples)
        ]
        built = build_shard(samples, [], grid=GRID, codebook_size=CODEBOOK_SIZE)
        commit(self._root, self._plan, item, built)
        return time.perf_counter()


def _write_and_drive(url: str, shards: int, samples: int) -> dict[str, float]:
    """Write all shards in this process, two at a time like any worker; then measure the driver's process."""
    began = time.perf_counter()
    plan = start(url, scale_plan(shards, samples))
    todo = Unfinished(url, plan)
    planned_s = time.perf_counter() - began
    ends = [time.perf_counter()]
    ends += sorted(map_items(todo, lambda: _Writer(url, plan), ClusterConfig(num_workers=0)))
    tenths = [ends[part * shards // 10] for part in range(11)]
    ms = [1000 * 10 * (end - begin) / shards for begin, end in itertools.pairwise(tenths)]
    emit(
        "write pass, no-op encoder",
        shards=shards,
        samples_per_shard=samples,
        file_system=_file_system(url),
        plan_s=planned_s,
        write_s=ends[-1] - ends[0],
        ms_per_shard=1000 * (ends[-1] - ends[0]) / shards,
        ms_per_shard_by_tenth=ms,
        last_tenth_over_first=ms[-1] / ms[0],
    )
    measured = _in_process("drive", url, shards, samples)
    shutil.rmtree(url)
    return measured


def _emit_drivers(what: str, small: dict[str, float], large: dict[str, float]) -> None:
    pairs = {name: [small[name], large[name]] for name in small}
    emit(f"driver, {what}", **pairs, peak_ratio=large["peak_mb"] / small["peak_mb"])


def _write_manifest(url: str, shards: int) -> int:
    """A manifest of shards that do not exist, names and hashes as random as real ones; its table's bytes."""
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
        tokenizer=plan.tokenizer,
        details={},
        probe=(),
        table=TableName(path=f"manifest-{sha256[:8]}.parquet", bytes=len(table), sha256=sha256),
    )
    storage.put(storage.join(url, manifest.table.path), table)
    storage.put(storage.join(url, MANIFEST), manifest.to_bytes())
    return len(table)


def _file_system(path: str) -> str:
    """Type of the file system a path lies on, such as ext4 or tmpfs (Linux)."""
    with open("/proc/mounts") as mounts:
        kinds = {place: kind for _, place, kind, *_ in (line.split() for line in mounts)}
    while path not in kinds:
        path = os.path.dirname(path)
    return kinds[path]


# ------------------------------------------------------------------------------------------------ processes


def _in_process(function: str, *arguments: object) -> dict[str, float]:
    """What `drive` or `open_manifest` of this module takes in a process of its own."""
    script = "import sys; from benchmarks import scale; scale.measure(*sys.argv[1:])"
    command = [sys.executable, "-c", script, function, *map(str, arguments)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(answer.stdout.splitlines()[-1])


def measure(function: str, url: str, *sizes: str) -> None:
    """Print what a function took, and the largest resident set after the imports and in all, in MB."""
    imported_mb = _peak_mb()
    figures = drive(url, *map(int, sizes)) if function == "drive" else open_manifest(url)
    print(json.dumps({**figures, "imported_mb": imported_mb, "peak_mb": _peak_mb()}))


def drive(url: str, shards: int, samples: int) -> dict[str, float]:
    """The driver of a pass: plan, look for what is missing, finish."""
    plan = start(url, scale_plan(shards, samples))
    began = time.perf_counter()
    if missing := len(Unfinished(url, plan)):
        raise RuntimeError(f"{missing} shards of {url} are missing")
    looked = time.perf_counter()
    manifest = finish(url, plan, decode_crop)
    return {
        "shards": shards,
        "samples": manifest.samples_written,
        "plan_bytes": len(storage.read(storage.join(url, PLAN))),
        "pending_s": looked - began,
        "finish_s": time.perf_counter() - looked,
    }


def open_manifest(url: str) -> dict[str, float]:
    """A reader's start: open, sizes of all shards, one shard's place and hashes."""
    began = time.perf_counter()
    dataset = open_dataset(url)
    samples = int(dataset.shard_sizes().sum())
    dataset.shard(0, dataset.num_shards // 2)
    return {"shards": dataset.num_shards, "samples": samples, "open_s": time.perf_counter() - began}


def _peak_mb() -> float:
    """Largest resident set of this process so far, in MB (Linux).

    Not `getrusage`: what it says a child inherits from its parent.
    """
    with open("/proc/self/status") as status:
        [line] = [line for line in status if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    run_job(main, ScaleConfig)

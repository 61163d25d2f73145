"""One driver or one reader in a process of its own, for `benchmarks.scale`: it says what memory it took."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from dataclasses import dataclass

from pipeline import storage
from shards.dataset.dataset import open_dataset
from shards.format.plan import Plan
from shards.pixels.views import decode_crop
from shards.writer.commit import PLAN, finish, start, unfinished

GRID = (14, 14)
CODEBOOK_SIZE = 8192


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a process took. Memory is the largest resident set so far, in MB, after its imports and in all."""

    shards: int
    samples: int
    imported_mb: float
    peak_mb: float
    plan_bytes: int = 0
    pending_s: float = 0.0
    finish_s: float = 0.0
    open_s: float = 0.0


def scale_plan(shards: int, samples: int) -> Plan:
    """The plan of a token dataset: `shards` ranges of `samples` ids, and a gap of one behind every third."""
    tokenizer = {"fingerprint": "f" * 64, "grid": list(GRID), "codebook_size": CODEBOOK_SIZE, "code_dim": 32}
    return Plan(
        kind="tokens",
        inputs={"images": "a" * 64, "tokenizer": "f" * 64},
        recipe={"views": {"seed": 0}},
        first_ids=tuple(number * samples + number // 3 for number in range(shards + 1)),
        samples=(samples,) * shards,
        views=1,
        header={"class_names": None, "tokenizer": tokenizer},
    )


def drive(url: str, shards: int, samples: int) -> Measured:
    """The driver of a pass: plan, look for what is missing, finish."""
    imported_mb = _peak_mb()
    plan = start(url, scale_plan(shards, samples))
    began = time.perf_counter()
    todo = unfinished(url, plan)
    pending_s = time.perf_counter() - began
    if len(todo):
        raise RuntimeError(f"{len(todo)} shards of {url} are missing")
    began = time.perf_counter()
    manifest = finish(url, plan, decode_crop)
    finish_s = time.perf_counter() - began
    return Measured(
        shards=shards,
        samples=manifest.samples_written,
        imported_mb=imported_mb,
        peak_mb=_peak_mb(),
        plan_bytes=len(storage.read(storage.join(url, PLAN))),
        pending_s=round(pending_s, 2),
        finish_s=round(finish_s, 2),
    )


def open_manifest(url: str) -> Measured:
    """A reader's start: open, sizes of all shards, one shard's place and hashes."""
    imported_mb = _peak_mb()
    began = time.perf_counter()
    dataset = open_dataset(url)
    samples = int(dataset.shard_sizes().sum())
    dataset.shard(0, dataset.num_shards // 2)
    open_s = time.perf_counter() - began
    return Measured(
        shards=dataset.num_shards,
        samples=samples,
        imported_mb=imported_mb,
        peak_mb=_peak_mb(),
        open_s=round(open_s, 3),
    )


def _peak_mb() -> float:
    """Largest resident set of this process so far, in MB (Linux).

    Not `getrusage`: what it says a child inherits from its parent.
    """
    with open("/proc/self/status") as status:
        [line] = [line for line in status if line.startswith("VmHWM")]
    return round(int(line.split()[1]) * 1024 / 1e6, 1)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["drive", url, shards, samples]:
            measured = drive(url, int(shards), int(samples))
        case ["open", url]:
            measured = open_manifest(url)
        case _:
            sys.exit(__doc__)
    print(json.dumps(dataclasses.asdict(measured)))

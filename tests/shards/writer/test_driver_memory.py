"""What the driver of a pass holds does not grow with samples, and hardly with shards."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from shards.dataset import dataset as dataset_module
from shards.dataset.dataset import open_dataset
from shards.format import manifest
from shards.format.build import build_shard
from shards.format.manifest import ProbeEntry, ShardInfo
from shards.format.plan import Item, Plan, items
from shards.pixels.views import decode_crop
from shards.writer import commit


def plan_of(shards: int, samples: int) -> Plan:
    return Plan(kind="images", inputs={}, first_ids=tuple(range(0, shards * samples + 1, samples)), views=1)


def peak(work: Callable[[], object]) -> int:
    """Largest number of bytes that Python held beyond what it held before."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def drive(root: Path, plan: Plan) -> None:
    begun = commit.start(str(root), plan)
    assert len(commit.Unfinished(str(root), begun)) == 0
    commit.finish(str(root), begun, decode_crop)


def test_ten_times_the_samples_take_no_more(tmp_path, make_sample):
    peaks: list[int] = []
    image = make_sample(0, tokens=False)
    for samples in (3, 30):
        plan = plan_of(40, samples)
        root = tmp_path / str(samples)
        for item in items(commit.start(str(root), plan)):
            ids = range(item.first_id, item.end_id)
            stored = [dataclasses.replace(image, sample_id=sample_id) for sample_id in ids]
            commit.commit(str(root), plan, item, build_shard(stored, [], grid=None, codebook_size=None))
        peaks.append(peak(lambda root=root, plan=plan: drive(root, plan)))
        assert open_dataset(str(root)).num_samples() == 40 * samples
    assert peaks[1] < 1.05 * peaks[0] + 100_000


@pytest.mark.parametrize("held", [False, True])
def test_shards_take_a_byte_while_they_wait_and_two_hundred_when_they_are_done(tmp_path, monkeypatch, held):
    """Without any object: receipts are made up when they are asked for."""

    def receipt(root: str, plan: Plan, item: Item) -> commit.Receipt | None:
        sha256 = np.random.default_rng(item.number).bytes(32).hex()
        shard = ShardInfo(
            view=0,
            number=item.number,
            first_id=item.first_id,
            end_id=item.end_id,
            samples=item.samples,
            rejected=0,
            tar=f"shards/{item.name}-{sha256[:8]}.tar",
            tar_bytes=10_240,
            tar_sha256=sha256,
            tar_version=None,
            index=f"index/{item.name}-{sha256[:8]}.parquet",
            index_bytes=5_000,
            index_sha256=sha256,
        )
        return commit.Receipt(plan=plan.fingerprint, shard=shard, rejected={}) if held else None

    probed = ProbeEntry(view=0, number=0, row=0, key="0000000000-00", sha256="0" * 64)
    monkeypatch.setattr(commit, "receipt", receipt)
    monkeypatch.setattr(commit, "probe_shard", lambda *_: [probed])
    # rows that are held before they are written together
    monkeypatch.setattr(manifest, "ROW_GROUP", 256)
    monkeypatch.setattr(dataset_module, "ROW_GROUP", 256)
    peaks: list[int] = []
    for shards in (1_000, 3_000):
        plan = plan_of(shards, 2)
        root = str(tmp_path / str(shards))
        commit.start(root, plan)
        if held:
            arrow = pa.total_allocated_bytes()
            peaks.append(peak(lambda root=root, plan=plan: commit.finish(root, plan, decode_crop)))
            assert pa.total_allocated_bytes() - arrow < 1 << 20
        else:
            peaks.append(peak(lambda root=root, plan=plan: commit.Unfinished(root, plan)))
            todo = commit.Unfinished(root, plan)
            assert (len(todo), todo.samples) == (shards, 2 * shards)
            assert [item.number for item in todo] == list(range(shards))
    assert peaks[1] - peaks[0] < 2_000 * (250 if held else 2) + 50_000

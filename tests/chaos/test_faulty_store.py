"""The write pass on a store and a network that fail in every way: it completes, and every byte is right."""

from __future__ import annotations

import dataclasses
import functools
import io
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest

from pipeline import remote, storage
from pipeline.artifacts import sha256_hex
from pipeline.cluster.config import ClusterConfig
from pipeline.cluster.items import map_items
from pipeline.remote import StoreError
from shards.dataset.dataset import Dataset, open_dataset
from shards.dataset.rows import read_shard_index
from shards.format.index import codes_of, read_rejects
from shards.pixels.views import decode_crop
from shards.writer import commit
from tests.chaos.proxy import Faults
from tests.chaos.tiny_pass import CODEBOOK_SIZE, GRID, SIDE, TinyPass, fake_codes, tree

if TYPE_CHECKING:
    from tests.chaos.proxy import FaultProxy

HERE = ClusterConfig(num_workers=0)
EVERYTHING = Faults(
    slow_down=0.06,
    internal=0.04,
    cut=0.06,
    drop_before=0.06,
    drop_after=0.06,
    late=0.03,
    delay=0.04,
    stale=0.3,
    conflict=0.03,
)
KINDS = ("slow_down", "internal", "drop_before", "drop_after", "late", "delay", "conflict")
"""What a pass meets again and again; cut and stale answers only where it reads and lists."""


def read_every_byte(dataset: Dataset, tiny: TinyPass) -> None:
    """Every object has its hash, every code is that of the decoded pixels, rejects name their sources."""
    written = 0
    rejected: dict[str, str] = {}
    for view in range(tiny.views):
        for shard in dataset.shards(view):
            assert shard.tar_sha256 is not None
            tar = storage.read(shard.tar)
            assert sha256_hex(tar) == shard.tar_sha256
            table = read_shard_index(shard)
            for row, codes in zip(table.to_pylist(), codes_of(table), strict=True):
                pixels = decode_crop(tar[row["image_offset"] :][: row["image_bytes"]])
                assert pixels.shape == (SIDE, SIDE, 3)
                np.testing.assert_array_equal(codes.reshape(GRID), fake_codes(pixels))
                written += 1
            if shard.rejects is not None:
                with storage.open_file(shard.rejects) as file:
                    data = file.read()
                assert sha256_hex(data) == shard.rejects_sha256
                rejected |= {row["source"]: row["reason"] for row in read_rejects(data).to_pylist()}
    assert rejected == tiny.rejected_sources()
    assert written == dataset.manifest.samples_written
    assert written + tiny.views * len(rejected) == tiny.num_shards * tiny.per_shard * tiny.views


def write_in_process(root: str, tiny: TinyPass) -> None:
    """As precompute_shards does it in one process: two items at once."""
    plan = commit.start(root, tiny.plan)
    todo = list(commit.pending(root, plan))
    list(map_items(todo, lambda: functools.partial(tiny.write_item, root), HERE))
    commit.finish(root, plan, decode_crop)


def check_pass(proxy: FaultProxy, root: str, local: str, tiny: TinyPass, faults: Faults) -> None:
    proxy.faults = faults
    write_in_process(root, tiny)
    read_every_byte(open_dataset(root, "tokens"), tiny)
    proxy.faults = Faults()
    tiny.write(local)
    assert tree(root) == tree(local)


def test_a_pass_completes_under_all_faults_together(
    fault_proxy: FaultProxy, s3_url: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tiny = TinyPass(num_shards=1, per_shard=6)
    check_pass(fault_proxy, f"{s3_url}/tokens", str(tmp_path_factory.mktemp("local")), tiny, EVERYTHING)
    happened = {kind: fault_proxy.counts[kind] for kind in (*KINDS, "cut", "stale")}
    assert sum(happened.values()) > 5, happened


@pytest.mark.chaos
@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_completes_when_many_requests_fail_in_one_way(
    fault_proxy: FaultProxy, s3_url: str, tmp_path_factory: pytest.TempPathFactory, kind: str
) -> None:
    faults = dataclasses.replace(Faults(), **{kind: 0.5})
    if kind == "delay":
        faults = Faults(delay=0.08, delay_s=2.5)  # beyond the client's patience
    if kind == "conflict":
        faults = Faults(conflict=0.8)  # of the few conditional writes
    tiny = TinyPass(num_shards=3)
    check_pass(fault_proxy, f"{s3_url}/tokens", str(tmp_path_factory.mktemp("local")), tiny, faults)
    assert fault_proxy.counts[kind] >= 2


@pytest.mark.chaos
@pytest.mark.parametrize("kind", ["cut", "stale"])
def test_half_of_all_answers_are_cut_or_stale(
    fault_proxy: FaultProxy, s3_url: str, tmp_path_factory: pytest.TempPathFactory, kind: str
) -> None:
    faults = dataclasses.replace(Faults(), **{kind: 0.5})
    tiny = TinyPass(num_shards=3)
    check_pass(fault_proxy, f"{s3_url}/tokens", str(tmp_path_factory.mktemp("local")), tiny, faults)
    fault_proxy.faults = faults
    local = tree(f"{s3_url}/tokens")  # cut answers of every length
    fault_proxy.faults = Faults()
    assert kind == "stale" or local == tree(f"{s3_url}/tokens")
    assert fault_proxy.counts[kind] >= 5


@pytest.mark.chaos
def test_many_threads_and_many_seeds(
    fault_proxy: FaultProxy, s3_url: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tiny = TinyPass(num_shards=8, views=2)
    local = str(tmp_path_factory.mktemp("local"))
    tiny.write(local)
    for seed in range(2):
        fault_proxy.faults = EVERYTHING
        root = f"{s3_url}/seed-{seed}"
        plan = commit.start(root, tiny.plan)
        with ThreadPoolExecutor(12) as pool:
            list(pool.map(functools.partial(tiny.write_item, root), commit.pending(root, plan)))
        commit.finish(root, plan, decode_crop)
        read_every_byte(open_dataset(root, "tokens"), tiny)
        fault_proxy.faults = Faults()
        assert tree(root) == tree(local)


IMPATIENT = remote.RetryPolicy(
    connect_s=0.2, answer_s=0.2, request_s=1, retry_s=0.25, first_wait_s=0.02, longest_wait_s=0.1
)
"""The store is given a quarter of a second."""


@pytest.mark.chaos
@pytest.mark.parametrize("faults", [Faults(slow_down=1.0), Faults(drop_before=1.0), Faults(silent=True)])
def test_a_pass_on_a_store_that_never_recovers_ends_with_its_name_and_goes_on_later(
    fault_proxy: FaultProxy,
    s3_url: str,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    faults: Faults,
) -> None:
    root, tiny = f"{s3_url}/tokens", TinyPass()
    commit.start(root, tiny.plan)
    fault_proxy.faults = faults
    with monkeypatch.context() as patch:
        patch.setattr(remote, "RETRIES", IMPATIENT)
        with pytest.raises(StoreError, match=rf"{root}/\S+: the store did not recover in .* attempts"):
            write_in_process(root, tiny)
    fault_proxy.faults = Faults()
    write_in_process(root, tiny)
    local = str(tmp_path_factory.mktemp("local"))
    tiny.write(local)
    assert tree(root) == tree(local)


@pytest.mark.chaos
@pytest.mark.parametrize("lacking", [Faults(no_condition=True), Faults(refuse_condition=True)])
def test_a_store_that_cannot_refuse_an_overwrite_is_named_at_every_start_and_one_driver_completes(
    fault_proxy: FaultProxy, s3_url: str, tmp_path_factory: pytest.TempPathFactory, lacking: Faults
) -> None:
    root, tiny = f"{s3_url}/tokens", TinyPass()
    fault_proxy.faults = lacking
    for _ in range(2):
        with pytest.warns(UserWarning, match=f"{s3_url} cannot refuse an overwrite: one driver only"):
            commit.start(root, tiny.plan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny.write(root)
    local = str(tmp_path_factory.mktemp("local"))
    tiny.write(local)
    assert tree(root) == tree(local)


def test_a_store_that_silently_overwrites_is_named_at_the_start(fault_proxy: FaultProxy, s3_url: str) -> None:
    fault_proxy.faults = Faults(no_condition=True)
    plan = TinyPass().plan
    with pytest.warns(UserWarning, match=f"{s3_url} cannot refuse an overwrite: one driver only"):
        commit.start(f"{s3_url}/tokens", plan)
    assert storage.read(f"{s3_url}/tokens/plan.json") == plan.to_bytes()


def test_a_listing_that_shows_what_is_gone_does_not_turn_a_driver_away(
    fault_proxy: FaultProxy, s3_url: str
) -> None:
    root = f"{s3_url}/tokens"
    storage.put(f"{root}/old", b"x")
    assert not storage.is_empty(root)
    storage.remove(f"{root}/old")
    fault_proxy.faults = Faults(stale=1.0)
    commit.start(root, TinyPass().plan)
    assert fault_proxy.counts["stale"] >= 1 and storage.exists(f"{root}/plan.json")


@pytest.mark.chaos
def test_prepare_precompute_and_read_under_all_faults(
    fault_proxy: FaultProxy, s3_url: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The stages themselves: images on the store, an untrained tokenizer, the reader of training."""
    import torch
    from PIL import Image

    from shards.pixels.crops import StoredCrops
    from shards.pixels.views import ViewPolicy
    from shards.reader.disk_cache import CacheConfig
    from shards.reader.reader import Batches, ShardReader
    from shards.writer.prepare import PrepareConfig, prepare_images
    from tokenizer.model.artifact import METRICS, save_tokenizer
    from tokenizer.model.teacher import build_teacher
    from tokenizer.model.teacher_config import TeacherConfig
    from tokenizer.model.vqkd import VQKD, VQKDConfig
    from tokenizer.precompute.config import PrecomputeConfig
    from tokenizer.precompute.run import precompute_shards

    torch.manual_seed(0)
    local = str(tmp_path_factory.mktemp("local"))
    teacher = build_teacher(TeacherConfig(), image_size=32, patch_size=8, device=torch.device("cpu"))
    model = VQKD(
        VQKDConfig(
            image_size=32,
            patch_size=8,
            width=32,
            depth=1,
            heads=2,
            decoder_depth=1,
            codebook_size=CODEBOOK_SIZE,
            code_dim=8,
            kmeans_init=False,
        ),
        target_dim=teacher.dim,
    )
    metrics: dict[str, float] = dict.fromkeys(METRICS, 0.0)
    fault_proxy.faults = EVERYTHING
    rng = np.random.default_rng(0)
    for number in range(24):
        picture = Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8))
        encoded = io.BytesIO()
        picture.save(encoded, "png")
        storage.put(f"{s3_url}/pictures/{number:02d}.png", encoded.getvalue() if number else b"no image")
    for base in (f"{s3_url}/runs", local):
        save_tokenizer(f"{base}/tokenizer", model, teacher=teacher, metrics=metrics, inputs={})
        prepare_images(
            PrepareConfig(
                source=f"{s3_url}/pictures", output=f"{base}/images", max_shard_samples=6, cluster=HERE
            )
        )
        precompute_shards(
            PrecomputeConfig(
                images=f"{base}/images",
                tokenizer=f"{base}/tokenizer",
                output=f"{base}/tokens",
                views=ViewPolicy(views_per_image=2),
                batch_size=4,
                samples_per_shard=6,
                encoder_threads=1,
                cluster=HERE,
            )
        )
    assert fault_proxy.counts.total() - fault_proxy.counts["requests"] > 50

    cache = CacheConfig(folder=str(tmp_path_factory.mktemp("cache")))
    batches = Batches(5, seed=1)
    reader = ShardReader(open_dataset(f"{s3_url}/runs/tokens"), StoredCrops(), batches, cache)
    plain = ShardReader(open_dataset(f"{local}/tokens"), StoredCrops(), batches)
    for epoch in range(2):
        for batch, expected in zip(reader.batches(epoch), plain.batches(epoch), strict=True):
            np.testing.assert_array_equal(batch.pixels, expected.pixels)
            assert batch.codes is not None and expected.codes is not None
            np.testing.assert_array_equal(batch.codes, expected.codes)
            assert batch.keys == expected.keys
    reader.close()
    plain.close()

    fault_proxy.faults = Faults()
    for name in ("images", "tokens"):
        there, here = tree(f"{s3_url}/runs/{name}"), tree(f"{local}/{name}")
        for objects in (there, here):
            assert objects.pop("/config.json")  # names the places
        assert there == here

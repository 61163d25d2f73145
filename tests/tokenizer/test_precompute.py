from __future__ import annotations

import dataclasses
import filecmp
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from pipeline.cluster import ClusterConfig
from pipeline.errors import InputError
from shards.decode import DecodeConfig, decode_image
from shards.images import read_images
from shards.index import codes_of
from shards.manifest import open_dataset, read_shard_index
from shards.order import view_of_epoch
from shards.reader import ShardReader
from shards.views import ViewPolicy, decode_crop, encode_crop, render, view_at
from tokenizer.artifact import VisualTokenizer
from tokenizer.precompute import PrecomputeConfig, ShardWriter, precompute_shards

if TYPE_CHECKING:
    from tests.conftest import RayHead

POLICY = ViewPolicy(scale=(0.3, 1.0), views_per_image=2, color_jitter=0.4, seed=5)


@pytest.fixture(scope="module")
def config(
    image_shards: str, tokenizer_url: str, tmp_path_factory: pytest.TempPathFactory
) -> PrecomputeConfig:
    return PrecomputeConfig(
        images=image_shards,
        tokenizer=tokenizer_url,
        output=str(tmp_path_factory.mktemp("tokens") / "out"),
        views=POLICY,
        batch_size=8,
        samples_per_shard=20,
        encoder_threads=1,
        cluster=ClusterConfig(num_workers=0),
    )


@pytest.fixture(scope="module")
def token_shards(config: PrecomputeConfig) -> str:
    precompute_shards(config)
    return config.output


def _files(root: str) -> dict[str, Path]:
    """The dataset's objects; config.json beside them says who began it, and differs."""
    found = {str(path.relative_to(root)): path for path in Path(root).rglob("*") if path.is_file()}
    assert found.pop("config.json")
    return found


def test_everything_is_counted(token_shards: str, image_shards: str) -> None:
    manifest = open_dataset(token_shards, "tokens").manifest
    assert (manifest.samples_in, manifest.samples_written, manifest.samples_rejected) == (78, 78, {})
    assert manifest.inputs["images"] == open_dataset(image_shards).fingerprint


def test_codes_are_those_of_the_stored_pixels_and_crops_those_of_the_policy(
    token_shards: str, image_shards: str, tokenizer_url: str
) -> None:
    """Guarantee *pairing*, by a slow straight reference: one image at a time, no batches, no threads."""
    dataset, tokenizer = open_dataset(token_shards), VisualTokenizer.load(tokenizer_url)
    sources = {sample.sample_id: sample for sample in read_images(open_dataset(image_shards), 0, 1000)}
    policy = POLICY.resolve(32)
    seen = set()
    for view in range(2):
        for shard in dataset.shards(view):
            table = read_shard_index(shard)
            tar = Path(shard.tar).read_bytes()
            for row, codes in zip(table.to_pylist(), codes_of(table), strict=True):
                stored = tar[row["image_offset"] : row["image_offset"] + row["image_bytes"]]
                pixels = decode_image(
                    sources[row["sample_id"]].image,
                    DecodeConfig(),
                )
                height, width = pixels.shape[:2]
                where = view_at(policy, row["sample_id"], view, height=height, width=width)
                assert row["crop"] == dataclasses.asdict(where.crop) and row["hflip"] == where.hflip
                assert stored == encode_crop(render(pixels, where, policy.interpolation), policy.jpeg_quality)
                expected = tokenizer.encode(torch.from_numpy(decode_crop(stored))[None])
                np.testing.assert_array_equal(codes, expected[0].numpy())
                assert row["label"] == sources[row["sample_id"]].label
                seen.add((row["sample_id"], view))
    assert len(seen) == 78


def test_online_equals_precomputed(token_shards: str, image_shards: str, tokenizer_url: str) -> None:
    tokenizer = VisualTokenizer.load(tokenizer_url)
    stored = ShardReader(open_dataset(token_shards), batch_size=8, seed=3)
    online = ShardReader(
        open_dataset(image_shards), batch_size=8, seed=3, views=POLICY.resolve(32), stored_pixels=True
    )
    by_key = {}
    for reader, codes_now in ((stored, False), (online, True)):
        for epoch in range(2):
            for batch in reader.batches(epoch):
                codes = tokenizer.encode(torch.from_numpy(batch.pixels)).numpy() if codes_now else batch.codes
                assert codes is not None
                view = view_of_epoch(2, 3, epoch)
                for sample_id, pixels, grid in zip(batch.sample_ids, batch.pixels, codes, strict=True):
                    known = by_key.setdefault((int(sample_id), view), (pixels, grid))
                    np.testing.assert_array_equal(known[0], pixels)
                    np.testing.assert_array_equal(known[1], grid)
        reader.close()
    assert len(by_key) > 39


def test_same_bytes_whatever_was_interrupted(
    config: PrecomputeConfig, token_shards: str, tmp_path: Path
) -> None:
    other = dataclasses.replace(config, output=str(tmp_path / "out"), decode_threads=3)
    run, calls = ShardWriter.__call__, []

    def die_at_the_third(self: ShardWriter, item: object) -> object:
        calls.append(item)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(self, item)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardWriter, "__call__", die_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            precompute_shards(other)
    assert not (tmp_path / "out" / "manifest.json").exists()
    precompute_shards(other)
    ours, theirs = _files(token_shards), _files(other.output)
    assert ours.keys() == theirs.keys()
    assert all(filecmp.cmp(ours[name], theirs[name], shallow=False) for name in ours)


@pytest.mark.ray
def test_actors_write_the_same_bytes(
    config: PrecomputeConfig, token_shards: str, tmp_path: Path, ray_head: RayHead
) -> None:
    cluster = ClusterConfig(num_workers=2, address=ray_head.address)
    other = dataclasses.replace(config, output=str(tmp_path / "out"), cluster=cluster)
    precompute_shards(other)
    ours, theirs = _files(token_shards), _files(other.output)
    assert ours.keys() == theirs.keys()
    assert all(filecmp.cmp(ours[name], theirs[name], shallow=False) for name in ours)


def test_finished_output_is_left_alone(config: PrecomputeConfig, token_shards: str) -> None:
    before = {name: os.stat(path).st_mtime_ns for name, path in _files(token_shards).items()}
    precompute_shards(config)
    assert {name: os.stat(path).st_mtime_ns for name, path in _files(token_shards).items()} == before


def test_other_recipe_at_the_same_output_is_refused(config: PrecomputeConfig, token_shards: str) -> None:
    del token_shards
    other = dataclasses.replace(config, views=dataclasses.replace(POLICY, seed=6))
    with pytest.raises(InputError, match=r"views\.seed: there 5, asked 6"):
        precompute_shards(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"views": ViewPolicy(image_size=64)}, "64.*32"),
        ({"views": ViewPolicy(views_per_image=0)}, "views_per_image"),
        ({"tokenizer": "/no/such/tokenizer"}, "/no/such/tokenizer"),
    ],
)
def test_bad_input_writes_nothing(
    config: PrecomputeConfig, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    other = dataclasses.replace(config, output=str(tmp_path / "out"), **change)
    with pytest.raises(InputError, match=message):
        precompute_shards(other)
    assert not (tmp_path / "out").exists()

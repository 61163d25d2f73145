from __future__ import annotations

import dataclasses
import filecmp
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from pipeline.cluster.config import ClusterConfig
from pipeline.errors import InputError
from shards.dataset.dataset import Dataset, layer_url, open_dataset
from shards.dataset.parts import parts, read_plan
from shards.dataset.rows import read_shard_index
from shards.format.index import codes_of
from shards.format.manifest import read_manifest
from shards.format.plan import Item
from shards.pixels.crops import FreshCrops, StoredCrops
from shards.pixels.decode import DecodeConfig, decode_image
from shards.pixels.views import ViewPolicy, decode_crop, encode_crop, render, view_at
from shards.reader.order import view_of_epoch
from shards.reader.reader import Batches, SampleBatch, ShardReader
from tokenizer.model.artifact import VisualTokenizer
from tokenizer.precompute.config import PrecomputeConfig
from tokenizer.precompute.items import ItemReport, ItemWriter
from tokenizer.precompute.run import precompute_shards

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


@contextmanager
def killed_at(number: int) -> Iterator[None]:
    """The writer dies at its n-th item."""
    run, calls = ItemWriter.__call__, []

    def die(self: ItemWriter, item: Item) -> ItemReport:
        calls.append(item)
        if len(calls) == number:
            raise KeyboardInterrupt
        return run(self, item)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ItemWriter, "__call__", die)
        yield


def same_files(root: str, other: str) -> bool:
    ours, theirs = _files(root), _files(other)
    return ours.keys() == theirs.keys() and all(
        filecmp.cmp(ours[name], theirs[name], shallow=False)
        for name in ours
        if not name.endswith("config.json")
    )


def _files(root: str) -> dict[str, Path]:
    """The dataset's objects; config.json beside them says who began it, and differs."""
    found = {str(path.relative_to(root)): path for path in Path(root).rglob("*") if path.is_file()}
    assert found.pop("config.json")
    return found


def test_codes_are_those_of_the_stored_pixels_and_crops_those_of_the_policy(
    token_shards: str, image_shards: str, tokenizer_url: str
) -> None:
    """Guarantee *pairing*, by a slow straight reference: one image at a time, no batches, no threads."""
    dataset, tokenizer = open_dataset(token_shards, "tokens"), VisualTokenizer.load(tokenizer_url)
    manifest = dataset.manifest
    assert (manifest.samples_in, manifest.samples_written, manifest.samples_rejected) == (78, 78, {})
    assert manifest.inputs["images"] == open_dataset(image_shards).fingerprint
    sources = {sample.sample_id: sample for sample in open_dataset(image_shards).read_images(0, 1000)}
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
    crops, batches = FreshCrops(POLICY.resolve(32), stored_pixels=True), Batches(8, seed=3)
    stored = ShardReader(open_dataset(token_shards), StoredCrops(), batches)
    online = ShardReader(open_dataset(image_shards), crops, batches)
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
    with killed_at(3):
        precompute_shards(other)
    assert not (tmp_path / "out" / "manifest.json").exists()
    precompute_shards(other)
    assert same_files(token_shards, other.output)


@pytest.mark.ray
def test_actors_write_the_same_bytes(
    config: PrecomputeConfig, token_shards: str, tmp_path: Path, ray_head: RayHead
) -> None:
    cluster = ClusterConfig(num_workers=2, address=ray_head.address)
    other = dataclasses.replace(config, output=str(tmp_path / "out"), cluster=cluster)
    precompute_shards(other)
    assert same_files(token_shards, other.output)


def test_finished_output_is_left_alone(config: PrecomputeConfig, token_shards: str) -> None:
    before = {name: os.stat(path).st_mtime_ns for name, path in _files(token_shards).items()}
    precompute_shards(config)
    assert {name: os.stat(path).st_mtime_ns for name, path in _files(token_shards).items()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"views": ViewPolicy(image_size=64)}, "64.*32"),
        ({"views": ViewPolicy(views_per_image=0)}, "views_per_image"),
        ({"tokenizer": "/no/such/tokenizer"}, "/no/such/tokenizer"),
        ({"images": None}, "--images is missing"),
        ({"extend": True, "code_layer": True}, "two passes"),
        ({"json": True}, "--dry_run"),
    ],
)
def test_bad_input_writes_nothing(
    config: PrecomputeConfig, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        precompute_shards(dataclasses.replace(config, **{"output": str(tmp_path / "out"), **change}))
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ added views


@pytest.fixture
def base(config: PrecomputeConfig, token_shards: str, tmp_path: Path) -> PrecomputeConfig:
    """A finished dataset of two views, of its own, that may grow."""
    shutil.copytree(token_shards, tmp_path / "grown")
    return dataclasses.replace(config, output=str(tmp_path / "grown"))


def extended(base: PrecomputeConfig, number: int, **changes: object) -> PrecomputeConfig:
    policy = dataclasses.replace(POLICY, views_per_image=number)
    return dataclasses.replace(base, **{"views": policy, "extend": True, **changes})  # type: ignore[arg-type]


def _objects(root: str) -> dict[str, bytes]:
    """Tars and indexes of a dataset with all its parts, by file name."""
    return {
        path.name: path.read_bytes()
        for path in Path(root).rglob("*")
        if path.is_file() and path.parent.name in ("shards", "index")
    }


@pytest.mark.parametrize("steps", [(4,), (3, 4)])
def test_added_views_are_those_of_a_dataset_planned_with_them(
    base: PrecomputeConfig, tmp_path: Path, steps: tuple[int, ...]
) -> None:
    at_once = dataclasses.replace(extended(base, 4), extend=False, output=str(tmp_path / "at-once"))
    precompute_shards(at_once)
    before = {path: path.read_bytes() for path in Path(base.output).rglob("*") if path.is_file()}
    for views in steps:
        precompute_shards(extended(base, views))
    assert all(path.read_bytes() == data for path, data in before.items())
    assert _objects(base.output) == _objects(at_once.output)
    grown = open_dataset(base.output, "tokens")
    assert grown.num_views == 4 and grown.first_views == (0, 2, *steps[:-1])
    added = [part for part in parts(base.output) if part.kind == "views"]
    assert [part.manifest.inputs["base"] for part in added if part.manifest] == [
        open_dataset(base.output, views=2).fingerprint
    ] * len(steps)
    written = {name: os.stat(path).st_mtime_ns for name, path in _files(base.output).items()}
    precompute_shards(extended(base, 4))  # finished: nothing to do
    assert {name: os.stat(path).st_mtime_ns for name, path in _files(base.output).items()} == written


def test_an_extension_that_was_killed_goes_on(base: PrecomputeConfig, tmp_path: Path) -> None:
    straight = dataclasses.replace(base, output=str(tmp_path / "straight"))
    shutil.copytree(base.output, straight.output)
    precompute_shards(extended(straight, 3))
    with killed_at(2):
        precompute_shards(extended(base, 3))
    assert open_dataset(base.output).num_views == 2
    with pytest.raises(InputError, match=r"more/v02 is unfinished, with view 2; finish it first"):
        precompute_shards(extended(base, 4))
    precompute_shards(extended(base, 3))
    assert open_dataset(base.output).num_views == 3
    assert same_files(base.output, straight.output)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"views": dataclasses.replace(POLICY, views_per_image=3, seed=6)}, r"views\.seed: there 5, asked 6"),
        ({"views": dataclasses.replace(POLICY, views_per_image=3, jpeg_quality=90)}, "jpeg_quality"),
        ({"precision": "bf16"}, r"tokenizer\.fingerprint: there '\w{64}', asked '\w{64}'"),
        ({"batch_size": 4}, r"encode\.batch_size: there 8, asked 4"),
        ({"views": POLICY}, "has 2 views already"),
        ({"views": dataclasses.replace(POLICY, views_per_image=1)}, "has 2 views already"),
        ({"extend": False}, "to add view 2 without rewriting it give --extend"),
        ({"extend": False, "views": dataclasses.replace(POLICY, seed=6)}, r"views\.seed: there 5, asked 6"),
    ],
)
def test_another_extension_is_refused(
    base: PrecomputeConfig, change: dict[str, object], message: str
) -> None:
    before = sorted(Path(base.output).rglob("*"))
    with pytest.raises(InputError, match=message):
        precompute_shards(extended(base, 3, **change))
    assert sorted(Path(base.output).rglob("*")) == before


def test_other_images_and_an_unfinished_base_are_refused(
    base: PrecomputeConfig, image_shards: str, tmp_path: Path
) -> None:
    shutil.copytree(image_shards, tmp_path / "images")
    other = dataclasses.replace(read_manifest(image_shards), class_names=("ant", "bee"))
    (tmp_path / "images" / "manifest.json").write_bytes(other.to_bytes())
    with pytest.raises(InputError, match=r"images: there '\w{64}', asked '\w{64}'"):
        precompute_shards(extended(base, 3, images=str(tmp_path / "images")))
    Path(base.output, "manifest.json").unlink()
    with pytest.raises(InputError, match="unfinished: a plan but no manifest"):
        precompute_shards(extended(base, 3))


# ------------------------------------------------------------------------------------------------ code layers


def layered(base: PrecomputeConfig, tokenizer: str, **changes: object) -> PrecomputeConfig:
    made = {"images": None, "tokenizer": tokenizer, "code_layer": True, "extend": False, **changes}
    return dataclasses.replace(base, **made)  # type: ignore[arg-type]


def test_a_code_layer_has_the_codes_of_the_stored_pixels(
    base: PrecomputeConfig, other_tokenizer_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_sources(*_: object) -> None:
        raise AssertionError("a code layer reads no source images")

    monkeypatch.setattr(Dataset, "read_images", no_sources)
    before = {path: path.read_bytes() for path in Path(base.output).rglob("*") if path.is_file()}
    manifest = precompute_shards(layered(base, other_tokenizer_url))
    assert all(path.read_bytes() == data for path, data in before.items())
    assert manifest.tokenizer is not None
    name = manifest.require_tokenizer().fingerprint[:8]
    assert not list(Path(base.output, "codes").rglob("*.tar"))

    tokenizer = VisualTokenizer.load(other_tokenizer_url)
    layer, own = open_dataset(base.output, codes=name), open_dataset(base.output)
    assert layer.manifest.tokenizer == tokenizer.spec and layer.manifest.grid == (2, 2)
    seen = 0
    for view in range(2):
        for shard in layer.shards(view):
            tar = Path(shard.tar).read_bytes()
            table = layer.read_index(view, shard.number)
            for row, codes in zip(table.to_pylist(), codes_of(table), strict=True):
                stored = tar[row["image_offset"] : row["image_offset"] + row["image_bytes"]]
                expected = tokenizer.encode(torch.from_numpy(decode_crop(stored))[None])
                np.testing.assert_array_equal(codes, expected[0].numpy())
                seen += 1
    assert seen == 78
    for theirs, ours in zip(_batches(layer), _batches(own), strict=True):
        np.testing.assert_array_equal(theirs.pixels, ours.pixels)
        assert theirs.keys == ours.keys
        assert theirs.codes is not None and theirs.codes.shape[1] == 4


def _batches(dataset: Dataset) -> list[SampleBatch]:
    with ShardReader(dataset, StoredCrops(), Batches(13, seed=2, num_threads=0)) as reader:
        return [batch for epoch in range(2) for batch in reader.batches(epoch)]


def test_a_layer_grows_with_the_views_and_is_the_same_after_a_kill(
    base: PrecomputeConfig, other_tokenizer_url: str, tmp_path: Path
) -> None:
    straight = dataclasses.replace(base, output=str(tmp_path / "straight"))
    shutil.copytree(base.output, straight.output)
    for one in (base, straight):
        precompute_shards(extended(one, 3))
    precompute_shards(layered(straight, other_tokenizer_url, decode_threads=3))

    with killed_at(3):
        precompute_shards(layered(base, other_tokenizer_url))
    name = VisualTokenizer.load(other_tokenizer_url).fingerprint
    with pytest.raises(InputError, match="no finished code layer"):
        open_dataset(base.output, codes=name)
    precompute_shards(layered(base, other_tokenizer_url))
    assert open_dataset(base.output, codes=name).num_views == 3
    assert same_files(base.output, straight.output)

    precompute_shards(extended(base, 4))
    made = Path(layer_url(base.output, name, 0), "manifest.json").stat().st_mtime_ns
    precompute_shards(layered(base, other_tokenizer_url, batch_size=4))  # of the new view alone
    assert Path(layer_url(base.output, name, 0), "manifest.json").stat().st_mtime_ns == made
    assert open_dataset(base.output, codes=name).num_views == 4


def test_a_layer_that_does_not_fit_is_refused(
    base: PrecomputeConfig, make_tokenizer: Callable[..., str], tokenizer_url: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"has the codes of tokenizer \w{64} already"):
        precompute_shards(layered(base, tokenizer_url))
    larger = make_tokenizer(tmp_path / "larger", image_size=64, patch_size=32)
    with pytest.raises(InputError, match=r"reads 64 pixels, the crops stored at .* have 32"):
        precompute_shards(layered(base, larger))
    with pytest.raises(InputError, match="there is no dataset"):
        precompute_shards(layered(base, larger, output=str(tmp_path / "nowhere")))
    assert not Path(base.output, "codes").exists()


def test_inputs_that_were_replaced_after_the_plan_are_refused(
    config: PrecomputeConfig, other_tokenizer_url: str, token_shards: str, tmp_path: Path
) -> None:
    plan = read_plan(token_shards)
    assert plan is not None
    replaced = dataclasses.replace(config, tokenizer=other_tokenizer_url)
    with pytest.raises(InputError, match=r"has fingerprint \w{64}, but the plan was made with \w{64}"):
        ItemWriter(replaced, plan, str(tmp_path))
    other = dataclasses.replace(plan, inputs={**plan.inputs, "images": "0" * 64})
    with pytest.raises(InputError, match=r"has fingerprint \w{64}, but the plan was made with 0{64}"):
        ItemWriter(config, other, str(tmp_path))


def test_a_damaged_tar_gives_no_codes(base: PrecomputeConfig, other_tokenizer_url: str) -> None:
    tar = next(Path(base.output, "shards").glob("v01-00001-*"))
    data = bytearray(tar.read_bytes())
    data[data.index(b"\xff\xd8\xff") + 100] ^= 1  # within the first image
    tar.write_bytes(data)
    with pytest.raises(InputError, match=f"{tar.name} is damaged at .*-01; copy"):
        precompute_shards(layered(base, other_tokenizer_url))

"""Repair: what is lost comes back bit for bit or is said to be lost, and nothing sound is written to."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cluster.config import ClusterConfig
from pipeline.errors import InputError
from shards.dataset.dataset import Dataset, open_dataset, open_table
from shards.format.tar import build_tar
from shards.pixels.views import encode_crop
from shards.upkeep import rebuild
from shards.upkeep.rebuild import Encoder
from shards.upkeep.recover import UnreadablePartError, open_damaged
from shards.upkeep.repair import Repair, repair_dataset
from shards.upkeep.verify import verify_dataset
from shards.writer.prepare import PrepareConfig, prepare_images

Written = Any  # of conftest


def tree(root: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path(root).rglob("*") if path.is_file()}


def times(root: str) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in Path(root).rglob("*") if path.is_file()}


def mended(root: str, images: Dataset | None = None, encoder: Encoder | None = None) -> list[Repair]:
    return repair_dataset(verify_dataset(root, sample=0), images=images, encoder=encoder)


def spoil(path: Path, how: int) -> None:
    """Missing, empty, cut, one bit flipped in the middle, foreign bytes of the same size."""
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 4
    if how == 0:
        path.unlink()
    else:
        path.write_bytes([b"", data[: len(data) // 3], bytes(flipped), b"\x07" * len(data)][how - 1])


def test_every_lost_object_comes_back_and_nothing_else_is_touched(
    written: Written, encoders: dict[str, Encoder]
) -> None:
    """Of both datasets, of the views that were added, and of the code layer; each damaged in another way."""
    images = open_dataset(written.images, "images")
    for root, sources in ((written.images, None), (written.tokens, images)):
        before, stamps = tree(root), times(root)
        paths = sorted(Path(path) for path in before if not path.endswith("config.json"))
        for turn, path in enumerate(paths[:: 1 if root == written.images else 2]):
            how = turn % 5 if path.name != "manifest.json" else 1 + turn % 4
            spoil(path, how)
            repairs = mended(root, sources, encoders["layer"])
            assert [(r.object, r.done) for r in repairs] == [(str(path), True)], (path, how, repairs)
            assert tree(root) == before
            touched = {name for name, stamp in times(root).items() if stamp != stamps[name]}
            assert touched == {str(path)}
            stamps = times(root)


def test_many_lost_objects_come_back_together(written: Written, encoders: dict[str, Encoder]) -> None:
    images = open_dataset(written.images, "images")
    before = tree(written.tokens)
    rng = np.random.default_rng(1)
    folders = [Path(part, name) for part in written.parts() for name in ("shards", "index", "rejects")]
    files = sorted(file for folder in folders if folder.exists() for file in folder.iterdir())
    lost = [file for file in files if rng.random() < 0.4]
    lost += [next(Path(written.parts()[1]).glob("manifest-*")), Path(written.tokens) / "manifest.json"]
    for turn, file in enumerate(lost):
        spoil(file, 1 + turn % 4)
    first = mended(written.tokens, images, encoders["base"])
    second = mended(written.tokens, images, encoders["layer"])
    assert all(repair.done for repair in second), second
    assert len(first) >= len(second) > 0
    assert tree(written.tokens) == before
    assert verify_dataset(written.tokens).sound


# ------------------------------------------------------------------------------------------------ from within


@pytest.mark.parametrize("folder", ["shards", "index"])
@pytest.mark.parametrize("ring", [2, 3])
def test_swapped_objects_go_back_without_any_source(written: Written, folder: str, ring: int) -> None:
    before = tree(written.tokens)
    files = sorted((Path(written.tokens) / folder).iterdir())[:ring]
    contents = [file.read_bytes() for file in files]
    for file, data in zip(files, [contents[-1], *contents[:-1]], strict=True):
        file.write_bytes(data)
    repairs = mended(written.tokens)
    assert sorted(r.object for r in repairs if r.done) == sorted(map(str, files))
    assert tree(written.tokens) == before


def test_an_object_under_another_name_is_found(written: Written) -> None:
    file = next((Path(written.tokens) / "shards").iterdir())
    data = file.read_bytes()
    file.rename(Path(written.tokens) / "shards" / "old.tar")
    [repair] = mended(written.tokens)
    assert repair.done and "old.tar" in repair.how and file.read_bytes() == data


def test_what_a_tar_lost_beside_its_images_comes_from_its_index(written: Written) -> None:
    """Headers, padding and codes."""
    shard = open_dataset(written.tokens).shard(0, 0)
    file = Path(shard.tar)
    data = file.read_bytes()
    for place in (3, 512 + 130, len(data) - 7):
        spoiled = bytearray(data)
        spoiled[place] ^= 1
        file.write_bytes(bytes(spoiled))
        [repair] = mended(written.tokens)
        assert repair.done and file.read_bytes() == data


def test_a_lost_index_needs_its_tar_and_another_view_only(written: Written) -> None:
    before = tree(written.tokens)
    one = open_dataset(written.tokens).shard(1, 2)
    Path(one.index).unlink()
    [repair] = mended(written.tokens)
    assert repair.done and tree(written.tokens) == before


def test_without_index_and_tar_it_takes_images_and_tokenizer(
    written: Written, encoders: dict[str, Encoder]
) -> None:
    before = tree(written.tokens)
    shard = next(shard for shard in open_dataset(written.tokens).shards(0) if shard.rejects is not None)
    images = open_dataset(written.images, "images")
    for path in (shard.tar, shard.index, shard.rejects):
        assert path is not None
        Path(path).unlink()
    assert "--tokenizer" in mended(written.tokens, images)[0].how
    assert encoders["base"].fingerprint in mended(written.tokens, images, encoders["layer"])[0].how
    assert "--images" in mended(written.tokens, None, encoders["base"])[0].how
    assert not any(Path(path).exists() for path in (shard.tar, shard.index))
    repairs = mended(written.tokens, images, encoders["base"])
    # the receipt was sound all along
    assert [r.done for r in repairs] == [True] * 3 and tree(written.tokens) == before


# ------------------------------------------------------------------------------------------------ refusals


def test_other_images_are_refused_and_none_are_asked_for(
    written: Written, tmp_path: Path, make_image_folder: Any
) -> None:
    shard = open_dataset(written.tokens).shard(0, 0)
    Path(shard.tar).unlink()
    [repair] = mended(written.tokens)
    assert not repair.done and "--images" in repair.how
    other = str(tmp_path / "other")
    prepare_images(
        PrepareConfig(
            source=str(make_image_folder(per_class=2)), output=other, cluster=ClusterConfig(num_workers=0)
        )
    )
    images = open_dataset(other)
    with pytest.raises(InputError, match=images.fingerprint) as refused:
        mended(written.tokens, images)
    assert open_dataset(written.images).fingerprint in str(refused.value)


def test_what_comes_out_differently_is_not_put(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with another version of the library that resizes."""
    images = open_dataset(written.images, "images")
    shard = open_dataset(written.tokens).shard(0, 0)
    spoil(Path(shard.tar), 4)
    spoiled = tree(written.tokens)
    encode = rebuild.encode_crop
    monkeypatch.setattr(rebuild, "encode_crop", lambda pixels, quality: encode(pixels, quality - 1))
    [outcome] = mended(written.tokens, images)
    assert not outcome.done and "library versions" in outcome.how
    assert tree(written.tokens) == spoiled


def test_a_source_counts_by_its_bytes(written: Written, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(written.source, source)
    root = str(tmp_path / "mine")
    config = PrepareConfig(
        source=str(source), output=root, max_shard_samples=5, cluster=ClusterConfig(num_workers=0)
    )
    prepare_images(config)
    before = tree(root)
    tar = Path(open_dataset(root).shard(0, 0).tar)
    for file in source.rglob("*.*"):
        os.utime(file, (1, 1))
    tar.unlink()
    [repair] = mended(root)
    assert repair.done and tree(root) == before

    for file in source.rglob("*.*"):
        file.write_bytes(file.read_bytes() + b"x")
    spoil(tar, 2)
    [repair] = mended(root)
    assert not repair.done and "no longer what it was" in repair.how
    (Path(root) / "sources.parquet").unlink()
    found = {Path(r.object).name: r for r in mended(root)}
    assert "no longer those that were listed" in found["sources.parquet"].how
    assert "sources.parquet" in found[tar.name].how and not any(r.done for r in found.values())


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_images_of_tars_and_parquet_files_come_back(tmp_path: Path, kind: str) -> None:
    """Tars are indexed in place, so their datasets have none of their own; one image cannot be read."""
    rng = np.random.default_rng(0)
    images = [encode_crop(rng.integers(0, 256, (16, 24, 3), np.uint8), 90) for _ in range(6)]
    images[4] = b"no image"
    source, root = tmp_path / f"source.{kind}", str(tmp_path / "out")
    if kind == "tar":
        source.write_bytes(build_tar([(f"{i}.jpg", data) for i, data in enumerate(images)])[0])
    else:
        pq.write_table(pa.table({"image": images, "label": list(range(6))}), source)
    prepare_images(
        PrepareConfig(
            source=str(source), output=root, max_shard_samples=4, cluster=ClusterConfig(num_workers=0)
        )
    )
    before = tree(root)
    assert (Path(root) / "shards").exists() == (kind == "parquet") and verify_dataset(root).sound
    for turn, path in enumerate(sorted(Path(path) for path in before if not path.endswith("config.json"))):
        spoil(path, 1 + turn % 4)
        [repair] = mended(root)
        assert repair.done and tree(root) == before, repair


def test_the_listing_of_one_half_of_a_split_comes_from_the_whole(written: Written, tmp_path: Path) -> None:
    root = str(tmp_path / "split")
    config = PrepareConfig(
        source=written.source, output=root, val_fraction=0.4, cluster=ClusterConfig(num_workers=0)
    )
    prepare_images(config)
    for part in ("train", "val"):
        listing = Path(root) / part / "sources.parquet"
        data = listing.read_bytes()
        listing.unlink()
        [repair] = mended(f"{root}/{part}")
        assert repair.done and listing.read_bytes() == data


# ------------------------------------------------------------------------------------------------ headers


def test_a_missing_manifest_is_written_again_where_the_pass_is_complete(written: Written) -> None:
    before = tree(written.tokens)
    for part in written.parts():
        (Path(part) / "manifest.json").unlink()
    spoil(next((Path(written.tokens) / "index").iterdir()), 0)
    found = verify_dataset(written.tokens, absent=True)
    assert {problem.kind for problem in found.problems} == {"manifest", "index"}
    assert all(repair.done for repair in repair_dataset(found))
    assert tree(written.tokens) == before

    for pattern in ("manifest.json", "manifest-*", "receipts/*/v00-00001.json"):
        next(Path(written.tokens).glob(pattern)).unlink()
    with pytest.raises(InputError, match="is unfinished"):
        verify_dataset(written.tokens, absent=True)


def test_a_lost_manifest_and_a_lost_receipt_follow_from_the_table(written: Written) -> None:
    before = tree(written.images)
    for how in (0, 4):
        spoil(Path(written.images) / "manifest.json", how)
        next((Path(written.images) / "receipts").rglob("*.json")).unlink()
        spoil(next((Path(written.images) / "shards").iterdir()), 3)
        found = verify_dataset(written.images, absent=True)
        assert {problem.kind for problem in found.problems} == {"manifest", "receipt", "tar"}
        assert all(repair.done for repair in repair_dataset(found))
        assert tree(written.images) == before


@pytest.mark.parametrize("name", ["manifest.json", "plan.json"])
def test_headers_of_two_parts_that_were_swapped_go_back(written: Written, name: str) -> None:
    """Each is whole in itself; the receipts tell whose it is."""
    before = tree(written.tokens)
    one, other = Path(written.tokens) / name, Path(written.parts()[1]) / name
    mine = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(mine)
    assert {problem.object for problem in verify_dataset(written.tokens).problems} == {str(one), str(other)}
    assert all(repair.done for repair in mended(written.tokens))
    assert tree(written.tokens) == before


def test_plan_table_and_manifest_follow_from_each_other(written: Written) -> None:
    root = Path(written.tokens)
    names = {"plan": "plan.json", "manifest": "manifest.json", "table": next(root.glob("manifest-*")).name}
    before = tree(written.tokens)
    table = open_table(written.tokens)
    for lost in itertools.chain(itertools.combinations(names, 1), itertools.combinations(names, 2)):
        for kind in lost:
            spoil(root / names[kind], 4)
        if lost == ("plan", "manifest"):
            with pytest.raises(UnreadablePartError):
                open_damaged(written.tokens, "base")
            for kind in lost:
                (root / names[kind]).write_bytes(before[str(root / names[kind])])
            continue
        part = open_damaged(written.tokens, "base")
        assert {problem.kind for problem in part.problems} == set(lost)
        assert part.plan.fingerprint == table.manifest.plan
        assert part.table.shard(1, 2) == table.shard(1, 2)
        assert all(repair.done for repair in mended(written.tokens)) and tree(written.tokens) == before


def test_with_too_much_lost_that_is_said(written: Written) -> None:
    next(Path(written.images).glob("manifest-*")).unlink()
    next((Path(written.images) / "receipts").rglob("*.json")).unlink()
    found = verify_dataset(written.images)
    assert not found.sound and [problem.kind for problem in found.problems] == ["table"]
    [repair] = repair_dataset(found)
    assert not repair.done


def test_a_lost_manifest_is_not_written_over_lost_objects(written: Written) -> None:
    root = Path(written.tokens)
    spoil(root / "manifest.json", 3)
    Path(open_table(written.parts()[1]).shard(0, 0).tar).unlink()
    shard = next((root / "shards").iterdir())
    shard.unlink()
    outcome = {Path(r.object).name: r for r in mended(written.tokens)}
    assert not outcome["manifest.json"].done and shard.name in outcome["manifest.json"].how
    with pytest.raises(json.JSONDecodeError):
        json.loads((root / "manifest.json").read_bytes()[:-9])

"""Repair: what is lost comes back bit for bit or is said to be lost, and nothing sound is written to."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cluster.config import ClusterConfig
from pipeline.errors import InputError
from shards.dataset.dataset import open_dataset, open_table
from shards.format.build import BuiltShard
from shards.format.tar import build_tar
from shards.pixels.views import encode_crop
from shards.upkeep.repair import MakeItem, Repair, repair_dataset
from shards.upkeep.verify import verify_dataset
from shards.writer.prepare import PrepareConfig, prepare_images

Written = Any  # of conftest

CANNOT = ("plan.json", "sources.parquet")
"""What nothing else determines."""


def no_item(*_: object) -> BuiltShard:
    raise InputError("give the images and the tokenizer")


def tree(root: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path(root).rglob("*") if path.is_file()}


def times(root: str) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in Path(root).rglob("*") if path.is_file()}


def repaired(root: str, make_item: MakeItem = no_item) -> list[Repair]:
    return repair_dataset(verify_dataset(root, sample=0), make_item)


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
    written: Written, make_item: MakeItem
) -> None:
    """Of both datasets, of the views that were added, and of the code layer; each damaged in another way."""
    for root in (written.images, written.tokens):
        before, stamps = tree(root), times(root)
        paths = sorted(Path(path) for path in before if not path.endswith("config.json"))
        for turn, path in enumerate(paths[:: 1 if root == written.images else 2]):
            how = turn % 5 if path.name != "manifest.json" else 1 + turn % 4
            spoil(path, how)
            repairs = repaired(root, make_item)
            assert [r.object for r in repairs] == [str(path)], (path, how, repairs)
            if path.name in CANNOT:
                assert not repairs[0].done and "copy it from another copy" in repairs[0].how
                path.write_bytes(before[str(path)])
            else:
                assert repairs[0].done, repairs
                assert {name for name, stamp in times(root).items() if stamp != stamps[name]} == {str(path)}
            assert tree(root) == before
            stamps = times(root)


def test_many_lost_objects_come_back_together(written: Written, make_item: MakeItem) -> None:
    before = tree(written.tokens)
    rng = np.random.default_rng(1)
    folders = [Path(part, name) for part in written.parts() for name in ("shards", "index", "rejects")]
    files = sorted(file for folder in folders if folder.exists() for file in folder.iterdir())
    lost = [file for file in files if rng.random() < 0.4]
    lost += [next(Path(written.parts()[1]).glob("manifest-*")), Path(written.tokens) / "manifest.json"]
    for turn, file in enumerate(lost):
        spoil(file, 1 + turn % 4)
    repairs = repaired(written.tokens, make_item)
    # layers are made from crops that may have been damaged then: a second run has them
    assert all(repair.done for repair in repaired(written.tokens, make_item))
    assert len(repairs) >= len(lost) and tree(written.tokens) == before
    assert verify_dataset(written.tokens).sound


@pytest.mark.parametrize(
    ("lost", "given"),
    [
        (["tar"], True),
        (["index"], True),
        (["rejects"], True),
        (["index", "rejects"], True),
        (["tar", "index"], False),
    ],
)
def test_codes_come_from_index_or_tar_and_only_else_from_the_tokenizer(
    written: Written, make_item: MakeItem, lost: list[str], given: bool
) -> None:
    before = tree(written.tokens)
    shard = next(shard for shard in open_dataset(written.tokens).shards(0) if shard.rejects is not None)
    for kind in lost:
        Path(str(getattr(shard, kind))).unlink()
    codes_given: list[bool] = []

    def make(plan: Any, item: Any, codes: Mapping[int, np.ndarray] | None) -> BuiltShard:
        codes_given.append(codes is not None)
        return make_item(plan, item, codes)

    repairs = repaired(written.tokens, make)
    assert len(repairs) == len(lost) and all(repair.done for repair in repairs)
    assert codes_given == [given] and tree(written.tokens) == before


def test_what_cannot_be_made_or_comes_out_differently_is_not_put(
    written: Written, make_item: MakeItem
) -> None:
    """As without the images, and as with another version of the library that resizes."""
    shard = open_dataset(written.tokens).shard(0, 0)
    spoil(Path(shard.tar), 4)
    spoiled = tree(written.tokens)
    [outcome] = repaired(written.tokens)
    assert not outcome.done and outcome.how == "give the images and the tokenizer"

    def another(plan: Any, item: Any, codes: Any) -> BuiltShard:
        return make_item(plan, item, {key: grid ^ 1 for key, grid in codes.items()})

    [outcome] = repaired(written.tokens, another)
    assert not outcome.done and "library versions" in outcome.how
    assert tree(written.tokens) == spoiled


def test_a_source_counts_by_its_bytes(written: Written, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(written.source, source)
    root = str(tmp_path / "mine")
    prepare(source, root)
    before = tree(root)
    tar = Path(open_dataset(root).shard(0, 0).tar)
    for file in source.rglob("*.*"):
        os.utime(file, (1, 1))
    tar.unlink()
    [repair] = repaired(root)
    assert repair.done and tree(root) == before

    for file in source.rglob("*.*"):
        file.write_bytes(file.read_bytes() + b"x")
    spoil(tar, 2)
    [repair] = repaired(root)
    assert not repair.done and "have changed" in repair.how
    (Path(root) / "sources.parquet").unlink()
    outcome = {Path(r.object).name: r for r in repaired(root)}
    assert "copy it from another copy" in outcome["sources.parquet"].how
    assert "sources.parquet" in outcome[tar.name].how and not any(r.done for r in outcome.values())


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
    prepare(source, root, max_shard_samples=4)
    before = tree(root)
    assert (Path(root) / "shards").exists() == (kind == "parquet") and verify_dataset(root).sound
    paths = sorted(Path(path) for path in before if Path(path).name not in ("config.json", *CANNOT))
    for turn, path in enumerate(paths):
        spoil(path, 1 + turn % 4)
        [repair] = repaired(root)
        assert repair.done and tree(root) == before, repair


def prepare(source: Path, root: str, max_shard_samples: int = 5) -> None:
    cluster = ClusterConfig(num_workers=0)
    prepare_images(
        PrepareConfig(source=str(source), output=root, max_shard_samples=max_shard_samples, cluster=cluster)
    )


# ------------------------------------------------------------------------------------------------ headers


def test_a_missing_manifest_is_written_again_where_the_pass_is_complete(
    written: Written, make_item: MakeItem
) -> None:
    before = tree(written.tokens)
    for part in written.parts():
        (Path(part) / "manifest.json").unlink()
    spoil(next((Path(written.tokens) / "index").iterdir()), 0)
    found = verify_dataset(written.tokens, absent=True)
    assert {problem.kind for problem in found.problems} == {"manifest", "index"}
    assert all(repair.done for repair in repair_dataset(found, make_item))
    assert tree(written.tokens) == before

    for pattern in ("manifest.json", "receipts/*/v00-00001.json"):
        next(Path(written.tokens).glob(pattern)).unlink()
    with pytest.raises(InputError, match="is unfinished"):
        verify_dataset(written.tokens, absent=True)


def test_table_and_manifest_follow_from_the_receipts(written: Written) -> None:
    root = Path(written.tokens)
    names = {"manifest": "manifest.json", "table": next(root.glob("manifest-*")).name}
    before = tree(written.tokens)
    shard = open_table(written.tokens).shard(1, 2)
    for lost in itertools.chain(itertools.combinations(names, 1), itertools.combinations(names, 2)):
        for kind in lost:
            spoil(root / names[kind], 4)
        found = verify_dataset(written.tokens, sample=0)
        assert {problem.kind for problem in found.problems} == set(lost)
        assert found.parts[0].table.shard(1, 2) == shard
        assert all(repair.done for repair in repair_dataset(found, no_item))
        assert tree(written.tokens) == before


@pytest.mark.parametrize("also", ["receipts/*/v00-00001.json", "plan.json"])
def test_with_too_much_lost_that_is_said(written: Written, also: str) -> None:
    next(Path(written.images).glob("manifest-*")).unlink()
    next(Path(written.images).glob(also)).unlink()
    found = verify_dataset(written.images)
    assert not found.sound and "table" in [problem.kind for problem in found.problems]
    repairs = repair_dataset(found, no_item)
    assert len(repairs) == 2 and not any(repair.done for repair in repairs)


def test_a_lost_manifest_is_not_written_over_lost_objects(written: Written) -> None:
    root = Path(written.tokens)
    spoil(root / "manifest.json", 3)
    shard = next((root / "shards").iterdir())
    shard.unlink()
    outcome = {Path(r.object).name: r for r in repaired(written.tokens)}
    assert not outcome["manifest.json"].done and shard.name in outcome["manifest.json"].how


def test_without_its_plan_a_shard_is_checked_but_not_made(
    written: Written, make_item: Callable[..., BuiltShard]
) -> None:
    (Path(written.tokens) / "plan.json").unlink()
    shard = next((Path(written.tokens) / "shards").iterdir())
    spoil(shard, 3)
    outcome = {Path(r.object).name: r for r in repaired(written.tokens, make_item)}
    assert outcome.keys() == {"plan.json", shard.name}
    assert "its plan is lost" in outcome[shard.name].how

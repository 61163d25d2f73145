"""Verification: a sound dataset passes, and whatever is damaged, or written wrongly, is named."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.cluster.config import ClusterConfig
from pipeline.errors import InputError
from shards.dataset.dataset import open_dataset
from shards.format.build import BuiltShard
from shards.format.index import read_index, write_table
from shards.format.manifest import Manifest
from shards.format.plan import Plan, items
from shards.format.tar import build_tar
from shards.pixels.views import decode_crop, encode_crop
from shards.upkeep.repair import MakeItem
from shards.upkeep.verify import Verification, is_chosen, verify_dataset
from shards.writer.commit import commit, finish, start
from shards.writer.prepare import PrepareConfig, prepare_images

Written = Any  # of conftest


def objects(root: str) -> list[Path]:
    """Every object that a manifest of the dataset vouches for, and the manifests."""
    return sorted(path for path in Path(root).rglob("*") if path.is_file() and path.name != "config.json")


def named(found: Verification) -> set[str]:
    return {problem.object for problem in found.problems}


def test_sound_datasets_pass_and_everything_is_counted(written_once: Written) -> None:
    images = verify_dataset(written_once.images)
    assert images.sound and not images.notes
    total = images.total
    assert (total.shards, total.samples, total.decoded) == (3, 13, 13)
    assert sum(total.rejected.values()) == 1
    # three tars, indexes and receipts, and one list of rejects
    assert total.objects == 10
    shards = [path for path in objects(written_once.images) if path.parent.name != "images"]
    assert total.bytes == sum(path.stat().st_size for path in shards)

    tokens = verify_dataset(written_once.tokens)
    assert tokens.sound and not tokens.notes
    assert [part.kind for part in tokens.parts] == ["base", "views", "codes", "codes"]
    assert (tokens.total.shards, tokens.total.samples) == (18, 72)
    assert tokens.total.rejected == {"too_large": 3}
    assert tokens.total.decoded == 36


def test_every_damaged_object_is_found(written: Written) -> None:
    """Each object in turn: missing, empty, cut by a byte, one bit flipped, foreign of the same size."""
    rng = np.random.default_rng(0)
    for root in (written.images, written.tokens):
        for path in objects(root):
            data = path.read_bytes()
            flipped = bytearray(data)
            flipped[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
            foreign = rng.integers(0, 256, len(data), np.uint8).tobytes()
            for damage in rng.permutation(5)[: 2 if root == written.images else 1]:
                unfinished = damage == 0 and path.name == "manifest.json"
                if unfinished:
                    continue  # what has no manifest is unfinished, which is another answer
                if damage == 0:
                    path.unlink()
                else:
                    path.write_bytes([b"", data[:-1], bytes(flipped), foreign][damage - 1])
                found = verify_dataset(root, sample=0)
                assert str(path) in named(found), (path, damage)
                path.write_bytes(data)


def test_a_dataset_without_manifest_is_unfinished_and_a_part_is_noted(written: Written) -> None:
    part = Path(written.parts()[1])
    (part / "manifest.json").unlink()
    found = verify_dataset(written.tokens, sample=0)
    assert any(str(part) in note and "unfinished" in note for note in found.notes)
    (Path(written.tokens) / "manifest.json").unlink()
    with pytest.raises(InputError, match="is unfinished"):
        verify_dataset(written.tokens)
    with pytest.raises(InputError, match="there is no dataset"):
        verify_dataset(str(Path(written.tokens).parent / "nowhere"))


def swap(one: Path, other: Path) -> None:
    mine = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(mine)


@pytest.mark.parametrize("folder", ["shards", "index", "receipts"])
def test_swapped_objects_are_both_found(written: Written, folder: str) -> None:
    first, *_, last = sorted(path for path in (Path(written.tokens) / folder).rglob("v*"))
    swap(first, last)
    # readers of a code layer need the base's tars and indexes, but the layer's own objects are as they were
    assert named(verify_dataset(written.tokens, sample=0)) == {str(first), str(last)}


def test_unreferenced_files_are_noted_and_harm_nobody(written: Written) -> None:
    for name in ("README.txt", "shards/v00-00000-00000000.tar", "more/v02/index/x", "receipts/x.json"):
        (Path(written.tokens) / name).write_bytes(b"x")
    found = verify_dataset(written.tokens, sample=0)
    assert found.sound and len(found.notes) == 4


def test_a_second_look_reads_only_what_had_problems(written: Written) -> None:
    tar = Path(open_dataset(written.images).shard(0, 1).tar)
    data = tar.read_bytes()
    tar.write_bytes(data[:-1])
    first = verify_dataset(written.images)
    assert first.total.shards == 2
    tar.write_bytes(data)
    untouched = Path(open_dataset(written.images).shard(0, 0).tar)
    untouched.unlink()
    again = verify_dataset(written.images, after=first)
    assert again.sound and (again.total.shards, again.total.samples) == (3, 13)


# ------------------------------------------------------------------------ written wrongly, hashes right


def write_wrong(
    root: str, written: Written, make_item: MakeItem, change: Callable[[BuiltShard], BuiltShard]
) -> Verification:
    """The token dataset once more, its first shard changed after it was built; then verified."""
    plan = Plan.from_bytes((Path(written.tokens) / "plan.json").read_bytes())
    start(root, plan)
    for item in items(plan):
        built = make_item(plan, item, None)
        commit(root, plan, item, change(built) if (item.view, item.number) == (0, 0) else built)
    with pytest.MonkeyPatch.context() as patch:  # the write pass would find out with its probe
        patch.setattr("shards.writer.commit.probe_shard", lambda shard, rows, decode: [])
        finish(root, plan, decode_crop)
    return verify_dataset(root)


def index_with(built: BuiltShard, column: str, change: Callable[[list[Any]], list[Any]]) -> BuiltShard:
    table = read_index(built.index)
    place = table.schema.get_field_index(column)
    values = pa.array(change(table.column(column).to_pylist()), table.schema.field(column).type)
    table = table.set_column(place, table.schema.field(place), values)
    return dataclasses.replace(built, index=write_table(table))


def beyond(codes: list[list[int]]) -> list[list[int]]:
    return [[64, 0, 0, 0], *codes[1:]]


def no_picture(data: bytes) -> bytes:
    return b"\xff\xd8 no picture".ljust(len(data), b"\0")


def smaller(data: bytes) -> bytes:
    return encode_crop(decode_crop(data)[:8, :8], 95).ljust(len(data), b"\0")


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("index", lambda built: index_with(built, "codes", beyond), "codes beyond the codebook in 1 of"),
        ("index", lambda built: dataclasses.replace(built, index=b"no Parquet"), "not a readable Parquet"),
        ("tar", lambda built: with_image(built, no_picture), "cannot be decoded"),
        ("tar", lambda built: with_image(built, smaller), "is 8 x 8 pixels, not 16 x 16"),
    ],
)
def test_what_was_written_wrongly_is_found_though_all_hashes_are_right(
    written: Written, make_item: MakeItem, kind: str, change: Callable[[BuiltShard], BuiltShard], message: str
) -> None:
    found = write_wrong(f"{written.tokens}-again", written, make_item, change)
    [problem] = [problem for problem in found.problems if problem.kind != "manifest"]
    assert message in problem.what and problem.kind == kind and not problem.damaged
    assert "v00-00000" in problem.object and "write the dataset again" in problem.mend


def with_image(built: BuiltShard, change: Callable[[bytes], bytes]) -> BuiltShard:
    """The shard with another first image of the same length."""
    assert built.tar is not None
    row = read_index(built.index).slice(0, 1).to_pylist()[0]
    start, end = row["image_offset"], row["image_offset"] + row["image_bytes"]
    image = change(built.tar[start:end])
    return dataclasses.replace(built, tar=built.tar[:start] + image + built.tar[end:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples_rejected": {"empty": 1}}, "disagrees with plan and shards"),
        ({"class_names": ("ant", "bee")}, "disagrees with plan and shards"),
        ({"samples_in": 27}, "disagrees with plan and shards"),
        ({"probe": {"sha256": "0" * 64}}, "has other pixels here"),
        ({"probe": {"row": 77}}, "names an image that is not stored"),
    ],
)
def test_a_manifest_that_disagrees_with_its_plan_or_shards_is_found(
    written: Written, change: dict[str, Any], message: str
) -> None:
    location = Path(written.images) / "manifest.json"
    manifest = Manifest.from_json(json.loads(location.read_bytes()))
    if "probe" in change:
        change = {"probe": (dataclasses.replace(manifest.probe[0], **change["probe"]),)}
    location.write_bytes(dataclasses.replace(manifest, **change).to_bytes())
    [problem] = verify_dataset(written.images, sample=0).problems
    assert message in problem.what and not problem.damaged


def test_parts_of_another_dataset_are_found(written: Written) -> None:
    """Sound in themselves, but not made for this base."""
    location = Path(written.tokens) / "manifest.json"
    manifest = Manifest.from_json(json.loads(location.read_bytes()))
    location.write_bytes(dataclasses.replace(manifest, class_names=("ant", "bee")).to_bytes())
    wrong = {p.part for p in verify_dataset(written.tokens).problems if "was made for" in p.what}
    assert wrong == {written.parts()[1], written.parts()[2]}


# ------------------------------------------------------------------------------------------------ in place


def test_tars_indexed_in_place_are_checked_by_version_and_image(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [encode_crop(rng.integers(0, 256, (16, 16, 3), np.uint8), 95) for _ in range(4)]
    tar, root = tmp_path / "theirs.tar", str(tmp_path / "out")
    archive, offsets = build_tar([(f"{number}.jpg", data) for number, data in enumerate(images)])
    tar.write_bytes(archive)
    listed_ns = tar.stat().st_mtime_ns
    cluster = ClusterConfig(num_workers=0)
    prepare_images(PrepareConfig(source=str(tar), output=root, max_shard_samples=2, cluster=cluster))
    sound = verify_dataset(root)
    assert sound.sound and sound.total.decoded == 4, sound.problems

    flipped = bytearray(archive)
    flipped[offsets[3] + 40] ^= 1
    tar.write_bytes(bytes(flipped))
    os.utime(tar, ns=(listed_ns, listed_ns))
    [problem] = verify_dataset(root, sample=0).problems
    assert problem.object == str(tar) and "damaged at 0000000003-00" in problem.what
    tar.write_bytes(archive)  # a new modification time
    assert all("has changed" in problem.what for problem in verify_dataset(root, sample=0).problems)
    tar.unlink()
    assert {problem.object for problem in verify_dataset(root, sample=0).problems} == {str(tar)}


def test_a_share_of_samples_is_chosen_by_id_alone() -> None:
    ids = np.arange(100_000, dtype=np.int64)
    chosen = is_chosen(ids, 0.01)
    assert 800 < chosen.sum() < 1200
    assert (is_chosen(ids, 0.1) >= chosen).all()  # a larger share contains a smaller one
    np.testing.assert_array_equal(is_chosen(ids[5000:6000], 0.1), is_chosen(ids, 0.1)[5000:6000])
    assert is_chosen(ids, 1.0).all() and not is_chosen(ids, 0.0).any()
    assert is_chosen(ids[:3], 1e-9).sum() == 1  # at least one of each shard
    assert not is_chosen(np.empty(0, np.int64), 0.5).any()

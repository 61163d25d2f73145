"""The write pass: killed at every step it ends in the same bytes, and it never counts or claims wrongly."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import storage
from pipeline.errors import InputError
from shards.dataset.dataset import open_dataset
from shards.dataset.rows import pixels_hash
from shards.format.build import BuiltShard, build_shard
from shards.format.manifest import Manifest, read_manifest
from shards.format.plan import Item, Plan, items
from shards.format.records import StoredSample
from shards.pixels.views import decode_crop
from shards.writer.commit import CommitError, commit, finish, pending, receipt, receipt_url, start
from tests.shards.files import tree

MakeDataset = Callable[..., Any]


def begun(dataset: Any, root: Path | str) -> tuple[str, Plan, list[Item]]:
    """A pass that was started: where, its plan, its items."""
    plan = start(str(root), dataset.plan)
    return str(root), plan, list(items(plan))


# ------------------------------------------------------------------------------------------------ start


def test_another_plan_is_refused_naming_both_values(tmp_path: Path, small_dataset: MakeDataset) -> None:
    root, plan, _ = begun(small_dataset(), tmp_path)
    before = tree(root)
    others = {
        "inputs.images: there 'aaa": dataclasses.replace(plan, inputs={"images": "b" * 64}),
        "recipe.policy.seed: there 0, asked 7": small_dataset(seed=7).plan,
        "views: there 2, asked 3": dataclasses.replace(plan, views=3),
        "there 9 samples in 3 ranges of at most 4 ids, 0 to 9, asked 9 samples in 2": dataclasses.replace(
            plan, first_ids=(0, 5, 9)
        ),
        "kind: there 'tokens', asked 'images'": small_dataset(kind="images").plan,
    }
    for message, other in others.items():
        with pytest.raises(InputError) as refused:
            start(root, other)
        assert message in str(refused.value) and root in str(refused.value)
        assert "\n" not in str(refused.value)
    assert tree(root) == before


def test_a_place_that_holds_something_else_is_refused(tmp_path: Path, small_dataset: MakeDataset) -> None:
    plan = small_dataset().plan
    (tmp_path / "holiday.txt").write_text("mine")
    with pytest.raises(InputError, match=r"already holds something else \(.*holiday\.txt\)"):
        start(str(tmp_path), plan)
    assert tree(tmp_path) == {"/holiday.txt": b"mine"}
    with pytest.raises(InputError, match="is a file"):
        start(str(tmp_path / "holiday.txt"), plan)
    start(str(tmp_path), plan, beside=["holiday.txt"])


def test_a_plan_that_is_none_is_refused_by_name_and_left_alone(
    tmp_path: Path, small_dataset: MakeDataset
) -> None:
    plan = small_dataset().plan
    whole = plan.to_bytes()
    contents = [b"[]", b"7", b"null", b"\xff\xfe", b"[" * 100_000, b'{"format_version": 99}']
    contents.append(
        b'{"format_version": 1, "kind": "tokens", "inputs": {}, "recipe": {}, "header": [], "first_view": 0, '
        b'"views": 1, "first_id": 0, "range_ids": [[1, 1]], "range_samples": null}'
    )
    for content in contents + [whole[:length] for length in range(0, len(whole) - 2, 7)]:
        (tmp_path / "plan.json").write_bytes(content)
        with pytest.raises(InputError, match=rf"{tmp_path}/plan\.json is not a plan of this format"):
            start(str(tmp_path), plan)
        assert tree(tmp_path) == {"/plan.json": content}
    (tmp_path / "plan.json").write_bytes(whole)
    assert start(str(tmp_path), plan).fingerprint == plan.fingerprint


def test_a_store_that_cannot_refuse_an_overwrite_is_named(
    tmp_path: Path, small_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overwrite(url: str, data: bytes) -> bool:
        storage.put(url, data)
        return True

    monkeypatch.setattr("shards.writer.commit.storage.create", overwrite)
    plan = small_dataset().plan
    for _ in range(2):  # when it is begun, and when it goes on
        with pytest.warns(UserWarning, match="cannot refuse an overwrite: one driver only"):
            start(str(tmp_path), plan)
        assert tree(tmp_path) == {"/plan.json": plan.to_bytes()}


# ------------------------------------------------------------------------------------------------ the pass


def test_a_finished_dataset_holds_exactly_what_the_manifest_names(
    tmp_path: Path, small_dataset: MakeDataset
) -> None:
    dataset = small_dataset(rejected={5: "truncated", 7: "empty", 8: "empty"})
    manifest = dataset.write(str(tmp_path))
    plan = dataset.plan

    assert manifest == read_manifest(str(tmp_path)) == finish(str(tmp_path), plan, decode_crop)
    assert Manifest.from_json(json.loads(manifest.to_bytes())).fingerprint == manifest.fingerprint
    assert (manifest.samples_in, manifest.samples_written) == (18, 12)
    assert manifest.samples_rejected == {"empty": 4, "truncated": 2}
    assert manifest.written_per_view == (6, 6)
    assert manifest.class_names == ("ant", "bee", "cat")
    assert manifest.tokenizer == plan.tokenizer and manifest.grid == (2, 3)
    assert manifest.inputs == plan.inputs and manifest.recipe.other["policy"]["scale"] == [0.2, 1.0]
    with pytest.raises(InputError, match="finished with another plan"):
        finish(str(tmp_path), small_dataset(seed=1).plan, decode_crop)

    opened = open_dataset(str(tmp_path), "tokens")
    assert opened.id_ranges() == ((0, 4, 7, 9), (4, 2, 0))
    named = {"/plan.json", "/manifest.json", f"/{manifest.table.path}"}
    for view in range(2):
        assert opened.shard_sizes(view).tolist() == [4, 2, 0]
        for number in range(3):
            shard = opened.shard(view, number)
            named |= {f"/receipts/{plan.plan_prefix}/v{view:02d}-{number:05d}.json"}
            paths = [shard.tar, shard.index] + ([shard.rejects] if shard.rejects else [])
            named |= {path.removeprefix(str(tmp_path)) for path in paths}
            assert Path(shard.tar).name == f"v{view:02d}-{number:05d}-{(shard.tar_sha256 or '')[:8]}.tar"
    assert set(tree(tmp_path)) == named


def test_nothing_that_is_stored_names_the_place_or_the_time(
    tmp_path: Path, small_dataset: MakeDataset
) -> None:
    small_dataset().write(str(tmp_path / "a"))
    small_dataset().write(str(tmp_path / "elsewhere" / "b"))
    assert tree(tmp_path / "a") == tree(tmp_path / "elsewhere" / "b")
    assert all(str(tmp_path).encode() not in data for data in tree(tmp_path / "a").values())


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it and tidy up."""


@contextmanager
def killed_at(monkeypatch: pytest.MonkeyPatch, step: int, *, before: bool) -> Iterator[list[int]]:
    """Dies at the step-th write, just before or just after it took effect; yields the count of writes."""
    count = [0]

    def dying(write: Callable[[str, bytes], Any]) -> Callable[[str, bytes], Any]:
        def attempt(url: str, data: bytes) -> Any:
            count[0] += 1
            if count[0] == step and before:
                raise Killed
            result = write(url, data)
            if count[0] == step:
                raise Killed
            return result

        return attempt

    with monkeypatch.context() as patch:
        patch.setattr("shards.writer.commit.storage.put", dying(storage.put))
        patch.setattr("shards.writer.commit.storage.create", dying(storage.create))
        yield count


@pytest.mark.parametrize("before", [True, False])
def test_killed_at_every_write_the_rerun_ends_in_the_same_bytes(
    tmp_path: Path, small_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    dataset = small_dataset(first_ids=(0, 3, 6), views=1)
    with killed_at(monkeypatch, 0, before=True) as count:
        dataset.write(str(tmp_path / "straight"))
    straight = tree(tmp_path / "straight")
    # plan twice (the second is the probe of the store), 2 + 3 objects, 2 receipts, table, manifest
    assert count[0] == 2 + 5 + 2 + 2

    for step in range(1, count[0] + 1):
        root = tmp_path / f"killed-{step}"
        with pytest.raises(Killed), killed_at(monkeypatch, step, before=before):
            dataset.write(str(root))
        if not (root / "manifest.json").exists():
            with pytest.raises(InputError, match=r"unfinished|no dataset"):
                open_dataset(str(root))
        dataset.write(str(root))
        assert tree(root) == straight


def test_a_rerun_builds_only_what_is_missing(tmp_path: Path, small_dataset: MakeDataset) -> None:
    dataset = small_dataset()
    root, plan, everything = begun(dataset, tmp_path)
    assert list(pending(root, plan)) == everything
    for item in everything[::2]:
        dataset.commit_item(root, item)
    assert list(pending(root, plan)) == everything[1::2]
    with pytest.raises(CommitError, match=r"3 of 6 shards .* not done \(v00-00001, v01-00000, v01-00002\)"):
        finish(root, plan, decode_crop)
    assert not storage.exists(f"{root}/manifest.json")

    for item in everything[1::2]:
        dataset.commit_item(root, item)
    finish(root, plan, decode_crop)
    storage.remove(receipt_url(root, plan, everything[0]))
    assert list(pending(root, plan)) == []  # finished is finished


@pytest.mark.parametrize("kind", ["tar", "index", "rejects"])
@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_receipt_counts_only_while_its_objects_are_there(
    tmp_path: Path, small_dataset: MakeDataset, kind: str, damage: str
) -> None:
    dataset = small_dataset(first_ids=(0, 3, 6), views=1)
    root, plan, (first, last) = begun(dataset, tmp_path)
    for item in (first, last):
        dataset.commit_item(root, item)
    straight = tree(root)
    path = Path(root) / getattr(receipt(root, plan, last).shard, kind)  # type: ignore[union-attr]
    path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:-1])

    assert list(pending(root, plan)) == [last]
    with pytest.raises(CommitError, match="1 of 2 shards"):
        finish(root, plan, decode_crop)
    dataset.commit_item(root, last)
    assert tree(root) == straight


JUNK = [b"", b"{", b"[]", b"{}", b"null", b'{"plan": 1, "shard": {}}']


@pytest.mark.parametrize("content", [*JUNK, "other", "plan", "tar", "index", "rejects"])
def test_a_receipt_damaged_or_of_something_else_does_not_count_and_is_replaced(
    tmp_path: Path, small_dataset: MakeDataset, content: bytes | str
) -> None:
    """Also that of another item, of another plan, or one that names the right bytes at a place of its own."""
    dataset = small_dataset(first_ids=(0, 6, 9), views=1)
    root, plan, (item, other) = begun(dataset, tmp_path / "out")
    for each in (item, other):
        dataset.commit_item(root, each)
    straight = tree(root)
    record = json.loads(storage.read(receipt_url(root, plan, item)))
    if content == "other":
        record = json.loads(storage.read(receipt_url(root, plan, other)))
    elif content == "plan":
        record["plan"] = "0" * 64
    elif isinstance(content, str):
        storage.put(str(tmp_path / "secret"), storage.read(storage.join(root, record["shard"][content])))
        record["shard"][content] = "../secret"
    data = content if isinstance(content, bytes) else json.dumps(record).encode()
    storage.put(receipt_url(root, plan, item), data)
    named = r"v00-00000\.json is not the receipt of v00-00000 in this plan.*does not count"
    with pytest.warns(UserWarning, match=named):
        assert list(pending(root, plan)) == [item]
    with pytest.warns(UserWarning, match=named):
        dataset.commit_item(root, item)
    assert tree(root) == straight


def test_the_first_receipt_stands_and_the_loser_deletes_nothing(
    tmp_path: Path, small_dataset: MakeDataset
) -> None:
    dataset = small_dataset(first_ids=(0, 3), views=1, rejected={})
    root, plan, [item] = begun(dataset, tmp_path)
    dataset.commit_item(root, item)
    winner = receipt(root, plan, item)
    before = tree(root)

    # another attempt, on another device: equal but for one code
    (sample, *others), _ = dataset.content(item)
    codes = (sample.codes + (np.arange(6) == 0).reshape(2, 3)).astype(np.uint16) % 16
    other = build_shard(
        [dataclasses.replace(sample, codes=codes), *others], [], grid=(2, 3), codebook_size=16
    )
    assert commit(root, plan, item, other) == winner == receipt(root, plan, item)
    after = tree(root)
    assert {path: after[path] for path in before} == before
    assert len(after) == len(before) + 2  # the loser's tar and index, for gc

    manifest = finish(root, plan, decode_crop)
    assert winner is not None
    assert open_dataset(root).shard(0, 0).tar == f"{root}/{winner.shard.tar}"
    assert finish(root, plan, decode_crop) == manifest


def test_many_drivers_at_once_leave_one_sound_dataset(tmp_path: Path, small_dataset: MakeDataset) -> None:
    dataset = small_dataset()
    root = str(tmp_path / "shared")
    with ThreadPoolExecutor(4) as pool:
        written = list(pool.map(lambda _: dataset.write(root), range(4)))
    assert written == [dataset.write(str(tmp_path / "alone"))] * 4
    assert tree(root) == tree(tmp_path / "alone")


# ------------------------------------------------------------------------------------------------ accounting


def test_what_does_not_belong_to_the_item_is_not_committed(
    tmp_path: Path, small_dataset: MakeDataset, make_sample: Callable[..., StoredSample]
) -> None:
    dataset = small_dataset(first_ids=(0, 3, 6), rejected={})
    root, plan, [first, *_] = begun(dataset, tmp_path)
    before = tree(root)

    def built(
        ids: list[int], view: int = 0, grid: tuple[int, int] | None = (2, 3), size: int = 16
    ) -> BuiltShard:
        samples = [make_sample(i, view, tokens=grid is not None) for i in ids]
        return build_shard(samples, [], grid=grid, codebook_size=size if grid else None)

    for shard, message in [
        (built([0, 1]), "2 samples written or rejected, the plan says 3"),
        (built([0, 1, 3]), r"ids 0 to 3 are not in \[0, 3\)"),
        (built([0, 1, 2], view=1), "of view 1"),
        (built([0, 1, 2], size=32), "codebook"),
        (built([0, 1, 2], grid=None), "codebook"),
    ]:
        with pytest.raises(CommitError, match=message):
            commit(root, plan, first, shard)
    assert tree(root) == before


def test_a_receipt_that_does_not_add_up_stops_the_pass(tmp_path: Path, small_dataset: MakeDataset) -> None:
    dataset = small_dataset(first_ids=(0, 3), views=1, rejected={1: "empty"})
    root, plan, [item] = begun(dataset, tmp_path)
    dataset.commit_item(root, item)
    url = receipt_url(root, plan, item)
    record = json.loads(storage.read(url))
    record["rejected"] = {}
    storage.put(url, json.dumps(record).encode())
    with pytest.raises(CommitError, match="2 written and 0 rejected, but 3 were read"):
        finish(root, plan, decode_crop)


# ------------------------------------------------------------------------------------------------ finish


def test_the_probe_spreads_over_the_dataset_and_tells_another_decoder(
    tmp_path: Path, small_dataset: MakeDataset, make_sample: Callable[..., StoredSample]
) -> None:
    dataset = small_dataset(first_ids=tuple(range(0, 41, 2)), views=2, rejected={0: "empty", 1: "empty"})
    manifest = dataset.write(str(tmp_path))
    assert 14 <= len(manifest.probe) <= 16
    assert {entry.view for entry in manifest.probe} == {0, 1}
    for entry in manifest.probe:
        sample_id, view = (int(part) for part in entry.key.split("-"))
        assert view == entry.view
        assert entry.sha256 == pixels_hash(decode_crop(make_sample(sample_id, view).image))

    # one shard: the probe takes more of it
    small = small_dataset(first_ids=(0, 40), views=1, rejected={}).write(str(tmp_path / "one"))
    assert [entry.row for entry in small.probe] == [int(40 * i / 16) for i in range(16)]
    tiny = small_dataset(first_ids=(0, 2), views=1, rejected={}).write(str(tmp_path / "two"))
    assert [entry.row for entry in tiny.probe] == [0, 1]


def test_on_s3_as_on_disk(tmp_path: Path, s3_url: str, small_dataset: MakeDataset) -> None:
    dataset = small_dataset(first_ids=(0, 3, 6), views=1)
    root = f"{s3_url}/deep/tokens"
    manifest = dataset.write(root)
    assert manifest == dataset.write(root) == dataset.write(str(tmp_path))
    assert tree(root) == tree(tmp_path)
    assert open_dataset(root).shard(0, 1).tar.startswith(f"{root}/shards/v00-00001-")
    with pytest.raises(InputError, match=r"recipe\.policy\.seed"):
        start(root, small_dataset(seed=1).plan)
    storage.put(f"{s3_url}/other/thing", b"")
    with pytest.raises(InputError, match="something else"):
        start(f"{s3_url}/other", dataset.plan)


def test_a_label_beyond_the_classes_is_refused(tmp_path: Path, small_dataset: MakeDataset) -> None:
    small = small_dataset(rejected={})
    start(str(tmp_path), small.plan)
    item = next(items(small.plan))
    samples, _ = small.content(item)
    built = build_shard(
        [dataclasses.replace(sample, label=3) for sample in samples], [], grid=(2, 3), codebook_size=16
    )
    with pytest.raises(CommitError, match="label 3 is none of the 3 classes"):
        commit(str(tmp_path), small.plan, item, built)

"""Added views and code layers: found by name, refused where they do not belong, read as one dataset."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pytest

from pipeline import storage
from pipeline.errors import InputError
from shards.dataset.codes import count_codes
from shards.dataset.dataset import (
    index_files,
    layer_url,
    open_dataset,
    open_table,
    views_url,
)
from shards.dataset.parts import parts
from shards.dataset.rows import probe_shard
from shards.dataset.summary import in_words, summarize
from shards.format.build import BuildError
from shards.format.index import codes_of, index_header
from shards.format.manifest import Recipe, TokenizerSpec, read_manifest
from shards.format.plan import Plan
from shards.format.records import sample_key
from shards.pixels.crops import StoredCrops
from shards.pixels.views import decode_crop
from shards.reader.order import view_of_epoch
from shards.reader.reader import Batches, ShardReader
from shards.writer.commit import commit, finish, pending, start
from shards.writer.layers import build_layer_shard, layer_plan

GRID, CODEBOOK_SIZE = (2, 3), 16
LAYER_GRID, LAYER_CODEBOOK = (2, 2), 300
LAYER = "c" * 64
STORED = [0, 1, 2, 3, 4, 6, 7, 8]
"""Ids; 5 is rejected in every view."""


def layer_spec(**changes: Any) -> TokenizerSpec:
    """The tokenizer of a layer."""
    spec = TokenizerSpec(fingerprint=LAYER, grid=LAYER_GRID, codebook_size=LAYER_CODEBOOK, image_size=16)
    return dataclasses.replace(spec, **changes)


class Growing:
    """A dataset of two views that grows, and what should be in it."""

    def __init__(self, root: str, make: Callable[..., Any], **arguments: Any) -> None:
        self.root = root
        self.small = make(**arguments)

    def write(self) -> None:
        self.small.write(self.root)

    def views_plan(self, first_view: int, views: int) -> Plan:
        plan = self.small.plan
        inputs = {**plan.inputs, "base": read_manifest(self.root).fingerprint}
        return dataclasses.replace(plan, inputs=inputs, first_view=first_view, views=views)

    def add_views(self, first_view: int, views: int, *, items: int = 100, **changes: Any) -> None:
        """Some work items of an extension; it is finished when there are no more."""
        plan = dataclasses.replace(self.views_plan(first_view, views), **changes)
        part = dataclasses.replace(self.small, plan=plan)
        place = views_url(self.root, first_view)
        start(place, plan)
        for item in list(pending(place, plan))[:items]:
            part.commit_item(place, item)
        if items >= plan.num_items:
            finish(place, plan, decode_crop)

    def add_layer(self, first_view: int, fingerprint: str = LAYER, **changes: Any) -> None:
        pixels = open_table(views_url(self.root, first_view))
        recipe = Recipe(libraries={"numpy": "2"})
        plan = dataclasses.replace(layer_plan(pixels, layer_spec(fingerprint=fingerprint), recipe), **changes)
        place = layer_url(self.root, LAYER, first_view)
        start(place, plan)
        for item in pending(place, plan):
            ids = np.array([i for i in range(item.first_id, item.end_id) if i in STORED])
            codes = np.array([layer_codes(int(i), item.view) for i in ids], np.uint16).reshape(len(ids), 4)
            shard = pixels.shard(item.view - first_view, item.number)
            built = build_layer_shard(
                shard, first_view, ids, codes, grid=LAYER_GRID, codebook_size=LAYER_CODEBOOK
            )
            commit(place, plan, item, built)
        finish(place, plan, decode_crop)


def layer_codes(sample_id: int, view: int) -> np.ndarray:
    return np.random.default_rng([9, sample_id, view]).integers(0, LAYER_CODEBOOK, 4, np.uint16)


def expected_codes(sample_id: int, view: int) -> np.ndarray:
    """What conftest's `make_sample` draws: pixels, box and flip come before."""
    rng = np.random.default_rng([sample_id, view])
    rng.integers(0, 256, (16, 16, 3), np.uint8)
    rng.integers(1, 25, 4)
    rng.integers(2)
    return rng.integers(0, CODEBOOK_SIZE, GRID, np.uint16).reshape(-1)


@pytest.fixture
def growing(tmp_path: Path, small_dataset: Callable[..., Any]) -> Growing:
    grown = Growing(str(tmp_path / "tokens"), small_dataset)
    grown.write()
    return grown


def all_read(dataset: Any, epochs: int) -> dict[str, tuple[bytes, tuple[int, ...]]]:
    """Key -> (pixels, codes) of everything a reader gives."""
    found = {}
    with ShardReader(dataset, StoredCrops(), Batches(4, seed=1, num_threads=0, drop_last=False)) as reader:
        for epoch in range(epochs):
            for batch in reader.batches(epoch):
                assert batch.codes is not None
                for key, pixels, codes in zip(batch.keys, batch.pixels, batch.codes, strict=True):
                    found[key] = (pixels.tobytes(), tuple(codes.tolist()))
    return found


def test_parts_are_listed_finished_or_not(growing: Growing) -> None:
    root = growing.root
    growing.add_views(2, 1)
    growing.add_views(3, 2, items=2)
    growing.add_layer(0)
    (Path(root) / "more" / "notes").mkdir()
    (Path(root) / "codes" / "README").mkdir()
    found = parts(root)
    places = ["", "/more/v02", "/more/v03", "/codes/cccccccc/v00"]
    assert [part.url for part in found] == [f"{root}{place}" for place in places]
    assert [part.kind for part in found] == ["base", "views", "views", "codes"]
    assert [part.finished for part in found] == [True, True, False, True]
    assert [(part.first_view, part.num_views) for part in found] == [(0, 2), (2, 1), (3, 2), (0, 2)]
    assert all(part.plan is not None for part in found)
    for part in (found[0], found[1], found[3]):
        for view in range(part.num_views):
            for shard in open_table(part.url).shards(view):
                assert storage.stat(shard.tar).bytes == shard.tar_bytes  # type: ignore[union-attr]
                assert storage.stat(shard.index).bytes == shard.index_bytes  # type: ignore[union-attr]
    with pytest.raises(InputError, match=r"more/v03 is unfinished"):
        open_table(found[2].url)
    [nothing] = parts(f"{root}-elsewhere")
    assert (nothing.kind, nothing.manifest, nothing.plan) == ("base", None, None)


def test_finished_extensions_belong_to_the_dataset(growing: Growing) -> None:
    root = growing.root
    alone = open_dataset(root)
    assert alone.fingerprint == read_manifest(root).fingerprint and alone.first_views == (0,)
    growing.add_views(2, 1, items=2)
    assert open_dataset(root).fingerprint == alone.fingerprint  # unfinished: not seen
    growing.add_views(2, 1)
    growing.add_views(3, 2)
    grown = open_dataset(root, "tokens")
    assert (grown.num_views, grown.first_views) == (5, (0, 2, 3))
    assert [grown.num_samples(view) for view in range(5)] == [8] * 5
    assert (grown.manifest.samples_in, grown.manifest.samples_written) == (45, 40)
    assert grown.manifest.samples_rejected == {"truncated": 5}
    assert [shard.name for view in range(5) for shard in grown.shards(view)] == [
        f"v{view:02d}-{number:05d}" for view in range(5) for number in range(3)
    ]
    assert len(grown.manifest.probe) > len(alone.manifest.probe)
    for entry in grown.manifest.probe:
        assert probe_shard(grown.shard(entry.view, entry.number), [entry.row], decode_crop) == [entry]

    table = ds.dataset(index_files(root)).to_table(columns=["key", "codes"])
    assert table.column("key").to_pylist() == [sample_key(i, view) for view in range(5) for i in STORED]
    np.testing.assert_array_equal(
        codes_of(table), [expected_codes(i, view) for view in range(5) for i in STORED]
    )
    assert grown.index_files(3) == [shard.index for shard in grown.shards(3)]
    assert count_codes(grown).sum() == 40 * 6


def test_a_run_keeps_the_views_it_began_with(growing: Growing) -> None:
    root = growing.root
    before = open_dataset(root)
    growing.add_views(2, 2)
    kept = open_dataset(root, views=2)
    assert kept.fingerprint == before.fingerprint and kept.manifest == before.manifest
    assert index_files(root, views=2) == before.index_files()
    by_number = {views: open_dataset(root, views=views) for views in (1, 2, 3, 4)}
    assert len({dataset.fingerprint for dataset in by_number.values()}) == 4
    assert by_number[4].fingerprint == open_dataset(root).fingerprint
    one, three = by_number[1].manifest, by_number[3].manifest
    assert (one.samples_in, one.samples_written, one.samples_rejected) == (9, 8, {"truncated": 1})
    assert (three.samples_in, three.samples_written, three.samples_rejected) == (27, 24, {"truncated": 3})
    with pytest.raises(InputError, match="there is no view 3"):
        by_number[3].shard(3, 0)
    with pytest.raises(InputError, match="has 4 finished views, 5 are asked for"):
        open_dataset(root, views=5)
    with pytest.raises(InputError, match="finished views, 0 are asked for"):
        open_dataset(root, views=0)


def test_the_reader_goes_through_all_views(growing: Growing) -> None:
    growing.add_views(2, 2)
    dataset = pickle.loads(pickle.dumps(open_dataset(growing.root)))
    found = all_read(dataset, epochs=4)
    assert set(found) == {sample_key(i, view) for i in STORED for view in range(4)}
    for i in STORED:
        for view in range(4):
            assert found[sample_key(i, view)][1] == tuple(expected_codes(i, view).tolist())
    with ShardReader(dataset, StoredCrops(), Batches(8, seed=1, num_threads=0)) as reader:
        [batch] = reader.batches(2)
    assert {key[-2:] for key in batch.keys} == {f"{view_of_epoch(4, 1, 2):02d}"}


def test_a_code_layer_takes_the_place_of_the_stored_codes(growing: Growing) -> None:
    root = growing.root
    before = {path: path.read_bytes() for path in Path(root).rglob("*") if path.is_file()}
    growing.add_layer(0)
    assert all(path.read_bytes() == data for path, data in before.items())
    own = open_dataset(root)
    assert own.manifest.grid == GRID  # the base's, as long as nobody chooses
    layer = pickle.loads(pickle.dumps(open_dataset(root, codes=LAYER[:8])))
    assert layer.manifest.tokenizer_fingerprint == LAYER and layer.manifest.grid == LAYER_GRID
    assert layer.fingerprint != own.fingerprint
    assert open_dataset(root, codes="f" * 8).fingerprint == own.fingerprint  # the base's own

    ours, theirs = all_read(own, epochs=2), all_read(layer, epochs=2)
    assert ours.keys() == theirs.keys() == {sample_key(i, view) for i in STORED for view in range(2)}
    for view in range(2):
        for i in STORED:
            key = sample_key(i, view)
            assert ours[key][0] == theirs[key][0]
            assert theirs[key][1] == tuple(layer_codes(i, view).tolist())

    table = layer.read_index(1, 0)
    assert table.column_names == own.read_index(1, 0).column_names
    assert index_header(table.schema)["codebook_size"] == LAYER_CODEBOOK
    assert table.drop_columns(["codes"]).equals(own.read_index(1, 0).drop_columns(["codes"]))
    files = ds.dataset(index_files(root, codes=LAYER))
    assert files.schema.names == ["key", "sample_id", "view", "codes"]
    assert files.to_table().column("view").to_pylist() == [0] * 8 + [1] * 8
    assert index_header(files.schema) == {
        "format_version": 1,
        "kind": "codes",
        "grid": [2, 2],
        "codebook_size": LAYER_CODEBOOK,
    }


def test_a_layer_covers_what_it_covers(growing: Growing) -> None:
    root = growing.root
    growing.add_layer(0)
    growing.add_views(2, 1)
    assert open_dataset(root, codes=LAYER).num_views == 2 and open_dataset(root).num_views == 3
    with pytest.raises(InputError, match=r"2 finished views with codes of c{64}, 3 are asked for"):
        open_dataset(root, views=3, codes=LAYER)
    growing.add_layer(2)
    layer = open_dataset(root, codes=LAYER)
    assert layer.num_views == 3
    found = all_read(layer, epochs=3)
    assert found[sample_key(4, 2)][1] == tuple(layer_codes(4, 2).tolist())
    assert open_dataset(root, views=1, codes=LAYER).index_files() == layer.index_files(0)
    with pytest.raises(InputError, match=r"no finished code layer 12345678 \(there are cccccccc\)"):
        open_dataset(root, codes="12345678")
    with pytest.raises(InputError, match=r"codes/cccccccc/v00 is a code layer, without pixels"):
        open_dataset(layer_url(root, LAYER, 0))


def test_a_copy_made_with_any_tool_is_sound(growing: Growing, tmp_path: Path) -> None:
    growing.add_views(2, 2)
    growing.add_layer(0)
    growing.add_layer(2)
    read = [all_read(open_dataset(growing.root, codes=codes), epochs=4) for codes in (None, LAYER)]
    shutil.copytree(growing.root, tmp_path / "copy")
    shutil.rmtree(growing.root)
    copy = str(tmp_path / "copy")
    assert [all_read(open_dataset(copy, codes=codes), epochs=4) for codes in (None, LAYER)] == read
    for part in parts(copy):
        for view in range(part.num_views):
            for shard in open_table(part.url).shards(view):
                assert shard.tar.startswith(f"{copy}/") and storage.exists(shard.tar)


def test_what_belongs_to_another_dataset_is_refused(
    growing: Growing, tmp_path: Path, small_dataset: Callable[..., Any]
) -> None:
    growing.add_views(2, 1)
    growing.add_layer(0)
    other = Growing(str(tmp_path / "other"), small_dataset, seed=1)
    other.write()
    ours, theirs = read_manifest(growing.root).fingerprint, read_manifest(other.root).fingerprint
    shutil.copytree(f"{growing.root}/more", f"{other.root}/more")
    with pytest.raises(
        InputError, match=f"views of another dataset: it was made for {ours}, but .* {theirs}"
    ):
        open_dataset(other.root)
    assert open_dataset(other.root, views=2).fingerprint == theirs
    shutil.copytree(f"{growing.root}/codes", f"{other.root}/codes")
    with pytest.raises(InputError, match=f"codes of other pixels: it was made for {ours}, but .* {theirs}"):
        open_dataset(other.root, views=2, codes=LAYER)


def test_codes_of_two_tokenizers_are_never_mixed(growing: Growing) -> None:
    other = dataclasses.replace(growing.small.plan.tokenizer, fingerprint="e" * 64)
    growing.add_views(2, 1, tokenizer=other)
    with pytest.raises(InputError, match=r"e{64}, .* of f{64}; codes of two tokenizers are never mixed"):
        open_dataset(growing.root)
    shutil.rmtree(f"{growing.root}/more")
    growing.add_views(2, 1)
    growing.add_layer(0)
    growing.add_layer(2, fingerprint="c" * 8 + "d" * 56)
    with pytest.raises(InputError, match=r"c{8}d{56}, not of c{64}"):
        open_dataset(growing.root, codes=LAYER[:8])


def test_a_layer_of_other_rows_is_refused(growing: Growing) -> None:
    growing.add_layer(0)
    dataset = open_dataset(growing.root, codes=LAYER)
    layers = dataset._layers  # as if two index files had been swapped, tables included
    right = layers[0].shard
    layers[0].shard = lambda view, i: right(view, 2 - i)  # type: ignore[method-assign]
    with pytest.raises(InputError, match="holds other samples than"):
        dataset.read_index(0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "f" * 64}, "has the codes of tokenizer f{64} already"),
        ({"image_size": 32}, "reads 32 pixels, the crops stored at .* have 16"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(
    growing: Growing, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        layer_plan(open_table(growing.root), layer_spec(**change), Recipe())


def test_wrong_codes_do_not_become_a_shard(growing: Growing) -> None:
    shard = open_table(growing.root).shard(0, 1)  # ids 4 and 6
    ids, codes = np.array([4, 6]), np.zeros((2, 4), np.uint16)

    def build(ids: np.ndarray, codes: np.ndarray) -> object:
        return build_layer_shard(shard, 0, ids, codes, grid=LAYER_GRID, codebook_size=LAYER_CODEBOOK)

    build(ids, codes)
    for wrong_ids, wrong_codes, message in (
        (ids, codes + np.uint16(LAYER_CODEBOOK), "outside the codebook of 300"),
        (ids, codes[:1], "no codes for 2 samples"),
        (ids, codes.astype(np.int64), "int64"),
        (ids[::-1].copy(), codes, "strictly ascending"),
        (ids[:1], codes, "strictly ascending"),
    ):
        with pytest.raises(BuildError, match=message):
            build(wrong_ids, wrong_codes)


def test_a_shard_without_samples_has_a_layer_too(tmp_path: Path, small_dataset: Callable[..., Any]) -> None:
    rejected = dict.fromkeys(range(4, 7), "empty")
    grown = Growing(str(tmp_path / "tokens"), small_dataset, rejected=rejected)
    grown.write()
    pixels = open_table(grown.root)
    built = build_layer_shard(
        pixels.shard(0, 1),
        0,
        np.empty(0, np.int64),
        np.empty((0, 4), np.uint16),
        grid=LAYER_GRID,
        codebook_size=LAYER_CODEBOOK,
    )
    assert built.samples == 0 and built.view is None
    assert layer_plan(pixels, layer_spec(), Recipe()).samples == (4, 0, 2)


def test_index_rows_of_a_layer_stay_near_the_entropy_of_their_codes(growing: Growing, tmp_path: Path) -> None:
    """4,000 grids of 14 x 14 random codes of 8,192, the worst case: 318.5 bytes of codes each."""
    ids = np.sort(np.random.default_rng(0).choice(10**7, 4000, replace=False))
    codes = np.random.default_rng(1).integers(0, 8192, (4000, 196), np.uint16)
    shard = dataclasses.replace(open_table(growing.root).shard(0, 0), samples=4000)
    built = build_layer_shard(shard, 0, ids, codes, grid=(14, 14), codebook_size=8192)
    assert 196 * 13 / 8 < len(built.index) / 4000 < 340


def test_the_summary_names_every_part(growing: Growing) -> None:
    growing.add_views(2, 1)
    growing.add_views(3, 1, items=1)
    growing.add_layer(0)
    found = summarize(open_dataset(growing.root))
    assert [(part.place, part.finished, part.crops) for part in found.parts] == [
        ("base", True, 16),
        ("more/v02", True, 8),
        ("more/v03", False, 0),
        ("codes/cccccccc/v00", True, 16),
    ]
    stored = sum(path.stat().st_size for path in Path(growing.root, "more/v02/shards").iterdir())
    assert found.parts[1].tar_bytes == stored and found.parts[3].tar_bytes == 0
    text = in_words(found)
    assert "view 3, unfinished: readers do not see it" in text
    assert "codes of views 0 to 1 by tokenizer cccccccc, 16 crops" in text
    layer = summarize(open_dataset(growing.root, codes=LAYER))
    assert layer.codes is not None and layer.codes.codebook_size == LAYER_CODEBOOK
    assert layer.codes.patches == 16 * 4


def test_parts_on_an_object_store(s3_url: str, small_dataset: Callable[..., Any]) -> None:
    grown = Growing(f"{s3_url}/tokens", small_dataset)
    grown.write()
    grown.add_views(2, 1)
    grown.add_layer(0)
    assert [part.kind for part in parts(grown.root)] == ["base", "views", "codes"]
    assert open_dataset(grown.root).num_views == 3
    layer = open_dataset(grown.root, codes=LAYER)
    assert all_read(layer, epochs=1) and layer.shard(1, 0).tar.startswith(f"{s3_url}/tokens/shards/v01")
    [code_part] = [part for part in parts(grown.root) if part.kind == "codes"]
    assert open_table(code_part.url).shard(1, 0).tar == layer.shard(1, 0).tar

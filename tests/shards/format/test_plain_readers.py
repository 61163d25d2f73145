"""A token dataset is read with plain webdataset and plain pyarrow: nothing of ours is on the reading side."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from shards.format.records import StoredSample
from shards.pixels.views import decode_crop
from shards.writer.commit import items

wds = pytest.importorskip("webdataset", reason="webdataset is not installed")


@pytest.fixture
def written(tmp_path: Path, small_dataset: Callable[..., Any]) -> tuple[Path, list[StoredSample]]:
    """A token dataset of two views and three shards each, and the samples that went into it."""
    dataset = small_dataset()
    dataset.write(str(tmp_path))
    return tmp_path, [sample for item in items(dataset.plan) for sample in dataset.content(item)[0]]


def test_plain_webdataset_reads_pixels_and_codes(written: tuple[Path, list[StoredSample]]) -> None:
    root, samples = written

    # only these two decoders: webdataset's default ones would unpickle
    tars = sorted(glob.glob(f"{root}/shards/*.tar"))
    decoders = [wds.imagehandler("rgb8"), wds.handle_extension("npy", wds.autodecode.npy_loads)]
    found = list(wds.WebDataset(tars, shardshuffle=False).decode(*decoders, pre=[], post=[]))

    assert [sample["__key__"] for sample in found] == [sample.key for sample in samples]
    for there, sample in zip(found, samples, strict=True):
        assert {name for name in there if not name.startswith("__")} == {"codes.npy", "jpg"}
        assert there["codes.npy"].dtype == np.uint16 and there["codes.npy"].shape == (2, 3)
        np.testing.assert_array_equal(there["codes.npy"], sample.codes)
        # Pillow decodes a stored crop to the very pixels that simplejpeg does
        np.testing.assert_array_equal(there["jpg"], decode_crop(sample.image))


def test_plain_pyarrow_reads_the_whole_index_as_one_table(written: tuple[Path, list[StoredSample]]) -> None:
    root, samples = written

    manifest = json.loads((root / "manifest.json").read_text())
    shard_table = pq.read_table(root / manifest["table"]["path"])
    files = [str(root / path) for path in shard_table.column("index").to_pylist()]
    table = pyarrow.dataset.dataset(files).to_table()

    schema = pq.read_schema(files[0])
    assert json.loads(schema.metadata[b"beit2_shards"])["grid"] == [2, 3]
    assert schema.field("image_offset").metadata[b"unit"] == b"bytes from the start of the tar"
    rejects = pyarrow.dataset.dataset(str(root / "rejects")).to_table().to_pylist()
    assert {(row["sample_id"], row["source"], row["reason"]) for row in rejects} == {
        (5, "s3://bucket/images/5.png", "truncated")
    }

    assert table.num_rows == manifest["samples_written"] == len(samples)
    assert table.column("key").to_pylist() == [sample.key for sample in samples]
    assert table.column("label").to_pylist() == [sample.label for sample in samples]
    expected = np.stack([np.asarray(sample.codes) for sample in samples])
    assert table.column("codes").to_pylist() == expected.reshape(len(samples), 6).tolist()
    assert pc.list_flatten(table.column("codes")).type == pa.uint16()

    # the questions people ask: how often each code occurs, which images hold one, one label's rows
    counts = {
        entry["values"]: entry["counts"]
        for entry in pc.value_counts(pc.list_flatten(table.column("codes"))).to_pylist()
    }
    values, occurrences = np.unique(expected, return_counts=True)
    assert counts == dict(zip(values.tolist(), occurrences.tolist(), strict=True))
    bees = pyarrow.dataset.dataset(files).to_table(columns=["key"], filter=pc.field("label") == 1)
    assert bees.column("key").to_pylist() == [sample.key for sample in samples if sample.label == 1]
    second_view = pyarrow.dataset.dataset(files).count_rows(filter=pc.field("view") == 1)
    assert second_view == len(samples) // 2


def test_offsets_of_the_index_lead_to_the_images_without_a_tar_library(
    written: tuple[Path, list[StoredSample]],
) -> None:
    root, samples = written
    manifest = json.loads((root / "manifest.json").read_text())
    images: dict[str, bytes] = {}
    for shard in pq.read_table(root / manifest["table"]["path"]).to_pylist():
        archive = (root / shard["tar"]).read_bytes()
        for row in pq.read_table(root / shard["index"]).to_pylist():
            images[row["key"]] = archive[row["image_offset"] : row["image_offset"] + row["image_bytes"]]
    assert images == {sample.key: sample.image for sample in samples}

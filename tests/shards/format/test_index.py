"""The index: every column round trip, its size per grid, and refusal of what is not an index."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.format.index import (
    METADATA_KEY,
    IndexFormatError,
    codes_of,
    index_header,
    index_schema,
    read_index,
    read_rejects,
    write_index,
    write_rejects,
)
from shards.format.records import RejectedSample, StoredSample, to_utf8

GRID = (2, 3)
MakeSample = Callable[..., StoredSample]
PLACE = ["key", "sample_id", "view", "image_offset", "image_bytes", "image_hash"]
ORIGIN = ["source", "source_width", "source_height"]
TOKEN_COLUMNS = [*PLACE, *ORIGIN, "crop", "hflip", "jitter", "label", "codes"]
IMAGE_COLUMNS = [*PLACE, "extension", *ORIGIN, "label"]


def test_every_value_of_a_token_index_comes_back(make_sample: MakeSample) -> None:
    samples = [make_sample(i, 3) for i in (0, 4, 5, 9)]
    table = read_index(write_index(samples, [10, 20, 30, 40], GRID, 16))

    assert table.column_names == TOKEN_COLUMNS
    header = {"format_version": 1, "kind": "tokens", "grid": [2, 3], "codebook_size": 16}
    assert index_header(table.schema) == header
    for row, offset, sample in zip(table.to_pylist(), [10, 20, 30, 40], samples, strict=True):
        assert sample.crop is not None and sample.codes is not None
        assert row["key"] == f"{sample.sample_id:010d}-03"
        assert (row["sample_id"], row["view"], row["image_offset"]) == (sample.sample_id, 3, offset)
        assert row["image_bytes"] == len(sample.image)
        assert row["image_hash"] == hashlib.sha256(sample.image).digest()
        for column in ("source", "source_width", "source_height", "hflip", "label"):
            assert row[column] == getattr(sample, column)
        assert row["crop"] == dataclasses.asdict(sample.crop)
        assert row["jitter"] == (
            None if sample.jitter is None else {**dataclasses.asdict(sample.jitter), "order": [2, 0, 1]}
        )
        assert row["codes"] == sample.codes.reshape(-1).tolist()
    assert None in table.column("label").to_pylist()
    assert {row is None for row in table.column("jitter").to_pylist()} == {True, False}


def test_image_index_has_no_view_columns_and_keeps_the_extension(make_sample: MakeSample) -> None:
    samples = [dataclasses.replace(make_sample(i, tokens=False), extension="png") for i in range(3)]
    table = read_index(write_index(samples, [0, 1, 2], None, None))
    assert table.column_names == IMAGE_COLUMNS
    assert table.column("extension").to_pylist() == ["png"] * 3
    assert index_header(table.schema)["kind"] == "images"


def test_codes_come_back_as_uint16_rows(make_sample: MakeSample) -> None:
    samples = [make_sample(i) for i in range(7)]
    codes = codes_of(read_index(write_index(samples, range(7), GRID, 16), ["codes"]))
    assert codes.dtype == np.uint16
    np.testing.assert_array_equal(codes, np.stack([np.asarray(s.codes).reshape(-1) for s in samples]))
    # also from a part of a table, and from tables put together
    table = read_index(write_index(samples, range(7), GRID, 16))
    np.testing.assert_array_equal(codes_of(table.slice(2, 3)), codes[2:5])
    np.testing.assert_array_equal(codes_of(pa.concat_tables([table, table])), np.concatenate([codes, codes]))
    assert codes_of(table.slice(0, 0)).shape == (0, 6)


def test_a_shard_without_samples_has_an_index_too() -> None:
    assert codes_of(read_index(write_index([], [], GRID, 16))).shape == (0, 6)
    assert read_index(write_index([], [], None, None)).num_rows == 0


@pytest.mark.parametrize("codebook_size", [8192, 65536])
def test_thirteen_bit_codes_take_at_most_350_bytes_a_grid(
    make_sample: MakeSample, codebook_size: int
) -> None:
    # uniformly random codes are the worst case: nothing can be compressed below 13 (16) bits a code
    rng = np.random.default_rng(0)
    sample = make_sample(0)
    codes = rng.integers(0, codebook_size, (2000, 14, 14), np.uint16)
    samples = [dataclasses.replace(sample, sample_id=i, codes=grid) for i, grid in enumerate(codes)]
    data = write_index(samples, [0] * len(samples), (14, 14), codebook_size)

    metadata = pq.ParquetFile(pa.BufferReader(data)).metadata
    columns = [metadata.row_group(0).column(i) for i in range(metadata.num_columns)]
    [column] = [column for column in columns if column.path_in_schema.startswith("codes.")]
    per_grid = column.total_compressed_size / len(samples)
    assert metadata.num_row_groups == 1
    assert per_grid <= (350 if codebook_size == 8192 else 500)
    np.testing.assert_array_equal(codes_of(read_index(data)), codes.reshape(2000, 196))


def test_reading_some_columns_only_and_a_column_that_is_not_there(make_sample: MakeSample) -> None:
    data = write_index([make_sample(1)], [512], GRID, 16)
    assert read_index(data, ["image_offset", "label"]).column_names == ["image_offset", "label"]
    with pytest.raises(IndexFormatError, match="no column lable"):
        read_index(data, ["lable"])


def test_what_is_not_an_index_is_refused(make_sample: MakeSample) -> None:
    good = write_index([make_sample(1)], [512], GRID, 16)
    stranger = pa.BufferOutputStream()
    pq.write_table(pa.table({"key": ["a"]}), stranger)
    newer = pa.BufferOutputStream()
    header = json.dumps({"format_version": 2, "kind": "tokens"}).encode()
    pq.write_table(pa.table({"key": ["a"]}).replace_schema_metadata({METADATA_KEY: header}), newer)
    for data, what in [
        (b"", "not a readable Parquet"),
        (b"nonsense" * 100, "not a readable Parquet"),
        (good[: len(good) // 2], "not a readable Parquet"),
        (stranger.getvalue().to_pybytes(), "not a shard index"),
        (newer.getvalue().to_pybytes(), "version 2"),
    ]:
        with pytest.raises(IndexFormatError, match=what):
            read_index(data)


def test_a_token_index_needs_codes_crop_and_a_codebook_that_fits(make_sample: MakeSample) -> None:
    sample = make_sample(1)
    for lacking in ({"codes": None}, {"crop": None}):
        with pytest.raises(ValueError, match="has no"):
            write_index([dataclasses.replace(sample, **lacking)], [0], GRID, 16)
    with pytest.raises(ValueError, match="uint16"):
        index_schema(GRID, 65537)
    with pytest.raises(ValueError, match="together"):
        index_schema(GRID, None)


def test_units_and_types_stand_in_the_schema() -> None:
    schema = index_schema((14, 14), 8192)
    assert all(field.metadata and field.metadata[b"unit"] for field in schema)
    assert schema.field("codes").type == pa.list_(pa.uint16(), 196)
    assert [field.name for field in schema if field.nullable] == ["jitter", "label"]


def test_names_that_are_not_utf8_are_stored_as_utf8(make_sample: MakeSample) -> None:
    name = b"/data/caf\xe9.jpg".decode("utf-8", "surrogateescape")
    assert to_utf8(name) == "/data/caf\\xe9.jpg"
    assert to_utf8("/data/café.jpg") == "/data/café.jpg"
    assert to_utf8("\ud800") == "\\ud800"
    table = read_index(write_index([dataclasses.replace(make_sample(1), source=name)], [0], GRID, 16))
    assert table.column("source").to_pylist() == ["/data/caf\\xe9.jpg"]

    reject = RejectedSample(sample_id=7, source=name, reason="truncated", message=f"cannot read {name}")
    [row] = read_rejects(write_rejects([reject])).to_pylist()
    assert row == dataclasses.asdict(reject) | {
        "source": "/data/caf\\xe9.jpg",
        "message": "cannot read /data/caf\\xe9.jpg",
    }

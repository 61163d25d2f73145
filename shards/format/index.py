"""The index of a shard: one Parquet file whose row i describes sample i of the tar, codes included.

Readers take offsets, labels and codes from here and never parse the tar; people query it with pyarrow.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.format.records import RejectedSample, StoredSample, to_utf8

FORMAT_VERSION = 1
METADATA_KEY = b"beit2_shards"
MAX_CODEBOOK_SIZE = 65536


class IndexFormatError(Exception):
    """The bytes are Parquet, or not even that, but not an index that this version can read."""


def _field(name: str, kind: pa.DataType, unit: str, *, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"unit": unit})


_PLACE = (
    _field("key", pa.string(), "name of the sample in the tar, without extension"),
    _field("sample_id", pa.int64(), "id, the same in every view"),
    _field("view", pa.int8(), "number of the view"),
    _field("image_offset", pa.int64(), "bytes from the start of the tar"),
    _field("image_bytes", pa.int32(), "bytes"),
    _field("image_hash", pa.binary(32), "sha256 of the encoded image"),
)
_ORIGIN = (
    _field("source", pa.string(), "URL, or URL#member"),
    _field("source_width", pa.int32(), "pixels, after orientation"),
    _field("source_height", pa.int32(), "pixels, after orientation"),
)
_LABEL = _field("label", pa.int32(), "index into class_names of the manifest", nullable=True)
_CROP = pa.struct([_field(side, pa.int32(), "source pixels") for side in ("top", "left", "height", "width")])
# not a fixed-size list: Parquet cannot read one back from under a struct that is null
_JITTER = pa.struct(
    [
        *(
            _field(name, pa.float64(), "factor, 1 = unchanged")
            for name in ("brightness", "contrast", "saturation")
        ),
        _field(
            "order", pa.list_(pa.int8()), "0 brightness, 1 contrast, 2 saturation, in order of application"
        ),
    ]
)

REJECTS_SCHEMA = pa.schema(
    [
        _field("sample_id", pa.int64(), "id"),
        _field("source", pa.string(), "URL, or URL#member"),
        _field("reason", pa.string(), "short stable word"),
        _field("message", pa.string(), "for people"),
    ]
)


def index_schema(grid: tuple[int, int] | None, codebook_size: int | None) -> pa.Schema:
    """Columns of an index: of an image dataset where `grid` is None, else of a token dataset.

    The schema's metadata holds, as JSON, format version, kind, grid [rows, columns] and codebook size; each
    field's metadata its unit.
    """
    if grid is None or codebook_size is None:
        if grid is not None or codebook_size is not None:
            raise ValueError("grid and codebook_size come together, or neither")
        header: dict[str, Any] = {"format_version": FORMAT_VERSION, "kind": "images"}
        extension = _field("extension", pa.string(), "of the member in the tar, without dot")
        fields = (*_PLACE, extension, *_ORIGIN, _LABEL)
    else:
        if not 1 <= codebook_size <= MAX_CODEBOOK_SIZE:
            raise ValueError(
                f"codebook size {codebook_size} does not fit uint16 codes (1..{MAX_CODEBOOK_SIZE})"
            )
        header = {
            "format_version": FORMAT_VERSION,
            "kind": "tokens",
            "grid": list(grid),
            "codebook_size": codebook_size,
        }
        fields = (
            *_PLACE,
            *_ORIGIN,
            _field("crop", _CROP, "source pixels"),
            _field("hflip", pa.bool_(), "mirrored after cropping"),
            _field("jitter", _JITTER, "colour factors baked into the image", nullable=True),
            _LABEL,
            _field(
                "codes", pa.list_(pa.uint16(), grid[0] * grid[1]), f"codes below {codebook_size}, row by row"
            ),
        )
    return pa.schema(fields, metadata={METADATA_KEY: json.dumps(header, sort_keys=True).encode()})


def write_index(
    samples: Sequence[StoredSample],
    offsets: Sequence[int],
    grid: tuple[int, int] | None,
    codebook_size: int | None,
) -> bytes:
    """The index as Parquet bytes; `offsets[i]` is where image i starts in the tar, in bytes."""
    columns: dict[str, list[Any] | pa.Array] = {
        "key": [sample.key for sample in samples],
        "sample_id": [sample.sample_id for sample in samples],
        "view": [sample.view for sample in samples],
        "image_offset": list(offsets),
        "image_bytes": [len(sample.image) for sample in samples],
        "image_hash": [hashlib.sha256(sample.image).digest() for sample in samples],
        "source": [to_utf8(sample.source) for sample in samples],
        "source_width": [sample.source_width for sample in samples],
        "source_height": [sample.source_height for sample in samples],
        "label": [sample.label for sample in samples],
    }
    if grid is None:
        columns["extension"] = [sample.extension for sample in samples]
    else:
        columns["crop"] = [_crop_row(sample) for sample in samples]
        columns["hflip"] = [sample.hflip for sample in samples]
        columns["jitter"] = [_jitter_row(sample) for sample in samples]
        columns["codes"] = codes_column([_codes_of(sample) for sample in samples], grid[0] * grid[1])
    return write_table(pa.table(columns, schema=index_schema(grid, codebook_size)))


def read_index(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of an index, or some columns of them. Raises IndexFormatError where it is not one."""
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        schema = file.schema_arrow
        index_header(schema)
        missing = sorted(set(columns or ()) - set(schema.names))
        if missing:
            raise IndexFormatError(
                f"the index has no column {', '.join(missing)}; it has {', '.join(schema.names)}"
            )
        return file.read(columns=None if columns is None else list(columns), use_threads=False)
    except (pa.ArrowInvalid, OSError) as error:
        raise IndexFormatError(f"not a readable Parquet file: {error}") from None


def index_header(schema: pa.Schema) -> dict[str, Any]:
    """`{"format_version", "kind"[, "grid", "codebook_size"]}` from an index's schema metadata."""
    text = (schema.metadata or {}).get(METADATA_KEY)
    if text is None:
        raise IndexFormatError(
            f"a Parquet file without {METADATA_KEY.decode()} metadata is not a shard index"
        )
    header = json.loads(text)
    if header["format_version"] != FORMAT_VERSION:
        raise IndexFormatError(
            f"index format version {header['format_version']}; this program reads version {FORMAT_VERSION}"
        )
    return header


def codes_of(table: pa.Table) -> np.ndarray:
    """The codes of an index table as uint16 [rows, grid area]."""
    area = table.schema.field("codes").type.list_size
    parts = [as_numpy(chunk.flatten()).reshape(-1, area) for chunk in table.column("codes").chunks]
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty((0, area), np.uint16), *parts])


def as_numpy(numbers: pa.Array) -> np.ndarray:
    """An Arrow array of numbers without nulls as numpy, read-only, without a copy.

    pyarrow's own `to_numpy` imports pandas, which costs every worker 0.2 s and 50 MB.
    """
    return np.from_dlpack(numbers)


def codes_column(codes: Sequence[np.ndarray], area: int) -> pa.FixedSizeListArray:
    """Grid-shaped uint16 codes as an Arrow column of fixed-size lists."""
    flat = np.stack(codes).astype(np.uint16, casting="safe").reshape(-1) if codes else np.empty(0, np.uint16)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat, pa.uint16()), type=pa.list_(pa.uint16(), area))


def write_rejects(rejects: Sequence[RejectedSample]) -> bytes:
    """Rejected samples as Parquet bytes, in the order given."""
    rows = {
        "sample_id": [sample.sample_id for sample in rejects],
        "source": [to_utf8(sample.source) for sample in rejects],
        "reason": [sample.reason for sample in rejects],
        "message": [to_utf8(sample.message) for sample in rejects],
    }
    return write_table(pa.table(rows, schema=REJECTS_SCHEMA))


def read_rejects(data: bytes) -> pa.Table:
    """The rows of a rejects file."""
    return pq.read_table(pa.BufferReader(data), use_threads=False)


def write_table(table: pa.Table) -> bytes:
    """Parquet bytes in one row group: zstd, every column dictionary-encoded.

    The dictionary is what keeps 13-bit codes at 13 bits: 324 B per 14x14 grid with 4,000 rows, 329 B with
    2,000 (uniformly random codes, the worst case); plain Parquet widens them to 790 B.
    """
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, compression="zstd", use_dictionary=True) as writer:
        writer.write_table(table, row_group_size=max(1, table.num_rows))
    return sink.getvalue().to_pybytes()


def _codes_of(sample: StoredSample) -> np.ndarray:
    if sample.codes is None:
        raise ValueError(f"sample {sample.key} has no codes; a token index needs them")
    return sample.codes


def _crop_row(sample: StoredSample) -> dict[str, int]:
    crop = sample.crop
    if crop is None:
        raise ValueError(f"sample {sample.key} has no crop box; a token index needs it")
    return {"top": crop.top, "left": crop.left, "height": crop.height, "width": crop.width}


def _jitter_row(sample: StoredSample) -> dict[str, Any] | None:
    jitter = sample.jitter
    if jitter is None:
        return None
    return {
        "brightness": jitter.brightness,
        "contrast": jitter.contrast,
        "saturation": jitter.saturation,
        "order": list(jitter.order),
    }

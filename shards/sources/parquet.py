"""Parquet files with image bytes in a column: a row per image, and their bytes, a few MB at a time."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import InputError
from shards.format.records import to_utf8
from shards.sources.table import Source
from shards.sources.tars import ListedFile, class_name

DEFAULT_LABEL_COLUMN = "label"

_BATCH_BYTES = 8 << 20
_DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError)
_MAX_CHEAP_ROWS = 1 << 20
"""A file may claim so many rows, however few its bytes; beyond that a row has at least one byte."""


def list_parquet(url: str, version: str, image_column: str, label_column: str | None) -> ListedFile:
    """One row per row of the file; sizes and hashes of the images come from reading them all once.

    Images are a column of bytes or a struct with `bytes` in it (Hugging Face's layout), labels one of numbers
    or names; Hugging Face's class names are honoured. A missing label column means no labels, unless it was
    asked for by name. InputError names what is missing.
    """
    rows: list[Source] = []
    labels: list[int | str | None] = []

    def append(image: bytes | None, label: int | str | None, reason: str | None, message: str | None) -> None:
        rows.append(
            Source(
                path=os.fsencode(url),
                row=len(rows),
                bytes=0 if image is None else len(image),
                version=version,
                image_hash=None if image is None else hashlib.sha256(image).digest(),
                reject_reason=reason,
                reject_message=message,
            )
        )
        labels.append(label)

    with storage.open_file(url) as file:
        try:
            parquet = pq.ParquetFile(file, pre_buffer=False)
            schema = parquet.schema_arrow
            _ = schema.names  # which may not be text
            starts = _group_starts(parquet, file.seek(0, 2))
        except _DAMAGE as error:
            append(None, None, "damaged_parquet", _message_of(error, url))
            return ListedFile(rows=[replace(rows[0], row=-1)], labels=labels)
        path = _image_path(schema, url, image_column)
        label_name = _label_name(schema, url, label_column)
        columns = [path] if label_name is None else [path, label_name]
        for group in range(parquet.num_row_groups):
            message = "fewer rows than the file says"
            try:
                for batch in _batches(parquet, group, columns):
                    found = [None] * batch.num_rows if label_name is None else _labels(batch, label_name)
                    for image, label in zip(_images(batch, image_column), found, strict=True):
                        if image:
                            append(image, label, None, None)
                        else:
                            append(None, None, "empty", "the row has no image bytes")
            except _DAMAGE as error:
                message = _message_of(error, url)
            while len(rows) < starts[group + 1]:
                append(None, None, "damaged_parquet", message)
        names = _huggingface_names(schema, label_name)
    return ListedFile(rows=rows, labels=labels, class_names=names)


def read_column(sources: Sequence[Source], image_column: str) -> Iterator[bytes]:
    """The images of rows of one file, in ascending order of rows; InputError where they are not there."""
    if not sources:
        return
    url = sources[0].url
    try:
        yield from _read_column(sources, image_column)
    except _DAMAGE as error:
        raise InputError(
            f"{url} can be read no more as when it was listed ({_message_of(error, url)}); bring the old one "
            "back, or prepare to another output"
        ) from None


def _read_column(sources: Sequence[Source], image_column: str) -> Iterator[bytes]:
    wanted = iter(sources)
    source = next(wanted, None)
    url = sources[0].url
    with storage.open_file(url) as file:
        parquet = pq.ParquetFile(file, pre_buffer=False)
        path = _image_path(parquet.schema_arrow, url, image_column)
        starts = _group_starts(parquet, file.seek(0, 2))
        for group in range(parquet.num_row_groups):
            position = starts[group]
            if source is None or source.row >= starts[group + 1]:
                continue
            for batch in _batches(parquet, group, [path]):
                images = None
                while source is not None and source.row < position + batch.num_rows:
                    images = _images(batch, image_column) if images is None else images
                    yield images[source.row - position] or b""
                    source = next(wanted, None)
                position += batch.num_rows
                if source is None or source.row >= starts[group + 1]:
                    break
    if source is not None:
        raise InputError(f"{url} has no row {source.row}; it has changed since it was listed")


def _group_starts(parquet: pq.ParquetFile, file_bytes: int) -> list[int]:
    """First row of each row group, and the end. ArrowInvalid where the file cannot hold what it claims."""
    sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
    if min(sizes, default=0) < 0 or sum(sizes) > max(file_bytes, _MAX_CHEAP_ROWS):
        raise pa.ArrowInvalid(f"{sum(sizes)} rows in {file_bytes} bytes")
    return list(itertools.accumulate(sizes, initial=0))


def _message_of(error: Exception, url: str) -> str:
    """What is damaged; of a remote file an OSError may be the network's, which is no fault of the file."""
    if isinstance(error, OSError) and not (isinstance(error, pa.ArrowException) or storage.is_local(url)):
        raise error
    return " ".join(str(error).split())[:200]


def _batches(parquet: pq.ParquetFile, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Batches of about 8 MB of one row group, judged by the average size of its rows."""
    metadata = parquet.metadata.row_group(group)
    row_bytes = metadata.total_byte_size / max(1, metadata.num_rows)
    batch_rows = int(min(4096, max(1, _BATCH_BYTES // max(1.0, row_bytes))))
    yield from parquet.iter_batches(batch_rows, row_groups=[group], columns=columns, use_threads=False)


def _image_path(schema: pa.Schema, url: str, image_column: str) -> str:
    """What to read for the images: the column, or its `bytes` field."""
    index = schema.get_field_index(image_column)
    if index < 0:
        raise InputError(
            f"{url} has no column {image_column}; set image_column to one of its: {', '.join(schema.names)}"
        )
    kind = schema.field(index).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
        if _is_bytes(kind):
            return f"{image_column}.bytes"
    if not _is_bytes(kind):
        raise InputError(
            f"column {image_column} of {url} is {kind}; set image_column to one of encoded images"
        )
    return image_column


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _images(batch: pa.RecordBatch, image_column: str) -> list[bytes | None]:
    column = batch.column(image_column)
    if pa.types.is_struct(column.type):
        # Fields of a null struct may hold bytes nevertheless.
        if column.null_count > 0:
            return [None if value is None else value["bytes"] for value in column.to_pylist()]
        column = column.field("bytes")
    return column.to_pylist()


def _labels(batch: pa.RecordBatch, label_name: str) -> list[int | str | None]:
    r"""Numbers or names; bytes of a name that are not UTF-8 are written as `\xff`."""
    column = batch.column(label_name)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_integer(column.type):
        return column.to_pylist()
    names = column.cast(pa.large_binary()).to_pylist()
    return [None if name is None else class_name(name.decode("utf-8", "surrogateescape")) for name in names]


def _label_name(schema: pa.Schema, url: str, label_column: str | None) -> str | None:
    name = DEFAULT_LABEL_COLUMN if label_column is None else label_column
    index = schema.get_field_index(name)
    if index < 0:
        if label_column is None:
            return None
        raise InputError(
            f"{url} has no column {name}; set label_column to one of its: {', '.join(schema.names)}"
        )
    kind = schema.field(index).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise InputError(f"column {name} of {url} is {kind}; set label_column to one of numbers or names")
    return name


def _huggingface_names(schema: pa.Schema, label_name: str | None) -> tuple[str, ...] | None:
    """Class names that `datasets` keeps in the schema's metadata, in the order of their numbers."""
    try:
        info = json.loads((schema.metadata or {})[b"huggingface"])
        names = info["info"]["features"][label_name]["names"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return None
    return tuple(to_utf8(str(name)) for name in names) if isinstance(names, list) else None

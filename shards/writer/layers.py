"""A code layer: the codes of another tokenizer for crops that are stored already, 2 % of their bytes.

It has plan, receipts, manifest and index files, a row for each row of the pixels' index, and no tars: each
shard names by place, size and hash the tar whose pixels were tokenized.
"""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.errors import InputError
from shards.dataset.dataset import ShardTable, views_url
from shards.format.build import BuildError, BuiltShard, PixelTar
from shards.format.index import (
    MAX_CODEBOOK_SIZE,
    METADATA_KEY,
    as_numpy,
    codes_column,
    codes_of,
    index_header,
    index_schema,
    read_index,
    write_table,
)
from shards.format.manifest import Recipe, ShardInfo, TokenizerSpec
from shards.format.plan import Plan
from shards.format.records import sample_key

_DATASET = "../../.."
"""The dataset as seen from a part of a layer, `codes/<tokenizer>/v<first view>`."""


def layer_plan(pixels: ShardTable, tokenizer: TokenizerSpec, recipe: Recipe) -> Plan:
    """The plan of a code layer for one part of a dataset: a shard of codes for every shard of its crops.

    Raises InputError where the stored crops do not fit the tokenizer.
    """
    manifest, stored = pixels.manifest, pixels.manifest.require_tokenizer()
    if tokenizer.fingerprint == stored.fingerprint:
        raise InputError(
            f"{pixels.url} has the codes of tokenizer {tokenizer.fingerprint} already; give another one"
        )
    if tokenizer.image_size != stored.image_size:
        raise InputError(
            f"the tokenizer reads {tokenizer.image_size} pixels, the crops stored at {pixels.url} "
            f"have {stored.image_size}; give a tokenizer of their size, or precompute from the images"
        )
    first_ids, samples = pixels.id_ranges()
    for view in range(1, pixels.num_views):
        if pixels.shard_sizes(view).tolist() != list(samples):
            raise InputError(f"the views of {pixels.url} hold different samples; verify the dataset")
    return Plan(
        kind="codes",
        inputs={"pixels": manifest.fingerprint, "tokenizer": tokenizer.fingerprint},
        recipe=recipe,
        first_ids=first_ids,
        samples=samples,
        first_view=manifest.first_view,
        views=pixels.num_views,
        class_names=manifest.class_names,
        tokenizer=tokenizer,
    )


def build_layer_shard(
    pixels: ShardInfo,
    first_view: int,
    sample_ids: np.ndarray,
    codes: np.ndarray,
    *,
    grid: tuple[int, int],
    codebook_size: int,
) -> BuiltShard:
    """One shard of a layer, its index re-read and compared.

    The index has the columns named here as in a token dataset; its metadata names kind `codes`. `pixels` is
    the shard of crops, of the part whose views begin with `first_view`; `sample_ids` int64 [n] are the rows
    of its index in order, `codes` uint16 [n, grid area] theirs. The same arguments give the same bytes.
    Raises BuildError where the codes cannot be this shard's.
    """
    if codes.dtype != np.uint16 or codes.shape != (pixels.samples, grid[0] * grid[1]):
        raise BuildError(
            f"{codes.dtype}{codes.shape} are no codes for {pixels.samples} samples on a grid of {grid}"
        )
    if sample_ids.shape != (pixels.samples,) or (np.diff(sample_ids) <= 0).any():
        raise BuildError(f"sample ids of {pixels.name} are not {pixels.samples} in strictly ascending order")
    if codes.size and int(codes.max()) >= min(codebook_size, MAX_CODEBOOK_SIZE):
        raise BuildError(
            f"code {int(codes.max())} of {pixels.name} is outside the codebook of {codebook_size}"
        )
    if pixels.tar_sha256 is None:
        raise BuildError(f"{pixels.tar} was indexed in place; it holds sources, not crops")
    columns = {
        "key": [sample_key(sample_id, pixels.view) for sample_id in sample_ids.tolist()],
        "sample_id": sample_ids,
        "view": np.full(pixels.samples, pixels.view, np.int8),
        "codes": codes_column(list(codes), grid[0] * grid[1]),
    }
    tokens = index_schema(grid, codebook_size)
    header = index_header(tokens) | {"kind": "codes"}
    metadata = {METADATA_KEY: json.dumps(header, sort_keys=True).encode()}
    schema = pa.schema([tokens.field(name) for name in columns], metadata=metadata)
    index = write_table(pa.table(columns, schema=schema))
    stored = read_index(index)
    same = np.array_equal(as_numpy(stored.column("sample_id").combine_chunks()), sample_ids)
    if not same or not np.array_equal(codes_of(stored), codes):
        raise BuildError(f"the re-read index of {pixels.name} holds other rows than were written")
    path = storage.join(views_url(_DATASET, first_view), "shards", storage.name(pixels.tar))
    return BuiltShard(
        tar=None,
        foreign=None,
        index=index,
        rejects=None,
        grid=grid,
        codebook_size=codebook_size,
        view=pixels.view if pixels.samples else None,
        samples=pixels.samples,
        rejected={},
        sample_ids=sample_ids,
        rejected_ids=np.empty(0, np.int64),
        pixels=PixelTar(path=path, bytes=pixels.tar_bytes, sha256=pixels.tar_sha256),
    )

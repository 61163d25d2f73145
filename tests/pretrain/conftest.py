"""A tiny token dataset, made once with random codes: pretraining needs no trained tokenizer to be tested."""

from __future__ import annotations

import numpy as np
import pytest

from shards.format.build import build_shard
from shards.format.manifest import TokenizerSpec
from shards.format.plan import Plan
from shards.format.records import StoredSample
from shards.pixels.views import CropBox, decode_crop, encode_crop
from shards.writer.commit import commit, finish, pending, start

NUM_SAMPLES = 40
CODEBOOK_SIZE = 8


@pytest.fixture(scope="session")
def token_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 crops of 32 px in two views; a patch's code is its brightness, so there is something to learn."""
    root = str(tmp_path_factory.mktemp("tokens") / "out")
    spec = TokenizerSpec(fingerprint="f" * 64, codebook_size=CODEBOOK_SIZE, image_size=32, grid=(4, 4))
    plan = Plan(
        kind="tokens",
        inputs={"images": "i", "tokenizer": "t"},
        first_ids=(0, 16, 32, NUM_SAMPLES),
        views=2,
        tokenizer=spec,
    )
    return write_tokens(root, plan)


def write_tokens(root: str, plan: Plan) -> str:
    """Write all shards of a plan, and return the root."""
    start(root, plan)
    for item in pending(root, plan):
        samples = [_sample(sample_id, item.view) for sample_id in range(item.first_id, item.end_id)]
        commit(root, plan, item, build_shard(samples, [], grid=(4, 4), codebook_size=CODEBOOK_SIZE))
    finish(root, plan, decode_crop)
    return root


def _sample(sample_id: int, view: int) -> StoredSample:
    rng = np.random.default_rng([sample_id, view])
    # Smooth pictures, so that visible patches say something of masked ones.
    y, x = np.mgrid[:4, :4]
    codes = np.clip(
        rng.uniform(0, 4) + y * rng.uniform(0, 0.8) + x * rng.uniform(0, 0.8), 0, CODEBOOK_SIZE - 1
    )
    codes = codes.astype(np.uint16)
    pixels = np.repeat(np.repeat((codes * 32).astype(np.uint8), 8, axis=0), 8, axis=1)
    return StoredSample(
        sample_id=sample_id,
        view=view,
        image=encode_crop(np.ascontiguousarray(np.repeat(pixels[..., None], 3, axis=2)), 95),
        extension="jpg",
        source=f"{sample_id}.png",
        source_width=32,
        source_height=32,
        label=None,
        crop=CropBox(top=0, left=0, height=32, width=32),
        codes=codes,
    )

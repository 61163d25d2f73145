"""Pieces of verification: which samples are looked at, and how a JPEG was encoded."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from shards.pixels.views import encode_crop
from shards.upkeep.check import is_chosen, read_jpeg


def test_a_share_of_samples_is_chosen_by_id_alone() -> None:
    ids = np.arange(100_000, dtype=np.int64)
    chosen = is_chosen(ids, 0.01)
    assert 800 < chosen.sum() < 1200
    assert (is_chosen(ids, 0.1) >= chosen).all()  # a larger share contains a smaller one
    np.testing.assert_array_equal(is_chosen(ids[5000:6000], 0.1), is_chosen(ids, 0.1)[5000:6000])
    assert is_chosen(ids, 1.0).all() and not is_chosen(ids, 0.0).any()
    assert is_chosen(ids[:3], 1e-9).sum() == 1  # at least one of each shard
    assert not is_chosen(np.empty(0, np.int64), 0.5).any()


def test_jpeg_headers_tell_quality_and_kind() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (24, 16, 3), np.uint8)
    plain = read_jpeg(encode_crop(pixels, 95))
    assert plain.baseline and plain.parameters == read_jpeg(encode_crop(pixels[:8], 95)).parameters
    assert plain.parameters != read_jpeg(encode_crop(pixels, 94)).parameters
    for settings in ({"progressive": True, "subsampling": 2}, {"subsampling": 0}):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95, **settings)
        other = read_jpeg(buffer.getvalue())
        assert other.baseline != settings.get("progressive", False)
        assert other != plain
    for data in (b"", b"\xff\xd8", b"\xff\xd8\xff\xe0\xff", b"text that is no picture"):
        with pytest.raises(ValueError, match="no JPEG header"):
            read_jpeg(data)

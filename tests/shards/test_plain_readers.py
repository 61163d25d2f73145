"""A token dataset is read with plain webdataset and plain pyarrow, and by nothing of ours."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from shards.commit import items
from shards.samples import StoredSample
from shards.views import decode_crop

webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")


@pytest.fixture
def written(tmp_path: Path, small_dataset: Callable[..., Any]) -> tuple[Path, list[StoredSample]]:
    """A token dataset of two views, and the samples that went into it."""
    dataset = small_dataset()
    dataset.write(str(tmp_path))
    return tmp_path, [sample for item in items(dataset.plan) for sample in dataset.content(item)[0]]


def tars(root: Path) -> list[str]:
    return sorted(glob.glob(f"{root}/shards/*.tar"))


def by_webdataset(root: Path) -> Iterator[dict[str, Any]]:
    """Three lines, with jpg and npy decoders only: nothing in a tar may choose to be unpickled."""
    from webdataset import autodecode

    decoders = [autodecode.imagehandler("rgb8", extensions=["jpg"]), webdataset.handle_extension("codes.npy", autodecode.npy_loads if hasattr(autodecode, "npy_loads") else _npy)]  # fmt: skip
    yield from webdataset.WebDataset(tars(root), shardshuffle=False, empty_check=False).decode(*decoders)


def _npy(data: bytes) -> np.ndarray:
    import io

    return np.load(io.BytesIO(data), allow_pickle=False)

"""The two records that flow through every write pass: a sample that is stored, and one that is rejected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # the records are plain data: holding one must not import image libraries
    from shards.pixels.views import CropBox, Jitter

MAX_SAMPLE_ID = 10**10
MAX_VIEWS = 100


def sample_key(sample_id: int, view: int) -> str:
    """`0000000042-00`: unique in a dataset, sorts like (sample_id, view), and holds no dot.

    A dotted key would silently merge samples in webdataset, which cuts names at the first dot.
    """
    if not (0 <= sample_id < MAX_SAMPLE_ID and 0 <= view < MAX_VIEWS):
        raise ValueError(
            f"sample {sample_id} view {view} has no key: ids stay below {MAX_SAMPLE_ID}, views below 100"
        )
    return f"{sample_id:010d}-{view:02d}"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StoredSample:
    """One image as a shard holds it, and where it came from.

    `image` is the encoded file: the untouched source in an image dataset, the JPEG crop in a token dataset.
    `source` is `URL#member` or a URL; width and height are the source's, in pixels after orientation.
    `codes` is uint16 in the shape of the tokenizer's grid. `image_offset` is the payload's place in a foreign
    tar, in bytes; in tars of our own the shard builder decides it.
    """

    sample_id: int
    view: int
    image: bytes
    extension: str
    source: str
    source_width: int
    source_height: int
    label: int | None
    crop: CropBox | None = None
    hflip: bool = False
    jitter: Jitter | None = None
    codes: np.ndarray | None = None
    image_offset: int | None = None

    @property
    def key(self) -> str:
        return sample_key(self.sample_id, self.view)


@dataclass(frozen=True, kw_only=True, slots=True)
class RejectedSample:
    """One source that could not be stored, with a short stable reason and a message for people."""

    sample_id: int
    source: str
    reason: str
    message: str


def to_utf8(name: str) -> str:
    r"""A name as valid UTF-8 text: bytes of a file name that are not UTF-8 are written as `\xff`.

    Python hands such names over with surrogates in them, which neither Parquet nor JSON can store.
    """
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # surrogates that do not stand for bytes
        return name.encode("utf-8", "backslashreplace").decode("utf-8")

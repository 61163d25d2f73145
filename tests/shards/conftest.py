"""Small samples and datasets for the tests of the shard format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from shards.build import ForeignTar, build_shard
from shards.commit import Item, Plan, commit, finish, pending, start
from shards.manifest import Manifest
from shards.samples import RejectedSample, StoredSample
from shards.views import CropBox, Jitter, decode_crop, encode_crop

GRID = (2, 3)
CODEBOOK_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class SmallDataset:
    """The plan of a tiny dataset, and what should come out of each of its items."""

    plan: Plan
    content: Callable[[Item], tuple[list[StoredSample], list[RejectedSample]]]

    def commit_item(self, root: str, item: Item) -> None:
        samples, rejects = self.content(item)
        tokens = self.plan.kind == "tokens"
        built = build_shard(
            samples, rejects, grid=GRID if tokens else None, codebook_size=CODEBOOK_SIZE if tokens else None
        )
        commit(root, self.plan, item, built)

    def write(self, root: str) -> Manifest:
        """The whole pass, going on from wherever an earlier one ended."""
        start(root, self.plan)
        for item in pending(root, self.plan):
            self.commit_item(root, item)
        return finish(root, self.plan, decode_crop)


@pytest.fixture
def make_sample() -> Callable[..., StoredSample]:
    """`make_sample(sample_id, view=0, tokens=True, size=16)`: an 8- or 16-pixel JPEG and random codes."""

    def make(sample_id: int, view: int = 0, *, tokens: bool = True, size: int = 16) -> StoredSample:
        rng = np.random.default_rng([sample_id, view])
        pixels = rng.integers(0, 256, (size, size, 3), np.uint8)
        top, left, height, width = (int(side) for side in rng.integers(1, 30, 4))
        return StoredSample(
            sample_id=sample_id,
            view=view,
            image=encode_crop(pixels, 95),
            extension="jpg",
            source=f"s3://bucket/images/{sample_id}.png",
            source_width=64 + sample_id % 7,
            source_height=48,
            label=None if sample_id % 5 == 4 else sample_id % 3,
            crop=CropBox(top=top, left=left, height=height, width=width) if tokens else None,
            hflip=bool(rng.integers(2)),
            jitter=Jitter(brightness=0.9, contrast=1.1, saturation=1.0, order=(2, 0, 1))
            if sample_id % 2
            else None,
            codes=rng.integers(0, CODEBOOK_SIZE, GRID, np.uint16) if tokens else None,
        )

    return make


@pytest.fixture
def small_dataset(make_sample: Callable[..., StoredSample]) -> Callable[..., SmallDataset]:
    """`small_dataset(kind="tokens", first_ids=(0, 4, 7, 9), views=2, rejected={5: "truncated"})`.

    Ids in `rejected` are rejected in every view with the reason given; `seed` is part of the recipe.
    """

    def make(
        kind: str = "tokens",
        first_ids: Sequence[int] = (0, 4, 7, 9),
        views: int = 2,
        rejected: dict[int, str] | None = None,
        seed: int = 0,
    ) -> SmallDataset:
        reasons = {5: "truncated"} if rejected is None else rejected
        tokenizer = {
            "fingerprint": "f" * 64,
            "grid": list(GRID),
            "codebook_size": CODEBOOK_SIZE,
            "code_dim": 4,
        }
        plan = Plan(
            kind="tokens" if kind == "tokens" else "images",
            inputs={"images": "a" * 64},
            recipe={"policy": {"seed": seed, "scale": (0.2, 1.0)}, "jpeg_quality": 95},
            first_ids=tuple(first_ids),
            views=views,
            header={"class_names": ["ant", "bee", "cat"]}
            | ({"tokenizer": tokenizer} if kind == "tokens" else {}),
        )

        def content(item: Item) -> tuple[list[StoredSample], list[RejectedSample]]:
            ids = range(item.first_id, item.end_id)
            samples = [make_sample(i, item.view, tokens=kind == "tokens") for i in ids if i not in reasons]
            rejects = [
                RejectedSample(
                    sample_id=i, source=f"s3://bucket/images/{i}.png", reason=reasons[i], message="why"
                )
                for i in ids
                if i in reasons
            ]
            return samples, rejects

        return SmallDataset(plan=plan, content=content)

    return make


@pytest.fixture
def foreign_tar() -> ForeignTar:
    """The name of a tar that nobody looks at."""
    return ForeignTar(url="s3://elsewhere/images-000.tar", bytes=10_000, version="etag-1")

"""Small samples and datasets for the tests of the shard format."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.cluster.config import ClusterConfig
from shards.dataset.dataset import Dataset, layer_url, open_dataset, open_table, views_url
from shards.dataset.rows import read_rows
from shards.format.build import BuiltShard, ForeignTar, build_shard
from shards.format.manifest import Manifest, Recipe, TokenizerSpec
from shards.format.plan import items
from shards.format.records import RejectedSample, StoredSample
from shards.pixels.decode import DecodeConfig, Rejected, decode_image, decode_recipe
from shards.pixels.views import CropBox, Jitter, ViewPolicy, decode_crop, encode_crop, render, view_at
from shards.writer.commit import Item, Plan, commit, finish, pending, start
from shards.writer.layers import build_layer_shard, layer_plan
from shards.writer.prepare import PrepareConfig, prepare_images

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
        top, left, height, width = (int(side) for side in rng.integers(1, 25, 4))
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
        tokenizer = TokenizerSpec(fingerprint="f" * 64, grid=GRID, codebook_size=CODEBOOK_SIZE, image_size=16)
        plan = Plan(
            kind="tokens" if kind == "tokens" else "images",
            inputs={"images": "a" * 64},
            recipe=Recipe(other={"policy": {"seed": seed, "scale": (0.2, 1.0)}, "jpeg_quality": 95}),
            first_ids=tuple(first_ids),
            views=views,
            class_names=("ant", "bee", "cat"),
            tokenizer=tokenizer if kind == "tokens" else None,
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


# ------------------------------------------------------------------------------------------ whole datasets

SIDE = 16
TOKENIZERS = {"base": "f" * 64, "layer": "1a2b3c4d" * 8}
_DECODE = DecodeConfig(max_pixels=2500)
"""Of the token datasets: one of the images is larger, and so rejected."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """An image dataset, and one of tokens made from it: 2 views, a third one added, and a code layer."""

    source: str
    images: str
    tokens: str

    def parts(self) -> list[str]:
        """Everything that has a manifest in the token dataset."""
        layer = TOKENIZERS["layer"]
        added = [layer_url(self.tokens, layer, first) for first in (0, 2)]
        return [self.tokens, views_url(self.tokens, 2), *added]


def fake_codes(pixels: np.ndarray) -> np.ndarray:
    """Codes of crops, uint8 [..., 16, 16, 3] -> uint16 [..., 4]: the brightness of each quarter."""
    quarters = pixels.reshape(*pixels.shape[:-3], 2, SIDE // 2, 2, SIDE // 2, 3)
    return (quarters.mean(axis=(-4, -2, -1)) // 4).astype(np.uint16).reshape(*pixels.shape[:-3], 4)


def _tokenizer(fingerprint: str) -> TokenizerSpec:
    return TokenizerSpec(fingerprint=fingerprint, grid=(2, 2), codebook_size=64, image_size=SIDE)


def _write_crops(root: str, images: Dataset, first_view: int, views: int, base: str | None) -> None:
    """A write pass without torch: crop, store, decode what was stored, look at its brightness."""
    policy = ViewPolicy(image_size=SIDE, scale=(0.3, 1.0), color_jitter=0.3, views_per_image=2, seed=5)
    first_ids, samples = images.id_ranges()
    plan = Plan(
        kind="tokens",
        inputs={"images": images.fingerprint} | ({} if base is None else {"base": base}),
        recipe=Recipe(views=asdict(policy), decode=decode_recipe(_DECODE)),
        first_ids=first_ids,
        samples=samples,
        first_view=first_view,
        views=views,
        class_names=images.manifest.class_names,
        tokenizer=_tokenizer(TOKENIZERS["base"]),
    )

    start(root, plan)
    for item in items(plan):
        commit(root, plan, item, crop_shard(images, plan, item))
    finish(root, plan, decode_crop)


def crop_shard(
    images: Dataset, plan: Plan, item: Item, codes: Mapping[int, np.ndarray] | None = None
) -> BuiltShard:
    """A shard of crops as the write pass makes it, with given codes or those of the fake tokenizer."""
    policy = ViewPolicy(**plan.recipe.require_views())
    samples: list[StoredSample] = []
    rejects: list[RejectedSample] = []
    for image in images.read_images(item.first_id, item.end_id):
        try:
            pixels = decode_image(image.image, _DECODE)
        except Rejected as error:
            rejects.append(
                RejectedSample(
                    sample_id=image.sample_id,
                    source=image.source,
                    reason=error.reason,
                    message=error.message,
                )
            )
            continue
        height, width = pixels.shape[:2]
        where = view_at(policy, image.sample_id, item.view, height=height, width=width)
        crop = encode_crop(render(pixels, where, policy.interpolation), policy.jpeg_quality)
        given = fake_codes(decode_crop(crop)) if codes is None else codes[image.sample_id]
        samples.append(
            StoredSample(
                sample_id=image.sample_id,
                view=item.view,
                image=crop,
                extension="jpg",
                source=image.source,
                source_width=width,
                source_height=height,
                label=image.label,
                crop=where.crop,
                hflip=where.hflip,
                jitter=where.jitter,
                codes=given.reshape(2, 2),
            )
        )
    return build_shard(samples, rejects, grid=(2, 2), codebook_size=64)


def _write_layer(root: str, first_view: int) -> None:
    """Codes of another tokenizer, which sees everything darker."""
    plan = layer_plan(open_table(views_url(root, first_view)), _tokenizer(TOKENIZERS["layer"]), Recipe())
    place = layer_url(root, TOKENIZERS["layer"], first_view)
    start(place, plan)
    for item in items(plan):
        commit(place, plan, item, layer_shard(root, plan, item))
    finish(place, plan, decode_crop)


def layer_shard(root: str, plan: Plan, item: Item) -> BuiltShard:
    """A shard of the code layer of the dataset at `root`."""
    shard = open_table(views_url(root, plan.first_view)).shard(item.view - plan.first_view, item.number)
    crops = list(read_rows(shard))
    codes = np.array([fake_codes(decode_crop(crop.image)) // 2 for crop in crops], np.uint16)
    ids = np.array([crop.sample_id for crop in crops], np.int64)
    codes = codes.reshape(len(ids), 4)
    return build_layer_shard(shard, plan.first_view, ids, codes, grid=(2, 2), codebook_size=64)


@pytest.fixture(scope="session")
def written_once(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """14 sources in shards of 5; one is no image, one too large for the tokens. Not to be changed."""
    root = tmp_path_factory.mktemp("written")
    rng = np.random.default_rng(0)
    for number in range(14):
        folder = root / "source" / f"class-{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        side = 64 if number == 5 else 32
        pixels = rng.integers(0, 256, (side, side + 8, 3), np.uint8) // 4 + 12 * number
        name = f"{number:02d}.{'png' if number % 3 else 'jpg'}"
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
    (root / "source" / "class-0" / "00.jpg").write_bytes(b"no image")
    written = Written(source=str(root / "source"), images=str(root / "images"), tokens=str(root / "tokens"))
    prepare_images(
        PrepareConfig(
            source=written.source,
            output=written.images,
            max_shard_samples=5,
            cluster=ClusterConfig(num_workers=0),
        )
    )
    images = open_dataset(written.images, "images")
    _write_crops(written.tokens, images, 0, 2, None)
    base = open_table(written.tokens).manifest.fingerprint
    _write_crops(views_url(written.tokens, 2), images, 2, 1, base)
    for first_view in (0, 2):
        _write_layer(written.tokens, first_view)
    return written


@pytest.fixture
def make_item(written: Written) -> Callable[..., BuiltShard]:
    """What a repair of the written token dataset needs: its writers, and the images."""

    def make(plan: Plan, item: Item, codes: Mapping[int, np.ndarray] | None) -> BuiltShard:
        if plan.kind == "codes":
            return layer_shard(written.tokens, plan, item)
        return crop_shard(open_dataset(written.images), plan, item, codes)

    return make


@pytest.fixture
def written(written_once: Written, tmp_path: Path) -> Written:
    """A copy to be damaged; the source is the same, and stays as it is."""
    for name in ("images", "tokens"):
        shutil.copytree(getattr(written_once, name), tmp_path / name)
    return Written(
        source=written_once.source, images=str(tmp_path / "images"), tokens=str(tmp_path / "tokens")
    )

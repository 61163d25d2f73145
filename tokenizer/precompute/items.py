"""One work item of a precompute pass: the crops of an id range in one view, made, stored and tokenized.

The story is `Cropper.__call__` and `CropMaker.make`: decode the image, draw the view, render it, encode it as
JPEG, decode that JPEG, tokenize what was decoded. So codes belong to exactly the pixels that are stored
(guarantee *pairing*). An item of a code layer begins with crops that are stored already.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.errors import InputError
from pipeline.threads import in_order_on
from shards.dataset.dataset import open_dataset, open_table, views_url
from shards.dataset.rows import Row, read_rows
from shards.format.build import BuiltShard, build_shard
from shards.format.plan import Item, Plan
from shards.format.records import RejectedSample, StoredSample
from shards.pixels.decode import DecodeConfig, Rejected, decode_config_of, decode_image
from shards.pixels.views import ViewPolicy, decode_crop, encode_crop, render, view_at
from shards.writer.commit import commit, receipt
from shards.writer.layers import build_layer_shard
from tokenizer.model.artifact import VisualTokenizer
from tokenizer.precompute.config import PrecomputeConfig

BATCHES_AHEAD = 2
"""Batches of crops that are prepared before the encoder asks for them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemReport:
    """Crops written and rejected by one work item, its seconds, and those the encoder waited for crops."""

    written: int
    rejected: int
    seconds: float = 0.0
    wait_s: float = 0.0


class ItemWriter:
    """Makes and commits one shard per call; lives in an actor.

    Calls come from two threads, so that one item reads and writes while the other encodes.
    """

    def __init__(self, config: PrecomputeConfig, plan: Plan, root: str) -> None:
        self._plan = plan
        self._root = root
        self._encoder = CropEncoder(plan, config.tokenizer)
        self._maker = item_maker(plan, config.output, config.images, self._encoder, config.decode_threads)

    def __call__(self, item: Item) -> ItemReport:
        began = time.monotonic()
        done = receipt(self._root, self._plan, item)
        if done is not None:
            return ItemReport(written=done.shard.samples, rejected=sum(done.rejected.values()))
        built = self._maker.make(item)
        commit(self._root, self._plan, item, built)
        return ItemReport(
            written=built.samples,
            rejected=len(built.rejected_ids),
            seconds=time.monotonic() - began,
            wait_s=self._encoder.take_wait_s(),
        )


def item_maker(
    plan: Plan, dataset_url: str, images_url: str | None, encoder: CropEncoder | None, num_threads: int
) -> CropMaker | LayerMaker:
    """What makes the shards of a plan for a dataset; `encoder` is None where codes will be given."""
    if plan.kind == "codes":
        assert encoder is not None
        return LayerMaker(plan, dataset_url, encoder, num_threads)
    if images_url is None:
        images = plan.inputs["images"]
        raise InputError(f"it takes the images that it was made from, {images}; give them with --images")
    return CropMaker(plan, images_url, encoder, num_threads)


# ------------------------------------------------------------------------------------------------ crops


class CropMaker:
    """Makes shards of crops with their codes, from the image shards of a plan."""

    def __init__(self, plan: Plan, images_url: str, encoder: CropEncoder | None, num_threads: int) -> None:
        """`encoder` may be None where the codes are given to `make`."""
        self._plan = plan
        self._images = open_dataset(images_url, "images")
        _require_planned(plan, "images", images_url, self._images.fingerprint)
        self._crop = Cropper.of(plan)
        self._encoder = encoder
        self._threads = ThreadPoolExecutor(max(1, num_threads), thread_name_prefix="crop")

    def make(self, item: Item, codes: Mapping[int, np.ndarray] | None = None) -> BuiltShard:
        """The shard of an item; `codes`, by sample id, take the place of what the encoder would give.

        With the codes of a stored index or tar the bytes are those that were written, on whatever device
        the codes were computed.
        """
        samples: list[StoredSample] = []
        rejects: list[RejectedSample] = []

        def pixels() -> Iterator[np.ndarray]:
            # Source images are read shard by shard and dropped after cropping: what stays are the crops.
            sources = self._images.read_images(item.first_id, item.end_id)
            crop = functools.partial(self._crop, item.view)
            for made in in_order_on(self._threads, crop, sources, _ahead(self._plan)):
                if isinstance(made, RejectedSample):
                    rejects.append(made)
                else:
                    samples.append(made.sample)
                    yield made.pixels

        if codes is None:
            assert self._encoder is not None
            encoded = self._encoder.encode(pixels())
            codes = {sample.sample_id: row for sample, row in zip(samples, encoded, strict=True)}
        else:
            for _ in pixels():
                pass
            if absent := [sample.key for sample in samples if sample.sample_id not in codes]:
                raise InputError(f"there are no stored codes of {absent[0]}, which these images give")
        grid, codebook_size = _grid(self._plan)
        paired = [dataclasses.replace(crop, codes=codes[crop.sample_id].reshape(grid)) for crop in samples]
        return build_shard(paired, rejects, grid=grid, codebook_size=codebook_size)


@dataclass(frozen=True, kw_only=True, eq=False)
class Crop:
    """A crop as it will be stored, without codes, and the pixels a reader of it will see, uint8 [S, S, 3]."""

    sample: StoredSample
    pixels: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Cropper:
    """Draws, renders and stores one view of an image, and looks at what was stored."""

    policy: ViewPolicy
    decode: DecodeConfig

    @classmethod
    def of(cls, plan: Plan) -> Cropper:
        """The cropper of a plan's recipe."""
        recipe = plan.recipe
        policy = ViewPolicy(**recipe.require_views())
        return cls(policy=policy, decode=decode_config_of(recipe.require_decode()))

    def __call__(self, view: int, image: Row) -> Crop | RejectedSample:
        try:
            pixels = decode_image(image.image, self.decode)
        except Rejected as error:
            return RejectedSample(
                sample_id=image.sample_id, source=image.source, reason=error.reason, message=error.message
            )
        height, width = pixels.shape[:2]
        where = view_at(self.policy, image.sample_id, view, height=height, width=width)
        jpeg = encode_crop(render(pixels, where, self.policy.interpolation), self.policy.jpeg_quality)
        sample = StoredSample(
            sample_id=image.sample_id,
            view=view,
            image=jpeg,
            extension="jpg",
            source=image.source,
            source_width=width,
            source_height=height,
            label=image.label,
            crop=where.crop,
            hflip=where.hflip,
            jitter=where.jitter,
        )
        return Crop(sample=sample, pixels=decode_crop(jpeg))


# ------------------------------------------------------------------------------------------------ code layers


class LayerMaker:
    """Makes shards of a code layer, from the crops that are stored in its dataset."""

    def __init__(self, plan: Plan, dataset_url: str, encoder: CropEncoder, num_threads: int) -> None:
        self._plan = plan
        self._crops = open_table(views_url(dataset_url, plan.first_view))
        _require_planned(plan, "pixels", self._crops.url, self._crops.manifest.fingerprint)
        self._encoder = encoder
        self._threads = ThreadPoolExecutor(max(1, num_threads), thread_name_prefix="decode")

    def make(self, item: Item) -> BuiltShard:
        """The shard of an item."""
        shard = self._crops.shard(item.view - self._plan.first_view, item.number)
        crops = list(read_rows(shard))
        images = [crop.image for crop in crops]
        codes = self._encoder.encode(in_order_on(self._threads, decode_crop, images, _ahead(self._plan)))
        ids = np.array([crop.sample_id for crop in crops], np.int64)
        grid, codebook_size = _grid(self._plan)
        return build_layer_shard(
            shard, self._plan.first_view, ids, codes, grid=grid, codebook_size=codebook_size
        )


# ------------------------------------------------------------------------------------------------ encoding


class CropEncoder:
    """The tokenizer of a plan, run as its recipe says, one batch at a time."""

    def __init__(self, plan: Plan, tokenizer_url: str) -> None:
        encode = plan.recipe.require_encode()
        if encode.device == "cuda" and not torch.cuda.is_available():
            raise InputError(
                "the plan says cuda, but this worker sees no GPU; give cluster.use_gpu true, or false for CPU"
            )
        if encode.device == "cpu":
            torch.set_num_threads(encode.threads)
        self._batch_size: int = encode.batch_size
        self._tokenizer = VisualTokenizer.load(
            tokenizer_url,
            device=encode.device,
            precision=encode.precision,
            batch_size=self._batch_size,
        )
        _require_planned(plan, "tokenizer", tokenizer_url, self._tokenizer.fingerprint)
        self._running = threading.Lock()
        self._wait_s = 0.0

    def encode(self, crops: Iterable[np.ndarray]) -> np.ndarray:
        """Codes uint16 [n, grid area] of crops, each uint8 [S, S, 3]."""
        codes = [np.empty((0, self._tokenizer.grid**2), np.uint16)]
        batch: list[np.ndarray] = []
        waiting = iter(crops)
        while True:
            asked = time.monotonic()
            pixels = next(waiting, None)
            self._wait_s += time.monotonic() - asked
            if pixels is not None:
                batch.append(pixels)
            if batch and (pixels is None or len(batch) == self._batch_size):
                with self._running:
                    grids = self._tokenizer.encode(torch.from_numpy(np.stack(batch))).cpu().numpy()
                codes.append(grids.astype(np.uint16))
                batch = []
            if pixels is None:
                return np.concatenate(codes)

    def take_wait_s(self) -> float:
        """Seconds that the encoder waited for crops since this was last asked."""
        wait_s, self._wait_s = self._wait_s, 0.0
        return wait_s


def _require_planned(plan: Plan, name: str, url: str, fingerprint: str) -> None:
    """What a worker opens is what the driver planned with: nobody replaced it in between."""
    if fingerprint != plan.inputs[name]:
        raise InputError(
            f"{url} has fingerprint {fingerprint}, but the plan was made with {plan.inputs[name]}; bring "
            "that one back, or choose another output"
        )


def _ahead(plan: Plan) -> int:
    return BATCHES_AHEAD * plan.recipe.require_encode().batch_size


def _grid(plan: Plan) -> tuple[tuple[int, int], int]:
    """Rows and columns of the code grid of a plan's tokenizer, and its codebook size."""
    tokenizer = plan.require_tokenizer()
    return tokenizer.grid, tokenizer.codebook_size

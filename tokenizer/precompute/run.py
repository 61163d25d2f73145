"""The write passes of the token shards (stage one's product): crop, store, decode what was stored, tokenize.

One work item is one (view, range of sample ids). The codes belong to exactly the pixels that are stored,
because it is the stored JPEG that is decoded and encoded (FORMAT.md, guarantee *pairing*). A finished dataset
grows by passes of their own: more views of the same images, or the codes of another tokenizer.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from pipeline import storage
from pipeline.artifacts import canonical_json, differences
from pipeline.cluster.config import ClusterConfig, device_type
from pipeline.cluster.items import map_items
from pipeline.config import ASIDE, PLACE, URL, absolute_places, identity, to_dict
from pipeline.errors import InputError
from pipeline.training.metrics import Progress
from pipeline.training.optim import Precision
from shards.dataset.dataset import Dataset, layer_url, open_dataset, open_table, views_url
from shards.dataset.images import ImageSample, StoredCrop, read_crops, read_images, sample_ids
from shards.dataset.parts import read_plan, views_in_words
from shards.format.build import build_shard
from shards.format.manifest import MANIFEST, Manifest
from shards.format.plan import Item, Plan
from shards.format.records import RejectedSample, StoredSample
from shards.pixels.decode import DecodeConfig, Rejected, decode_config_of, decode_image
from shards.pixels.views import ViewPolicy, decode_crop, encode_crop, render, view_at
from shards.writer.commit import Unfinished, commit, finish, receipt, record_run, start, unfinished
from shards.writer.layers import build_layer_shard, layer_plan
from tokenizer.model.artifact import VisualTokenizer, describe, read_tokenizer

In = TypeVar("In")
Made = TypeVar("Made")

BATCHES_AHEAD = 2
CROP_BYTES_PER_PIXEL = 23_600 / 224**2
"""Measured on ImageNet crops at quality 95, 4:2:0."""


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig:
    """Write token shards: fixed crops of every image, each paired with its grid of codes.

    A rerun does only what is missing; a finished output is left alone. It grows by `extend` (more views of
    the same images) and by `code_layer` (another tokenizer over the stored crops), and is not rewritten.
    """

    output: str = field(metadata=PLACE)
    """Where the token shards go, or the dataset that grows: a folder or any fsspec URL."""
    tokenizer: str = field(metadata=URL)
    """Tokenizer artifact, the output of train_tokenizer."""
    images: str | None = field(default=None, metadata=URL)
    """Image shards, the output of prepare_images; not read for a code layer."""
    extend: bool = False
    """Add views to the finished dataset at output, up to views.views_per_image in all; the other settings are
    those it was made with."""
    code_layer: bool = False
    """Add the codes of another tokenizer for the crops stored at output; reads no images."""
    dry_run: bool = field(default=False, metadata=ASIDE)
    """Print what the pass would take, measured on a few images, and write nothing."""
    json: bool = field(default=False, metadata=ASIDE)
    """With dry_run: print one line of JSON instead of text."""
    views: ViewPolicy = ViewPolicy()
    """Which crops; views_per_image is the number that is stored of each image."""
    batch_size: int = 64
    """Crops per forward pass; every batch is padded to this size, so results do not depend on the rest."""
    precision: Precision = "auto"
    """Compute type of the encoder; similarities to the codebook are fp32 in any case."""
    samples_per_shard: int = 4000
    """At most so many crops in a shard, fewer where they would exceed 100 MB; what is added to a dataset has
    the ranges of its shards."""
    decode_threads: int = 2
    """Threads per worker that decode, crop and encode JPEG while the encoder runs."""
    encoder_threads: int = 2
    """CPU threads of the encoder; part of the plan, because sums may round otherwise with another number."""
    cluster: ClusterConfig = field(default=ClusterConfig(), metadata=ASIDE)
    """Ray actors that share the shards."""

    def __post_init__(self) -> None:
        if self.extend and self.code_layer:
            raise InputError("--extend and --code_layer are two passes; run one after the other")
        if self.images is None and not self.code_layer:
            raise InputError("--images is missing: name the image shards that the crops come from")
        if self.json and not self.dry_run:
            raise InputError("--json is the form of what --dry_run prints; give both or neither")


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemReport:
    """What one work item did."""

    written: int
    rejected: int
    seconds: float
    wait_s: float
    """Time in which the encoder waited for crops."""


@dataclass(frozen=True, kw_only=True)
class WritePass:
    """Shards that are written after one plan, into a folder of their own."""

    root: str
    plan: Plan


# ------------------------------------------------------------------------------------------------ the passes


def precompute_shards(config: PrecomputeConfig) -> Manifest:
    """Write all missing shards, then the manifest; returns it, or that of what was added last."""
    # For the workers of a Ray that this job starts: OpenMP threads that wait give their core to the cropping
    # instead of spinning on it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    config = absolute_places(config)
    passes = planned_passes(config, device_type(config.cluster))
    return [_write(config, one) for one in passes][-1]


def planned_passes(config: PrecomputeConfig, device: str) -> list[WritePass]:
    """What a configuration asks for, in order of work; writes nothing.

    One pass, but for a code layer one for each part of the dataset that has pixels. Raises InputError,
    naming what differs, where it does not fit what is at the output already.
    """
    if config.code_layer:
        return _layer_passes(config, device)
    assert config.images is not None
    images = open_dataset(config.images, "images")
    if config.extend:
        return [_extension(config, images, device)]
    plan = _plan(config, images, device)
    held = read_plan(config.output)
    if held is not None and plan.views > held.views and not _differing(held, plan):
        raise InputError(
            f"{config.output} has {held.views} views of each image; to add "
            f"{views_in_words(held.views, plan.views - held.views)} without rewriting it give --extend"
        )
    return [WritePass(root=config.output, plan=plan)]


def _write(config: PrecomputeConfig, work: WritePass) -> Manifest:
    root, plan = work.root, start(work.root, work.plan)
    record_run(root, identity(config))
    todo = unfinished(root, plan)
    _announce(plan, todo)
    writer = LayerWriter if plan.kind == "codes" else ShardWriter
    make_writer: Callable[[], LayerWriter | ShardWriter] = functools.partial(writer, config, plan, root)

    progress = Progress("precompute", todo.samples, "images")
    shards, rejected, busy_s, wait_s = 0, 0, 0.0, 0.0
    for report in map_items(todo, make_writer, config.cluster):
        shards, rejected = shards + 1, rejected + report.rejected
        busy_s, wait_s = busy_s + report.seconds, wait_s + report.wait_s
        progress.update(
            report.written + report.rejected,
            shards=f"{shards}/{len(todo)}",
            rejected=rejected,
            encoder_waited=f"{100 * wait_s / max(busy_s, 1e-9):.0f} %",
        )
    if todo:
        progress.close(shards=f"{shards}/{len(todo)}", rejected=rejected)
    return finish(root, plan, decode_crop)


class ShardWriter:
    """Makes and commits one shard of crops with their codes per call; lives in an actor.

    Calls come from two threads, so that one item reads and writes while the other encodes.
    """

    def __init__(self, config: PrecomputeConfig, plan: Plan, root: str) -> None:
        assert config.images is not None
        self._plan = plan
        self._root = root
        self._images = open_dataset(config.images, "images")
        _require_planned(plan, "images", config.images, self._images.fingerprint)
        self._crops = Cropper(
            policy=config.views.resolve(plan.header["tokenizer"]["image_size"]),
            decode=decode_config_of(plan.recipe["decode"]),
        )
        self._encoder = CropEncoder(config, plan)

    def __call__(self, item: Item) -> ItemReport:
        began = time.monotonic()
        if (done := _done(self._root, self._plan, item)) is not None:
            return done
        # Source images are read shard by shard and dropped after cropping: what stays are the crops.
        sources = read_images(self._images, item.first_id, item.end_id)
        found = self._encoder.encode(functools.partial(self._crops, item.view), sources)
        samples = [dataclasses.replace(sample, codes=grid) for sample, grid in found.made]
        grid, codebook_size = _shape(self._plan)
        built = build_shard(samples, found.rejects, grid=grid, codebook_size=codebook_size)
        commit(self._root, self._plan, item, built)
        return ItemReport(
            written=len(samples),
            rejected=len(found.rejects),
            seconds=time.monotonic() - began,
            wait_s=found.wait_s,
        )


class LayerWriter:
    """Makes and commits one shard of a code layer per call, from crops that are stored; lives in an actor."""

    def __init__(self, config: PrecomputeConfig, plan: Plan, root: str) -> None:
        self._plan = plan
        self._root = root
        self._pixels = open_table(views_url(config.output, plan.first_view))
        _require_planned(plan, "pixels", self._pixels.url, self._pixels.manifest.fingerprint)
        self._encoder = CropEncoder(config, plan)

    def __call__(self, item: Item) -> ItemReport:
        began = time.monotonic()
        if (done := _done(self._root, self._plan, item)) is not None:
            return done
        first_view = self._plan.first_view
        shard = self._pixels.shard(item.view - first_view, item.number)
        found = self._encoder.encode(_stored_pixels, read_crops(shard))
        grid, codebook_size = _shape(self._plan)
        ids = np.array([sample_id for sample_id, _ in found.made], np.int64)
        area = grid[0] * grid[1]
        codes = np.array([codes for _, codes in found.made], np.uint16).reshape(len(ids), area)
        built = build_layer_shard(shard, first_view, ids, codes, grid=grid, codebook_size=codebook_size)
        commit(self._root, self._plan, item, built)
        return ItemReport(written=len(ids), rejected=0, seconds=time.monotonic() - began, wait_s=found.wait_s)


# ------------------------------------------------------------------------------------------------ one crop


@dataclass(frozen=True, kw_only=True)
class Cropper:
    """Draws, renders and stores one view of an image, and looks at what was stored."""

    policy: ViewPolicy
    decode: DecodeConfig

    def __call__(self, view: int, image: ImageSample) -> tuple[StoredSample, np.ndarray] | RejectedSample:
        """The crop as it will be stored, and the pixels a reader of it will see, uint8 [S, S, 3]."""
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
        return sample, decode_crop(jpeg)


def _stored_pixels(crop: StoredCrop) -> tuple[int, np.ndarray]:
    """A stored crop's id and pixels, decoded as every reader does."""
    try:
        return crop.sample_id, decode_crop(crop.image)
    except ValueError as error:
        raise InputError(
            f"sample {crop.sample_id} of {crop.tar} cannot be decoded ({error}); verify the dataset"
        ) from None


# ------------------------------------------------------------------------------------------------ encoding


@dataclass(frozen=True, kw_only=True)
class Encoded(Generic[Made]):
    """What became of one item's crops: each with its codes, uint16 [rows, columns], and the rejected ones."""

    made: list[tuple[Made, np.ndarray]]
    rejects: list[RejectedSample]
    wait_s: float


class CropEncoder:
    """The tokenizer of a plan, and threads that prepare crops while it runs, one batch at a time."""

    def __init__(self, config: PrecomputeConfig, plan: Plan) -> None:
        encode = plan.recipe["encode"]
        if encode["device"] == "cuda" and not torch.cuda.is_available():
            raise InputError(
                "the plan says cuda, but this worker sees no GPU; give cluster.use_gpu true, or false for CPU"
            )
        if encode["device"] == "cpu":
            torch.set_num_threads(encode["threads"])
        self._batch_size: int = encode["batch_size"]
        self._tokenizer = VisualTokenizer.load(
            config.tokenizer,
            device=encode["device"],
            precision=encode["precision"],
            batch_size=self._batch_size,
        )
        _require_planned(plan, "tokenizer", config.tokenizer, self._tokenizer.fingerprint)
        self._running = threading.Lock()
        self._threads = ThreadPoolExecutor(max(1, config.decode_threads), thread_name_prefix="crop")

    def encode(
        self, prepare: Callable[[In], tuple[Made, np.ndarray] | RejectedSample], sources: Iterable[In]
    ) -> Encoded[Made]:
        """Prepare every source into what is made of it and its pixels, uint8 [S, S, 3], and encode those."""
        made: list[tuple[Made, np.ndarray]] = []
        rejects: list[RejectedSample] = []
        batch: list[tuple[Made, np.ndarray]] = []
        wait_s = 0.0
        crops = _in_order_ahead(self._threads, prepare, sources, ahead=BATCHES_AHEAD * self._batch_size)
        while True:
            asked = time.monotonic()
            crop = next(crops, None)
            wait_s += time.monotonic() - asked
            if isinstance(crop, RejectedSample):
                rejects.append(crop)
            elif crop is not None:
                batch.append(crop)
            if batch and (crop is None or len(batch) == self._batch_size):
                grids = self._tokenize([pixels for _, pixels in batch])
                made += [(one, grid) for (one, _), grid in zip(batch, grids, strict=True)]
                batch = []
            if crop is None:
                return Encoded(made=made, rejects=rejects, wait_s=wait_s)

    def _tokenize(self, pixels: list[np.ndarray]) -> np.ndarray:
        with self._running:
            codes = self._tokenizer.encode(torch.from_numpy(np.stack(pixels))).cpu().numpy()
        return codes.astype(np.uint16).reshape(len(pixels), self._tokenizer.grid, self._tokenizer.grid)


def _in_order_ahead(
    pool: ThreadPoolExecutor, function: Callable[[In], Made], values: Iterable[In], *, ahead: int
) -> Iterator[Made]:
    """`map` in order on a thread pool, with at most `ahead` results waiting: bounded memory."""
    running: deque[Future[Made]] = deque()
    try:
        for value in values:
            running.append(pool.submit(function, value))
            if len(running) >= ahead:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for future in running:
            future.cancel()


def _require_planned(plan: Plan, name: str, url: str, found: str) -> None:
    """What a worker opens is what the driver planned with: nobody replaced it in between."""
    if found != plan.inputs[name]:
        raise InputError(
            f"{url} has fingerprint {found}, but the plan was made with {plan.inputs[name]}; bring that one "
            "back, or choose another output"
        )


def _done(root: str, plan: Plan, item: Item) -> ItemReport | None:
    """What an earlier attempt wrote for an item, if its receipt stands."""
    held = receipt(root, plan, item)
    if held is None:
        return None
    return ItemReport(written=held.samples, rejected=sum(held.rejected.values()), seconds=0.0, wait_s=0.0)


def _shape(plan: Plan) -> tuple[tuple[int, int], int]:
    """Grid and codebook size of a plan's tokenizer."""
    tokenizer = plan.header["tokenizer"]
    rows, columns = tokenizer["grid"]
    return (rows, columns), tokenizer["codebook_size"]


# ------------------------------------------------------------------------------------------------ plans


def _plan(config: PrecomputeConfig, images: Dataset, device: str, like: Plan | None = None) -> Plan:
    """Everything that decides the bytes of the output, and the id range of each shard: those of `like`."""
    artifact = read_tokenizer(config.tokenizer)
    policy = config.views.resolve(artifact.config.image_size)
    if policy.views_per_image < 1:
        raise InputError(f"views.views_per_image is {policy.views_per_image}; store 1 view or more")
    encode = _encode_recipe(config, device)
    tokenizer = describe(artifact, encode["precision"])
    if like is None:
        most = int(100e6 / (policy.side**2 * CROP_BYTES_PER_PIXEL))
        first_ids, samples = _ranges(images, max(1, min(config.samples_per_shard, most)))
    else:
        first_ids, samples = like.first_ids, like.samples
    return Plan(
        kind="tokens",
        inputs={"images": images.fingerprint, "tokenizer": tokenizer["fingerprint"]},
        recipe={
            "views": to_dict(policy),
            # Crop boxes are in the coordinates of the decoder that prepared the images: no setting here.
            "decode": images.manifest.recipe["decode"],
            "encode": encode,
            "libraries": _libraries("numpy", "pillow", "simplejpeg", "torch"),
        },
        first_ids=first_ids,
        samples=samples,
        views=policy.views_per_image,
        header={"class_names": images.manifest.class_names, "tokenizer": tokenizer},
    )


def _encode_recipe(config: PrecomputeConfig, device: str) -> dict[str, Any]:
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if device == "cuda" else "fp32"
    return {
        "device": device,
        "precision": precision,
        "batch_size": config.batch_size,
        "threads": config.encoder_threads,
    }


def _libraries(*names: str) -> dict[str, str]:
    return {name: metadata.version(name) for name in names}


def _extension(config: PrecomputeConfig, images: Dataset, device: str) -> WritePass:
    """The pass that adds views to a finished dataset: the shards that a plan for all views would have given.

    Its id ranges are those of the base. An extension that is finished comes back as it is.
    """
    root, wanted = config.output, config.views.views_per_image
    dataset, base = open_dataset(root, "tokens"), read_plan(root)
    if base is None:
        raise InputError(f"{root} has no plan.json to go on with; copy the dataset again")
    asked = _plan(config, images, device, like=base)
    if differing := _differing(base, asked):
        raise InputError(
            f"{root} cannot be extended with another recipe, which differs in {'; '.join(differing[:6])}; "
            "repeat the inputs and settings it was made with, or choose another output"
        )
    held = dataset.num_views
    if wanted < held or (wanted == held and dataset.first_views == (0,)):
        raise InputError(
            f"{root} has {held} views already; give views.views_per_image the number it shall have in all"
        )
    first_view = dataset.first_views[-1] if wanted == held else held
    place = views_url(root, first_view)
    begun = read_plan(place)
    if begun is not None and (end := begun.first_view + begun.views) != wanted:
        raise InputError(
            f"{place} is unfinished, with {views_in_words(first_view, end - first_view)}; finish it first: "
            f"--extend --views.views_per_image {end}"
        )
    if begun is not None and wanted == held:
        return WritePass(root=place, plan=begun)
    other = differences(base.recipe.get("libraries"), asked.recipe["libraries"])
    if other:
        print(
            f"note: other library versions than the first views were made with ({'; '.join(other)}): each "
            "crop keeps its own codes, but resizing may differ slightly between views",
            flush=True,
        )
    plan = dataclasses.replace(
        asked,
        inputs={**asked.inputs, "base": open_table(root).manifest.fingerprint},
        first_view=first_view,
        views=wanted - first_view,
    )
    return WritePass(root=place, plan=plan)


def _layer_passes(config: PrecomputeConfig, device: str) -> list[WritePass]:
    """A pass for every part of the dataset that has crops; one that is finished comes back as it is."""
    dataset = open_dataset(config.output, "tokens")
    encode = _encode_recipe(config, device)
    tokenizer = describe(read_tokenizer(config.tokenizer), encode["precision"])
    recipe = {"encode": encode, "libraries": _libraries("numpy", "simplejpeg", "torch")}
    passes: list[WritePass] = []
    for first_view in dataset.first_views:
        place = layer_url(config.output, tokenizer["fingerprint"], first_view)
        plan = layer_plan(open_table(views_url(config.output, first_view)), tokenizer, recipe)
        if storage.exists(storage.join(place, MANIFEST)):
            plan = read_plan(place) or plan
        passes.append(WritePass(root=place, plan=plan))
    return passes


def _differing(there: Plan, asked: Plan) -> list[str]:
    """In which inputs and settings two plans differ, but for the number of views and library versions."""
    return differences(_compared(there), _compared(asked))


def _compared(plan: Plan) -> dict[str, Any]:
    value = json.loads(canonical_json({"inputs": plan.inputs, **plan.recipe, **plan.header}))
    value.pop("libraries", None)
    value.get("views", {}).pop("views_per_image", None)
    return value


def _ranges(images: Dataset, samples_per_shard: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Id ranges of at most `samples_per_shard` samples, and how many each holds.

    Small image shards are taken together, so that objects stay large; a shard with more samples is cut.
    """
    edges, sizes = images.id_ranges()
    first_ids: list[int] = []
    samples: list[int] = []
    for number, (first_id, size) in enumerate(zip(edges[:-1], sizes, strict=True)):
        if size > samples_per_shard:
            ids = sample_ids(images.shard(0, number))
            cuts = range(0, size, -(-size // -(-size // samples_per_shard)))
            first_ids += [first_id, *(int(ids[cut]) for cut in cuts[1:])]
            samples += [min(cuts.step, size - cut) for cut in cuts]
        elif samples and samples[-1] + size <= samples_per_shard:
            samples[-1] += size
        else:
            first_ids.append(first_id)
            samples.append(size)
    return (*first_ids, edges[-1]), tuple(samples)


def _announce(plan: Plan, todo: Unfinished) -> None:
    per_view = plan.first_ids[-1] - plan.first_ids[0] if plan.samples is None else sum(plan.samples)
    crops, done = per_view * plan.views, plan.num_items - len(todo)
    shards = f"in {plan.num_items} shards ({done} committed already)"
    if plan.kind == "codes":
        tokenizer = plan.header["tokenizer"]
        print(
            f"codes of tokenizer {tokenizer['fingerprint'][:8]} for "
            f"{views_in_words(plan.first_view, plan.views)}: {crops:,} stored crops {shards}",
            flush=True,
        )
        return
    size = crops * plan.recipe["views"]["image_size"] ** 2 * CROP_BYTES_PER_PIXEL / 1e9
    views = plan.first_view + plan.views
    seen = "E" if views == 1 else f"E/{views}"
    print(
        f"{per_view:,} images, {views_in_words(plan.first_view, plan.views)}: {crops:,} crops, about "
        f"{size:.2f} GB, {shards}; a run of E epochs sees each crop {seen} times",
        flush=True,
    )

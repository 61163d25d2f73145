"""One shard made again in memory: its samples from whatever is left of them, built as in the write pass.

Whether what comes out is what was written is for the caller to see: the shard table names its hashes.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from pipeline import storage
from shards.dataset.dataset import Dataset, ShardTable
from shards.dataset.images import ImageSample, read_crops, read_images
from shards.dataset.rows import Decode, read_checked, read_shard_index, read_shard_rejects
from shards.format.build import BuiltShard, ForeignTar, build_shard
from shards.format.index import codes_of
from shards.format.manifest import DamageError, Manifest, Recipe, ShardInfo
from shards.format.records import RejectedSample, StoredSample, sample_key
from shards.format.tar import iter_members
from shards.pixels.decode import Rejected, decode, decode_config_of, decode_image
from shards.pixels.views import CropBox, Jitter, View, decode_crop, encode_crop, render, view_at
from shards.sources.listing import read_sources
from shards.sources.table import SOURCES, Source, load_rows
from shards.upkeep.check import decode_settings, view_policy
from shards.upkeep.recover import ObjectKind, OpenedPart, read_or_none
from shards.writer.layers import build_layer_shard

_READ_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A tokenizer, for codes that are lost altogether: pixels uint8 [B, S, S, 3] -> codes uint16 [B, N]."""

    fingerprint: str
    """As in the tokenizer block of the manifests that it wrote codes for."""
    encode: Callable[[np.ndarray], np.ndarray]


class CannotRebuildError(Exception):
    """Why something cannot be brought back, and what it would take."""


def decoder_of(kind: str, recipe: Recipe) -> Decode:
    """How the images of a kind of dataset become pixels."""
    if kind != "images" or recipe.decode is None:
        return decode_crop
    config = decode_config_of(recipe.decode)
    return lambda data: decode_image(data, config)


def _known_rejects(shard: ShardInfo) -> list[RejectedSample]:
    table = read_shard_rejects(shard)
    return [] if table is None else [RejectedSample(**row) for row in table.to_pylist()]


def _encode_of(manifest: Manifest, encoder: Encoder | None) -> Callable[[np.ndarray], np.ndarray]:
    """The tokenizer of a part, if it was given."""
    named = manifest.tokenizer_fingerprint
    if encoder is None:
        raise CannotRebuildError(f"its codes are lost; give their tokenizer, {named}, with --tokenizer")
    if encoder.fingerprint != named:
        raise CannotRebuildError(f"its codes are of tokenizer {named}, and {encoder.fingerprint} was given")
    return encoder.encode


def _codes(encode: Callable[[np.ndarray], np.ndarray], crops: Sequence[bytes]) -> np.ndarray:
    """Codes of stored crops, uint16 [n, grid area]."""
    if not crops:
        return np.empty((0, 0), np.uint16)
    return encode(np.stack([decode_crop(crop) for crop in crops])).astype(np.uint16)


def _members(shard: ShardInfo) -> dict[str, bytes]:
    """The members of a sound tar."""
    data = read_checked(shard.tar, shard.tar_bytes, shard.tar_sha256 or "", shard.name)
    return {
        member.name: data[member.offset : member.offset + member.bytes]
        for member in iter_members(io.BytesIO(data))
    }


def _salvaged(index: pa.Table, archive: bytes) -> list[bytes | None]:
    """The images of an index that a damaged tar still holds, by their hashes."""
    images: list[bytes | None] = []
    columns = ("image_offset", "image_bytes", "image_hash")
    for row in index.select(list(columns)).to_pylist():
        image = archive[row["image_offset"] : row["image_offset"] + row["image_bytes"]]
        images.append(image if hashlib.sha256(image).digest() == row["image_hash"] else None)
    return images


# ------------------------------------------------------------------------------------------- image shards


class ImageShard:
    """One shard of an image dataset: from its tar, or from the sources that were listed."""

    def __init__(
        self, part: OpenedPart, shard: ShardInfo, lost: set[ObjectKind], sources_url: str | None
    ) -> None:
        """`sources_url` is where the listing of sources lies, None where that is lost."""
        self._part = part
        self._shard = shard
        self._lost = lost
        self._sources_url = sources_url
        config = decode_settings(part.manifest)
        if config is None:
            raise CannotRebuildError("the images were prepared with another decode version")
        self._decode = config

    def rebuilt(self) -> BuiltShard:
        """Tar, index and rejects; CannotRebuildError where a source is no longer what it was."""
        index = None if "index" in self._lost else read_shard_index(self._shard)
        ids = range(self._shard.first_id, self._shard.end_id)
        if index is None:
            samples, rejects = self._from_sources(ids)
        else:
            samples = self._from_index(index)
            known = {sample.sample_id for sample in samples}
            rejects = []
            if "rejects" in self._lost:
                _, rejects = self._from_sources([i for i in ids if i not in known])
        if "rejects" not in self._lost:
            rejects = _known_rejects(self._shard)
        shard = self._shard
        foreign = None
        if shard.is_foreign:
            foreign = ForeignTar(url=shard.tar, bytes=shard.tar_bytes, version=shard.tar_version or "")
        return build_shard(samples, rejects, grid=None, codebook_size=None, foreign=foreign)

    def _from_index(self, index: pa.Table) -> list[StoredSample]:
        """Samples as the index describes them; images come from the tar as far as it goes."""
        images = self._images(index)
        columns = ("sample_id", "view", "extension", "source", "source_width", "source_height", "label")
        places = index.column("image_offset").to_pylist()
        return [
            StoredSample(image=image, image_offset=place if self._shard.is_foreign else None, **row)
            for row, image, place in zip(index.select(list(columns)).to_pylist(), images, places, strict=True)
        ]

    def _images(self, index: pa.Table) -> list[bytes]:
        if self._shard.is_foreign:  # only its rejects are made again, and the images of an index are sound
            spans = index.select(["image_offset", "image_bytes"]).to_pylist()
            return [storage.read(self._shard.tar, s["image_offset"], s["image_bytes"]) for s in spans]
        images = _salvaged(index, read_or_none(self._shard.tar) or b"")
        ids: list[int] = index.column("sample_id").to_pylist()
        missing = [row for row, image in enumerate(images) if image is None]
        hashes = index.column("image_hash").to_pylist()
        sources = self._sources([ids[row] for row in missing])
        # The bytes decide whether a source is the same, not when it was written.
        current = [replace(source, version=_version(source)) for source in sources]
        for row, source, data in zip(missing, sources, self._read(current), strict=True):
            if isinstance(data, Rejected) or hashlib.sha256(data).digest() != hashes[row]:
                what = data.message if isinstance(data, Rejected) else "other bytes than were stored"
                raise CannotRebuildError(f"its source {source.name} is no longer what it was: {what}")
            images[row] = data
        return [image for image in images if image is not None]

    def _from_sources(self, ids: Iterable[int]) -> tuple[list[StoredSample], list[RejectedSample]]:
        """What became of sources, decided as when they were prepared."""
        numbers = list(ids)
        stored: dict[str, bytes] = {}
        if "tar" not in self._lost and not self._shard.is_foreign:
            stored = {name.partition(".")[0]: data for name, data in _members(self._shard).items()}
            if "rejects" not in self._lost:
                numbers = [i for i in numbers if self._key(i) in stored]
        sources = self._sources(numbers)
        read = self._read(
            [source for i, source in zip(numbers, sources, strict=True) if self._key(i) not in stored]
        )
        samples: list[StoredSample] = []
        rejects: list[RejectedSample] = []
        for sample_id, source in zip(numbers, sources, strict=True):
            key = self._key(sample_id)
            image = stored[key] if key in stored else next(read)
            try:
                samples.append(self._sample(sample_id, source, image))
            except Rejected as error:
                rejects.append(
                    RejectedSample(
                        sample_id=sample_id, source=source.name, reason=error.reason, message=error.message
                    )
                )
        return samples, rejects

    def _key(self, sample_id: int) -> str:
        return sample_key(sample_id, self._shard.view)

    def _sample(self, sample_id: int, source: Source, image: bytes | Rejected) -> StoredSample:
        if isinstance(image, Rejected):
            raise image
        decoded = decode(image, self._decode)
        height, width = decoded.pixels.shape[:2]
        return StoredSample(
            sample_id=sample_id,
            view=self._shard.view,
            image=image,
            extension=decoded.extension,
            source=source.name,
            source_width=width,
            source_height=height,
            label=source.label,
            image_offset=source.offset if self._shard.is_foreign else None,
        )

    def _sources(self, ids: Sequence[int]) -> list[Source]:
        if not ids:
            return []
        if self._sources_url is None:
            raise CannotRebuildError(f"{SOURCES}, which says where the images came from, is lost")
        rows = load_rows(self._sources_url, self._shard.first_id, self._shard.end_id)
        return [rows[sample_id - self._shard.first_id] for sample_id in ids]

    def _read(self, sources: Sequence[Source]) -> Iterator[bytes | Rejected]:
        with ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="read") as pool:
            yield from read_sources(
                sources,
                image_column=self._part.manifest.recipe.image_column or "image",
                max_file_bytes=self._decode.max_file_bytes,
                pool=pool,
            )


def _version(source: Source) -> str:
    found = storage.stat(source.url)
    return source.version if found is None else found.version


# ------------------------------------------------------------------------------------------- token shards


@dataclass(frozen=True, kw_only=True)
class _Fact:
    """What an index says of a source image."""

    source: str
    source_width: int
    source_height: int
    label: int | None


class TokenShard:
    """One shard of crops with their codes: from its tar and index, from the images, from the tokenizer."""

    def __init__(
        self,
        parts: Sequence[OpenedPart],
        part: OpenedPart,
        shard: ShardInfo,
        lost: set[ObjectKind],
        images: Dataset | None,
        encoder: Encoder | None,
    ) -> None:
        policy = view_policy(part.manifest)
        if policy is None:
            raise CannotRebuildError("the recipe names no view policy")
        self._parts = parts
        self._part = part
        self._shard = shard
        self._lost = lost
        self._images = images
        self._encoder = encoder
        self._policy = policy

    def rebuilt(self) -> BuiltShard:
        """Tar, index and rejects; CannotRebuildError says what it would take."""
        if "index" not in self._lost:
            samples = self._from_index(read_shard_index(self._shard))
        elif "tar" not in self._lost:
            samples = self._from_tar(_members(self._shard))
        else:
            samples = self._from_images()
        if "rejects" in self._lost:
            rejects = self._rejects({sample.sample_id for sample in samples})
        else:
            rejects = _known_rejects(self._shard)
        manifest = self._part.manifest
        codebook_size = manifest.require_tokenizer().codebook_size
        return build_shard(samples, rejects, grid=manifest.grid, codebook_size=codebook_size)

    def _from_index(self, index: pa.Table) -> list[StoredSample]:
        """Samples as the index describes them; a crop that the tar has lost is cropped again."""
        grid = self._part.manifest.grid
        images = _salvaged(index, read_or_none(self._shard.tar) or b"")
        rows = index.drop_columns(["codes"]).to_pylist()
        views = {
            row["sample_id"]: View(
                index=self._shard.view,
                crop=CropBox(**row["crop"]),
                hflip=row["hflip"],
                jitter=None if row["jitter"] is None else _jitter(row["jitter"]),
                image_size=self._policy.side,
            )
            for row in rows
        }
        missing = [row["sample_id"] for row, image in zip(rows, images, strict=True) if image is None]
        cropped = self._cropped(missing, views)
        samples: list[StoredSample] = []
        for row, image, codes in zip(rows, images, codes_of(index), strict=True):
            sample_id = row["sample_id"]
            data = cropped[sample_id] if image is None else image
            if hashlib.sha256(data).digest() != row["image_hash"]:
                raise CannotRebuildError(
                    f"{row['key']}, cropped again, has other bytes; use the library versions of the recipe"
                )
            fact = _Fact(**{name: row[name] for name in _FACTS})
            samples.append(self._sample(sample_id, data, fact, views[sample_id], codes.reshape(grid)))
        return samples

    def _from_tar(self, members: dict[str, bytes]) -> list[StoredSample]:
        """Samples as the tar holds them; the rest of their rows follows from policy and source."""
        names = [name.removesuffix(".jpg") for name in members if name.endswith(".jpg")]
        facts = self._facts()
        samples: list[StoredSample] = []
        for key in names:
            sample_id = int(key.partition("-")[0])
            payload = io.BytesIO(members[f"{key}.codes.npy"])
            codes = np.lib.format.read_array(payload, allow_pickle=False)
            fact = facts.get(sample_id)
            if fact is None:
                raise CannotRebuildError(f"nothing is known of the image of {key}")
            samples.append(
                self._sample(sample_id, members[f"{key}.jpg"], fact, self._view(sample_id, fact), codes)
            )
        return samples

    def _from_images(self) -> list[StoredSample]:
        """Samples made from the beginning, as the write pass made them."""
        encode = _encode_of(self._part.manifest, self._encoder)
        rejected = set() if "rejects" in self._lost else {r.sample_id for r in _known_rejects(self._shard)}
        facts = {i: fact for i, fact in self._facts().items() if i not in rejected}
        views = {sample_id: self._view(sample_id, fact) for sample_id, fact in facts.items()}
        crops = self._cropped(list(facts), views)
        codes = _codes(encode, list(crops.values())).reshape(len(crops), *self._part.manifest.grid)
        return [
            self._sample(sample_id, crop, facts[sample_id], views[sample_id], grid)
            for (sample_id, crop), grid in zip(crops.items(), codes, strict=True)
        ]

    def _sample(
        self, sample_id: int, image: bytes, fact: _Fact, view: View, codes: np.ndarray
    ) -> StoredSample:
        return StoredSample(
            sample_id=sample_id,
            view=self._shard.view,
            image=image,
            extension="jpg",
            source=fact.source,
            source_width=fact.source_width,
            source_height=fact.source_height,
            label=fact.label,
            crop=view.crop,
            hflip=view.hflip,
            jitter=view.jitter,
            codes=codes,
        )

    def _view(self, sample_id: int, fact: _Fact) -> View:
        height, width = fact.source_height, fact.source_width
        return view_at(self._policy, sample_id, self._shard.view, height=height, width=width)

    def _facts(self) -> dict[int, _Fact]:
        """What is known of the images of this id range: from another view of them, or from the images."""
        ids = range(self._shard.first_id, self._shard.end_id)
        columns = ("sample_id", *_FACTS)
        for part in self._parts:
            if part.manifest.kind != "tokens":
                continue
            for view in range(part.manifest.num_views):
                other = part.table.shard(view, self._shard.number)
                same_ids = (other.first_id, other.end_id) == (ids.start, ids.stop)
                if not same_ids or other.index == self._shard.index:
                    continue
                try:
                    return _facts_of(read_shard_index(other, columns))
                except DamageError:
                    continue
        images = self._required_images()
        facts: dict[int, _Fact] = {}
        for shard in images.shards(0):
            if shard.first_id < ids.stop and shard.end_id > ids.start and shard.samples:
                facts |= _facts_of(read_shard_index(shard, columns))
        return {sample_id: fact for sample_id, fact in sorted(facts.items()) if sample_id in ids}

    def _cropped(self, sample_ids: Sequence[int], views: dict[int, View]) -> dict[int, bytes]:
        """Views of images, encoded as they are stored."""
        if not sample_ids:
            return {}
        wanted, crops = set(sample_ids), dict[int, bytes]()
        for image in read_images(self._required_images(), min(wanted), max(wanted) + 1):
            if image.sample_id in wanted:
                crops[image.sample_id] = self._crop(image, views[image.sample_id])
        if absent := wanted - crops.keys():
            raise CannotRebuildError(f"the images have no sample {min(absent)}")
        return crops

    def _crop(self, image: ImageSample, view: View) -> bytes:
        decode_as = decoder_of("images", self._part.manifest.recipe)
        try:
            pixels = decode_as(image.image)
        except Rejected as error:
            raise CannotRebuildError(f"{image.source} cannot be decoded here ({error})") from None
        return encode_crop(render(pixels, view, self._policy.interpolation), self._policy.jpeg_quality)

    def _rejects(self, stored: set[int]) -> list[RejectedSample]:
        """Images of the range that were not stored, and why."""
        decode_as = decoder_of("images", self._part.manifest.recipe)
        rejects: list[RejectedSample] = []
        for image in read_images(self._required_images(), self._shard.first_id, self._shard.end_id):
            if image.sample_id in stored:
                continue
            try:
                decode_as(image.image)
            except Rejected as error:
                rejects.append(
                    RejectedSample(
                        sample_id=image.sample_id,
                        source=image.source,
                        reason=error.reason,
                        message=error.message,
                    )
                )
        return rejects

    def _required_images(self) -> Dataset:
        named = self._part.manifest.inputs.get("images")
        if self._images is None:
            raise CannotRebuildError(
                f"it takes the images that it was made from, {named}; give them with --images"
            )
        if self._images.fingerprint != named:
            raise CannotRebuildError(f"it was made from the images {named}, not {self._images.fingerprint}")
        return self._images


_FACTS = ("source", "source_width", "source_height", "label")


def _facts_of(index: pa.Table) -> dict[int, _Fact]:
    return {row.pop("sample_id"): _Fact(**row) for row in index.select(["sample_id", *_FACTS]).to_pylist()}


def _jitter(row: dict) -> Jitter:
    return Jitter(**{**row, "order": tuple(row["order"])})


# ------------------------------------------------------------------------------------------- code layers


def rebuilt_layer(
    part: OpenedPart, pixels: ShardTable, shard: ShardInfo, encoder: Encoder | None
) -> BuiltShard:
    """A shard of a code layer: its codes, lost with its index, are computed again from the crops."""
    manifest = part.manifest
    encode = _encode_of(manifest, encoder)
    crops = pixels.shard(shard.view - manifest.first_view, shard.number)
    stored = list(read_crops(crops))
    rows, columns = manifest.grid
    return build_layer_shard(
        crops,
        manifest.first_view,
        np.array([crop.sample_id for crop in stored], np.int64),
        _codes(encode, [crop.image for crop in stored]).reshape(len(stored), rows * columns),
        grid=manifest.grid,
        codebook_size=manifest.require_tokenizer().codebook_size,
    )

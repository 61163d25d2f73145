"""One shard of a dataset, read and held against all that is known of it: table, plan, recipe, hashes."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.artifacts import sha256_hex
from pipeline.errors import InputError
from shards.dataset.dataset import ShardTable
from shards.dataset.rows import check_foreign_tar, pixels_hash
from shards.format.build import EXTENSION, npy_bytes
from shards.format.index import (
    REJECTS_SCHEMA,
    IndexFormatError,
    codes_of,
    index_header,
    index_schema,
    read_index,
    read_rejects,
)
from shards.format.manifest import Manifest, ProbeEntry, ShardInfo
from shards.format.plan import Item
from shards.format.records import sample_key
from shards.format.tar import TarError, build_tar, iter_members
from shards.pixels.decode import DecodeConfig, Rejected, decode, decode_config_of
from shards.pixels.views import View, ViewPolicy, decode_crop, encode_crop, view_at
from shards.upkeep.recover import ABSENT, MEND, ObjectKind, OpenedPart, Problem, read_or_none
from shards.writer.commit import Receipt
from shards.writer.layers import layer_schema

NOT_AS_WRITTEN = "what was written is wrong: write the dataset again, and report this"

_BRING_BACK = "bring the old tar back, or prepare again"
_RUN_BYTES = 32 << 20
_OTHER_TOOLS = "decode with the library versions of the recipe"


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What the shards without a problem add up to; `rejected` counts by reason."""

    shards: int = 0
    objects: int = 0
    bytes: int = 0
    samples: int = 0
    decoded: int = 0
    rejected: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            shards=self.shards + other.shards,
            objects=self.objects + other.objects,
            bytes=self.bytes + other.bytes,
            samples=self.samples + other.samples,
            decoded=self.decoded + other.decoded,
            rejected=dict(sorted((Counter(self.rejected) + Counter(other.rejected)).items())),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """What checking a shard, or several of a part, brought."""

    problems: list[Problem]
    tally: Tally


def is_chosen(sample_ids: np.ndarray, share: float) -> np.ndarray:
    """Which samples belong to a share of all, bool [n]: by a hash of the id, and at least one of those given.

    A larger share contains a smaller one, and every view and every run chooses the same.
    """
    words = sample_ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)  # splitmix64
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    chosen = (words >> np.uint64(11)).astype(np.float64) < share * 2.0**53
    if share > 0 and len(words):
        chosen[int(words.argmin())] = True
    return chosen


class _Findings:
    """What is wrong with one shard, in the making."""

    def __init__(self, part: str, item: Item) -> None:
        self._part = part
        self._item = item
        self.problems: list[Problem] = []
        self.objects = 0
        self.bytes = 0

    def lost(
        self, kind: ObjectKind, url: str, what: str, sha256: str | None = None, mend: str = MEND
    ) -> None:
        """An object that is not there, or not as it was written."""
        self._add(Problem(object=url, kind=kind, part=self._part, what=what, mend=mend, found_sha256=sha256))

    def wrong(self, kind: ObjectKind, url: str, what: str, mend: str = NOT_AS_WRITTEN) -> None:
        """An object that was written as it is, and should not have been."""
        self._add(Problem(object=url, kind=kind, part=self._part, what=what, mend=mend, damaged=False))

    def rows(self, kind: ObjectKind, url: str, keys: Sequence[str], bad: np.ndarray, what: str) -> None:
        """Rows, bool [n], of which something is wrong."""
        if bad.any():
            first = keys[int(bad.argmax())]
            self.wrong(kind, url, f"{what} in {int(bad.sum())} of {len(bad)} rows, first {first}")

    def read(self, kind: ObjectKind, url: str, num_bytes: int, sha256: str) -> bytes | None:
        """The bytes of an object, if they are those that were written."""
        self.objects += 1
        try:
            data = storage.read(url)
        except ABSENT:
            return self.lost(kind, url, "missing")
        except OSError as error:
            if not storage.is_local(url):
                raise
            return self.lost(kind, url, f"cannot be read: {error.strerror}")
        self.bytes += len(data)
        found = sha256_hex(data)
        if (len(data), found) == (num_bytes, sha256):
            return data
        written = f"written were {num_bytes} with {sha256[:8]}…"
        return self.lost(kind, url, f"damaged: {len(data)} bytes with sha256 {found[:8]}…, {written}", found)

    def _add(self, problem: Problem) -> None:
        self.problems.append(dataclasses.replace(problem, view=self._item.view, number=self._item.number))


class ShardChecker:
    """Checks one shard of a part with each call; called from several threads."""

    def __init__(self, part: OpenedPart, pixels: ShardTable | None, sample: float) -> None:
        """`pixels` is where the crops of a code layer lie, None where that could not be opened."""
        manifest = part.manifest
        self._part = part
        self._pixels = pixels
        self._sample = sample
        self._probe = {(entry.view, entry.number, entry.row): entry for entry in manifest.probe}
        self._tokens = manifest.kind == "tokens"
        self._layer = manifest.kind == "codes"
        self._codebook_size = 0 if manifest.tokenizer is None else manifest.tokenizer.codebook_size
        grid = None if manifest.tokenizer is None else manifest.grid
        self._grid = grid
        if manifest.kind == "images" or grid is None:
            self._schema = index_schema(None, None)
        else:
            make = layer_schema if self._layer else index_schema
            self._schema = make(grid, self._codebook_size)
        self._decode = decode_settings(manifest)
        self._policy = view_policy(manifest)
        self._side = None if manifest.tokenizer is None else manifest.tokenizer.image_size
        self._jpeg: JpegHeader | None = None
        if self._policy is not None:
            any_crop = encode_crop(np.zeros((16, 16, 3), np.uint8), self._policy.jpeg_quality)
            self._jpeg = read_jpeg(any_crop)

    def __call__(self, item: Item) -> Found:
        """Read and check what the table names for an item."""
        manifest, table = self._part.manifest, self._part.table
        stored = table.stored(item.view - manifest.first_view, item.number)
        shard = stored.resolved(self._part.url)
        findings = _Findings(self._part.url, item)
        self._check_record(findings, item, stored)
        rejects = self._read_rejects(findings, item, shard)
        self._check_receipt(findings, stored, rejects)
        index = self._read_index(findings, shard)
        if index is not None:
            self._check_rows(findings, item, shard, index, rejects)
        decoded = 0
        if self._layer:
            self._check_layer(findings, item, stored, index)
        elif shard.is_foreign:
            decoded = self._check_foreign(findings, shard, index)
        else:
            decoded = self._check_tar(findings, shard, index)
        sound = not findings.problems
        tally = Tally(
            shards=1,
            objects=findings.objects,
            bytes=findings.bytes,
            samples=shard.samples,
            decoded=decoded,
            rejected={} if rejects is None else dict(Counter(rejects.column("reason").to_pylist())),
        )
        return Found(problems=findings.problems, tally=tally if sound else Tally())

    # ---------------------------------------------------------------------------------- table, receipt

    def _check_record(self, findings: _Findings, item: Item, stored: ShardInfo) -> None:
        """The shard's row of the table against the plan, and its paths against its hashes."""
        location = storage.join(self._part.url, self._part.manifest.table.path)
        named = (stored.view, stored.number, stored.first_id, stored.end_id, stored.samples + stored.rejected)
        planned = (item.view, item.number, item.first_id, item.end_id, item.samples)
        if named != planned:
            findings.wrong("table", location, f"the row of {item.name} is {named}, the plan says {planned}")
        paths = [(stored.index, "index", stored.index_sha256, "parquet")]
        if not stored.is_foreign and not self._layer:
            paths.append((stored.tar, "shards", stored.tar_sha256 or "", "tar"))
        if stored.rejects is not None:
            paths.append((stored.rejects, "rejects", stored.rejects_sha256 or "", "parquet"))
        for path, folder, sha256, suffix in paths:
            if path != f"{folder}/{item.name}-{sha256[:8]}.{suffix}":
                findings.wrong("table", location, f"the row of {item.name} names {path}, not by its hash")

    def _check_receipt(self, findings: _Findings, stored: ShardInfo, rejects: pa.Table | None) -> None:
        url = storage.join(self._part.url, "receipts", self._part.plan.plan8, f"{stored.name}.json")
        findings.objects += 1
        data = read_or_none(url)
        if data is None:
            findings.lost("receipt", url, "missing")
            return
        findings.bytes += len(data)
        if stored.rejected and rejects is None:
            try:
                reasons = Receipt.from_bytes(data).rejected
            except (ValueError, KeyError, TypeError):
                reasons = {}
        else:
            reasons = reasons_of(rejects)
        expected = Receipt(plan=self._part.plan.fingerprint, shard=stored, rejected=reasons)
        if data != expected.to_bytes():
            findings.lost("receipt", url, "damaged, or another shard's", sha256_hex(data))

    # ---------------------------------------------------------------------------------- rejects, index

    def _read_rejects(self, findings: _Findings, item: Item, shard: ShardInfo) -> pa.Table | None:
        """The rejects, checked; None where there are none, or none that can be read."""
        if shard.rejects is None or shard.rejects_bytes is None or shard.rejects_sha256 is None:
            if shard.rejected:
                what = f"the row of {item.name} counts {shard.rejected} rejects and names no list of them"
                findings.wrong("table", storage.join(self._part.url, self._part.manifest.table.path), what)
            return None
        data = findings.read("rejects", shard.rejects, shard.rejects_bytes, shard.rejects_sha256)
        if data is None:
            return None
        try:
            table = read_rejects(data)
        except (pa.ArrowException, OSError) as error:
            findings.wrong("rejects", shard.rejects, f"is no readable Parquet file ({error})")
            return None
        if not table.schema.equals(REJECTS_SCHEMA) or table.num_rows != shard.rejected:
            what = f"has {table.num_rows} rows of {table.schema.names}, not {shard.rejected} rejects"
            findings.wrong("rejects", shard.rejects, what)
            return None
        ids = table.column("sample_id").to_numpy()
        keys = [str(sample_id) for sample_id in ids.tolist()]
        findings.rows("rejects", shard.rejects, keys, _out_of_order(ids, item), "ids out of order or range")
        empty = np.array([not reason for reason in table.column("reason").to_pylist()], bool)
        findings.rows("rejects", shard.rejects, keys, empty, "no reason")
        return table

    def _read_index(self, findings: _Findings, shard: ShardInfo) -> pa.Table | None:
        """The index, its schema and length checked."""
        data = findings.read("index", shard.index, shard.index_bytes, shard.index_sha256)
        if data is None:
            return None
        try:
            table = read_index(data)
            header = index_header(table.schema)
        except (IndexFormatError, ValueError, KeyError) as error:
            findings.wrong("index", shard.index, str(error))
            return None
        if not table.schema.equals(self._schema) or header != index_header(self._schema):
            what = f"has schema {header} {table.schema.names}, not this format's"
            findings.wrong("index", shard.index, what)
            return None
        if table.num_rows != shard.samples:
            findings.wrong("index", shard.index, f"has {table.num_rows} rows, not {shard.samples}")
            return None
        return table

    def _check_rows(
        self, findings: _Findings, item: Item, shard: ShardInfo, table: pa.Table, rejects: pa.Table | None
    ) -> None:
        ids = table.column("sample_id").to_numpy()
        keys: list[str] = table.column("key").to_pylist()

        def check(bad: np.ndarray, what: str) -> None:
            findings.rows("index", shard.index, keys, bad, what)

        check(_out_of_order(ids, item), "ids out of order or range")
        check(table.column("view").to_numpy() != item.view, "another view")
        named = [_key(sample_id, item.view) for sample_id in ids.tolist()]
        check(np.array(keys, object) != np.array(named, object), "keys that are not those of id and view")
        if rejects is not None:
            check(np.isin(ids, rejects.column("sample_id").to_numpy()), "ids that were rejected as well")
        if self._grid is not None and self._part.manifest.kind != "images":
            beyond = codes_of(table) >= self._codebook_size
            check(np.asarray(beyond.any(axis=1)), "codes beyond the codebook")
        if self._layer:
            return
        starts, lengths = table.column("image_offset").to_numpy(), table.column("image_bytes").to_numpy()
        outside = (starts < 0) | (lengths < 1) | (starts + lengths > shard.tar_bytes)
        check(outside, "no place in the tar")
        heights, widths = table.column("source_height").to_numpy(), table.column("source_width").to_numpy()
        check((heights < 1) | (widths < 1), "no source size")
        labels, names = table.column("label"), self._part.manifest.class_names
        numbers = labels.fill_null(0).to_numpy()
        unknown = (numbers < 0) | (numbers >= (1 << 31 if names is None else len(names)))
        check(unknown & np.array(labels.is_valid()), "labels without a class")
        if self._tokens:
            self._check_views(findings, item, shard, table, keys)
        else:
            odd = [EXTENSION.fullmatch(name) is None for name in table.column("extension").to_pylist()]
            check(np.array(odd, bool), "odd extensions")

    def _check_views(
        self, findings: _Findings, item: Item, shard: ShardInfo, table: pa.Table, keys: Sequence[str]
    ) -> None:
        """Crop boxes lie inside their sources, and are those that the recipe's policy draws."""
        columns = ("sample_id", "source_height", "source_width", "crop", "hflip", "jitter")
        outside = np.zeros(len(keys), bool)
        drawn = np.zeros(len(keys), bool)
        for i, row in enumerate(table.select(list(columns)).to_pylist()):
            crop, height, width = row["crop"], row["source_height"], row["source_width"]
            outside[i] = (
                min(crop["top"], crop["left"]) < 0
                or min(crop["height"], crop["width"]) < 1
                or crop["top"] + crop["height"] > height
                or crop["left"] + crop["width"] > width
            )
            if self._policy is not None and min(height, width) > 0:
                view = view_at(self._policy, row["sample_id"], item.view, height=height, width=width)
                drawn[i] = not _is_view(row, view)
        findings.rows("index", shard.index, keys, outside, "crop boxes outside the source")
        findings.rows("index", shard.index, keys, drawn, "other views than the recipe draws")

    # ---------------------------------------------------------------------------------- images

    def _check_tar(self, findings: _Findings, shard: ShardInfo, index: pa.Table | None) -> int:
        """The tar, and each of its images; returns how many were decoded."""
        assert shard.tar_sha256 is not None
        data = findings.read("tar", shard.tar, shard.tar_bytes, shard.tar_sha256)
        if data is None or index is None:
            return 0
        offsets, lengths = index.column("image_offset").to_pylist(), index.column("image_bytes").to_pylist()
        images = [data[start : start + length] for start, length in zip(offsets, lengths, strict=True)]
        members = archive_members(index, images)
        difference = _archive_difference(data, members, offsets)
        if difference is not None:
            findings.wrong("tar", shard.tar, difference)
        return self._check_images(findings, shard, index, enumerate(images))

    def _check_foreign(self, findings: _Findings, shard: ShardInfo, index: pa.Table | None) -> int:
        """A tar indexed in place: still the same one, and each image in it; returns how many were decoded."""
        findings.objects += 1
        try:
            check_foreign_tar(shard)
        except InputError as error:
            what = str(error).partition("; ")[0].removeprefix(f"{shard.tar}, ")
            findings.lost("tar", shard.tar, what, mend=_BRING_BACK)
            return 0
        return 0 if index is None else self._check_images(findings, shard, index, _in_runs(shard, index))

    def _check_images(
        self,
        findings: _Findings,
        shard: ShardInfo,
        index: pa.Table,
        images: Iterable[tuple[int, bytes]],
    ) -> int:
        """Hash every image, decode the chosen ones; `images` come with their rows."""
        chosen = is_chosen(index.column("sample_id").to_numpy(), self._sample)
        hashes = index.column("image_hash").to_pylist()
        troubles: list[str] = []
        decoded = 0
        for row, data in images:
            trouble: str | None = None
            if hashlib.sha256(data).digest() != hashes[row]:
                trouble = "has other bytes than the hash in the index says"
            elif chosen[row]:
                decoded += 1
                if self._tokens:
                    trouble = self._crop_trouble(data)
                else:
                    trouble = self._image_trouble(data, index.slice(row, 1).to_pylist()[0])
            findings.bytes += len(data) if shard.is_foreign else 0
            if trouble is not None:
                troubles.append(f"{index.column('key')[row]} {trouble}")
                continue
            entry = self._probe.get((shard.view, shard.number, row))
            if entry is not None and not self._decodes_alike(entry, str(index.column("key")[row]), data):
                what = f"{entry.key} of the decode probe has other pixels here than at the writer's"
                findings.wrong("tar", shard.tar, what, _OTHER_TOOLS)
        if troubles:
            what = f"{len(troubles)} of {len(hashes)} images are wrong, first {troubles[0]}"
            if shard.is_foreign:
                findings.lost("tar", shard.tar, what, mend=_BRING_BACK)
            else:
                findings.wrong("tar", shard.tar, what)
        return decoded

    def _decodes_alike(self, entry: ProbeEntry, key: str, data: bytes) -> bool:
        """Whether an image of the decode probe has the pixels here that it had at the writer's."""
        if self._decode is None and not self._tokens:
            return True
        try:
            pixels = decode_crop(data) if self._decode is None else decode(data, self._decode).pixels
        except (Rejected, ValueError):
            return False
        return (key, pixels_hash(pixels)) == (entry.key, entry.sha256)

    def _crop_trouble(self, data: bytes) -> str | None:
        try:
            pixels = decode_crop(data)
            jpeg = read_jpeg(data)
        except ValueError as error:
            return f"cannot be decoded ({error})"
        height, width = pixels.shape[:2]
        if self._side is not None and (height, width) != (self._side, self._side):
            return f"is {width} x {height} pixels, not {self._side} x {self._side}"
        if not jpeg.baseline or (self._jpeg is not None and jpeg.parameters != self._jpeg.parameters):
            return "is a JPEG of another kind than the recipe says"
        return None

    def _image_trouble(self, data: bytes, row: dict[str, Any]) -> str | None:
        if self._decode is None:
            return None
        try:
            found = decode(data, self._decode)
        except Rejected as error:
            return f"cannot be decoded ({error})"
        height, width = found.pixels.shape[:2]
        if (height, width) != (row["source_height"], row["source_width"]):
            return f"is {width} x {height} pixels, not {row['source_width']} x {row['source_height']}"
        if found.extension != row["extension"]:
            return f"is a {found.extension}, not a {row['extension']}"
        return None

    def _check_layer(
        self, findings: _Findings, item: Item, stored: ShardInfo, index: pa.Table | None
    ) -> None:
        """A code layer's shard names the tar of its pixels, and has their rows."""
        if self._pixels is None:
            return
        pixels = self._pixels.shard(item.view - self._pixels.manifest.first_view, item.number)
        shard = stored.resolved(self._part.url)
        named = (shard.tar, shard.tar_bytes, shard.tar_sha256)
        if named != (pixels.tar, pixels.tar_bytes, pixels.tar_sha256):
            location = storage.join(self._part.url, self._part.manifest.table.path)
            findings.wrong("table", location, f"the row of {item.name} names other pixels than {pixels.tar}")
        data = read_or_none(pixels.index)
        if index is None or data is None or sha256_hex(data) != pixels.index_sha256:
            return  # said where the pixels are checked
        ids = read_index(data, ("sample_id",)).column("sample_id")
        if not ids.equals(index.column("sample_id")):
            findings.wrong("index", shard.index, f"has other samples than {pixels.index}")


# ------------------------------------------------------------------------------------------------ pieces


def view_policy(manifest: Manifest) -> ViewPolicy | None:
    """The policy that a token dataset's views were drawn by; None where its recipe names none."""
    settings = manifest.recipe.views if manifest.kind == "tokens" else None
    if not isinstance(settings, dict):
        return None
    pairs: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()
    }
    try:
        return ViewPolicy(**pairs)
    except (TypeError, InputError):
        return None


def decode_settings(manifest: Manifest) -> DecodeConfig | None:
    """How the images of an image dataset were decoded; None for crops, and for another decode version."""
    if manifest.kind != "images" or manifest.recipe.decode is None:
        return None
    try:
        return decode_config_of(manifest.recipe.decode)
    except InputError:
        return None


def reasons_of(rejects: pa.Table | None) -> dict[str, int]:
    """Rejects by reason, as receipts count them."""
    counts = Counter([] if rejects is None else rejects.column("reason").to_pylist())
    return dict(sorted(counts.items()))


def archive_members(index: pa.Table, images: Sequence[bytes]) -> list[tuple[str, bytes]]:
    """Names and payloads of the tar that an index describes, its images given in order of rows."""
    keys: list[str] = index.column("key").to_pylist()
    header = index_header(index.schema)
    if header["kind"] == "images":
        names = [f"{key}.{end}" for key, end in zip(keys, index.column("extension").to_pylist(), strict=True)]
        return list(zip(names, images, strict=True))
    members: list[tuple[str, bytes]] = []
    for key, codes, image in zip(keys, codes_of(index), images, strict=True):
        members.append((f"{key}.codes.npy", npy_bytes(codes.reshape(header["grid"]))))
        members.append((f"{key}.jpg", image))
    return members


def _archive_difference(data: bytes, members: list[tuple[str, bytes]], offsets: list[int]) -> str | None:
    """How a tar differs from the archive of its members, the images at `offsets`; None where it does not."""
    step = max(1, len(members) // max(1, len(offsets)))
    try:
        archive, placed = build_tar(members)
        if archive == data and placed[step - 1 :: step] == offsets:
            return None
        found = list(iter_members(io.BytesIO(data)))
    except (TarError, ValueError) as error:
        return f"is no sound tar ({error})"
    names = [name for name, _ in members]
    for there, named in itertools.zip_longest([member.name for member in found], names):
        if there != named:
            return f"holds {there} where its index lists {named}"
    for member, (name, payload) in zip(found, members, strict=True):
        if data[member.offset : member.offset + member.bytes] != payload:
            what = "codes" if name.endswith(".npy") else "bytes"
            return f"holds other {what} for {name} than its index"
    return "holds headers or padding that this format does not write"


def _in_runs(shard: ShardInfo, index: pa.Table) -> Iterator[tuple[int, bytes]]:
    """The images of a tar indexed in place, with their rows; neighbours are read together."""
    offsets, lengths = index.column("image_offset").to_pylist(), index.column("image_bytes").to_pylist()
    run: list[int] = []
    for row in [*np.argsort(offsets, kind="stable").tolist(), None]:
        if run and (row is None or offsets[row] + lengths[row] - offsets[run[0]] > _RUN_BYTES):
            start = offsets[run[0]]
            block = storage.read(shard.tar, start, max(offsets[i] + lengths[i] for i in run) - start)
            for i in run:
                yield i, block[offsets[i] - start : offsets[i] - start + lengths[i]]
            run = []
        if row is not None:
            run.append(row)


def _out_of_order(ids: np.ndarray, item: Item) -> np.ndarray:
    """Ids that do not ascend, or are not the item's: bool [n]."""
    bad = (ids < item.first_id) | (ids >= item.end_id)
    bad[1:] |= np.diff(ids) <= 0
    return bad


def _key(sample_id: int, view: int) -> str | None:
    try:
        return sample_key(sample_id, view)
    except ValueError:
        return None


def _is_view(row: dict[str, Any], view: View) -> bool:
    jitter = None if view.jitter is None else dataclasses.asdict(view.jitter)
    if jitter is not None:
        jitter["order"] = list(jitter["order"])
    return (row["crop"], row["hflip"], row["jitter"]) == (dataclasses.asdict(view.crop), view.hflip, jitter)


@dataclass(frozen=True, kw_only=True)
class JpegHeader:
    """How a JPEG was encoded: quantisation tables, components and their sampling, in its own bytes."""

    baseline: bool
    parameters: bytes


def read_jpeg(data: bytes) -> JpegHeader:
    """The header of a JPEG, up to its first scan; ValueError where it has none (ITU T.81, annex B)."""
    parameters = b""
    frame: int | None = None
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        payload = data[position + 4 : position + 2 + length]
        if marker == 0xDB:
            parameters += payload
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            frame = marker
            parameters += payload[:1] + payload[5:]  # without height and width
        elif marker == 0xDA and frame is not None:
            return JpegHeader(baseline=frame == 0xC0, parameters=parameters)
        position += 2 + length
    raise ValueError("no JPEG header")

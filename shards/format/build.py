"""One shard built in memory, re-opened and compared with what went in, before anything is published."""

from __future__ import annotations

import io
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shards.format import index, tar
from shards.format.records import RejectedSample, StoredSample

MAX_SHARD_SAMPLES = 4000
MAX_SHARD_BYTES = 100_000_000
"""Planners cut id ranges by both; the builder enforces the first, since encoded sizes are known too late."""

EXTENSION = re.compile(r"[0-9a-z]{1,16}")


class BuildError(Exception):
    """What was built differs from what went in, or what went in is no shard: a fault of the program."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ForeignTar:
    """Somebody else's tar, indexed in place: absolute URL, size, and ETag or modification time."""

    url: str
    bytes: int
    version: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelTar:
    """The tar of another part of the dataset that a code layer belongs to: relative place, size, sha256."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BuiltShard:
    """The objects of one (view, id range), checked and ready to be committed.

    `tar` is None where the images stay in a foreign tar or, for a code layer, in `pixels`; `rejects` where
    nothing was rejected. `rejected` counts by reason. `sample_ids` are those of the index, `rejected_ids` the
    others, both ascending int64.
    """

    tar: bytes | None
    foreign: ForeignTar | None
    index: bytes
    rejects: bytes | None
    grid: tuple[int, int] | None
    codebook_size: int | None
    view: int | None
    samples: int
    rejected: dict[str, int]
    sample_ids: np.ndarray
    rejected_ids: np.ndarray
    pixels: PixelTar | None = None
    max_label: int | None = None


def build_shard(
    samples: Sequence[StoredSample],
    rejects: Sequence[RejectedSample],
    *,
    grid: tuple[int, int] | None,
    codebook_size: int | None,
    foreign: ForeignTar | None = None,
) -> BuiltShard:
    """Tar, index and rejects of one work item; a token shard where `grid` is given, else an image shard.

    Samples come in ascending id order, all of one view, at most 4,000. The same samples give the same bytes.
    Raises BuildError naming the sample where an input or a re-read output is not as it must be.
    """
    _check_samples(samples, rejects, grid, codebook_size, foreign)
    if foreign is None:
        archive, payload_offsets = tar.build_tar(_members(samples, grid))
        offsets = payload_offsets if grid is None else payload_offsets[1::2]
    else:
        archive = None
        offsets = [_foreign_offset(sample) for sample in samples]
    built = BuiltShard(
        tar=archive,
        foreign=foreign,
        index=index.write_index(samples, offsets, grid, codebook_size),
        rejects=index.write_rejects(rejects) if rejects else None,
        grid=grid,
        codebook_size=codebook_size,
        view=samples[0].view if samples else None,
        samples=len(samples),
        rejected=dict(sorted(Counter(reject.reason for reject in rejects).items())),
        sample_ids=np.array([sample.sample_id for sample in samples], np.int64),
        rejected_ids=np.array([reject.sample_id for reject in rejects], np.int64),
        max_label=max((sample.label for sample in samples if sample.label is not None), default=None),
    )
    _check_built(built, samples, rejects, grid)
    return built


def npy_bytes(codes: np.ndarray) -> bytes:
    """NPY version 1.0 of a grid of codes: `<u2`, C order."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(codes, "<u2"), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _members(samples: Sequence[StoredSample], grid: tuple[int, int] | None) -> list[tuple[str, bytes]]:
    members: list[tuple[str, bytes]] = []
    for sample in samples:
        if grid is not None:
            assert sample.codes is not None
            members.append((f"{sample.key}.codes.npy", npy_bytes(sample.codes)))
        members.append((f"{sample.key}.{sample.extension}", sample.image))
    return members


def _foreign_offset(sample: StoredSample) -> int:
    if sample.image_offset is None:
        raise BuildError(f"sample {sample.key} of a foreign tar has no image_offset")
    return sample.image_offset


# ------------------------------------------------------------------------------------------ what goes in


def _check_samples(
    samples: Sequence[StoredSample],
    rejects: Sequence[RejectedSample],
    grid: tuple[int, int] | None,
    codebook_size: int | None,
    foreign: ForeignTar | None,
) -> None:
    if len(samples) > MAX_SHARD_SAMPLES:
        raise BuildError(f"{len(samples)} samples in one shard; at most {MAX_SHARD_SAMPLES} are allowed")
    if foreign is not None and grid is not None:
        raise BuildError(f"token shards store their own crops; {foreign.url} cannot be one's tar")
    for what, ids in (
        ("samples", [sample.sample_id for sample in samples]),
        ("rejects", [reject.sample_id for reject in rejects]),
    ):
        if any(later <= earlier for earlier, later in itertools.pairwise(ids)):
            raise BuildError(f"{what} are not in strictly ascending id order")
    both = {sample.sample_id for sample in samples} & {reject.sample_id for reject in rejects}
    if both:
        raise BuildError(f"sample {min(both)} is stored and rejected at once")
    for sample in samples:
        if sample.view != samples[0].view:
            raise BuildError(f"sample {sample.key} is of another view than {samples[0].key}, in one shard")
        if not 0 < len(sample.image) < 2**31:
            raise BuildError(
                f"image of sample {sample.key} has {len(sample.image)} bytes; 1 to 2^31 - 1 can be stored"
            )
        if grid is not None:
            _check_token_sample(sample, grid, codebook_size)
        elif sample.codes is not None:
            raise BuildError(f"sample {sample.key} has codes, but no grid was given")
        if foreign is not None:
            end = _foreign_offset(sample) + len(sample.image)
            if end > foreign.bytes:
                raise BuildError(
                    f"sample {sample.key} ends at byte {end} of {foreign.bytes} of {foreign.url}"
                )
        elif not EXTENSION.fullmatch(sample.extension):
            raise BuildError(
                f"extension {sample.extension!r} of sample {sample.key} is not lower-case letters and digits"
            )


def _check_token_sample(sample: StoredSample, grid: tuple[int, int], codebook_size: int | None) -> None:
    codes = sample.codes
    if codes is None or sample.crop is None:
        raise BuildError(
            f"sample {sample.key} of a token shard has no {'codes' if codes is None else 'crop box'}"
        )
    box, width, height = sample.crop, sample.source_width, sample.source_height
    sides = (box.left, box.width, width), (box.top, box.height, height)
    if any(start < 0 or length < 1 or start + length > source for start, length, source in sides):
        raise BuildError(
            f"the crop of sample {sample.key} is not inside its source of {width} x {height}: {box}"
        )
    if sample.extension != "jpg":
        raise BuildError(f"sample {sample.key} of a token shard is a {sample.extension!r}, not a 'jpg'")
    if codes.shape != grid or codes.dtype != np.uint16:
        raise BuildError(f"codes of sample {sample.key} are {codes.dtype}{codes.shape}, not uint16{grid}")
    if codebook_size is None or int(codes.max()) >= codebook_size:
        raise BuildError(
            f"code {int(codes.max())} of sample {sample.key} is outside the codebook of {codebook_size}"
        )


# ------------------------------------------------------------------------------------------ what came out


def _check_built(
    built: BuiltShard,
    samples: Sequence[StoredSample],
    rejects: Sequence[RejectedSample],
    grid: tuple[int, int] | None,
) -> None:
    """Read back what will be published with the readers' own code, and compare with what went in."""
    table = index.read_index(built.index)
    keys = [sample.key for sample in samples]
    if table.column("key").to_pylist() != keys:
        raise BuildError("the re-read index holds other keys, or in another order, than the samples")
    stored_codes = index.codes_of(table) if grid is not None else None
    if stored_codes is not None:
        for key, sample, row in zip(keys, samples, stored_codes, strict=True):
            if sample.codes is None or not np.array_equal(row, sample.codes.reshape(-1)):
                raise BuildError(f"the re-read index holds other codes for {key}")
    if built.tar is not None:
        _check_tar(built.tar, table.column("image_offset").to_pylist(), samples, grid)
    if built.rejects is not None:
        listed = index.read_rejects(built.rejects).column("sample_id").to_pylist()
        if listed != [reject.sample_id for reject in rejects]:
            raise BuildError("the re-read rejects hold other ids than were rejected")


def _check_tar(
    archive: bytes, offsets: list[int], samples: Sequence[StoredSample], grid: tuple[int, int] | None
) -> None:
    members = list(tar.iter_members(io.BytesIO(archive)))
    step = 1 if grid is None else 2
    if len(members) != step * len(samples):
        raise BuildError(f"the re-read tar holds {len(members)} members for {len(samples)} samples")
    for row, sample in enumerate(samples):
        image = members[step * row + step - 1]
        if (image.name, image.offset) != (f"{sample.key}.{sample.extension}", offsets[row]):
            raise BuildError(
                f"the index points {sample.key} at byte {offsets[row]}, the tar holds {image} there"
            )
        if archive[image.offset : image.offset + image.bytes] != sample.image:
            raise BuildError(f"the re-read tar holds another image for {sample.key}")
        if grid is None:
            continue
        codes = members[step * row]
        payload = io.BytesIO(archive[codes.offset : codes.offset + codes.bytes])
        stored = np.lib.format.read_array(payload, allow_pickle=False)
        if codes.name != f"{sample.key}.codes.npy" or not np.array_equal(stored, np.asarray(sample.codes)):
            raise BuildError(f"the re-read tar holds other codes for {sample.key}")

"""The shard builder: what comes out is what went in, and nothing else ever comes out."""

from __future__ import annotations

import dataclasses
import functools
import io
import tarfile
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from shards.format import build
from shards.format.build import MAX_SHARD_SAMPLES, BuildError, BuiltShard, ForeignTar, build_shard
from shards.format.index import codes_of, read_index, read_rejects
from shards.format.records import RejectedSample, StoredSample
from shards.pixels.views import CropBox

GRID = (2, 3)
MakeSample = Callable[..., StoredSample]


def build_tokens(samples: Sequence[StoredSample], rejects: Sequence[RejectedSample] = ()) -> BuiltShard:
    return build_shard(samples, rejects, grid=GRID, codebook_size=16)


def members_of(archive: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as reader:
        files = {member.name: reader.extractfile(member) for member in reader}
        return {name: file.read() for name, file in files.items() if file is not None}


def reject(sample_id: int, reason: str = "truncated") -> RejectedSample:
    return RejectedSample(sample_id=sample_id, source=f"file-{sample_id}", reason=reason, message="no")


def test_a_token_shard_holds_codes_and_image_of_each_sample_side_by_side(make_sample: MakeSample) -> None:
    samples = [make_sample(i, 1) for i in (3, 4, 8)]
    built = build_tokens(samples, [reject(5), reject(6, "empty"), reject(7)])
    assert built.tar is not None and built.rejects is not None

    members = members_of(built.tar)
    assert list(members) == [
        f"{key}.{extension}"
        for key in ("0000000003-01", "0000000004-01", "0000000008-01")
        for extension in ("codes.npy", "jpg")
    ]
    for sample in samples:
        stored = members[f"{sample.key}.codes.npy"]
        codes = np.load(io.BytesIO(stored), allow_pickle=False)
        assert codes.dtype == np.dtype("<u2") and codes.flags.c_contiguous
        assert stored[:8] == b"\x93NUMPY\x01\x00" and members[f"{sample.key}.jpg"] == sample.image
        np.testing.assert_array_equal(codes, sample.codes)

    table = read_index(built.index)
    for row, sample in zip(table.to_pylist(), samples, strict=True):
        assert built.tar[row["image_offset"] :][: row["image_bytes"]] == sample.image
    np.testing.assert_array_equal(
        codes_of(table), np.stack([np.asarray(s.codes).reshape(-1) for s in samples])
    )
    assert (built.samples, built.rejected, built.view) == (3, {"empty": 1, "truncated": 2}, 1)
    assert built.sample_ids.tolist() == [3, 4, 8] and built.rejected_ids.tolist() == [5, 6, 7]
    assert read_rejects(built.rejects).column("reason").to_pylist() == ["truncated", "empty", "truncated"]


def test_an_image_shard_keeps_source_bytes_and_extension(make_sample: MakeSample) -> None:
    png = dataclasses.replace(make_sample(1, tokens=False), extension="png", image=b"\x89PNG whatever it is")
    samples = [make_sample(0, tokens=False), png]
    built = build_shard(samples, [], grid=None, codebook_size=None)
    assert built.tar is not None and built.rejects is None
    assert members_of(built.tar) == {"0000000000-00.jpg": samples[0].image, "0000000001-00.png": png.image}
    offset = read_index(built.index).column("image_offset").to_pylist()[1]
    assert built.tar[offset : offset + len(png.image)] == png.image


def test_a_foreign_tar_is_pointed_at_and_not_copied(make_sample: MakeSample, foreign_tar: ForeignTar) -> None:
    samples = [
        dataclasses.replace(make_sample(i, tokens=False), image_offset=512 + 2048 * i, extension="JPEG")
        for i in range(3)
    ]
    built = build_shard(samples, [reject(9)], grid=None, codebook_size=None, foreign=foreign_tar)
    assert built.tar is None and built.foreign == foreign_tar
    table = read_index(built.index)
    assert table.column("image_offset").to_pylist() == [512, 2560, 4608]
    assert table.column("extension").to_pylist() == ["JPEG"] * 3

    beyond = dataclasses.replace(samples[0], image_offset=foreign_tar.bytes - 10)
    with pytest.raises(BuildError, match="ends at byte"):
        build_shard([beyond], [], grid=None, codebook_size=None, foreign=foreign_tar)
    with pytest.raises(BuildError, match="no image_offset"):
        build_shard([make_sample(1, tokens=False)], [], grid=None, codebook_size=None, foreign=foreign_tar)
    with pytest.raises(BuildError, match="own crops"):
        build_shard([make_sample(1)], [], grid=GRID, codebook_size=16, foreign=foreign_tar)


def test_a_range_of_rejects_only_still_is_a_shard() -> None:
    built = build_tokens([], [reject(0), reject(1)])
    assert built.tar is not None and members_of(built.tar) == {}
    assert read_index(built.index).num_rows == 0
    assert (built.samples, built.rejected, built.view) == (0, {"truncated": 2}, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_id": 0}, "ascending"),
        ({"sample_id": 9}, "stored and rejected"),
        ({"view": 1}, "another view"),
        ({"image": b""}, "0 bytes"),
        ({"extension": "png"}, "not a 'jpg'"),
        ({"codes": None}, "no codes"),
        ({"crop": None}, "no crop box"),
        ({"codes": np.zeros((3, 2), np.uint16)}, "not uint16"),
        ({"codes": np.zeros((2, 3), np.int64)}, "not uint16"),
        ({"codes": np.full((2, 3), 16, np.uint16)}, "outside the codebook"),
    ],
)
def test_samples_that_do_not_belong_are_refused(
    make_sample: MakeSample, changes: dict[str, object], message: str
) -> None:
    good = make_sample(1)
    with pytest.raises(BuildError, match=message):
        build_tokens([make_sample(0), dataclasses.replace(good, **changes)], [reject(9)])  # type: ignore[arg-type]
    build_tokens([make_sample(0), good], [reject(9)])


def test_keys_that_break_codes_without_a_grid_and_too_many_samples_are_refused(
    make_sample: MakeSample,
) -> None:
    image = make_sample(0, tokens=False)
    for extension in ("tar.gz", "", "JPG", "a/b"):
        with pytest.raises(BuildError, match="extension"):
            named = dataclasses.replace(image, extension=extension)
            build_shard([named], [], grid=None, codebook_size=None)
    for changes in ({"sample_id": -1}, {"sample_id": 10**10}, {"view": 100}):
        with pytest.raises(ValueError, match="has no key"):
            build_tokens([dataclasses.replace(make_sample(0), **changes)])
    with pytest.raises(BuildError, match="no grid"):
        build_shard([make_sample(0)], [], grid=None, codebook_size=None)
    with pytest.raises(BuildError, match="at most 4000"):
        build_tokens([make_sample(0)] * (MAX_SHARD_SAMPLES + 1))


@pytest.mark.parametrize("grid", [GRID, None])
def test_damage_between_building_and_publishing_is_noticed(
    make_sample: MakeSample, monkeypatch: pytest.MonkeyPatch, grid: tuple[int, int] | None
) -> None:
    """Any flipped byte of a payload or header, wrong offsets, swapped members: never handed out."""
    samples = [make_sample(i, tokens=grid is not None) for i in range(3)]
    codebook_size = None if grid is None else 16
    honest = build.tar.build_tar
    archive = build_shard(samples, [], grid=grid, codebook_size=codebook_size).tar
    assert archive is not None

    def attempt(fake: Callable[[Sequence[tuple[str, bytes]]], tuple[bytes, list[int]]]) -> None:
        monkeypatch.setattr(build.tar, "build_tar", fake)
        # damage inside an npy header surfaces as ValueError from numpy
        with pytest.raises((BuildError, ValueError)):
            build_shard(samples, [], grid=grid, codebook_size=codebook_size)

    def flip(position: int, members: Sequence[tuple[str, bytes]]) -> tuple[bytes, list[int]]:
        data, offsets = honest(members)
        return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :], offsets

    for member in build.tar.iter_members(io.BytesIO(archive)):
        for position in range(member.offset, member.offset + member.bytes, 37):
            attempt(functools.partial(flip, position))
    attempt(lambda members: (honest(members)[0], [offset + 1 for offset in honest(members)[1]]))
    attempt(lambda members: honest(members[::-1]))
    attempt(lambda members: honest(members[:-1]))


def test_a_large_crop_box_survives(make_sample: MakeSample) -> None:
    box = CropBox(top=0, left=30_000, height=1, width=2**31 - 30_001)
    built = build_tokens([dataclasses.replace(make_sample(0), crop=box, source_width=2**31 - 1)])
    assert read_index(built.index).column("crop").to_pylist() == [dataclasses.asdict(box)]


@pytest.mark.parametrize("change", [{"top": -1}, {"left": 65}, {"height": 0}, {"height": 49}, {"width": 64}])
def test_a_crop_outside_its_source_is_refused(make_sample: MakeSample, change: dict[str, int]) -> None:
    sample = dataclasses.replace(
        make_sample(0), crop=CropBox(**{"top": 0, "left": 1, "height": 48, "width": 63})
    )
    build_tokens([sample])
    with pytest.raises(BuildError, match="0000000000-00 is not inside its source of 64 x 48"):
        build_tokens([dataclasses.replace(sample, crop=dataclasses.replace(sample.crop, **change))])

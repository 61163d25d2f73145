"""The tar writer and reader against Python's `tarfile`, and against damage that `tarfile` does not notice."""

from __future__ import annotations

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.format.tar import BLOCK, TarError, TarMember, build_tar, iter_members

NAMES = st.from_regex(r"[abcxyz0189_-]{1,90}(\.[abcxyz0189_]{1,4}){1,2}\.?", fullmatch=True)
MEMBERS = st.lists(st.tuples(NAMES, st.binary(max_size=1200)), max_size=6)


def read_all(archive: bytes) -> list[TarMember]:
    return list(iter_members(io.BytesIO(archive)))


def by_tarfile(archive: bytes) -> list[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as reader:
        files = [(member, reader.extractfile(member)) for member in reader if member.isfile()]
        return [(member.name, file.read()) for member, file in files if file is not None]


@settings(max_examples=60, deadline=None)
@given(members=MEMBERS)
def test_what_is_built_reads_back_with_tarfile_and_with_us(members: list[tuple[str, bytes]]) -> None:
    archive, offsets = build_tar(members)

    assert by_tarfile(archive) == members
    assert [(m.name, m.offset, m.bytes, m.problem) for m in read_all(archive)] == [
        (name, offset, len(payload), None) for (name, payload), offset in zip(members, offsets, strict=True)
    ]
    for (_, payload), offset in zip(members, offsets, strict=True):
        assert archive[offset : offset + len(payload)] == payload
    assert len(archive) % tarfile.RECORDSIZE == 0
    assert build_tar(members)[0] == archive


def test_headers_hold_no_time_and_no_owner_and_names_that_fit() -> None:
    archive, _ = build_tar([("a.jpg", b"x"), ("b.jpg", b"y" * 512)])
    with tarfile.open(fileobj=io.BytesIO(archive)) as reader:
        for member in reader:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert member.mode == 0o644
    assert archive[257:265] == b"ustar\x0000"
    for name in ("x" * 101, "ü.jpg"):
        with pytest.raises(ValueError, match="does not fit"):
            build_tar([(name, b"")])


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_archives_of_every_usual_format_read_as_tarfile_reads_them(tar_format: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as writer:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        writer.addfile(folder)
        for number, name in enumerate(["plain.jpg", "d/" * 60 + "long.jpg", "ümläut.png", "after.jpg"]):
            if tar_format == tarfile.USTAR_FORMAT and not name.isascii():
                continue
            info = tarfile.TarInfo(name)
            info.size = 100 * number
            writer.addfile(info, io.BytesIO(bytes([number]) * info.size))
    archive = buffer.getvalue()

    members = [(m.name, archive[m.offset : m.offset + m.bytes]) for m in read_all(archive)]
    assert members == by_tarfile(archive) and len(members) >= 3


def test_every_flipped_header_byte_is_noticed_or_harmless() -> None:
    archive, _ = build_tar([("a.jpg", b"a" * 700), ("b.jpg", b"b")])
    second = BLOCK + 1024
    for position in [*range(BLOCK), *range(second, second + BLOCK)]:
        damaged = bytearray(archive)
        damaged[position] ^= 0x10
        if 148 <= position % second < 156:
            continue  # the checksum field itself may still spell the same number
        with pytest.raises(TarError, match="damaged"):
            read_all(bytes(damaged))


@settings(max_examples=200, deadline=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, 6000), st.integers(0, 255)), max_size=12),
    format_number=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    mend=st.booleans(),
)
def test_no_bytes_crash_the_reader_or_point_outside(
    edits: list[tuple[int, int]], format_number: int, mend: bool
) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format_number) as writer:
        for name in ("n" * 150, "b.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 600
            writer.addfile(info, io.BytesIO(b"p" * 600))
    archive = bytearray(buffer.getvalue())
    for position, value in edits:
        archive[position % len(archive)] = value
    if mend:  # a valid checksum lets the damage through to the fields
        for start in range(0, len(archive), BLOCK):
            header = archive[start : start + BLOCK]
            if header[257:262] == b"ustar":
                total = sum(header) - sum(header[148:156]) + 8 * 32
                archive[start + 148 : start + 156] = b"%06o\0 " % total

    try:
        for member in iter_members(io.BytesIO(bytes(archive))):
            assert 0 < member.offset <= member.offset + member.bytes <= len(archive)
    except TarError:
        pass

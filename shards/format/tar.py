"""Tar archives as bytes: webdataset's own writer, and a reader that refuses what it cannot vouch for.

A webdataset reader sees one sample for each key, which has no dot: `codes.npy` (NPY bytes) and `jpg` in token
shards, the source file under its own extension in image shards. Python's `tarfile` ends silently at a damaged
or missing header, so a tar cut at a member boundary looks whole; here the end marker must be there.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Literal

BLOCK = tarfile.BLOCKSIZE
REGULAR_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
MAX_EXTENSION_BYTES = 1 << 20
"""A long-name or pax record beyond this is not a name but an attack on memory."""


class TarError(Exception):
    """The archive is damaged or of a kind that cannot be read; says what and at which byte."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TarMember:
    """One member: payload at [offset, offset + bytes) of the archive.

    `problem` is None for a regular file with a harmless name; others are listed, never to be opened:
    `link`, `special` (device, fifo, unknown type) or `unsafe_name` (absolute, `..`, empty, NUL).
    """

    name: str
    offset: int
    bytes: int
    problem: Literal["link", "special", "unsafe_name"] | None = None


def build_tar(members: Sequence[tuple[str, bytes]]) -> tuple[bytes, list[int]]:
    """A ustar archive of regular files, and the offset of each payload in it.

    Owner, group and time are 0 and there is no padding but zeros: the same members give the same bytes.
    Names must be ASCII, fit ustar's 100 bytes, and have an extension.
    """
    from webdataset.writer import TarWriter  # imports torch where it is there: only who writes pays for it

    file = io.BytesIO()
    offsets: list[int] = []
    position = 0
    with TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False, keep_meta=True) as writer:
        for name, payload in members:
            key, _, extension = name.partition(".")
            if len(name) > 100 or not name.isascii() or not extension:
                raise ValueError(
                    f"member name {name!r} does not fit: at most 100 ASCII bytes with an extension"
                )
            writer.write({"__key__": key, extension: payload})
            offsets.append(position + BLOCK)
            position += BLOCK + _padded(len(payload))
    return file.getvalue(), offsets


def iter_members(file: BinaryIO) -> Iterator[TarMember]:
    """Every member of an uncompressed tar in order; folders are left out, everything else is listed.

    Understands ustar, GNU long names and pax paths. Raises TarError at a header that is damaged or cut off,
    at a payload that ends beyond the file, where the end marker is missing, and where anything follows it
    (a second archive, say): members before it have been yielded by then and are sound.
    """
    end = file.seek(0, 2)
    position = 0
    long_name: str | None = None
    pax: dict[str, str] = {}
    while True:
        file.seek(position)
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            raise TarError(f"cut off at byte {end}: no end marker")
        if not header.strip(b"\0"):
            _check_end(file, position)
            return
        info = _parse_header(header, position)
        offset = position + BLOCK
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, *_PAX_TYPES):
            record = _read_extension(file, offset, info.size, end)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                long_name = record.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
            elif info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                pax = _parse_pax(record, offset)
            elif info.type == tarfile.XGLTYPE:
                _check_global(_parse_pax(record, offset), position)
            position = offset + _padded(info.size)
            continue
        name = pax.get("path", long_name if long_name is not None else info.name)
        size = _pax_size(pax, offset) if "size" in pax else info.size
        if info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in pax):
            raise TarError(f"member {name!r} at byte {position} is a sparse file; repack it without --sparse")
        long_name, pax = None, {}
        # links and devices carry no payload, whatever their size field says; unknown types do
        stored = size if info.type in REGULAR_TYPES or info.type not in tarfile.SUPPORTED_TYPES else 0
        if offset + stored > end:
            raise TarError(f"cut off inside member {name!r}: it ends at byte {offset + stored} of {end}")
        position = offset + _padded(stored)
        if info.type == tarfile.DIRTYPE or (info.type in REGULAR_TYPES and name.endswith("/")):
            continue
        yield TarMember(name=name, offset=offset, bytes=stored, problem=_problem(info.type, name))


_PAX_TYPES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)


def _check_end(file: BinaryIO, position: int) -> None:
    """Only zeros may follow the end marker: `tarfile` stops there and would lose the rest without a word."""
    while block := file.read(1 << 20):
        if block.count(0) < len(block):
            raise TarError(
                f"the archive ends at byte {position}, but something follows, such as another; split it there"
            )


def _check_global(pax: dict[str, str], position: int) -> None:
    """A global header may say who made the archive, not what every member is called or how long it is."""
    wrong = [key for key in pax if key in ("path", "size", "linkpath") or key.startswith("GNU.sparse.")]
    if wrong:
        raise TarError(f"the global pax header at byte {position} sets {wrong[0]} for all members; repack it")


def _parse_header(header: bytes, position: int) -> tarfile.TarInfo:
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise TarError(f"damaged header at byte {position}: {error}") from None
    if info.size < 0:
        raise TarError(f"damaged header at byte {position}: negative size")
    return info


def _read_extension(file: BinaryIO, offset: int, size: int, end: int) -> bytes:
    if size > MAX_EXTENSION_BYTES or offset + size > end:
        raise TarError(f"extended header at byte {offset} claims {size} bytes")
    file.seek(offset)
    return file.read(size)


def _parse_pax(record: bytes, offset: int) -> dict[str, str]:
    """`<length> <key>=<value>\\n` records; a malformed one is an error, because the name may be in it."""
    records: dict[str, str] = {}
    position = 0
    while position < len(record) and record[position : position + 1] != b"\0":
        space = record.find(b" ", position, position + 20)
        digits = record[position : max(space, position)]
        length = int(digits) if digits.isdigit() else 0
        entry = record[space + 1 : position + length]
        whole = space >= 0 and space - position + 2 < length <= len(record) - position
        if not whole or not entry.endswith(b"\n") or b"=" not in entry:
            raise TarError(f"damaged pax header at byte {offset + position}")
        key, value = entry[:-1].split(b"=", 1)
        records[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        position += length
    return records


def _pax_size(pax: dict[str, str], offset: int) -> int:
    size = pax["size"]
    if not (size.isascii() and size.isdigit()):
        raise TarError(f"damaged pax header before byte {offset}: size {size!r}")
    return int(size)


def _problem(kind: bytes, name: str) -> Literal["link", "special", "unsafe_name"] | None:
    if kind in (tarfile.LNKTYPE, tarfile.SYMTYPE):
        return "link"
    if kind not in REGULAR_TYPES:
        return "special"
    if not name or name.startswith("/") or "\0" in name or ".." in name.split("/"):
        return "unsafe_name"
    return None


def _padded(size: int) -> int:
    return size + -size % BLOCK

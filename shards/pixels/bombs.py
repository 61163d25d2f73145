"""Small files that cost much: what a file asks of its decoder, looked up in its headers before one is asked.

Pillow bounds an image's pixels, a PNG's text and the tags of a TIFF. What is bounded here was found by
measurement: it took minutes or gigabytes, from a few megabytes of file.
"""

from __future__ import annotations

import itertools
import math
import re
import struct
from collections.abc import Iterator

_MAX_EXIF_PARTS = 100
"""Of a JPEG. Pillow joins them one by one: 4 MB in 400,000 parts took 2.4 s, growing with the square."""
_MAX_COMMENTS = 10_000
"""Of a plain PNM, which is copied for each: 1 MB with 500,000 took 9 s, the next ones as much each."""
_MAX_VALUES = 1 << 20
"""Of a TIFF's tag, such as one for each strip: 4 MB with 4,000,000, a byte each, took 22 s and 1.2 GB."""
_MAX_TAGS = 1 << 16
_MAX_BLOCKS = 1 << 19
"""Code blocks or precincts of a JPEG 2000: 12 kB with 4,000,000 took 9 s and 8.7 GB."""
_MAX_CODESTREAMS = 64

_TIFF = (b"II*\0", b"MM\0*", b"MM*\0", b"II\0*", b"MM\0+", b"II+\0")
_TILE_WIDTH, _TILE_LENGTH = 322, 323
# Tags below say how the pixels lie; those above may hold anything, and nobody looks into them.
_END_OF_LAYOUT = 700
_TEXTS = (2, 7)
_CODESTREAM = b"\xff\x4f\xff\x51"
_COD, _COC, _SOT, _SOD = 0xFF52, 0xFF53, 0xFF90, 0xFF93


def excess(data: bytes, max_pixels: int) -> str | None:
    """Why these bytes would cost a decoder more than any image of `max_pixels` pixels, or None."""
    if data.startswith(b"\xff\xd8"):
        parts = data.count(b"Exif\0\0")
        return f"EXIF in {parts} parts" if parts > _MAX_EXIF_PARTS else None
    if data[:2] in (b"P1", b"P2", b"P3"):
        comments = data.count(b"#")
        return f"{comments} comments in a plain PNM" if comments > _MAX_COMMENTS else None
    if data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8X" and len(data) >= 30:
        # its decoder makes room for the canvas as soon as it is opened
        width, height = (int.from_bytes(data[place : place + 3], "little") + 1 for place in (24, 27))
        too_large = width * height > max_pixels
        return f"{width} x {height} pixels, more than max_pixels {max_pixels}" if too_large else None
    if data[:4] in _TIFF:
        return _tiff_excess(data, max_pixels)
    if data.startswith((_CODESTREAM, b"icns")) or data[4:8] == b"jP  ":
        # there may be others before the one that counts
        starts = [match.start() for match in re.finditer(_CODESTREAM, data)]
        if len(starts) > _MAX_CODESTREAMS:
            return f"{len(starts)} codestreams"
        blocks = max((_jpeg2000_blocks(data, start) for start in starts), default=0)
        return f"{blocks} code blocks or precincts" if blocks > _MAX_BLOCKS else None
    return None


# ------------------------------------------------------------------------------------------------ TIFF


def _tiff_excess(data: bytes, max_pixels: int) -> str | None:
    sides = {_TILE_WIDTH: 1, _TILE_LENGTH: 1}
    # Pillow takes a big-endian BigTIFF for a classic one, libtiff does not
    tags = itertools.chain.from_iterable(_tiff_tags(data, big) for big in {data[2] == 43, 43 in data[2:4]})
    for number, (tag, kind, count, value) in enumerate(tags):
        if number == _MAX_TAGS:
            return "more than 65,536 tags"
        # what would end behind the file is not read
        if _MAX_VALUES < count <= len(data) and tag < _END_OF_LAYOUT and kind not in _TEXTS:
            return f"{count} values in tag {tag}"
        if tag in sides:
            sides[tag] = max(sides[tag], value)
    pixels = math.prod(sides.values())
    return f"tiles of {pixels} pixels, more than max_pixels {max_pixels}" if pixels > max_pixels else None


def _tiff_tags(data: bytes, big: bool) -> Iterator[tuple[int, int, int, int]]:
    """(tag, type, count, value if it is one number) of the first directory, as far as the file goes."""
    order = ">" if data.startswith(b"MM") else "<"
    position, one, entry, number = (8, "Q", "HHQ", "Q") if big else (4, "L", "HHL", "H")
    try:
        [position] = struct.unpack_from(order + one, data, position)
        [entries] = struct.unpack_from(order + number, data, position)
        position += struct.calcsize(number)
        for _ in range(entries):
            tag, kind, count = struct.unpack_from(order + entry, data, position)
            position += struct.calcsize(f"={entry}")
            form = {1: "B", 3: "H", 4: "L", 16: "Q"}.get(kind, "")
            [value] = struct.unpack_from(order + form, data, position) if form else [0]
            yield tag, kind, count, value
            position += struct.calcsize(f"={one}")
    except (struct.error, OverflowError):
        return  # the end of the file, or a place behind it


# ------------------------------------------------------------------------------------------------ JPEG 2000


def _jpeg2000_blocks(data: bytes, start: int) -> int:
    """At most so many code blocks or precincts: all samples over the smallest area that any header names."""
    smallest = 1 << 12  # a code block cannot be larger
    samples = 0
    try:
        x1, y1, x0, y0 = struct.unpack_from(">IIII", data, start + 8)
        [components] = struct.unpack_from(">H", data, start + 40)
        samples = max(0, x1 - x0) * max(0, y1 - y0) * components
        for marker, body in _jpeg2000_segments(data, start + 2):
            # the index of a component is one byte where there are at most 256
            skipped = 5 if marker == _COD else 2 if components < 257 else 3
            _levels, width, height, _style, _transform, *precincts = body[skipped:]
            areas = [width + height + 4, *((each & 15) + (each >> 4) for each in precincts)]
            smallest = min(smallest, 1 << min(areas))
    except (struct.error, ValueError, OverflowError):
        pass  # cut off, or too short to name sizes
    return samples // smallest


def _jpeg2000_segments(data: bytes, position: int) -> Iterator[tuple[int, bytes]]:
    """Marker and body of each coding style segment, in the main header and those of all tile parts."""
    tile_end = len(data)
    while position + 4 <= len(data):
        marker, length = struct.unpack_from(">HH", data, position)
        body = data[position + 4 : position + 2 + length]
        if marker == _SOT:
            [tile_bytes] = struct.unpack_from(">I", body, 2)
            tile_end = position + tile_bytes if tile_bytes else len(data)
        if marker == _SOD:
            if tile_end <= position:
                return
            position = tile_end
            continue
        if marker in (_COD, _COC):
            yield marker, body
        position += 2 + length

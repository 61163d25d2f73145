"""Small files that cost much: refused by their headers, while whole pictures of their kind pass."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.pixels.decode import DecodeConfig, Rejected, decode_image

ROOT = Path(__file__).resolve().parents[3]


def saved(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def tiled_tiff(side: int) -> bytes:
    """A TIFF of one pixel in one deflated tile of side x side pixels."""
    payload = zlib.compress(bytes(side * side), 9)
    tags = {256: 1, 257: 1, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 134, 325: len(payload)}
    entries = b"".join(struct.pack("<HHLL", tag, 4, 1, value) for tag, value in tags.items())
    return b"II" + struct.pack("<HLH", 42, 8, len(tags)) + entries + bytes(4) + payload


def exif_parts(parts: int) -> bytes:
    jpeg = saved(Image.new("RGB", (8, 8)), "JPEG")
    return jpeg[:2] + (b"\xff\xe1" + struct.pack(">H", 9) + b"Exif\0\0x") * parts + jpeg[2:]


def plain_pnm(comments: int) -> bytes:
    return b"P2\n4 4\n255\n" + b"#\n" * comments + b"1 " * 16


def webp_canvas(width: int, height: int) -> bytes:
    sides = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<II", 10, 0) + sides
    return b"RIFF" + struct.pack("<I", len(body)) + body


def run_length_bmp(width: int) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, 1, 1, 8, 1, 0, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 2000, 0, 0, 54 + 1024) + head + bytes(1024) + b"\1\1\0\0\0\1"


def scans(copies: int) -> bytes:
    data = saved(Image.fromarray(np.zeros((2500, 2500), np.uint8)), "JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * copies + data[-2:]


COSTLY = {
    "tile": (tiled_tiff, 15_000, 512),
    "EXIF in parts": (exif_parts, 300_000, 3),
    "comments": (plain_pnm, 3_000_000, 50),
    "canvas": (lambda side: webp_canvas(side, side), 16_000, None),
    "run-length BMP": (run_length_bmp, 170_000_000, None),
    "repeated scans": (scans, 3000, 1),
}
"""By name: how it is made; a size that costs ten seconds to hours, or gigabytes; an ordinary size."""


@pytest.mark.parametrize("name", COSTLY)
def test_costly_files_are_refused_by_their_headers(name):
    make, costly, ordinary = COSTLY[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Rejected, match="too_large"):
            decode_image(make(costly), DecodeConfig())
    if ordinary is not None:
        decode_image(make(ordinary), DecodeConfig())


def test_long_rows_take_seconds_and_not_minutes():
    """A process with 20 s of CPU decodes a row of 45 MB that Pillow's own blocks would take longer over."""
    program = """
import resource, struct
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
from shards.pixels.decode import DecodeConfig, decode_image
width = 50_000_000
sizes = struct.pack("<IHHI", 54 + 3 * width, 0, 0, 54)
head = struct.pack("<IiiHHIIiiII", 40, width, 1, 1, 24, 0, 3 * width, 0, 0, 0, 0)
pixels = decode_image(b"BM" + sizes + head + bytes(range(150)) * (width // 50), DecodeConfig())
assert pixels.shape == (1, width, 3) and pixels[0, 1].tolist() == [5, 4, 3]
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

"""Small files that cost much: refused by their headers, while whole pictures of every kind pass."""

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

from shards.pixels.bombs import excess
from shards.pixels.decode import DecodeConfig, Rejected, decode_image

ROOT = Path(__file__).resolve().parents[3]
MAX_PIXELS = 178_956_970


def saved(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def tiff(order: str, big: bool, entries: list[tuple[int, int, int, int]], payload: bytes = b"") -> bytes:
    """A TIFF of raw tags (tag, type, count, value)."""
    mark = b"II" if order == "<" else b"MM"
    if big:
        head = mark + struct.pack(f"{order}HHHQ", 43, 8, 0, 16) + struct.pack(f"{order}Q", len(entries))
        body = b"".join(struct.pack(f"{order}HHQQ", *entry) for entry in entries) + bytes(8)
    else:
        head = mark + struct.pack(f"{order}HL", 42, 8) + struct.pack(f"{order}H", len(entries))
        body = b"".join(struct.pack(f"{order}HHLL", *entry) for entry in entries) + bytes(4)
    return head + body + payload


def strips(count: int, order: str = "<", big: bool = False) -> bytes:
    """A TIFF, one pixel wide, of so many strips, whose offsets take a byte each."""
    after = 16 + 8 + 20 * 9 + 8 if big else 8 + 2 + 12 * 9 + 4
    long = 16 if big else 4
    fields = {
        256: (long, 1, 1),
        257: (long, 1, count),
        258: (long, 1, 8),
        259: (long, 1, 1),
        262: (long, 1, 1),
    }
    fields |= {273: (1, count, after), 277: (long, 1, 1), 278: (long, 1, 1), 279: (1, count, after)}
    return tiff(order, big, [(tag, *field) for tag, field in fields.items()], b"\x08" * count)


def tiles(side: int) -> bytes:
    """A TIFF of one pixel in one deflated tile of side x side pixels."""
    payload = zlib.compress(bytes(side * side), 9)
    fields = {
        256: 1,
        257: 1,
        258: 8,
        259: 8,
        262: 1,
        277: 1,
        322: side,
        323: side,
        324: 134,
        325: len(payload),
    }
    return tiff("<", False, [(tag, 4, 1, value) for tag, value in fields.items()], payload)


def exif_parts(parts: int) -> bytes:
    jpeg = saved(Image.new("RGB", (8, 8)), "JPEG")
    return jpeg[:2] + (b"\xff\xe1" + struct.pack(">H", 9) + b"Exif\0\0x") * parts + jpeg[2:]


def plain_pnm(comments: int) -> bytes:
    return b"P2\n4 4\n255\n" + b"#\n" * comments + b"1 " * 16


def jpeg2000(side: int, precincts: int, *, jp2: bool = False) -> bytes:
    """A grey picture, side x side, with every precinct of 2^precincts x 2^precincts."""
    options = {"no_jp2": not jp2, "precinct_size": (128, 128), "codeblock_size": (64, 64)}
    data = bytearray(saved(Image.new("L", (side, side)), "JPEG2000", **options))
    coding = data.index(b"\xff\x52")
    for place in range(coding + 14, coding + 2 + struct.unpack(">H", data[coding + 2 : coding + 4])[0]):
        data[place] = precincts << 4 | precincts
    return bytes(data)


def icns(picture: bytes) -> bytes:
    entry = b"ic09" + struct.pack(">I", len(picture) + 8) + picture
    return b"icns" + struct.pack(">I", len(entry) + 8) + entry


def webp_canvas(width: int, height: int) -> bytes:
    sides = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<II", 10, 0) + sides
    return b"RIFF" + struct.pack("<I", len(body)) + body


def run_length_bmp(width: int, height: int) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, 0, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 2000, 0, 0, 54 + 1024) + head + bytes(1024) + b"\1\1\0\0\0\1"


def gzip_fits(side: int) -> bytes:
    """Two headers and next to nothing: a compressed image of side x side pixels."""
    cards = [
        "SIMPLE  =                    T",
        "BITPIX  =                   16",
        "NAXIS   =                    0",
    ]
    table = [
        "XTENSION= 'BINTABLE'", "BITPIX  =                    8", "NAXIS   =                    2",
        "NAXIS1  =                    8", "NAXIS2  =                    1", "ZIMAGE  =                    T",
        "ZCMPTYPE= 'GZIP_1  '", "ZBITPIX =                   16", "ZNAXIS  =                    2",
        f"ZNAXIS1 = {side:20d}", f"ZNAXIS2 = {side:20d}",
    ]  # fmt: skip
    blocks = ["".join(card.ljust(80) for card in [*lines, "END"]).ljust(2880) for lines in (cards, table)]
    return "".join(blocks).encode() + bytes(8)


BOMBS = {
    "strips": lambda: strips(2_000_000),
    "strips, big-endian": lambda: strips(2_000_000, ">"),
    "strips, BigTIFF": lambda: strips(2_000_000, big=True),
    "tile": lambda: tiles(15_000),
    "EXIF in parts": lambda: exif_parts(300_000),
    "comments": lambda: plain_pnm(3_000_000),
    "precincts": lambda: jpeg2000(4000, 1),
    "precincts in JP2": lambda: jpeg2000(4000, 1, jp2=True),
    "precincts behind others": lambda: jpeg2000(64, 7, jp2=True) + jpeg2000(4000, 1),
    "precincts in an icon": lambda: icns(jpeg2000(4000, 1)),
    "codestreams": lambda: b"\xff\x4f\xff\x51" * 1_000_000,
    "canvas": lambda: webp_canvas(16_000, 16_000),
    "run-length BMP": lambda: run_length_bmp(170_000_000, 1),
    "compressed FITS": lambda: gzip_fits(13_000),
    "repeated scans": lambda: (
        lambda data: data[:-2] + data[data.rindex(b"\xff\xda") : -2] * 3000 + data[-2:]
    )(saved(Image.fromarray(np.zeros((2500, 2500), np.uint8)), "JPEG", progressive=True)),
}
"""Each takes its decoder ten seconds to hours, or gigabytes."""


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_by_their_headers(name):
    with pytest.raises(Rejected) as raised, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decode_image(BOMBS[name](), DecodeConfig(max_pixels=MAX_PIXELS))
    assert raised.value.reason == ("unsupported" if name == "compressed FITS" else "too_large")


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


def test_ordinary_pictures_are_no_bombs():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (300, 200, 3), dtype=np.uint8))
    pictures = [
        *(
            saved(image, kind)
            for kind in ("JPEG", "PNG", "TIFF", "WEBP", "JPEG2000", "BMP", "PPM", "GIF", "AVIF")
        ),
        *(saved(image, "TIFF", compression=kind) for kind in ("tiff_lzw", "jpeg", "packbits")),
        saved(image, "TIFF", big_tiff=True),
        saved(image, "WEBP", lossless=True, save_all=True, append_images=[image.rotate(180)]),
        saved(image, "JPEG2000", tile_size=(64, 64), codeblock_size=(4, 4), precinct_size=(64, 64)),
        saved(image, "JPEG2000", no_jp2=True, num_resolutions=1),
        exif_parts(3),
        plain_pnm(50),
        strips(5_000),
        tiles(512),
        jpeg2000(300, 1),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for data in pictures:
            assert excess(data, MAX_PIXELS) is None
            with Image.open(io.BytesIO(data)) as opened:
                assert decode_image(data, DecodeConfig()).shape[:2] == opened.size[::-1]


def test_damage_at_the_start_of_a_file_breaks_no_look_at_its_headers():
    rng = np.random.default_rng(1)
    whole = [
        strips(3),
        strips(3, ">"),
        strips(3, big=True),
        tiles(16),
        jpeg2000(64, 3),
        jpeg2000(64, 3, jp2=True),
    ]
    whole += [webp_canvas(9, 9), exif_parts(2), plain_pnm(2), icns(jpeg2000(64, 3))]
    for data in [*whole, b"MM\0+" + bytes(200), b"II*\0", b"\xff\x4f\xff\x51", b"RIFF1234WEBPVP8X"]:
        assert excess(data, MAX_PIXELS) is None
        for number in range(300):
            damaged = bytearray(data[: rng.integers(4, len(data) + 1)])
            for place in rng.integers(4, max(5, len(damaged)), 3):
                if place < len(damaged):
                    damaged[place] = rng.integers(256) if number % 2 else 255
            excess(bytes(damaged), MAX_PIXELS)  # raises nothing

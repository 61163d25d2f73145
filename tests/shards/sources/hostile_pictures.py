"""Pictures as people have them, as they rather should not, broken ones, and small files that promise much."""

from __future__ import annotations

import gzip
import io
import os
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, PngImagePlugin

SEED = int(os.environ.get("HOSTILE_SEED", "0"))


def picture(mode: str = "RGB", size: tuple[int, int] = (26, 22), seed: int = 0) -> Image.Image:
    rng = np.random.default_rng([SEED, seed])
    width, height = size
    pixels = rng.integers(0, 256, ((height + 3) // 4, (width + 3) // 4, 4), np.uint8)
    pixels = np.kron(pixels, np.ones((4, 4, 1), np.uint8))[:height, :width]
    match mode:
        case "I;16":
            return Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257)
        case "I":
            return Image.fromarray(pixels[:, :, 0].astype(np.int32) * 70_000)
        case "F":
            return Image.fromarray(pixels[:, :, 0].astype(np.float32) / 17 - 3)
        case "RGBA" | "LA" | "PA":
            return Image.fromarray(pixels).convert(mode)
        case _:
            return Image.fromarray(pixels[:, :, :3]).convert(mode)


def saved(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(
    width: int, height: int, depth: int, colour: int, rows: bytes | None = None, extra: bytes = b""
) -> bytes:
    """A PNG of the given header; all zeros where no rows (each with its filter byte) are given."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    if rows is None:
        packer = zlib.compressobj(9)
        row = bytes((width * channels * depth + 7) // 8 + 1)
        body = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    else:
        body = zlib.compress(rows)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def tiff(entries: list[tuple[int, int, int, int | bytes]], payload: bytes = b"") -> bytes:
    """A TIFF of raw tags (tag, type, count, value); bytes as value are put behind and pointed at."""
    after = 8 + 2 + 12 * len(entries) + 4
    body = struct.pack("<H", len(entries))
    for tag, kind, count, value in entries:
        if isinstance(value, bytes):
            body += struct.pack("<HHLL", tag, kind, count, after + len(payload))
            payload += value
        else:
            body += struct.pack("<HHLL", tag, kind, count, value)
    return b"II*\0" + struct.pack("<L", 8) + body + bytes(4) + payload


def jpeg_segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def whole_pictures() -> Iterator[tuple[str, bytes]]:
    """Formats and modes as people have them, and as they rather should not."""
    for file_format, modes in {
        "JPEG": "RGB L 1 CMYK YCbCr",
        "PNG": "RGB L 1 P RGBA LA I;16",
        "GIF": "RGB L 1 P",
        "TIFF": "RGB L 1 P RGBA LA PA CMYK YCbCr LAB I;16 I F",
        "WEBP": "RGB L RGBA",
        "BMP": "RGB L 1 P",
        "PPM": "RGB L 1 I;16 F",
        "JPEG2000": "RGB L RGBA LA",
        "AVIF": "RGB RGBA",
    }.items():
        for mode in modes.split():
            yield f"modes/{mode.replace(';', '')}.{file_format.lower()}", saved(picture(mode), file_format)
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        yield f"tiff/{compression}.tif", saved(picture(), "TIFF", compression=compression)
    yield "tiff/group4.tif", saved(picture("1"), "TIFF", compression="group4")
    yield "tiff/pages.tif", saved(picture(), "TIFF", save_all=True, append_images=[picture(seed=1)])
    yield "tiff/big.tif", saved(picture(), "TIFF", big_tiff=True)
    fields = {256: 8, 257: 8, 259: 1, 262: 1, 277: 2, 278: 8, 279: 128, 338: 1}
    premultiplied = [(258, 3, 2, 8 | 8 << 16), *((tag, 3, 1, value) for tag, value in fields.items())]
    yield "tiff/premultiplied.tif", tiff(sorted([*premultiplied, (273, 4, 1, bytes(range(128)))]))
    for orientation in range(1, 10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for file_format in ("JPEG", "PNG", "TIFF", "WEBP"):
            yield f"turned/{orientation}.{file_format.lower()}", saved(picture(), file_format, exif=exif)
    frames = {"save_all": True, "append_images": [picture(seed=seed) for seed in range(3)]}
    for file_format in ("GIF", "PNG", "WEBP"):
        yield f"animated/{file_format}", saved(picture(), file_format, **frames)
    for size in ((1, 1), (1, 3000), (3000, 1), (65_500, 1), (2, 20_000)):
        for file_format in ("JPEG", "PNG", "BMP", "TIFF"):
            yield f"sizes/{size[0]}x{size[1]}.{file_format.lower()}", saved(picture(size=size), file_format)
    yield "jpeg/progressive.jpg", saved(picture(), "JPEG", progressive=True)
    yield "jpeg/444.jpg", saved(picture(), "JPEG", subsampling=0, quality=100)
    yield "jpeg/trailing.jpg", saved(picture(), "JPEG") + b"trailing bytes" * 20
    yield "jpeg/no-end-marker.jpg", saved(picture(), "JPEG")[:-2]
    cmyk = saved(picture("CMYK"), "JPEG")
    for transform in (0, 1, 2):  # Adobe: CMYK, and (with four components) YCCK
        adobe = b"Adobe" + struct.pack(">HHHB", 100, 0, 0, transform)
        yield f"jpeg/adobe{transform}.jpg", cmyk[:2] + jpeg_segment(0xEE, adobe) + cmyk[2:]
    jpeg = saved(picture(), "JPEG")
    for name, exif_bytes in {
        "garbage": b"Exif\0\0" + b"\xde\xad\xbe\xef" * 50,
        "short": b"Exif\0\0II",
        "outside": b"Exif\0\0II*\0\xff\xff\xff\x7f",
        "loop": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\xff\xff\xff\xff\x08\0\0\0\x08\0\0\0",
    }.items():
        yield f"exif/{name}.jpg", jpeg[:2] + jpeg_segment(0xE1, exif_bytes) + jpeg[2:]
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "c" * 900_000, zip=True)
    yield "png/text.png", saved(picture(), "PNG", pnginfo=text)
    yield "png/palette.png", saved(picture("P"), "PNG", transparency=bytes(range(100)))
    yield "png/key-colour.png", saved(picture("L"), "PNG", transparency=7)
    yield (
        "png/16-bit-colour-key.png",
        png(2, 2, 16, 2, b"\0" + bytes(range(12)) + b"\0" + b"\xff" * 12, chunk(b"tRNS", b"\xff\xff" * 3)),
    )
    yield "png/16-bit-grey-alpha.png", png(2, 1, 16, 4, b"\0" + bytes(range(8)))
    yield "png/16-bit-rgba.png", png(1, 1, 16, 6, b"\0" + bytes(range(8)))
    yield "ppm/plain.ppm", b"P3\n# a comment\n3 1 255\n1 2 3 4 5 6 7 8 9\n"
    yield "ppm/maxval.pgm", b"P5 3 1 1000\n" + bytes(6)


def broken_pictures() -> Iterator[tuple[str, bytes]]:
    """What is no picture, or not all of one."""
    yield "nothing/zero.jpg", b""
    yield "nothing/one-byte.png", b"\x89"
    yield "nothing/zeros.gif", bytes(700)
    yield "nothing/spaces.bmp", b" " * 700
    yield "nothing/text.jpg", b"I am a text, and somebody called me an image.\n" * 30
    yield "nothing/page.png", b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
    yield "nothing/define.jpg", b"#define WIDTH 3\n#define HEIGHT 4\nint main(void) { return 0; }\n"
    yield "nothing/p6.txt", b"P6 is not a postcode but the beginning of a text"
    yield "nothing/im.txt", b"Name: somebody\nImage type: no\n\x1a" + bytes(600)
    yield "nothing/video.mp4", b"\0\0\0\x18ftypmp42" + bytes(500)
    yield "nothing/heic.heic", b"\0\0\0\x18ftypheic" + bytes(500)
    yield "nothing/mif1.avif", b"\0\0\0\x18ftypmif1" + bytes(500)
    yield "nothing/postscript.eps", saved(picture(), "EPS")
    yield "nothing/drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"
    yield "nothing/archive.jpg.gz", gzip.compress(saved(picture(), "JPEG"))
    yield "nothing/pickle.png", b"cos\nsystem\n(S'touch /tmp/hostile-was-here'\ntR."
    yield "nothing/sizeless.gif", b"GIF89a" + bytes(7) + b";"
    yield "nothing/png-0x0.png", png(0, 0, 8, 2, b"")
    for file_format in ("ICO", "PCX", "TGA", "QOI"):
        yield f"nothing/not-listed.{file_format.lower()}", saved(picture(), file_format)
    yield "nothing/wmf.wmf", b"\xd7\xcd\xc6\x9a\0\0" + bytes(60) + b"\1\0\t\0" + bytes(80)
    iptc = b"\x1c\x03\x3c\0\2\1\0\x1c\x03\x14\0\2\0\1\x1c\x03\x1e\0\2\0\1\x1c\x03\x78\0\1\x05"
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n%%EndComments\n"
    yield "nothing/iptc.jpg", iptc + b"\x1c\x08\x0a" + struct.pack(">H", len(program)) + program + bytes(5)


def limits() -> Iterator[tuple[str, bytes]]:
    """Small files that promise much."""
    yield "bombs/30000.png", png(30_000, 30_000, 1, 0)
    for width, height in ((0xFFFF, 0xFFFF), (65_535, 2_731)):
        yield f"bombs/{width}x{height}.gif", b"GIF89a" + struct.pack("<HH", width, height) + bytes(3) + b";"
    yield (
        "bombs/text.png",
        png(4, 4, 8, 0, extra=chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(20_000_000), 9))),
    )
    profile = chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(20_000_000), 9))
    yield "bombs/profile.png", png(4, 4, 8, 0, extra=profile)
    for tag in (256, 257, 273, 277, 278, 279):
        entries = {256: 4, 257: 4, 258: 8, 259: 1, 262: 1, 273: 200, 277: 1, 278: 4, 279: 16} | {
            tag: 0xFFFFFFFF
        }
        yield f"bombs/tag{tag}.tif", tiff([(key, 4, 1, value) for key, value in entries.items()]) + bytes(500)
        counts = [(key, 4, 0x3FFFFFFF if key == tag else 1, value) for key, value in entries.items()]
        yield f"bombs/count{tag}.tif", tiff(counts) + bytes(500)


def damaged_pictures() -> Iterator[tuple[str, bytes]]:
    """Cut at many lengths and flipped at many places."""
    frames = {"save_all": True, "append_images": [picture(seed=5)]}
    originals = {
        "jpg": saved(picture(), "JPEG"),
        "progressive.jpg": saved(picture(), "JPEG", progressive=True, restart_marker_blocks=1),
        "cmyk.jpg": saved(picture("CMYK"), "JPEG"),
        "png": saved(picture(), "PNG"),
        "palette.png": saved(picture("P"), "PNG", transparency=3),
        "apng": saved(picture(), "PNG", **frames),
        "gif": saved(picture(), "GIF", **frames),
        "tif": saved(picture(), "TIFF"),
        "lzw.tif": saved(picture(), "TIFF", compression="tiff_lzw"),
        "float.tif": saved(picture("F"), "TIFF"),
        "jpeg.tif": saved(picture(), "TIFF", compression="jpeg"),
        "webp": saved(picture(), "WEBP"),
        "lossless.webp": saved(picture("RGBA"), "WEBP", lossless=True, **frames),
        "bmp": saved(picture(), "BMP"),
        "jp2": saved(picture(), "JPEG2000"),
        "avif": saved(picture(), "AVIF"),
        "ppm": saved(picture(), "PPM"),
    }
    rng = np.random.default_rng([SEED, 1])
    for extension, data in originals.items():
        lengths = {*range(0, 40, 3), *np.linspace(40, len(data) - 1, 14).astype(int).tolist(), len(data) - 1}
        for length in sorted(lengths):
            if 0 < length < len(data):
                yield f"cut/{length}.{extension}", data[:length]
        for number in range(24):
            flipped = bytearray(data)
            reach = (40, 200, len(data))[number % 3]
            for place in rng.integers(0, min(reach, len(data)), rng.integers(1, 4)):
                flipped[place] ^= 1 << rng.integers(8)
            yield f"flipped/{number}.{extension}", bytes(flipped)

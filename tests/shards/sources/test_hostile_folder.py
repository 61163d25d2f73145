"""A folder made to break the pass: every file is written or rejected with a reason, as Pillow decides."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import socket
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from pipeline import storage
from pipeline.cluster.config import ClusterConfig
from pipeline.errors import InputError
from shards.dataset.dataset import Dataset, open_dataset
from shards.dataset.rows import read_shard_index
from shards.format.records import as_text
from shards.pixels.decode import FORMATS, REASONS, DecodeConfig, Rejected, decode, decode_image
from shards.writer import commit
from shards.writer.prepare import PrepareConfig, prepare_images

MAX_PIXELS = 20_000_000
READ_REASONS = ("empty", "unreadable", "changed", "too_large")
SEED = int(os.environ.get("HOSTILE_SEED", "0"))


def prepare(source: object, output: object, **settings) -> Dataset:
    here = {"cluster": ClusterConfig(num_workers=0), "decode": DecodeConfig(max_pixels=MAX_PIXELS)}
    config = PrepareConfig(source=str(source), output=str(output), **(here | settings))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepare_images(config)
    return open_dataset(str(output), "images")


def oracle(data: bytes) -> tuple[int, int] | None:
    """Upright (width, height) of the first picture in a file, if plain Pillow decodes all of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data)) as image:
                if image.format == "EPS" or image.width * image.height > MAX_PIXELS:
                    return None
                image.load()
                size = image.size
                with contextlib.suppress(Exception):  # the picture is whole, only its EXIF block is not
                    size = ImageOps.exif_transpose(image).size
                return size
        except Exception:
            return None


def account(dataset: Dataset) -> tuple[dict[str, tuple[bytes, int, int]], dict[str, tuple[str, str]]]:
    """(bytes, width, height) of every stored source and (reason, message) of every reject, by source."""
    written: dict[str, tuple[bytes, int, int]] = {}
    rejected: dict[str, tuple[str, str]] = {}
    for shard in dataset.shards():
        archive = Path(shard.tar).read_bytes()
        for row in read_shard_index(shard).to_pylist():
            assert row["source"] not in written
            image = archive[row["image_offset"] : row["image_offset"] + row["image_bytes"]]
            written[row["source"]] = image, row["source_width"], row["source_height"]
        if shard.rejects is not None:
            for row in pq.read_table(shard.rejects).to_pylist():
                assert row["source"] not in rejected
                rejected[row["source"]] = row["reason"], row["message"]
    manifest = dataset.manifest
    assert manifest.samples_in == len(written) + len(rejected)
    assert manifest.samples_written == len(written)
    reasons = [reason for reason, _ in rejected.values()]
    assert manifest.samples_rejected == {reason: reasons.count(reason) for reason in sorted(set(reasons))}
    assert not set(written) & set(rejected)
    assert all(reason and message and "\n" not in message for reason, message in rejected.values())
    return written, rejected


def check(root: Path, dataset: Dataset, files: dict[bytes, bytes]) -> dict[str, tuple[str, str]]:
    """Assert that regular files met the fate that plain Pillow decides; the other rejects are returned."""
    written, rejected = account(dataset)
    for name, data in files.items():
        source = as_text(os.fsdecode(os.fsencode(root) + b"/" + name))
        expected = oracle(data)
        if expected is None:
            assert source not in written, f"{source} was written, but Pillow cannot decode it"
            reason, _ = rejected.pop(source)
            assert reason in REASONS
        else:
            assert source not in rejected, f"{source} was rejected: {rejected[source]}"
            assert written.pop(source) == (data, *expected)
    assert not written
    return rejected


def write(root: Path, files: dict[bytes, bytes]) -> None:
    for name, data in files.items():
        path = os.fsencode(root) + b"/" + name
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)


# ------------------------------------------------------------------------------------------ pictures


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
        "TGA": "RGB L P RGBA",
        "JPEG2000": "RGB L RGBA LA",
        "AVIF": "RGB RGBA",
    }.items():
        for mode in modes.split():
            yield f"modes/{mode.replace(';', '')}.{file_format.lower()}", saved(picture(mode), file_format)
    for file_format in ("ICO", "ICNS", "PCX", "SGI", "DDS", "QOI", "BLP", "IM", "SPIDER", "MSP", "XBM"):
        mode = {"BLP": "P", "SPIDER": "F", "MSP": "1", "XBM": "1", "ICNS": "RGBA", "ICO": "RGBA"}.get(
            file_format, "RGB"
        )
        yield f"rare/{file_format}", saved(picture(mode, (32, 32)), file_format)
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
        "tga": saved(picture(), "TGA", compression="tga_rle"),
        "ppm": saved(picture(), "PPM"),
        "ico": saved(picture("RGBA", (16, 16)), "ICO"),
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


def odd_names() -> Iterator[tuple[bytes, bytes]]:
    names = [
        b"no_extension", b".hidden.jpg", b".hidden_folder/a.png", b"folder.jpg/inside.png", b"new\nline.png",
        b"quo'te\".png", b"back\\slash.png", b"caf\xe9.png", b"caf\xc3\xa9.png", b"\xff\xfe\xfd", b"#1.png",
        b"100%.png", b"a*b?.png", b"{000..002}.png", b"-rf.png", b" spaces ", "日本語🙂.png".encode(),
        b"tab\t.png", b"$(touch owned).png", b"x" * 251 + b".png", b"CON", b"a.tar.png", b"\x01\x7f",
    ]  # fmt: skip
    for number, name in enumerate(names):
        yield (
            b"na\xefve names/" + name,
            saved(picture(size=(8, 8), seed=number), "JPEG" if number % 2 else "PNG"),
        )


# ------------------------------------------------------------------------------------------ the tests


def test_every_file_is_written_or_rejected_as_plain_pillow_decides(tmp_path):
    files = {
        name.encode(): data
        for source in (whole_pictures, broken_pictures, limits, damaged_pictures)
        for name, data in source()
    }
    files |= dict(odd_names())
    root = tmp_path / "pictures"
    write(root, files)
    dataset = prepare(root, tmp_path / "out", max_shard_samples=400)
    assert check(root, dataset, files) == {}
    assert dataset.manifest.samples_written > 150 and len(dataset.manifest.samples_rejected) == len(REASONS)
    assert dataset.manifest.samples_in == len(files) > 900
    assert not Path("/tmp/hostile-was-here").exists() and not (tmp_path / "owned").exists()
    assert dataset.manifest.class_names is not None and "na\\xefve names" in dataset.manifest.class_names


def test_special_files_links_and_permissions(tmp_path):
    image = saved(picture(), "PNG")
    root, outside = tmp_path / "pictures", tmp_path / "outside"
    files = {b"a/1.png": image, b"a/b/2.png": image, b"secret.png": image, b"locked/3.png": image}
    write(root, files)
    write(outside, {b"far.png": image, b"deep/er.png": image})
    special = {
        name: "unreadable" for name in ("dangling.png", "self.png", "pipe.jpg", "socket.png", "zero.png")
    }
    (root / "dangling.png").symlink_to("/nowhere/at/all.png")
    (root / "self.png").symlink_to("self.png")
    os.mkfifo(root / "pipe.jpg")
    (root / "zero.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(root)  # the name of a socket is short
        listener.bind("socket.png")
        os.chdir(here)
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "b" / "here").symlink_to(".")
    (root / "0-first-by-name").symlink_to(root / "a" / "b")
    (root / "far").symlink_to(outside)
    (root / "far.png").symlink_to(outside / "far.png")
    files |= {b"far/far.png": image, b"far/deep/er.png": image, b"far.png": image}
    for name in ("one", "two"):
        (root / name).symlink_to({"one": "two", "two": "one"}[name])
        special[name] = "unreadable"
    os.chmod(root / "secret.png", 0)
    os.chmod(root / "locked", 0)
    readable = os.access(root / "secret.png", os.R_OK)  # for root everything is
    try:
        dataset = prepare(root, tmp_path / "out")
    finally:
        os.chmod(root / "locked", 0o700)
    if not readable:
        del files[b"secret.png"], files[b"locked/3.png"]
        special |= {"secret.png": "unreadable", "locked": "unreadable"}
    rest = check(root, dataset, files)
    assert {name: reason for name, (reason, _) in rest.items()} == {
        f"{root}/{name}": reason for name, reason in special.items()
    }


def test_a_path_too_long_to_open_is_named(tmp_path):
    root = tmp_path / "pictures"
    write(root, {b"fine.png": saved(picture(), "PNG")})
    folder = os.open(root, os.O_RDONLY)
    for _ in range(18):
        os.mkdir("d" * 250, dir_fd=folder)
        below = os.open("d" * 250, os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    os.close(os.open("lost.png", os.O_CREAT | os.O_WRONLY, dir_fd=folder))
    os.close(folder)
    written, rejected = account(prepare(root, tmp_path / "out"))
    assert list(written) == [f"{root}/fine.png"]
    [(place, (reason, _))] = rejected.items()
    assert len(place) > 4000 and reason == "unreadable"


def test_files_that_change_after_the_listing_are_rejected_by_name(tmp_path, monkeypatch):
    image, other = saved(picture(), "BMP"), saved(picture(seed=1), "BMP")
    assert len(image) == len(other)
    names = ("gone", "grown", "cut", "other", "touched", "pipe", "folder", "link", "loop", "same")
    root = tmp_path / "pictures"
    write(root, {name.encode(): image for name in names})
    with monkeypatch.context() as patch:
        patch.setattr(commit, "start", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(root, tmp_path / "out")
    for name in ("gone", "pipe", "folder", "link", "loop"):
        (root / name).unlink()
    (root / "grown").write_bytes(image + b"more")
    (root / "cut").write_bytes(image[:-5])
    (root / "other").write_bytes(other)
    os.utime(root / "touched", ns=(1, 1))
    os.mkfifo(root / "pipe")
    (root / "folder").mkdir()
    (root / "link").symlink_to(root / "other")
    (root / "loop").symlink_to(root / "loop")
    (root / "new").write_bytes(image)
    written, rejected = account(prepare(root, tmp_path / "out"))
    assert {os.path.basename(source) for source in written} == {"same"}
    reasons = {os.path.basename(source): reason for source, (reason, _) in rejected.items()}
    changed = dict.fromkeys(("grown", "cut", "other", "touched", "link"), "changed")
    assert reasons == changed | dict.fromkeys(("gone", "pipe", "folder", "loop"), "unreadable")


def test_a_file_that_is_written_to_while_it_is_read_is_rejected(tmp_path, monkeypatch):
    root = tmp_path / "pictures"
    write(root, {b"a.bmp": saved(picture(), "BMP"), b"b.bmp": saved(picture(), "BMP")})
    read = storage.read

    def half_and_half(url: str, start: int = 0, length: int | None = None) -> bytes:
        data = read(url, start, length)
        if url.endswith("a.bmp"):
            new = saved(picture(seed=3), "BMP")
            Path(url).write_bytes(new)
            return data[:1000] + new[1000:]
        return data

    monkeypatch.setattr(storage, "read", half_and_half)
    written, rejected = account(prepare(root, tmp_path / "out"))
    assert list(written) == [f"{root}/b.bmp"] and rejected[f"{root}/a.bmp"][0] == "changed"


def test_many_files_in_one_folder(tmp_path):
    root = tmp_path / "pictures"
    kinds = {
        b"0.png": saved(picture(size=(4, 4)), "PNG"),
        b"1.jpg": b"no",
        b"2.bmp": saved(picture(size=(4, 4)), "BMP"),
    }
    write(root, kinds)
    for number in range(3, 20_000):
        os.link(root / os.fsdecode(sorted(kinds)[number % 3]), root / str(number))
    dataset = prepare(root, tmp_path / "out")
    written, rejected = account(dataset)
    assert len(written) == 13_333 and dataset.manifest.samples_rejected == {"not_an_image": 6_667}
    names = {os.path.basename(source).partition(".")[0] for source in (*written, *rejected)}
    assert names == set(map(str, range(20_000)))


def test_a_source_that_cannot_be_looked_at_is_named(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    for name in ("loop", "dangling", "pipe", "x" * 300):
        with pytest.raises(InputError, match=name):
            prepare(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------ decoding alone


def agrees(data: bytes) -> bool:
    """Whether decoding says what Pillow says; True where both have pixels."""
    expected = oracle(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            height, width = decode_image(data, DecodeConfig(max_pixels=MAX_PIXELS)).shape[:2]
        except Rejected as rejected:
            assert rejected.reason in REASONS
            assert expected is None, f"{rejected} of what Pillow decodes"
            return False
    assert (width, height) == expected
    return True


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
def test_damage_has_the_outcome_that_pillow_gives_it(file_format):
    rng = np.random.default_rng([SEED, 2])
    outcomes = {True: 0, False: 0}
    for seed in range(6):
        mode = ("RGB", "L", "RGB", "P" if file_format not in ("JPEG", "WEBP") else "RGB")[seed % 4]
        options = {"progressive": True} if file_format == "JPEG" and seed % 2 else {}
        data = saved(picture(mode, (30 + seed, 25), seed), file_format, **options)
        outcomes[agrees(data)] += 1
        for _ in range(40):
            flipped = bytearray(data)
            for place in rng.integers(0, len(data), rng.integers(1, 3)):
                flipped[place] ^= 1 << rng.integers(8)
            outcomes[agrees(bytes(flipped[: rng.integers(1, 2 * len(data))]))] += 1
    assert min(outcomes.values()) >= 6


def test_sixteen_bits_and_floats_are_never_clipped_in_silence():
    ramp = np.linspace(0, 65535, 30 * 40).reshape(30, 40)
    for data in (
        saved(Image.fromarray(ramp.astype(np.uint16)), "PNG"),
        saved(Image.fromarray(ramp.astype(np.uint16)), "TIFF"),
        saved(Image.fromarray((ramp - 32768).astype(np.float32)), "TIFF"),
        saved(Image.fromarray((ramp * 30_000).astype(np.int32)), "TIFF"),
    ):
        pixels = decode_image(data, DecodeConfig())
        assert len(np.unique(pixels)) == 256 and (np.diff(pixels[:, :, 0].ravel().astype(int)) >= 0).all()


def test_only_listed_formats_are_opened():
    Image.init()
    programs_and_stubs = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "IPTC", "FPX", "MIC"}
    assert set(FORMATS) <= set(Image.OPEN) and not set(FORMATS) & programs_and_stubs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, data in broken_pictures():
            with pytest.raises(Rejected) as raised:
                decode(data, DecodeConfig())
            unsupported = name.rpartition("/")[2] in ("postscript.eps", "heic.heic", "wmf.wmf")
            assert (raised.value.reason == "unsupported") == unsupported, name

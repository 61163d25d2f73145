"""Decoding: the pixels Pillow gives, upright and in RGB; for anything else a reason, never a crash."""

from __future__ import annotations

import io
import json
import os
import struct
import sys
import tarfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from pipeline.errors import InputError
from shards.pixels import decode as decoder
from shards.pixels.decode import (
    FORMATS,
    REASONS,
    DecodeConfig,
    Rejected,
    decode,
    decode_config_of,
    decode_image,
    decode_recipe,
    pixel_libraries,
)

CONFIG = DecodeConfig()
SHARED = Path(os.environ.get("BEIT2_SHARED", Path(__file__).resolve().parents[4] / "shared"))


def picture(height: int = 40, width: int = 56, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, ((height + 7) // 8, (width + 7) // 8, 3))
    return np.kron(blocks, np.ones((8, 8, 1)))[:height, :width].astype(np.uint8)


def saved(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int = 8, pixels: bytes = bytes(1000)) -> bytes:
    """A PNG of RGB that promises width x height pixels and holds what it is given."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def reason_of(data: bytes, config: DecodeConfig = CONFIG) -> str:
    with pytest.raises(Rejected) as raised:
        decode_image(data, config)
    assert raised.value.reason in REASONS
    assert raised.value.message and "\n" not in raised.value.message and len(raised.value.message) < 300
    return raised.value.reason


# ------------------------------------------------------------------------------------------ what is decoded


WRITABLE = {
    "JPEG": "RGB L 1 CMYK YCbCr",
    "PNG": "RGB L 1 P",
    "GIF": "RGB L 1 P",
    "TIFF": "RGB L 1 P CMYK YCbCr LAB",
    "WEBP": "RGB L 1 P",
    "BMP": "RGB L 1 P",
    "PPM": "RGB L 1",
    "JPEG2000": "RGB L",
}


@pytest.mark.parametrize(
    ("file_format", "mode"),
    [(file_format, mode) for file_format, modes in WRITABLE.items() for mode in modes.split()],
)
def test_modes_and_formats_equal_pillow(file_format, mode):
    data = saved(Image.fromarray(picture()).convert(mode), file_format)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB"))
    pixels = decode_image(data, CONFIG)
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    assert np.array_equal(pixels, expected)


def test_pieces_make_the_same_picture(monkeypatch):
    """Large images are converted a piece at a time; here every image is large."""
    alpha = Image.fromarray(picture()[:, :, 0])
    layered = Image.fromarray(picture(seed=1))
    layered.putalpha(alpha)
    pictures = [
        saved(Image.fromarray(picture()).convert(mode), file_format)
        for file_format, modes in WRITABLE.items()
        for mode in modes.split()
    ]
    pictures += [saved(layered.convert(mode), "TIFF") for mode in ("RGBA", "LA", "PA")]
    pictures += [saved(layered, "PNG"), saved(layered.convert("P"), "PNG", transparency=5)]
    pictures += [
        saved(Image.fromarray(picture()[:, :, 0].astype(kind)), "TIFF") for kind in ("u2", "i4", "f4")
    ]
    whole = [decode_image(data, CONFIG) for data in pictures]
    for pixels in (37, 101, 1000):  # part of a row, one and a half, many
        monkeypatch.setattr(decoder, "_PIECE_PIXELS", pixels)
        for data, expected in zip(pictures, whole, strict=True):
            assert np.array_equal(decode_image(data, CONFIG), expected)


def test_extensions_are_those_of_the_real_format():
    image = Image.fromarray(picture())
    names = {"JPEG": "jpg", "PNG": "png", "TIFF": "tif", "WEBP": "webp", "PPM": "pnm", "JPEG2000": "jp2"}
    for file_format, extension in names.items():
        assert decode(saved(image, file_format), CONFIG).extension == extension


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(file_format, orientation):
    image = Image.fromarray(picture())
    exif = image.getexif()
    exif[0x0112] = orientation
    data = saved(image, file_format, exif=exif)
    with Image.open(io.BytesIO(data)) as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    assert np.array_equal(decode_image(data, CONFIG), expected)
    assert expected.shape[:2] == ((40, 56) if orientation < 5 else (56, 40))


def test_damaged_exif_is_no_reason_to_lose_a_picture():
    data = saved(Image.fromarray(picture()), "JPEG", exif=b"Exif\0\0" + b"\xde\xad\xbe\xef" * 20)
    assert np.array_equal(
        decode_image(data, CONFIG), decode_image(saved(Image.fromarray(picture()), "JPEG"), CONFIG)
    )


def test_transparency_is_composited_on_white():
    colour = picture(8, 8).astype(np.float64)
    alpha = np.arange(64).reshape(8, 8) * 4
    rgba = np.concatenate([colour, alpha[:, :, None]], axis=2).astype(np.uint8)
    expected = colour * alpha[:, :, None] / 255 + 255.0 * (255 - alpha[:, :, None]) / 255
    for file_format in ("PNG", "TIFF"):
        pixels = decode_image(saved(Image.fromarray(rgba), file_format), CONFIG)
        assert np.abs(pixels - expected).max() <= 1


def test_palette_and_key_colour_transparency_become_white():
    image = Image.fromarray(np.array([[0, 1], [2, 3]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    assert decode_image(saved(image, "PNG", transparency=1), CONFIG).tolist() == [
        [[10, 20, 30], [255, 255, 255]],
        [[70, 80, 90], [100, 110, 120]],
    ]
    grey = Image.fromarray(np.array([[7, 9]], np.uint8))
    assert decode_image(saved(grey, "PNG", transparency=9), CONFIG)[0].tolist() == [[7] * 3, [255] * 3]


def test_the_first_frame_of_an_animation_counts():
    frames = [Image.fromarray(picture(seed=seed)) for seed in range(3)]
    for file_format, options in [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})]:
        single = decode_image(saved(frames[0], file_format, **options), CONFIG)
        many = decode_image(
            saved(frames[0], file_format, save_all=True, append_images=frames[1:], **options), CONFIG
        )
        assert np.abs(single.astype(int) - many).max() == 0


# ------------------------------------------------------------------------------------------ high bit depth


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_by_full_range(file_format):
    values = np.arange(0, 65536, 37, dtype=np.uint16)[:1764].reshape(42, 42)
    pixels = decode_image(saved(Image.fromarray(values), file_format), CONFIG)
    assert np.array_equal(pixels[:, :, 0], np.rint(values / 257).astype(np.uint8))
    assert np.array_equal(pixels[:, :, 0], pixels[:, :, 2])


def test_floats_by_full_range_of_their_finite_values():
    values = np.array([[-2.0, 0.0, 2.0], [np.nan, np.inf, -np.inf]], np.float32)
    pixels = decode_image(saved(Image.fromarray(values), "TIFF"), CONFIG)
    assert pixels[:, :, 1].tolist() == [[0, 128, 255], [0, 255, 0]]
    for constant in (3.5, np.nan):
        flat = saved(Image.fromarray(np.full((4, 5), constant, np.float32)), "TIFF")
        assert not decode_image(flat, CONFIG).any()


def test_wide_integers_by_full_range():
    wide = np.array([[-(2**31), 0, 2**31 - 1]], np.int32)
    assert decode_image(saved(Image.fromarray(wide), "TIFF"), CONFIG)[0, :, 0].tolist() == [0, 128, 255]
    narrow = np.array([[0, 257 * 9, 65535]], np.int32)
    assert decode_image(saved(Image.fromarray(narrow), "TIFF"), CONFIG)[0, :, 0].tolist() == [0, 9, 255]


def test_percentile_and_window():
    rng = np.random.default_rng(0)
    values = rng.integers(1000, 5000, (64, 64)).astype(np.uint16)
    values[0, 0], values[0, 1] = 0, 65535
    data = saved(Image.fromarray(values), "PNG")
    low, high = np.percentile(values, (1, 99))
    expected = np.rint(np.clip((values - low) / (high - low), 0, 1) * 255)
    percentile = decode_image(data, DecodeConfig(high_bit_depth="percentile", percentile=(1.0, 99.0)))
    assert np.abs(percentile[:, :, 0] - expected).max() <= 1
    window = decode_image(data, DecodeConfig(high_bit_depth="window", window=(1000.0, 5000.0)))
    assert np.abs(window[:, :, 0] - np.rint(np.clip((values - 1000.0) / 4000, 0, 1) * 255)).max() <= 1


def test_eight_bit_images_ignore_the_mapping():
    data = saved(Image.fromarray(picture()), "PNG")
    windowed = decode_image(data, DecodeConfig(high_bit_depth="window", window=(0.0, 10.0)))
    assert np.array_equal(windowed, picture())


def test_sixteen_bit_colour_is_read_by_full_range_only():
    values = np.array([[[0, 257, 65535], [40000, 1000, 300]]], ">u2")
    data = png(2, 1, 16, b"\0" + values.tobytes())
    assert np.abs(decode_image(data, CONFIG) - values.astype(np.float64) / 257).max() <= 1
    assert reason_of(data, DecodeConfig(high_bit_depth="percentile")) == "unsupported"


# ------------------------------------------------------------------------------------------ the fast path


def test_plain_jpegs_equal_pillow_in_every_variety():
    rng = np.random.default_rng(0)
    for number in range(120):
        height, width = rng.integers(1, 70, 2)
        image = Image.fromarray(picture(height, width, seed=number))
        options = {"quality": int(rng.integers(1, 100)), "progressive": bool(number % 2)}
        if number % 3 == 0:
            image = image.convert("L")
        elif number % 3 == 1:
            options["subsampling"] = ("4:4:4", "4:2:2", "4:2:0")[number % 9 // 3]
        elif number % 2:
            options["keep_rgb"] = True
        if number % 5 == 0:
            options["restart_marker_blocks"] = 2
        data = saved(image, "JPEG", **options)
        with Image.open(io.BytesIO(data)) as stored:
            assert np.array_equal(decode_image(data, CONFIG), np.asarray(stored.convert("RGB"))), options
    for subsampling in ("440", "411"):
        data = simplejpeg.encode_jpeg(picture(), colorsubsampling=subsampling)
        with Image.open(io.BytesIO(data)) as stored:
            assert np.array_equal(decode_image(data, CONFIG), np.asarray(stored.convert("RGB")))


def test_photographs_equal_pillow():
    path = SHARED / "data" / "imagenet-sample.tar"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    with tarfile.open(path) as archive:
        for member in archive.getmembers()[::5]:
            stored = archive.extractfile(member)
            assert stored is not None
            data = stored.read()
            with Image.open(io.BytesIO(data)) as image:
                expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
            assert np.array_equal(decode_image(data, CONFIG), expected), member.name


# ------------------------------------------------------------------------------------------ what is rejected


def test_reasons():
    jpeg = saved(Image.fromarray(picture()), "JPEG")
    png = saved(Image.fromarray(picture()), "PNG")
    assert reason_of(b"") == "empty"
    assert reason_of(b"just some text, named cat.jpg by somebody") == "not_an_image"
    assert reason_of(jpeg[: len(jpeg) // 2]) == "truncated"
    assert reason_of(png[: len(png) // 2]) == "truncated"
    assert reason_of(jpeg[:11]) in ("corrupt", "truncated")
    middle = len(png) // 2
    assert reason_of(png[:middle] + bytes(8) + png[middle + 8 :]) in ("corrupt", "truncated")
    assert reason_of(saved(Image.fromarray(picture()), "EPS")) == "unsupported"
    assert reason_of(jpeg, DecodeConfig(max_file_bytes=len(jpeg) - 1)) == "too_large"


def test_the_pixel_limit_is_checked_before_decoding():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        assert reason_of(png(30_000, 30_000)) == "too_large"
        assert reason_of(png(10_000, 10_000), DecodeConfig(max_pixels=99_999_999)) == "too_large"
    data = saved(Image.fromarray(picture(10, 20)), "PNG")
    assert reason_of(data, DecodeConfig(max_pixels=199)) == "too_large"
    assert decode_image(data, DecodeConfig(max_pixels=200)).shape == (10, 20, 3)


def test_random_damage_never_escapes():
    rng = np.random.default_rng(0)
    image = Image.fromarray(picture())
    outcomes = {"pixels": 0, "rejected": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for file_format in FORMATS:
            whole = np.frombuffer(saved(image, file_format), np.uint8)
            for _ in range(25):
                data = whole.copy()
                places = rng.integers(0, min(len(data), rng.choice([30, 300, 10**6])), rng.integers(1, 6))
                data[places] = rng.integers(0, 256, len(places))
                try:
                    pixels = decode_image(data.tobytes(), DecodeConfig(max_pixels=1_000_000))
                except Rejected as rejected:
                    assert rejected.reason in REASONS
                    outcomes["rejected"] += 1
                else:
                    assert pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8
                    outcomes["pixels"] += 1
    assert min(outcomes.values()) > 20


# ------------------------------------------------------------------------------------------ HEIC


def heic(image: Image.Image, orientation: int = 1) -> bytes:
    pillow_heif = pytest.importorskip(
        "pillow_heif", reason="pillow-heif, of the extra heif, is not installed"
    )
    pillow_heif.register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(image, "HEIF", quality=-1, exif=exif.tobytes())


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_heic_is_read_and_turned_once(orientation):
    """The left half is red; the encoder writes the turn into the file as its own property."""
    pixels = np.full((32, 48, 3), 255, np.uint8)
    pixels[:, :24, 1:] = 0
    found = decode(heic(Image.fromarray(pixels), orientation), CONFIG)
    with Image.open(io.BytesIO(saved(Image.fromarray(pixels), "PNG"))) as upright:
        upright.getexif()[0x0112] = orientation
        expected = np.asarray(ImageOps.exif_transpose(upright))
    assert found.extension == "heic" and found.pixels.shape == expected.shape
    assert np.abs(found.pixels.astype(int) - expected).max() < 40


def test_heic_within_limits_or_refused():
    data = heic(Image.fromarray(picture()))
    assert reason_of(data, DecodeConfig(max_pixels=40 * 56 - 1)) == "too_large"
    for end in (len(data) // 3, len(data) - 20):
        assert reason_of(data[:end]) in ("truncated", "corrupt")


def test_heic_without_its_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    decoder._reads_heic.cache_clear()
    try:
        for brands in (b"heic\0\0\0\0", b"mif1\0\0\0\0mif1heic"):
            data = struct.pack(">I", 8 + len(brands)) + b"ftyp" + brands + bytes(200)
            with pytest.raises(Rejected, match=r'unsupported: .*pip install "beit2-pipeline\[heif\]"'):
                decode_image(data, CONFIG)
    finally:
        decoder._reads_heic.cache_clear()


# ------------------------------------------------------------------------------------------ settings


def test_recipes_say_the_settings_and_are_read_again():
    config = DecodeConfig(max_pixels=5, high_bit_depth="window", window=(0.0, 9.0))
    recipe = decode_recipe(config)
    assert recipe["version"] == 1 and recipe["window"] == [0.0, 9.0] and recipe["percentile"] == [0.5, 99.5]
    assert decode_config_of(json.loads(json.dumps(recipe))) == config
    with pytest.raises(InputError, match="decode version 2, this is 1"):
        decode_config_of({**recipe, "version": 2})


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_pixels": 0},
        {"max_file_bytes": 0},
        {"max_file_bytes": 1 << 31},
        {"high_bit_depth": "clip"},
        {"percentile": (99.0, 1.0)},
        {"window": (0.0, 1.0)},
        {"high_bit_depth": "window"},
        {"window": (3.0, 3.0), "high_bit_depth": "window"},
    ],
)
def test_wrong_values_are_named(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        DecodeConfig(**wrong)


def test_libraries_are_named():
    assert set(pixel_libraries()) == {"pillow", "libjpeg", "simplejpeg"}
    assert all(version and version != "None" for version in pixel_libraries().values())

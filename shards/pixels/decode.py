"""The one way from the bytes of any image file to pixels: uint8 RGB, upright, within a pixel limit.

Whatever the bytes are, the outcome is pixels or `Rejected` with a reason. Nothing is clipped silently and
nothing in a file is executed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import PIL
import simplejpeg
from PIL import Image, ImageFile, UnidentifiedImageError, features

from pipeline.errors import InputError
from shards.pixels import bombs

DECODE_VERSION = 1
"""Raised whenever the pixels of any image may change: crop boxes and codes are in this version's pixels."""

REASONS = (
    "empty",
    "not_an_image",
    "truncated",
    "corrupt",
    "too_large",
    "unsupported",
)
"""Why `decode_image` refuses."""

FORMATS = (
    "JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF", "JPEG2000",
    "BLP", "CUR", "DCX", "DDS", "DIB", "FITS", "FLI", "FTEX", "GBR", "ICNS", "ICO", "IM", "MSP", "PCX", "PPM",
    "PSD", "QOI", "SGI", "SPIDER", "SUN", "TGA", "XBM", "XPM",
)  # fmt: skip
"""What is read, by Pillow's names (MPO counts as JPEG; PPM is all of PBM, PGM, PNM and PFM).

Left out: EPS, which Ghostscript would have to run; WMF, BUFR, GRIB, HDF5 and MPEG, of which Pillow knows no
more than the name; IPTC, FPX and MIC, which hold files of any other format; MCIDAS, PCD, PIXAR, XVTHUMB and
IMT, which nobody writes. HEIC, JPEG XL, SVG and raw camera files are unknown to Pillow.
"""

_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "JPEG2000": "jp2", "PPM": "pnm"}
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\x00", b"MM\x00*", b"BM")
_NOT_READ = {
    b"%!PS": "PostScript is a program; reading it would run it",
    b"\xc5\xd0\xd3\xc6": "EPS is a program; reading it would run it",
    b"\xd7\xcd\xc6\x9a": "WMF is a program; reading it would run it",
    b"\xff\x0a": "JPEG XL is not read",
    b"\0\0\0\x0cJXL ": "JPEG XL is not read",
}
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")
_HIGH_BIT_DEPTH = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
_OPAQUE_WHITE = (255, 255, 255, 255)

# A progressive JPEG may repeat scans over the whole image without end: 2 MB can cost hours. 64 scans over the
# largest image are far more than any encoder writes.
_MAX_JPEG_SCAN_PIXELS = 64 * 178_956_970
# Pillow fills the rest of a line byte by byte: 1 kB took 18 s.
_MAX_SLOW_PIXELS = 1 << 24
_MAX_BYTES_PER_PIXEL = 8
_MAX_EXIF_BYTES = 16 << 20
_PIECE_PIXELS = 1 << 22


class Rejected(Exception):
    """These bytes cannot become a sample: `reason` is a name to count by, `message` one line for people."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How image files become pixels."""

    max_pixels: int = 178_956_970
    """Larger images are rejected from their header, before anything is decoded (default: Pillow's limit).
    Decoding takes 7 bytes per pixel, in WebP and JPEG 2000 up to 18; a worker decodes two at once."""
    max_file_bytes: int = 1 << 30
    """Larger files are rejected unread; less than 2 GiB, which is what an index can name."""
    high_bit_depth: Literal["full_range", "percentile", "window"] = "full_range"
    """How grey images of 16 or 32 bits become 8: by the whole range (of 16 bits; otherwise from the image's
    smallest to its largest value), by the percentiles or by the window below."""
    percentile: tuple[float, float] = (0.5, 99.5)
    """Percentiles of each image that become black and white, with high_bit_depth: percentile."""
    window: tuple[float, float] | None = None
    """Values that become black and white, with high_bit_depth: window."""

    def __post_init__(self) -> None:
        for limit in ("max_pixels", "max_file_bytes"):
            if getattr(self, limit) < 1:
                raise InputError(f"decode.{limit} is {getattr(self, limit)}; give 1 or more")
        if self.max_file_bytes >= 1 << 31:
            raise InputError(f"decode.max_file_bytes is {self.max_file_bytes}; give less than {1 << 31}")
        if self.high_bit_depth not in ("full_range", "percentile", "window"):
            raise InputError(
                f"decode.high_bit_depth is {self.high_bit_depth}; give full_range, percentile or window"
            )
        if not 0 <= self.percentile[0] < self.percentile[1] <= 100:
            raise InputError(f"decode.percentile is {self.percentile}; give 0 <= low < high <= 100")
        if (self.window is None) == (self.high_bit_depth == "window"):
            mend = "give the two together" if self.window is None else "set high_bit_depth: window"
            raise InputError(f"decode.window is {self.window}, high_bit_depth {self.high_bit_depth}; {mend}")
        if self.window is not None and not -math.inf < self.window[0] < self.window[1] < math.inf:
            raise InputError(f"decode.window is {self.window}; give two finite values, low < high")


def decode_recipe(config: DecodeConfig) -> dict[str, Any]:
    """What decides decoded pixels, for the recipe of an image dataset."""
    settings = dataclasses.asdict(config)
    window = None if config.window is None else list(config.window)
    return {**settings, "percentile": list(config.percentile), "window": window, "version": DECODE_VERSION}


def decode_config_of(recipe: dict[str, Any]) -> DecodeConfig:
    """The settings in a recipe; InputError where they are of another decode version."""
    settings = dict(recipe)
    version = settings.pop("version")
    if version != DECODE_VERSION:
        raise InputError(
            f"the images were prepared with decode version {version}, this is {DECODE_VERSION}; prepare again"
        )
    pairs: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()
    }
    return DecodeConfig(**pairs)


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedImage:
    """Pixels, uint8 [H, W, 3], and the file extension of the format they were found in, such as jpg."""

    pixels: np.ndarray
    extension: str


def decode_image(data: bytes, config: DecodeConfig) -> np.ndarray:
    """The pixels of an image file, uint8 [H, W, 3] RGB; raises `Rejected` for anything that is not fully one.

    EXIF orientation is applied. The first frame or page of several counts. Palettes are expanded, CMYK and
    Lab converted by Pillow without ICC profiles, transparency is composited on white. Grey images of more
    than 8 bits are mapped by `config.high_bit_depth`; Pillow reads 16-bit colour as its high byte.
    """
    return decode(data, config).pixels


def decode(data: bytes, config: DecodeConfig) -> DecodedImage:
    """As `decode_image`, with the format's extension."""
    if not data:
        raise Rejected("empty", "0 bytes")
    if len(data) > config.max_file_bytes:
        raise Rejected("too_large", f"{len(data)} bytes, more than max_file_bytes {config.max_file_bytes}")
    try:
        with _open(data, config) as image:
            extension = _EXTENSIONS.get(image.format or "", (image.format or "bin").lower())
            return DecodedImage(pixels=_upright_rgb(data, image, config), extension=extension)
    except Rejected:
        raise
    # Decoders of some 30 formats meet bytes that may have been made to break them: whatever they raise, from
    # SyntaxError to MemoryError, says the same thing about the file.
    except Exception as error:
        raise _classify(error, data) from None


def pixel_libraries() -> dict[str, str]:
    """Versions of the libraries that decide pixels, for recipes."""
    return {
        "pillow": PIL.__version__,
        "libjpeg": str(features.version("libjpeg_turbo") or features.version("jpg")),
        "simplejpeg": str(simplejpeg.__version__),
    }


def _open(data: bytes, config: DecodeConfig) -> ImageFile.ImageFile:
    """The image with its header read and checked, its pixels not yet decoded."""
    too_much = bombs.excess(data, config.max_pixels)
    if too_much is not None:
        raise Rejected("too_large", too_much)
    if Image.MAX_IMAGE_PIXELS is not None and config.max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        # Pillow's own guard is process-wide. It stays, because it also covers images inside images (ICO,
        # ICNS), but must not be tighter than what was asked for.
        Image.MAX_IMAGE_PIXELS = config.max_pixels
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    _check_size(image, config)
    decoder = image.tile[0][0] if image.tile else ""
    if image.format in ("JPEG", "MPO", "BLP"):
        num_scans = data.count(
            b"\xff\xda"
        )  # escaped in coded data, so only markers (and those of thumbnails)
        # the JPEG in a BLP has a size of its own
        pixels = config.max_pixels if image.format == "BLP" else math.prod(image.size)
        if num_scans * pixels > _MAX_JPEG_SCAN_PIXELS:
            raise Rejected("too_large", f"{num_scans} scans over {image.width} x {image.height} pixels")
    elif decoder == "fits_gzip":
        raise Rejected("unsupported", "compressed FITS, which takes its time by the size it claims")
    elif decoder == "bmp_rle" and math.prod(image.size) > _MAX_SLOW_PIXELS:
        raise Rejected("too_large", f"run-length coded BMP of {image.width} x {image.height} pixels")
    elif decoder == "raw":
        # Pillow collects a row that is longer than a block by copying it for each block: 60 MB took 18 s.
        image.decodermaxblock = max(image.decodermaxblock, image.width * _MAX_BYTES_PER_PIXEL)
    return image


def _check_size(image: Image.Image, config: DecodeConfig) -> None:
    if math.prod(image.size) > config.max_pixels:
        raise Rejected(
            "too_large", f"{image.width} x {image.height} pixels, more than max_pixels {config.max_pixels}"
        )
    if min(image.size) < 1:
        raise Rejected("corrupt", f"{image.width} x {image.height} pixels")


def _upright_rgb(data: bytes, image: Image.Image, config: DecodeConfig) -> np.ndarray:
    pixels = _plain_jpeg(data, image)
    if pixels is not None:
        return _transposed(pixels, _orientation(image))
    rawmode = _rawmode(image)
    image.load()
    # The header of a container (ICO, ICNS) may have promised another size.
    _check_size(image, config)
    orientation = _orientation(image)
    if image.mode in _HIGH_BIT_DEPTH:
        grey = _to_8_bits(_values(image), config)
        return _transposed(np.repeat(grey[:, :, None], 3, axis=2), orientation)
    if ";16" in rawmode and config.high_bit_depth != "full_range":
        raise Rejected(
            "unsupported", f"16-bit colour is read with high_bit_depth full_range only ({rawmode})"
        )
    return _transposed(_rgb(image), orientation)


def _rgb(image: Image.Image) -> np.ndarray:
    """Pixels of a loaded image, uint8 [H, W, 3], composited on white where it has transparency."""
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for rows, columns, piece in _pieces(image):
        if piece.mode == "La":
            piece = piece.convert("LA")  # premultiplied grey goes nowhere else
        if (piece.mode != "P" or piece.palette is not None) and piece.has_transparency_data:
            layer = piece.convert("RGBA")
            piece = Image.alpha_composite(Image.new("RGBA", layer.size, _OPAQUE_WHITE), layer)
        pixels[rows, columns] = np.asarray(piece.convert("RGB"))
    return pixels


def _values(image: Image.Image) -> np.ndarray:
    """Grey values of a loaded image, [H, W] of its own type."""
    values: np.ndarray | None = None
    for rows, columns, piece in _pieces(image):
        part = np.asarray(piece)
        if values is None:
            values = np.empty((image.height, image.width), part.dtype)
        values[rows, columns] = part
    assert values is not None
    return values


def _pieces(image: Image.Image) -> Iterator[tuple[slice, slice, Image.Image]]:
    """Rows, columns and picture of pieces of a few million pixels, which together are the image.

    Converted whole, a large image would be held four times over; and Pillow gives no numpy array of one that
    is wider than 67 million pixels.
    """
    width = min(image.width, _PIECE_PIXELS)
    height = max(1, _PIECE_PIXELS // width)
    for top in range(0, image.height, height):
        bottom = min(image.height, top + height)
        for left in range(0, image.width, width):
            right = min(image.width, left + width)
            box = (left, top, right, bottom)
            piece = image if box == (0, 0, *image.size) else image.crop(box)
            yield slice(top, bottom), slice(left, right), piece


def _plain_jpeg(data: bytes, image: Image.Image) -> np.ndarray | None:
    """The pixels of an ordinary RGB or grey JPEG by simplejpeg, or None where Pillow has to look.

    The same libjpeg-turbo in its exact mode, so the same pixels (tests compare them), 1.3 times as fast.
    Strict: the slightest damage is left to Pillow to judge.
    """
    if image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return None
    with contextlib.suppress(ValueError):
        pixels = simplejpeg.decode_jpeg(
            data, colorspace="RGB", fastdct=False, fastupsample=False, strict=True
        )
        if pixels.shape == (image.height, image.width, 3):
            return pixels
    return None


def _rawmode(image: Image.Image) -> str:
    """How the pixels are laid out in the file, such as `RGB;16B`; empty where the format does not say."""
    tiles = getattr(image, "tile", None)
    if not tiles:
        return ""
    arguments = tiles[0][3]
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none or the block is damaged, as viewers do."""
    if len(image.info.get("exif") or b"") > _MAX_EXIF_BYTES:
        return 1
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # the block is free-form bytes and the image is whole without it
        return 1
    return orientation if orientation in range(1, 9) else 1


def _transposed(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels [H, W, 3] turned upright, contiguous."""
    match orientation:
        case 2:
            pixels = pixels[:, ::-1]
        case 3:
            pixels = pixels[::-1, ::-1]
        case 4:
            pixels = pixels[::-1]
        case 5:
            pixels = pixels.transpose(1, 0, 2)
        case 6:
            pixels = pixels[::-1].transpose(1, 0, 2)
        case 7:
            pixels = pixels[::-1, ::-1].transpose(1, 0, 2)
        case 8:
            pixels = pixels[:, ::-1].transpose(1, 0, 2)
    return np.ascontiguousarray(pixels)


def _to_8_bits(values: np.ndarray, config: DecodeConfig) -> np.ndarray:
    """Grey values [H, W] of 16 or 32 bits as uint8 [H, W]; NaN is black, infinities are black and white."""
    if config.high_bit_depth == "full_range" and values.dtype.kind in "iu" and values.dtype.itemsize == 2:
        low, high = 0.0, 65535.0
    elif config.high_bit_depth == "window" and config.window is not None:
        low, high = config.window
    else:
        finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
        if finite.size == 0:
            low, high = 0.0, 1.0
        elif config.high_bit_depth == "percentile":
            low, high = (float(value) for value in np.percentile(finite, config.percentile))
        else:
            low, high = float(finite.min()), float(finite.max())
            if values.dtype.kind == "i" and low >= 0 and high <= 65535:
                # Pillow widens 16-bit files of some formats (PGM, 16-bit TIFF variants) to 32 bits.
                low, high = 0.0, 65535.0
    if high <= low:
        # One value only: there is no contrast to show.
        high = low + 1.0
    grey = np.empty(values.shape, np.uint8)
    rows = max(
        1, (1 << 20) // values.shape[1]
    )  # a block at a time: eight bytes per pixel of a large image are too many
    for top in range(0, len(values), rows):
        scaled = (values[top : top + rows].astype(np.float64) - low) * (255.0 / (high - low))
        scaled = np.nan_to_num(scaled, copy=False, nan=0.0, posinf=255.0, neginf=0.0)
        grey[top : top + rows] = np.rint(scaled.clip(0.0, 255.0))
    return grey


def _classify(error: Exception, data: bytes) -> Rejected:
    message = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return Rejected("too_large", message)
    if isinstance(error, UnidentifiedImageError):
        for signature, why in _NOT_READ.items():
            if data.startswith(signature):
                return Rejected("unsupported", why)
        if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
            return Rejected("unsupported", "HEIC is not read")
        if data.startswith(_SIGNATURES) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
            return Rejected("corrupt", "begins like an image, but its header cannot be read")
        return Rejected("not_an_image", "no known image format")
    if "truncat" in message.lower():
        return Rejected("truncated", message)
    if isinstance(error, MemoryError):
        return Rejected("too_large", "more memory than there is")
    return Rejected("corrupt", message)

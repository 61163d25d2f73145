"""The one way from the bytes of any image file to pixels: uint8 RGB, upright, within a pixel limit.

Whatever the bytes are, the outcome is pixels or `Rejected` with a reason. Nothing is clipped silently and
nothing in a file is executed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import PIL
import simplejpeg
from PIL import Image, ImageFile, TiffImagePlugin, UnidentifiedImageError, features

from pipeline.errors import InputError

DECODE_VERSION = 1
"""Raised whenever the pixels of any image may change: crop boxes and codes are in this version's pixels."""

REASONS = ("empty", "not_an_image", "truncated", "corrupt", "too_large", "unsupported")
"""Why `decode_image` refuses."""

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM")
"""Formats that are always read, by Pillow's names: MPO counts as JPEG, PPM is all of PBM, PGM, PNM and PFM.
HEIC is read where pillow-heif is installed. Formats that are programs, such as EPS, never are."""

_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "JPEG2000": "jp2", "PPM": "pnm", "HEIF": "heic"}
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\x00", b"MM\x00*", b"BM")
_NOT_READ = {
    b"%!PS": "PostScript is a program; reading it would run it",
    b"\xc5\xd0\xd3\xc6": "EPS is a program; reading it would run it",
    b"\xd7\xcd\xc6\x9a": "WMF is a program; reading it would run it",
    b"\xff\x0a": "JPEG XL is not read",
    b"\0\0\0\x0cJXL ": "JPEG XL is not read",
}
_HEIC_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"))
_HIGH_BIT_DEPTH = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
_OPAQUE_WHITE = (255, 255, 255, 255)

# Pillow bounds pixels, a PNG's text and a TIFF's tags. What else cost minutes or gigabytes, by measurement:
_MAX_JPEG_SCAN_PIXELS = 64 * 178_956_970  # a progressive JPEG may repeat scans: 2 MB can cost hours
_MAX_EXIF_PARTS = 100  # joined one by one: 4 MB in 400,000 parts took 2.4 s, growing with the square
_MAX_EXIF_BYTES = 16 << 20
_MAX_COMMENTS = 10_000  # of a plain PNM, which is copied for each: 1 MB with 500,000 took 9 s
_MAX_SLOW_PIXELS = 1 << 24  # the rest of a run-length line is filled byte by byte: 1 kB took 18 s
_MAX_BYTES_PER_PIXEL = 8
_PIECE_PIXELS = 1 << 22
_TILE_SIDES = (322, 323)  # tags of a TIFF


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
    settings = {**dataclasses.asdict(config), "version": DECODE_VERSION}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}


def decode_config_of(recipe: dict[str, Any]) -> DecodeConfig:
    """The settings in a recipe; InputError where they are of another decode version."""
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in recipe.items()}
    version = settings.pop("version")
    if version != DECODE_VERSION:
        raise InputError(
            f"the images were prepared with decode version {version}, this is {DECODE_VERSION}; prepare again"
        )
    return DecodeConfig(**settings)


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
    # Decoders meet bytes that may have been made to break them: whatever they raise, from SyntaxError to
    # MemoryError, says the same thing about the file.
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
    _check_bytes(data, config)
    if Image.MAX_IMAGE_PIXELS is not None and config.max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        # Pillow's own guard is process-wide; it must not be tighter than what was asked for.
        Image.MAX_IMAGE_PIXELS = config.max_pixels
    formats = (*FORMATS, "HEIF") if _is_heic(data) and _reads_heic() else FORMATS
    image = Image.open(io.BytesIO(data), formats=formats)
    _check_size(*image.size, config)
    decoder = image.tile[0][0] if image.tile else ""
    if image.format in ("JPEG", "MPO"):
        # Escaped in coded data, so only markers count, and those of thumbnails.
        num_scans = data.count(b"\xff\xda")
        if num_scans * math.prod(image.size) > _MAX_JPEG_SCAN_PIXELS:
            raise Rejected("too_large", f"{num_scans} scans over {image.width} x {image.height} pixels")
    elif isinstance(image, TiffImagePlugin.TiffImageFile):
        width, length = (image.tag_v2.get(tag, 1) for tag in _TILE_SIDES)
        _check_size(width, length, config)  # one tile may be larger than the image
    elif decoder == "bmp_rle" and math.prod(image.size) > _MAX_SLOW_PIXELS:
        raise Rejected("too_large", f"run-length coded BMP of {image.width} x {image.height} pixels")
    if decoder == "raw":
        # Pillow collects a row that is longer than a block by copying it for each block: 60 MB took 18 s.
        image.decodermaxblock = max(image.decodermaxblock, image.width * _MAX_BYTES_PER_PIXEL)
    return image


def _check_bytes(data: bytes, config: DecodeConfig) -> None:
    """Refuse what would already cost too much while its header is read."""
    if data.startswith(b"\xff\xd8") and (parts := data.count(b"Exif\0\0")) > _MAX_EXIF_PARTS:
        raise Rejected("too_large", f"EXIF in {parts} parts")
    if data[:2] in (b"P1", b"P2", b"P3") and (comments := data.count(b"#")) > _MAX_COMMENTS:
        raise Rejected("too_large", f"{comments} comments in a plain PNM")
    if data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8X" and len(data) >= 30:
        # Room for the canvas is made as soon as it is opened.
        width, height = (int.from_bytes(data[place : place + 3], "little") + 1 for place in (24, 27))
        _check_size(width, height, config)


def _is_heic(data: bytes) -> bool:
    """True where a file's brand, or one that it is compatible with, is one of HEIC."""
    end = min(int.from_bytes(data[:4], "big"), 128)
    brands = (data[place : place + 4] for place in (8, *range(16, end, 4)))
    return data[4:8] == b"ftyp" and any(brand in _HEIC_BRANDS for brand in brands)


@functools.cache
def _reads_heic() -> bool:
    """True where pillow-heif is installed; Pillow then knows its format."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener(thumbnails=False)
    return True


def _check_size(width: int, height: int, config: DecodeConfig) -> None:
    if width * height > config.max_pixels:
        raise Rejected("too_large", f"{width} x {height} pixels, more than max_pixels {config.max_pixels}")
    if min(width, height) < 1:
        raise Rejected("corrupt", f"{width} x {height} pixels")


def _upright_rgb(data: bytes, image: ImageFile.ImageFile, config: DecodeConfig) -> np.ndarray:
    pixels = _plain_jpeg(data, image)
    if pixels is not None:
        return _transposed(pixels, _orientation(image))
    rawmode = _rawmode(image)
    image.load()
    _check_size(*image.size, config)  # the header may have promised another one
    orientation = _orientation(image)
    if image.mode in _HIGH_BIT_DEPTH:
        grey = _to_8_bits(_assembled(image, np.asarray), config)
        return _transposed(np.repeat(grey[:, :, None], 3, axis=2), orientation)
    if ";16" in rawmode and config.high_bit_depth != "full_range":
        message = f"16-bit colour is read with high_bit_depth full_range only ({rawmode})"
        raise Rejected("unsupported", message)
    return _transposed(_assembled(image, _to_rgb), orientation)


def _to_rgb(piece: Image.Image) -> np.ndarray:
    """Pixels of a loaded image, uint8 [H, W, 3], composited on white where it has transparency."""
    if piece.mode == "La":
        piece = piece.convert("LA")  # premultiplied grey goes nowhere else
    if (piece.mode != "P" or piece.palette is not None) and piece.has_transparency_data:
        layer = piece.convert("RGBA")
        piece = Image.alpha_composite(Image.new("RGBA", layer.size, _OPAQUE_WHITE), layer)
    return np.asarray(piece.convert("RGB"))


def _assembled(image: Image.Image, convert: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    """What `convert` makes of a loaded image, [H, W, ...], a few million pixels at a time.

    Converted whole, a large image would be held four times over; and Pillow gives no numpy array of one that
    is wider than 67 million pixels.
    """
    width = min(image.width, _PIECE_PIXELS)
    height = max(1, _PIECE_PIXELS // width)
    whole: np.ndarray | None = None
    for top, left in itertools.product(range(0, image.height, height), range(0, image.width, width)):
        box = (left, top, min(left + width, image.width), min(top + height, image.height))
        part = convert(image if box == (0, 0, *image.size) else image.crop(box))
        if whole is None:
            whole = np.empty((image.height, image.width, *part.shape[2:]), part.dtype)
        whole[top : box[3], left : box[2]] = part
    assert whole is not None
    return whole


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


def _rawmode(image: ImageFile.ImageFile) -> str:
    """How the pixels are laid out in the file, such as `RGB;16B`; empty where the format does not say."""
    arguments = image.tile[0][3] if image.tile else None
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
    rows = -1 if orientation in (3, 4, 6, 7) else 1
    columns = -1 if orientation in (2, 3, 7, 8) else 1
    pixels = pixels[::rows, ::columns]
    return np.ascontiguousarray(pixels.transpose(1, 0, 2) if orientation >= 5 else pixels)


def _to_8_bits(values: np.ndarray, config: DecodeConfig) -> np.ndarray:
    """Grey values [H, W] of 16 or 32 bits as uint8 [H, W]; NaN is black, infinities are black and white."""
    low, high = _range(values, config)
    if high <= low:
        high = low + 1.0  # one value only: there is no contrast to show
    grey = np.empty(values.shape, np.uint8)
    # A block at a time: eight bytes per pixel of a large image are too many.
    rows = max(1, (1 << 20) // values.shape[1])
    for top in range(0, len(values), rows):
        scaled = (values[top : top + rows].astype(np.float64) - low) * (255.0 / (high - low))
        scaled = np.nan_to_num(scaled, copy=False, nan=0.0, posinf=255.0, neginf=0.0)
        grey[top : top + rows] = np.rint(scaled.clip(0.0, 255.0))
    return grey


def _range(values: np.ndarray, config: DecodeConfig) -> tuple[float, float]:
    """The values that become black and white."""
    if config.high_bit_depth == "window" and config.window is not None:
        return config.window
    full_range = config.high_bit_depth == "full_range"
    if full_range and values.dtype.kind in "iu" and values.dtype.itemsize == 2:
        return 0.0, 65535.0
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    if finite.size == 0:
        return 0.0, 1.0
    if not full_range:
        low, high = np.percentile(finite, config.percentile).tolist()
        return low, high
    low, high = float(finite.min()), float(finite.max())
    # Pillow widens 16-bit files of some formats (PGM, 16-bit TIFF variants) to 32 bits.
    is_narrow = values.dtype.kind == "i" and low >= 0 and high <= 65535
    return (0.0, 65535.0) if is_narrow else (low, high)


def _classify(error: Exception, data: bytes) -> Rejected:
    message = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return Rejected("too_large", message)
    if isinstance(error, UnidentifiedImageError):
        for signature, why in _NOT_READ.items():
            if data.startswith(signature):
                return Rejected("unsupported", why)
        if _is_heic(data) and not _reads_heic():
            return Rejected("unsupported", 'HEIC needs pillow-heif: pip install "beit2-pipeline[heif]"')
        is_webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
        if data.startswith(_SIGNATURES) or is_webp or _is_heic(data):
            return Rejected("corrupt", "begins like an image, but its header cannot be read")
        return Rejected("not_an_image", "no known image format")
    if "truncat" in message.lower():
        return Rejected("truncated", message)
    if isinstance(error, MemoryError):
        return Rejected("too_large", "more memory than there is")
    return Rejected("corrupt", message)

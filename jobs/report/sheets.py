"""How pictures for people's eyes are drawn: the paper, its fonts, scaled pixels, frames, and PNG bytes."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH = 1600
"""Of a sheet, in pixels."""
MARGIN, GAP = 32, 12
PAPER, INK, MUTED = (252, 252, 251), (28, 27, 26), (107, 105, 99)
RED = (255, 45, 45)
"""Of the box around a patch."""


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def titled_sheet(title: str, lead: str, height: int) -> Image.Image:
    """An empty sheet with its heading, which ends above pixel 100."""
    sheet = Image.new("RGB", (WIDTH, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 24), shortened(draw, title, 26, WIDTH - 2 * MARGIN), INK, font(26))
    draw.text((MARGIN, 60), shortened(draw, lead, 15, WIDTH - 2 * MARGIN), MUTED, font(15))
    draw.line((MARGIN, 90, WIDTH - MARGIN, 90), INK, 2)
    return sheet


def heading(draw: ImageDraw.ImageDraw, y: int, words: str) -> int:
    """A line of text; returns where what follows begins."""
    draw.text((MARGIN, y), words, INK, font(16))
    return y + 34


def shortened(draw: ImageDraw.ImageDraw, words: str, size: int, width: int) -> str:
    """As much of the words, from the beginning, as is not wider than `width` pixels."""
    while words and draw.textlength(words, font(size)) > width:
        words = words[:-1]
    return words


def scaled(pixels: np.ndarray, side: int, how: Image.Resampling) -> Image.Image:
    """A square picture of `side` pixels."""
    return Image.fromarray(np.ascontiguousarray(pixels)).resize((side, side), how)


def fitted(pixels: np.ndarray, side: int) -> Image.Image:
    """At most `side` pixels a side: what is small grows by a whole factor, with hard edges; others shrink."""
    factor = side // pixels.shape[0]
    if factor > 0:
        return scaled(pixels, factor * pixels.shape[0], Image.Resampling.NEAREST)
    return scaled(pixels, side, Image.Resampling.LANCZOS)


def framed(
    picture: Image.Image, box: tuple[int, int, int, int], color: tuple[int, ...], width: int = 2
) -> None:
    """Draw a frame around the pixels of `box` (left, top, right, bottom), of which it hides none."""
    left, top, right, bottom = box
    frame = (left - width, top - width, right + width - 1, bottom + width - 1)
    ImageDraw.Draw(picture).rectangle(frame, outline=color, width=width)


def png(sheet: Image.Image) -> bytes:
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()

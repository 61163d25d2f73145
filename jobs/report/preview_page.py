"""How a preview of token shards looks: a PNG contact sheet, and a self-contained page."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from jobs.report.page import Section, details, escape, figure, grid, image, page, paragraph, table
from jobs.report.sheets import (
    GAP,
    INK,
    MARGIN,
    MUTED,
    PAPER,
    WIDTH,
    font,
    framed,
    heading,
    png,
    scaled,
    shortened,
    titled_sheet,
)
from shards.dataset.preview import Preview, SharedCode, ShownSample, code_colors
from shards.format.manifest import Dataset

CROP = 116
"""Side of a crop and of its code map on the sheet, in pixels."""
MAX_VIEWS = 12
"""So many are as wide as the sheet."""
TILE = 76
"""Side of a patch with its surroundings."""
CAPTION = 20
PREVIEW_MARK = "<!-- written by jobs.preview_shards -->"


def contact_sheet(dataset: Dataset, shown: Preview) -> bytes:
    """The sheet as PNG bytes: images with their views side by side, each above its code map, then codes."""
    colors = _colors(dataset)
    cells = [_sample_cell(sample, colors, _caption(dataset, sample)) for sample in shown.samples]
    per_row = max(1, (WIDTH - 2 * MARGIN + 2 * GAP) // (cells[0].width + 2 * GAP))
    rows = [_code_row(one, shown.patches, colors) for one in shown.codes]
    top = 104
    samples_height = -(-len(cells) // per_row) * (cells[0].height + GAP)
    height = top + 34 + samples_height + 44 + sum(row.height + 8 for row in rows) + MARGIN
    sheet = titled_sheet(_title(dataset), _lead(dataset), height)
    draw = ImageDraw.Draw(sheet)
    y = heading(draw, top, _samples_heading(shown))
    for number, cell in enumerate(cells):
        line, column = divmod(number, per_row)
        sheet.paste(cell, (MARGIN + column * (cell.width + 2 * GAP), y + line * (cell.height + GAP)))
    y = heading(draw, y + samples_height + 10, _codes_heading(shown))
    for row in rows:
        sheet.paste(row, (MARGIN, y))
        y += row.height + 8
    return png(sheet)


def html_page(dataset: Dataset, shown: Preview) -> bytes:
    """The same as one HTML file without anything outside it."""
    colors = _colors(dataset)
    views = len(shown.samples[0].pixels)
    cells = [
        figure(
            f'<div class="row" style="--columns:{views}">'
            + "".join(image(pixels, f"view {view}", width=CROP) for view, pixels in enumerate(sample.pixels))
            + "".join(
                image(colors[codes], f"codes of view {view}", width=CROP, photo=False)
                for view, codes in enumerate(sample.codes)
            )
            + "</div>",
            _caption(dataset, sample),
        )
        for sample in shown.samples
    ]
    codes = "".join(_code_block(one, shown.patches, colors) for one in shown.codes)
    tokenizer = dataset.manifest.tokenizer or {}
    facts = [[key, str(value)] for key, value in sorted(tokenizer.items())]
    sections = [
        Section(
            title="Crops and their codes",
            body=paragraph(_samples_heading(shown)) + grid(cells, min_width=max(CROP, CROP * views)),
        ),
        Section(title="Patches that share a code", body=paragraph(_codes_heading(shown)) + codes),
        Section(title="Tokenizer", body=details("what the manifest says", table(["", "value"], facts))),
    ]
    return page(_title(dataset), _lead(dataset), sections, mark=PREVIEW_MARK).encode()


# ------------------------------------------------------------------------------------------------ words


def _title(dataset: Dataset) -> str:
    return f"Token shards: {dataset.url}"


def _lead(dataset: Dataset) -> str:
    manifest = dataset.manifest
    tokenizer = manifest.tokenizer or {}
    rows, columns = manifest.grid
    views = "1 view" if dataset.num_views == 1 else f"{dataset.num_views} views"
    return (
        f"{manifest.samples_written:,} crops in {views}, dataset {dataset.fingerprint[:8]}, codes of "
        f"tokenizer {tokenizer['fingerprint'][:8]}: {rows} x {columns} of {tokenizer['codebook_size']:,}"
    )


def _samples_heading(shown: Preview) -> str:
    views = len(shown.samples[0].pixels)
    which = "the stored crop" if views == 1 else f"{views} stored views side by side"
    return (
        f"{len(shown.samples)} images spread over the dataset: {which}, and below the code of every patch, "
        "a colour for each code"
    )


def _codes_heading(shown: Preview) -> str:
    how = "One code" if len(shown.codes) == 1 else "Codes from the most used to the rarest"
    return (
        f"{how}: patches from different images that carry it, with their surroundings ({shown.searched:,} "
        "crops of view 0 were searched)"
    )


def _caption(dataset: Dataset, sample: ShownSample) -> str:
    if sample.label is None:
        return f"{sample.sample_id}"
    return f"{sample.sample_id}  {class_name(dataset, sample.label)}"


def class_name(dataset: Dataset, label: int) -> str:
    """The name of a class, or its number where it has none."""
    names = dataset.manifest.class_names
    return names[label] if names is not None and label < len(names) else str(label)


def _code_words(one: SharedCode, patches: int) -> tuple[str, str]:
    if one.count == 0:
        return f"code {one.code}", "no patch carries it"
    return f"code {one.code}", f"{100 * one.count / patches:.2g} %, {one.images:,} crops"


# ------------------------------------------------------------------------------------------------ drawing


def _sample_cell(sample: ShownSample, colors: np.ndarray, caption: str) -> Image.Image:
    """Views side by side, crops above code maps, a caption below."""
    views = len(sample.pixels)
    width = views * CROP + (views - 1) * 4
    cell = Image.new("RGB", (width, 2 * CROP + 4 + CAPTION), PAPER)
    for view in range(views):
        x = view * (CROP + 4)
        cell.paste(scaled(sample.pixels[view], CROP, Image.Resampling.LANCZOS), (x, 0))
        cell.paste(scaled(colors[sample.codes[view]], CROP, Image.Resampling.NEAREST), (x, CROP + 4))
    draw = ImageDraw.Draw(cell)
    draw.text((0, 2 * CROP + 8), shortened(draw, caption, 12, width), MUTED, font(12))
    return cell


def _code_row(one: SharedCode, patches: int, colors: np.ndarray) -> Image.Image:
    """A swatch with the code's name and share, then its patches, outlined in its colour."""
    left, pitch = 190, TILE + 6
    per_line = (WIDTH - 2 * MARGIN - left) // pitch
    lines = max(1, -(-len(one.patches) // per_line))
    row = Image.new("RGB", (WIDTH - 2 * MARGIN, lines * pitch), PAPER)
    draw = ImageDraw.Draw(row)
    color = tuple(int(part) for part in colors[one.code])
    name, share = _code_words(one, patches)
    draw.rounded_rectangle((0, 4, 26, 30), 4, color)
    draw.text((38, 4), name, INK, font(17))
    draw.text((38, 28), share, MUTED, font(13))
    for number, patch in enumerate(one.patches):
        line, column = divmod(number, per_line)
        row.paste(_outlined(patch, color), (left + column * pitch, line * pitch))
    return row


def _outlined(patch: np.ndarray, color: tuple[int, ...]) -> Image.Image:
    """A patch in its surroundings, which are paler, with a frame in the colour of its code."""
    tile = scaled(patch, TILE, Image.Resampling.LANCZOS)
    low, high = TILE // 3, TILE - TILE // 3
    middle = tile.crop((low, low, high, high))
    tile = Image.blend(tile, Image.new("RGB", tile.size, PAPER), 0.45)
    tile.paste(middle, (low, low))
    framed(tile, (low, low, high, high), color)
    return tile


def _code_block(one: SharedCode, patches: int, colors: np.ndarray) -> str:
    name, share = _code_words(one, patches)
    color = tuple(int(part) for part in colors[one.code])
    tiles = "".join(
        image(np.asarray(_outlined(patch, color)), key, width=TILE, photo=False)
        for patch, key in zip(one.patches, one.keys, strict=True)
    )
    swatch = "#" + "".join(f"{part:02x}" for part in color)
    head = f'<div><b class="key"><i style="--c:{swatch};margin-left:0"></i>{escape(name)}</b>'
    return (
        f'<div class="code">{head}<span>{escape(share)}</span></div>'
        f'<div class="tiles" style="flex-wrap:wrap">{tiles}</div></div>'
    )


def _colors(dataset: Dataset) -> np.ndarray:
    assert dataset.manifest.tokenizer is not None
    return code_colors(dataset.manifest.tokenizer["codebook_size"])

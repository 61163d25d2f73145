"""How a codebook looks (paper, Figures 4 and 5): a self-contained page, and one PNG for each figure."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw

from jobs.report.html import Section, details, escape, figure, grid, image, page, paragraph, rank_chart, table
from jobs.report.pictures import surroundings
from jobs.report.sheets import (
    GAP,
    INK,
    MARGIN,
    MUTED,
    PAPER,
    RED,
    WIDTH,
    fitted,
    font,
    framed,
    heading,
    png,
    scaled,
    shortened,
    titled_sheet,
)
from pretrain.evals.codebook import PRIOR, CodebookFindings, Example, PlacedCode, ShownCode
from shards.dataset.codes import SHIFTS
from shards.dataset.dataset import Dataset
from shards.dataset.summary import CodeStatistics

MARK = "<!-- written by jobs.visualize_codebook -->"
CROP, SHEET_CROP = 128, 102
"""A crop with its box is at most so many pixels wide on the page, and on the sheet: twelve in a row."""
BORDER = 3
"""Of paper around a crop, so that a box at its edge is whole: two pixels of red, one of paper."""
LABEL = 200
"""Width of what stands to the left of a code's patches."""
MAP = 98
"""A map of places is at most so many pixels wide, and at least half."""
LESS, EVEN, MORE = np.array((33, 102, 172)), np.array((244, 244, 242)), np.array((178, 24, 43))
"""Colours of places with a quarter of an even spread, an even spread, and four times that."""
RANGE = 2.0
"""Where those colours lie, in powers of two."""


# ------------------------------------------------------------------------------------------------ the page


def codebook_page(dataset: Dataset, found: CodebookFindings) -> bytes:
    """One HTML file without anything outside it."""
    usage = usage_body(found.statistics, found.counts, "all stored crops")
    tokenizer = dataset.manifest.require_tokenizer().to_json()
    facts = [[key, str(value)] for key, value in sorted(tokenizer.items())]
    facts.append(["dataset", dataset.fingerprint])
    sections = [
        Section(title="Patches that share a code", body=_codes_body(dataset, found)),
        Section(title="How often each code is used", body=usage),
        Section(title="Where on the grid codes occur", body=_places_body(found)),
        Section(title="Tokenizer", body=details("what the manifest says", table(["", "value"], facts))),
    ]
    return page(_title(dataset), _lead(dataset, found), sections, mark=MARK).encode()


def usage_body(codes: CodeStatistics, counts: np.ndarray, where: str) -> str:
    """How much of the codebook is used, in words and as a chart of rank and frequency."""
    return paragraph(f"Over {where}, {_usage_words(codes, counts)}") + rank_chart(counts.tolist())


def _codes_body(dataset: Dataset, found: CodebookFindings) -> str:
    rows = []
    for one in found.codes:
        tiles = "".join(_tile_html(example, dataset.manifest.grid) for example in one.examples)
        words = "".join(f"<span>{escape(line)}</span><br>" for line in _code_words(dataset, one))
        place = image(place_map(one.place), f"places of code {one.code}", width=MAP, photo=False)
        rows.append(
            f'<div class="code" style="--label:{LABEL}px;align-items:start;margin:18px 0">'
            f"<div><b>code {one.code}</b>{words}"
            f'<div style="margin-top:6px">{place}</div></div>'
            f'<div class="tiles" style="flex-wrap:wrap;gap:2px">{tiles}</div></div>'
        )
    return paragraph(_codes_lead(found)) + "".join(rows)


def _tile_html(example: Example, shape: tuple[int, int]) -> str:
    tile = patch_tile(example, shape, CROP)
    alt = f"{example.key}, patch {example.patch}"
    # Enlarged pixels stay exact; photographs cost a fifth as JPEG.
    return image(np.asarray(tile), alt, width=tile.width, photo=example.pixels.shape[0] > CROP // 2)


def _places_body(found: CodebookFindings) -> str:
    def maps(places: list[PlacedCode]) -> str:
        cells = [
            figure(
                image(place_map(one), f"places of code {one.code}", width=MAP, photo=False),
                f"code {one.code}: {one.bits:.2f} ({one.bits_shifted:.2f})",
            )
            for one in places
        ]
        return grid(cells, min_width=MAP + 60)

    scale = image(np.asarray(_scale(200, 12)), "from a quarter to four times", width=200, photo=False)
    legend = (
        '<div class="heads" style="display:flex;gap:8px;align-items:center">'
        f"1/4 of an even spread {scale} 4 times</div>"
    )
    parts = [paragraph(_position_words(found)), paragraph(_map_words()), legend]
    if found.position.most:
        parts += [
            '<h3 style="margin:16px 0 8px">Codes that say most about their place</h3>',
            maps(list(found.position.most)),
        ]
    parts += [
        '<h3 style="margin:16px 0 8px">The codes shown above</h3>',
        maps([one.place for one in found.codes]),
    ]
    return "".join(parts)


# ------------------------------------------------------------------------------------------------ the figures


def codes_figure(dataset: Dataset, found: CodebookFindings) -> bytes:
    """PNG: a row for each code, its patches boxed in their crops, and below each the patch from near by."""
    rows = [_code_row(dataset, one) for one in found.codes]
    height = 104 + 34 + sum(row.height + GAP for row in rows) + MARGIN
    sheet = titled_sheet(_title(dataset), _lead(dataset, found), height)
    y = heading(ImageDraw.Draw(sheet), 104, "Patches that share a code, the most consistent codes first")
    for row in rows:
        sheet.paste(row, (MARGIN, y))
        y += row.height + GAP
    return png(sheet)


def patch_tile(example: Example, shape: tuple[int, int], side: int) -> Image.Image:
    """The crop, up to `side` pixels, with a red box around the patch; below, that patch from near by."""
    rows, columns = shape
    crop = fitted(example.pixels, side)
    row, column = divmod(example.patch, columns)
    box = (
        BORDER + column * crop.width // columns,
        BORDER + row * crop.height // rows,
        BORDER + (column + 1) * crop.width // columns,
        BORDER + (row + 1) * crop.height // rows,
    )
    near, third = surroundings(example.pixels, example.patch, shape), side // 6
    how = Image.Resampling.NEAREST if near.shape[0] < side // 4 else Image.Resampling.LANCZOS
    zoom = scaled(near, 3 * third, how)
    framed(zoom, (third, third, 2 * third, 2 * third), RED)
    tile = Image.new("RGB", (crop.width + 2 * BORDER, crop.height + 2 * BORDER + 2 + zoom.height), PAPER)
    tile.paste(crop, (BORDER, BORDER))
    framed(tile, box, PAPER, BORDER)
    framed(tile, box, RED)
    tile.paste(zoom, ((tile.width - zoom.width) // 2, tile.height - zoom.height))
    return tile


def _code_row(dataset: Dataset, one: ShownCode) -> Image.Image:
    """A code's name and figures, then its patches."""
    tiles = [patch_tile(example, dataset.manifest.grid, SHEET_CROP) for example in one.examples]
    words, pitch = _code_words(dataset, one), tiles[0].height + 6
    per_line = (WIDTH - 2 * MARGIN - LABEL) // (tiles[0].width + 3)
    lines = -(-len(tiles) // per_line)
    row = Image.new("RGB", (WIDTH - 2 * MARGIN, max(lines * pitch, 28 + 17 * len(words))), PAPER)
    draw = ImageDraw.Draw(row)
    draw.text((0, 2), f"code {one.code}", INK, font(18))
    for number, line in enumerate(words):
        draw.text((0, 28 + 17 * number), shortened(draw, line, 13, LABEL - GAP), MUTED, font(13))
    for number, tile in enumerate(tiles):
        line, column = divmod(number, per_line)
        row.paste(tile, (LABEL + column * (tile.width + 3), line * pitch))
    return row


def usage_figure(dataset: Dataset, found: CodebookFindings) -> bytes:
    """PNG: share of patches by rank of use, on a logarithmic scale, with the level of even use."""
    from matplotlib.figure import Figure  # costs half a second, and only this figure needs it

    counts = np.sort(found.counts[found.counts > 0])[::-1] / found.counts.sum()
    ranks = np.arange(len(counts) + 1)
    drawn = Figure(figsize=(10, 4.2), dpi=120, layout="constrained")
    axes = drawn.subplots()
    axes.stairs(100 * counts, ranks, fill=True, color="#2a6fc9", baseline=1e-9)
    axes.axhline(100 / len(found.counts), color="#1c1b1a", linestyle=":", linewidth=1)
    axes.annotate(
        "even use",
        (len(found.counts), 100 / len(found.counts)),
        ha="right",
        va="bottom",
        textcoords="offset points",
        xytext=(-2, 2),
    )
    axes.set_yscale("log")
    axes.set_xlim(0, len(found.counts))
    axes.set_ylim(min(100 * counts[-1], 100 / len(found.counts)) / 2, 200 * counts[0])
    axes.set_xlabel("codes, most used first")
    axes.set_ylabel("share of patches, %")
    axes.set_title(_usage_words(found.statistics, found.counts).partition(". ")[0], fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def places_figure(dataset: Dataset, found: CodebookFindings) -> bytes:
    """PNG: maps of where codes occur on the grid."""
    groups = [
        ("Codes that say most about their place", list(found.position.most)),
        ("The most consistent codes", [one.place for one in found.codes]),
    ]
    pitch, line_height = 150, 150
    per_line = (WIDTH - 2 * MARGIN) // pitch
    lines = sum(-(-len(places) // per_line) for _, places in groups)
    height = 104 + 90 + lines * line_height + 44 * len(groups) + MARGIN
    sheet = titled_sheet(_title(dataset), _lead(dataset, found), height)
    draw = ImageDraw.Draw(sheet)
    y = heading(draw, 104, _position_words(found).partition(". ")[0])
    draw.text((MARGIN, y), "1/4 of an even spread", MUTED, font(13))
    sheet.paste(_scale(200, 12), (MARGIN + 150, y + 3))
    draw.text((MARGIN + 360, y), "4 times", MUTED, font(13))
    y += 44
    for title, places in groups:
        if not places:
            continue
        y = heading(draw, y, title)
        for number, one in enumerate(places):
            line, column = divmod(number, per_line)
            x, top = MARGIN + column * pitch, y + line * line_height
            sheet.paste(fitted(place_map(one), MAP), (x, top))
            draw.text((x, top + MAP + 4), f"code {one.code}", INK, font(13))
            draw.text((x, top + MAP + 20), _bits_words(one), MUTED, font(12))
        y += -(-len(places) // per_line) * line_height + 10
    return png(sheet)


def place_map(place: PlacedCode) -> np.ndarray:
    """A colour for each place of the grid, uint8 [rows, columns, 3]."""
    return _colors(np.log2(place.spread) / RANGE)


def _scale(width: int, height: int) -> Image.Image:
    """The colours from a quarter to four times, from left to right."""
    return Image.fromarray(_colors(np.tile(np.linspace(-1, 1, width), (height, 1))))


def _colors(values: np.ndarray) -> np.ndarray:
    """Values, of which -1 to 1 are told apart, as uint8 [..., 3]."""
    values = np.clip(values, -1, 1)[..., None]
    colors = np.where(values < 0, EVEN + values * (EVEN - LESS), EVEN + values * (MORE - EVEN))
    return colors.round().astype(np.uint8)


# ------------------------------------------------------------------------------------------------ words


def _title(dataset: Dataset) -> str:
    return f"Codebook: {dataset.url}"


def _lead(dataset: Dataset, found: CodebookFindings) -> str:
    tokenizer = dataset.manifest.require_tokenizer()
    rows, columns = dataset.manifest.grid
    return (
        f"{found.statistics.codebook_size:,} codes of tokenizer {tokenizer.fingerprint[:8]} on {rows} x "
        f"{columns} patches of {dataset.manifest.samples_written:,} crops, dataset {dataset.fingerprint[:8]}"
    )


def _codes_lead(found: CodebookFindings) -> str:
    return (
        f"{len(found.codes)} of the {found.eligible:,} codes that occur often enough in {found.searched:,} "
        "sampled crops, the most consistent first. Each crop has a box around one patch of the code; below "
        "it is that patch with its surroundings. Patches are drawn at random, from different images as long "
        "as there are any. Likeness is the mean cosine between gradient histograms of patches from two "
        f"different images; for patches of any two codes it is {found.likeness_of_any:.2f}. It measures "
        "looks, not meaning. Codes of less contrast than the median code come after all others. Where images "
        "have labels, the code's most frequent classes are named: their share of its patches, and how many "
        "times their share of all patches that is."
    )


def _usage_words(codes: CodeStatistics, counts: np.ndarray) -> str:
    used, most = codes.codebook_size - codes.num_dead, counts.max() / max(1, codes.patches)
    return (
        f"{codes.patches:,} patches: {used:,} of {codes.codebook_size:,} codes occur "
        f"({100 * codes.usage:.1f} %), perplexity {codes.perplexity:,.1f}. The most used code holds "
        f"{100 * most:.1f} % of the patches: always guessing it would be right that often."
    )


def _code_words(dataset: Dataset, one: ShownCode) -> list[str]:
    lines = [
        f"{100 * one.share:.2g} % of patches",
        f"likeness {one.consistency:.2f}, {one.images:,} crops",
        f"place: {_bits_words(one.place)}",
    ]
    for held in one.classes:
        lines.append(f"{100 * held.share:.2g} % {class_name(dataset, held.label)} ({held.lift:.2g}x)")
    if one.neighbours:
        lines.append(f"nearest codes: {', '.join(str(code) for code, _ in one.neighbours)}")
    return lines


def class_name(dataset: Dataset, label: int) -> str:
    """The name of a class, or its number where it has none."""
    names = dataset.manifest.class_names
    return names[label] if names is not None and label < len(names) else str(label)


def _bits_words(place: PlacedCode) -> str:
    return f"{place.bits:.2f} bits ({place.bits_shifted:.2f} shifted)"


def _position_words(found: CodebookFindings) -> str:
    position = found.position
    return (
        f"A patch's place says {position.bits:.3f} of the {position.code_entropy:.2f} bits of its code, "
        f"{position.bits_shifted:.3f} by chance. These are the mutual information of code and place over all "
        "stored patches, as counted, and the same after every crop's grid was shifted around its edges by a "
        f"random distance ({SHIFTS} times, the mean): codes keep their neighbours and lose their places. "
        f"What exceeds it is bound to position: {position.bits - position.bits_shifted:.3f} bits."
    )


def _map_words() -> str:
    return (
        "Each map is the grid of patches, coloured by how often the code occurs at a place, over an even "
        f"spread of its patches ({PRIOR} are added to both, so that rare codes stay pale). Below it "
        "stand the bits by which its places differ from those of all patches, and in brackets the same after "
        "the shifts."
    )

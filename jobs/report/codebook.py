"""How a codebook looks (paper, Figures 4 and 5): parts of a page, the page, and one PNG for each figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from jobs.report import html, pictures
from jobs.report.pictures import Row, Tile
from pretrain.evals.codebook import PRIOR, ExaminedCodebook, ShownCode
from shards.dataset.codes import SHIFTS, CodeStatistics, CropSample
from shards.dataset.dataset import Dataset
from shards.pixels.views import decode_crop

MARK = "<!-- written by jobs.visualize_codebook -->"
CROP, SHEET_CROP = 128, 102
"""Pixels a side that a crop has at most on the page, and on the sheet: twelve in a row."""
MAP = 126
"""Pixels a side that a map of places has at most."""
PICTURE = 224
"""Width of an image beside its codes, in pixels of the screen."""
CROPS = 6
"""Crops of the sample that the page shows with their codes."""
CODE_WORDS = (
    "Each crop has a box around one patch of the code; below it is that patch with its surroundings. Patches "
    "are drawn at random, from different images as long as there are any. Codes of less contrast than the "
    "median code come last. Likeness is the mean cosine between gradient histograms of patches from two "
    "different images."
)
"""What a row of a code shows."""


# ------------------------------------------------------------------------------------------------ the whole


def codebook_files(
    dataset: Dataset, sample: CropSample, codebook: np.ndarray | None, examined: ExaminedCodebook
) -> dict[str, bytes]:
    """The page, with nothing outside it, and its figures, PNGs, by file name.

    `codebook` [K, D] gives similar codes similar colours.
    """
    tokenizer, (rows, columns) = dataset.manifest.require_tokenizer(), dataset.manifest.grid
    title = f"Codebook: {dataset.url}"
    lead = (
        f"{tokenizer.codebook_size:,} codes of tokenizer {tokenizer.fingerprint[:8]} on {rows} x {columns} "
        f"patches of {dataset.manifest.samples_written:,} crops, dataset {dataset.fingerprint[:8]}"
    )
    facts = {**tokenizer.to_json(), "dataset": dataset.fingerprint}
    facts = html.table(["", "value"], [(key, str(value)) for key, value in sorted(facts.items())])
    colors = pictures.code_colors(codebook, tokenizer.codebook_size)
    crops = [
        {"image": decode_crop(place.read()), "codes": pictures.code_map(codes, colors)}
        for place, codes in zip(sample.places[:CROPS], sample.codes, strict=False)
    ]
    codes = html.paragraph(_codes_lead(examined)) + code_rows(dataset, examined.codes)
    sections = {
        "Patches that share a code": codes,
        "How often each code is used": usage_body(examined.statistics, examined.counts, "all stored crops"),
        "Where on the grid codes occur": _places_body(examined),
        "Crops and their codes": picture_rows(crops),
        "Tokenizer": html.details("what the manifest says", facts),
    }
    shown = [_code_row(dataset, code, SHEET_CROP) for code in examined.codes]
    return {
        "codebook.html": html.page(title, lead, sections, mark=MARK),
        "codes.png": pictures.png(pictures.sheet(title, lead, shown)),
        "usage.png": pictures.png(pictures.usage_chart(examined.counts)),
        "places.png": pictures.png(pictures.sheet(title, lead, _place_rows(examined))),
    }


def usage_body(codes: CodeStatistics, counts: np.ndarray, where: str) -> str:
    """How much of the codebook is used, in words and as a chart of rank and frequency."""
    used, most = codes.codebook_size - codes.num_dead, counts.max() / max(1, codes.patches)
    words = (
        f"Over {where}, {codes.patches:,} patches: {used:,} of {codes.codebook_size:,} codes occur "
        f"({100 * codes.usage:.1f} %), perplexity {codes.perplexity:,.1f}. The most used code holds "
        f"{100 * most:.1f} % of the patches: always guessing it would be right that often."
    )
    chart = pictures.usage_chart(counts)
    return html.paragraph(words) + html.image(
        np.asarray(chart), "codebook usage by rank", width=900, photo=False
    )


def code_rows(dataset: Dataset, codes: Sequence[ShownCode]) -> str:
    """Codes with patches that carry them, one below the other, as HTML."""
    return "".join(_row_html(_code_row(dataset, code, CROP)) for code in codes)


def picture_rows(rows: Sequence[Mapping[str, np.ndarray]]) -> str:
    """Pictures beside each other by what they show; maps of codes are one pixel per patch, drawn sharp."""
    cells = [f'<div class="heads">{title}</div>' for title in rows[0]]
    for row in rows:
        for title, pixels in row.items():
            cells.append(html.image(pixels, title, width=PICTURE, photo="codes" not in title))
    return f'<div class="row" style="--columns:{len(rows[0])}">{"".join(cells)}</div>'


# ------------------------------------------------------------------------------------------------ rows


def _code_row(dataset: Dataset, shown: ShownCode, side: int) -> Row:
    words = [
        f"{100 * shown.share:.2g} % of patches",
        f"likeness {shown.consistency:.2f}, {shown.images:,} crops",
    ]
    if shown.place is not None:
        words.append(f"place: {shown.place.bits:.2f} bits ({shown.place.bits_shifted:.2f} shifted)")
    names = dataset.manifest.class_names or ()
    for share in shown.classes:
        name = names[share.label] if share.label < len(names) else share.label
        words.append(f"{100 * share.share:.2g} % {name} ({share.lift:.2g}x)")
    if shown.neighbours:
        words.append(f"nearest codes: {', '.join(str(code) for code, _ in shown.neighbours)}")
    tiles = [pictures.patch_tile(example, dataset.manifest.grid, side) for example in shown.examples]
    return Row(title=f"code {shown.code}", words=words, tiles=tiles)


def _place_rows(examined: ExaminedCodebook) -> list[Row]:
    colors = pictures.spread_colors(np.exp2(np.tile(np.linspace(-2, 2, MAP), (12, 1))))
    scale = Tile(picture=Image.fromarray(colors), alt="colours", sharp=True)
    rows = [Row(title="Colours", words=["1/4 to 4 times an even spread"], tiles=[scale])]
    groups = {
        "Most bound": examined.position.most,
        "Most consistent": [examined.position.of(shown.code) for shown in examined.codes],
    }
    for title, places in groups.items():
        tiles = [
            Tile(
                picture=pictures.fitted(pictures.spread_colors(place.spread), MAP),
                alt=f"places of code {place.code}",
                caption=f"code {place.code}: {place.bits:.2f} ({place.bits_shifted:.2f})",
                sharp=True,
            )
            for place in places
        ]
        if tiles:
            rows.append(Row(title=title, words=["bits (after the shifts)"], tiles=tiles))
    return rows


def _row_html(row: Row) -> str:
    words = "".join(f"<span>{html.escape(line)}</span>" for line in row.words)
    tiles = []
    for tile in row.tiles:
        pixels, width = np.asarray(tile.picture), tile.picture.width
        caption = f"<figcaption>{html.escape(tile.caption)}</figcaption>"
        picture = html.image(pixels, tile.alt, width=width, photo=not tile.sharp)
        tiles.append(f"<figure>{picture}{caption}</figure>")
    return (
        f'<div class="code"><div><b>{html.escape(row.title)}</b>{words}</div>'
        f'<div class="tiles">{"".join(tiles)}</div></div>'
    )


# ------------------------------------------------------------------------------------------------ words


def _codes_lead(examined: ExaminedCodebook) -> str:
    return (
        f"{len(examined.codes)} of the {examined.eligible:,} codes that occur often enough in "
        f"{examined.searched:,} sampled crops, the most consistent first. {CODE_WORDS} For patches of any "
        f"two codes it is {examined.likeness_of_any:.2f}. It measures looks, not meaning. Where images have "
        "labels, the code's most frequent classes are named: their share of its patches, and how many times "
        "their share of all patches that is."
    )


def _places_body(examined: ExaminedCodebook) -> str:
    position = examined.position
    words = (
        f"A patch's place says {position.bits:.3f} of the {position.code_entropy:.2f} bits of its code, "
        f"{position.bits_shifted:.3f} by chance. These are the mutual information of code and place over all "
        "stored patches, as counted, and the same after every crop's grid was shifted around its edges by a "
        f"random distance ({SHIFTS} times, the mean): codes keep their neighbours and lose their places. "
        f"What exceeds it is bound to position: {position.bits - position.bits_shifted:.3f} bits."
    )
    maps = (
        "Each map is the grid of patches, coloured by how often the code occurs at a place, over an even "
        f"spread of its patches ({PRIOR} are added to both, so that rare codes stay pale). Below it "
        "stand the bits by which its places differ from those of all patches, and in brackets the same after "
        "the shifts."
    )
    return (
        html.paragraph(words)
        + html.paragraph(maps)
        + "".join(_row_html(row) for row in _place_rows(examined))
    )

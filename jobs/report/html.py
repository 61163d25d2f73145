"""HTML of the reports: text, tables, charts and inlined pictures, self-contained, for light and dark screens.

Everything here turns plain values into strings; nothing reads a file or knows a model.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from PIL import Image

Points = Sequence[tuple[float, float]]


def escape(text: object) -> str:
    """Text as HTML."""
    return html.escape(str(text), quote=True)


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text; `kind` is a class of the style sheet."""
    return f'<p class="{kind}">{escape(text)}</p>'


def page(title: str, lead: str, sections: Mapping[str, str], *, mark: str) -> bytes:
    """The whole document, from HTML by title of its section; `mark`, in the second line, names the writer."""
    parts = [f"<section><h2>{escape(name)}</h2>\n{body}\n</section>\n" for name, body in sections.items()]
    return (
        f'<!doctype html>\n{mark}\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head>\n<body><main>"
        f"<header><h1>{escape(title)}</h1><p>{escape(lead)}</p></header>\n"
        f"{''.join(parts)}</main></body></html>\n"
    ).encode()


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A plain table; a cell of the first column that repeats the one above is left empty."""
    lines, last = ["<tr>" + "".join(f"<th>{escape(column)}</th>" for column in columns) + "</tr>"], ""
    for first, *cells in rows:
        opening = "<tr><td>" if first == last else f'<tr class="first"><td>{escape(first)}'
        lines.append(opening + "".join(f"</td><td>{escape(cell)}" for cell in cells) + "</td></tr>")
        last = first
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def details(title: str, body: str) -> str:
    """A part that opens on a click."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def grid(cells: Sequence[str], *, min_width: int) -> str:
    """Cells beside each other as far as the page is wide."""
    return f'<div class="grid" style="--cell:{min_width}px">{"".join(cells)}</div>'


def image(pixels: np.ndarray, alt: str, *, width: int, photo: bool = True) -> str:
    """Pixels uint8 [H, W, 3] as an inlined picture: JPEG for photos, else PNG with hard pixel edges."""
    buffer = io.BytesIO()
    if photo:
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90, subsampling="4:4:4")
    else:
        Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    source = f"data:image/{'jpeg' if photo else 'png'};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f'<img class="{"" if photo else "hard"}" src="{source}" alt="{escape(alt)}" width="{width}">'


# ------------------------------------------------------------------------------------------------ charts

_WIDTH, _HEIGHT = 420, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 10, 30
_BINS = 200
"""Points of a line at most; those of a longer one are means of neighbours, which also smooths it."""


def line_chart(title: str, lines: Mapping[str, Points], *, x_label: str) -> str:
    """A titled chart of lines by name, with their last values; empty where no point is finite."""
    finite = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in lines.items()}
    everything = [point for points in finite.values() for point in points]
    if not everything:
        return ""
    xs, ys = zip(*everything, strict=True)
    left, right, (low, high) = min(xs), max(xs), _padded(min(ys), max(ys))

    def across(x: float) -> float:
        return _LEFT + (x - left) / (right - left or 1.0) * (_WIDTH - _LEFT - _RIGHT)

    def down(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - low) / (high - low) * (_HEIGHT - _BOTTOM - _TOP)

    parts, legend = [_text(_WIDTH - _RIGHT, _HEIGHT - 2, x_label, "end")], []
    parts += [_text(across(x), _HEIGHT - 16, _figure(x), "middle") for x in _ticks(left, right, 5)]
    for y in _ticks(low, high, 5):
        parts.append(f'<path d="M{_LEFT} {down(y):.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(_text(_LEFT - 6, down(y) + 4, _figure(y), "end"))
    for number, (name, points) in enumerate(finite.items()):
        if points:
            color = f"var(--series-{number % 2})"
            # The last point once more: a line of one point is a dot.
            path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in [*_binned(points), points[-1]])
            parts.append(f'<polyline points="{path}" stroke="{color}"/>')
            key = f'<i style="--c:{color}"></i>{escape(name)}'
            legend.append(f"<span>{key} <b>{_figure(points[-1][1])}</b></span>")
    return (
        f'<figure class="chart"><h3>{escape(title)}</h3><div class="legend">{"".join(legend)}</div>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}">{"".join(parts)}</svg></figure>'
    )


def _text(x: float, y: float, content: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round values inside [low, high], about `count` of them."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _padded(low: float, high: float) -> tuple[float, float]:
    """The range with 5 % of air, reaching down to 0 where the values start near it anyway."""
    span = (high - low) or abs(high) or 1.0
    return 0.0 if 0 <= low < 0.35 * high else low - 0.05 * span, high + 0.05 * span


def _binned(points: Points) -> Points:
    """Means of neighbouring points, at most `_BINS` of them."""
    bins = np.array_split(np.array(points), min(_BINS, len(points)))
    return [(float(x), float(y)) for x, y in (part.mean(axis=0) for part in bins)]


def _figure(value: float) -> str:
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


_CSS = """
:root{color-scheme:light dark;--paper:#fcfcfb;--card:#ffffff;--ink:#1c1b1a;--muted:#6b6963;--rule:#e3e1da;
--series-0:#2a6fc9;--series-1:#d9622b}
@media (prefers-color-scheme:dark){:root{--paper:#161615;--card:#1e1e1c;--ink:#ecebe6;--muted:#a09d94;
--rule:#35342f;--series-0:#5b9bea;--series-1:#ee8450}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:32px 24px 64px}
header{border-bottom:2px solid var(--ink);margin-bottom:8px}
h1{font-size:28px;line-height:1.2;margin:0 0 6px}
h2{font-size:19px;margin:36px 0 8px}
h3{font-size:14px;margin:0 0 2px}
p{margin:6px 0 12px;max-width:76ch}
.muted,figcaption,th{color:var(--muted)}
.verdict{border-left:3px solid var(--series-0);padding:4px 0 4px 12px;font-weight:600}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}
td,th{padding:5px 14px 5px 0;text-align:left;vertical-align:top;font-weight:400}
.first td{border-top:1px solid var(--rule)}
td:nth-child(3){font-weight:600}
td:nth-child(4){color:var(--muted)}
.grid{display:grid;gap:16px;grid-template-columns:repeat(auto-fill,minmax(min(100%,var(--cell)),1fr))}
figure{margin:0}
.chart{background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:12px 14px 8px}
.legend{display:flex;gap:14px;font-size:12.5px;color:var(--muted)}
.legend b{color:var(--ink)}
i{display:inline-block;width:12px;height:12px;margin:0 5px 0 0;vertical-align:-1px;background:var(--c)}
svg{display:block;width:100%;height:auto}
svg text{font-size:11px;fill:var(--muted)}
path{stroke:var(--rule)}
polyline{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
img{display:block;max-width:100%;height:auto;border-radius:3px}
.hard{image-rendering:pixelated}
.code{display:grid;grid-template-columns:200px 1fr;gap:12px;margin:18px 0}
.code span{display:block;font-size:12.5px;color:var(--muted)}
.row{display:grid;grid-template-columns:repeat(var(--columns),minmax(0,1fr));gap:8px;margin:0 0 8px}
.row img{width:100%}
.tiles{display:flex;flex-wrap:wrap;gap:4px}
.tiles figcaption{font-size:11.5px}
.heads{font-size:12.5px;color:var(--muted);margin-bottom:4px}
details{margin:10px 0}
summary{cursor:pointer;color:var(--muted)}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:12.5px}
@media (max-width:640px){.code{grid-template-columns:1fr}}
@media print{section{break-inside:avoid}}
"""

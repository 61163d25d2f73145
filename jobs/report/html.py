"""The look of the report: HTML, SVG charts and inlined pictures, self-contained, for light and dark screens.

Everything here turns plain values into strings; nothing reads a file or knows a model.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

MARK = "<!-- written by jobs.write_report -->"
"""Second line of every report, by which a later run knows a file that it may replace."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One line of a chart. `color` numbers the palette.

    `marked` draws the points and a dashed line; `noisy` puts the running mean on top of a long line.
    """

    label: str
    points: Sequence[tuple[float, float]]
    color: int = 0
    marked: bool = False
    noisy: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A measured share with its confidence interval."""

    label: str
    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A titled part of the page; `body` is HTML."""

    title: str
    body: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TableRow:
    """One line of the summary; `note` qualifies the value, or says why there is none."""

    group: str
    name: str
    value: str
    note: str = ""


def escape(text: object) -> str:
    """Text as HTML."""
    return html.escape(str(text), quote=True)


def paragraph(text: str, *, muted: bool = False) -> str:
    """A paragraph of plain text."""
    return f'<p class="muted">{escape(text)}</p>' if muted else f"<p>{escape(text)}</p>"


def page(title: str, lead: str, sections: Sequence[Section], *, mark: str = MARK) -> str:
    """The whole document; `mark`, a comment, says who wrote it."""
    parts = [f"<section><h2>{escape(section.title)}</h2>\n{section.body}\n</section>" for section in sections]
    return (
        f'<!doctype html>\n{mark}\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head>\n<body><main>"
        f"<header><h1>{escape(title)}</h1><p>{escape(lead)}</p></header>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def summary(rows: Sequence[TableRow]) -> str:
    """The summary table, one block per group."""
    lines = ['<div class="scroll"><table class="summary">']
    group = ""
    for row in rows:
        head = f'<th class="group">{escape(row.group)}</th>' if row.group != group else "<th></th>"
        opening = ' class="first"' if row.group != group else ""
        group = row.group
        cells = f'<td>{escape(row.name)}</td><td class="value">{escape(row.value)}</td>'
        lines.append(f'<tr{opening}>{head}{cells}<td class="muted">{escape(row.note)}</td></tr>')
    return "\n".join([*lines, "</table></div>"])


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table; columns after the first are figures and stand right."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    head, body = f"<thead><tr>{head}</tr></thead>", f"<tbody>{body}</tbody>"
    return f'<div class="scroll"><table class="plain">{head}{body}</table></div>'


def details(title: str, body: str) -> str:
    """A part that opens on a click."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def grid(cells: Sequence[str], *, min_width: int) -> str:
    """Cells beside each other as far as the page is wide."""
    return f'<div class="grid" style="--cell:{min_width}px">' + "".join(cells) + "</div>"


def image(pixels: np.ndarray, alt: str, *, width: int, photo: bool = True) -> str:
    """Pixels uint8 [H, W, 3] as an inlined picture: JPEG for photos, else PNG with hard pixel edges."""
    buffer = io.BytesIO()
    if photo:
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90, subsampling="4:4:4")
    else:
        Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    kind = "jpeg" if photo else "png"
    style = "" if photo else ' class="hard"'
    return f'<img{style} src="data:image/{kind};base64,{data}" alt="{escape(alt)}" width="{width}">'


def figure(content: str, caption: str) -> str:
    """Content with a caption below."""
    return f"<figure>{content}<figcaption>{escape(caption)}</figcaption></figure>"


# ------------------------------------------------------------------------------------------------ charts

_WIDTH, _HEIGHT = 420, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 10, 30


def line_chart(title: str, series: Sequence[Series], *, x_label: str) -> str:
    """A titled chart with a legend that gives the last values."""
    finite = [
        (one, points) for one in series if (points := [(x, y) for x, y in one.points if math.isfinite(y)])
    ]
    if not finite:
        return ""
    xs = [x for _, points in finite for x, _ in points]
    ys = [y for _, points in finite for _, y in points]
    x_axis = _Axis(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT)
    y_axis = _Axis(*_padded(min(ys), max(ys)), _HEIGHT - _BOTTOM, _TOP)
    parts = _frame(x_axis, y_axis, x_label)
    legend = []
    for one, points in finite:
        color = f"var(--series-{one.color % 4})"
        if one.marked:
            parts.append(_polyline(x_axis, y_axis, points, color, "1.5", dash="4 3"))
            for x, y in _thinned(points, 60):
                tip = f"{one.label}, {x_label} {x:g}: {_figure(y)}"
                place = f'cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}" r="3" fill="{color}"'
                parts.append(f"<circle {place}>{_tip(tip)}</circle>")
        elif one.noisy and len(points) > 40:
            parts.append(_polyline(x_axis, y_axis, _thinned(points, 400), color, "1", opacity="0.3"))
            parts.append(_polyline(x_axis, y_axis, _running_mean(points, 80), color, "2"))
        else:
            parts.append(_polyline(x_axis, y_axis, _thinned(points, 400), color, "2"))
        shape = "dots" if one.marked else "line"
        legend.append(
            f'<span><i class="{shape}" style="--c:{color}"></i>{escape(one.label)} '
            f"<b>{_figure(points[-1][1])}</b></span>"
        )
    return (
        f'<figure class="chart"><h3>{escape(title)}</h3><div class="legend">{"".join(legend)}</div>'
        f"{_svg(parts, title)}</figure>"
    )


def interval_chart(rows: Sequence[Interval], *, reference: tuple[str, float]) -> str:
    """Horizontal bars of shares in [0, 1] with whiskers for their intervals; the first stands out.

    `reference` is a named share to compare with, drawn as a line.
    """
    width, left, right, pitch = 720, 180, 70, 26
    foot = pitch * len(rows) + 8
    name, share = reference
    top = max([*(row.high for row in rows), share])
    axis = _Axis(0, min(1.0, top * 1.12), left, width - right)
    parts = []
    for tick in _ticks(axis.low, axis.high, 5):
        parts += [
            _line("gridline", axis(tick), 4, axis(tick), foot),
            _text(axis(tick), foot + 16, _percent(tick)),
        ]
    for number, row in enumerate(rows):
        y = 10 + pitch * number
        color = f"var(--series-{0 if number == 0 else 3})"
        low, high = axis(row.low), axis(row.high)
        tip = f"{row.label}: {100 * row.value:.1f} % [{100 * row.low:.1f}, {100 * row.high:.1f}]"
        parts += [
            _text(left - 10, y + 13, row.label, anchor="end", ink=True),
            f'<rect x="{left}" y="{y}" width="{axis(row.value) - left:.1f}" height="18" fill="{color}">'
            f"{_tip(tip)}</rect>",
            _line("whisker", low, y + 9, high, y + 9),
            _line("whisker", low, y + 5, low, y + 13),
            _line("whisker", high, y + 5, high, y + 13),
            _text(high + 8, y + 13, f"{100 * row.value:.1f} %", anchor="start", ink=True),
        ]
    parts += [_line("reference", axis(share), 4, axis(share), foot), _text(axis(share), foot + 30, name)]
    return _svg(parts, "linear probe accuracies", width=width, height=foot + 34)


def rank_chart(counts: Sequence[int]) -> str:
    """Share of patches per code, most used first, on a logarithmic scale, with the level of even use."""
    ordered = sorted((count for count in counts if count > 0), reverse=True)
    if not ordered:
        return ""
    total, even = sum(ordered), 1 / len(counts)
    width, height = 900, 230
    left, right, foot = _LEFT + 14, width - _RIGHT, height - 40
    lowest = math.floor(math.log10(min(ordered[-1] / total, even)))
    highest = math.ceil(math.log10(max(ordered[0] / total, even)))
    x_axis = _Axis(0, len(counts), left, right)
    y_axis = _Axis(lowest, max(highest, lowest + 1), foot, _TOP)
    parts = []
    for power in range(lowest, highest + 1):
        y = y_axis(power)
        parts += [
            _line("gridline", left, y, right, y),
            _text(left - 6, y + 4, _percent(10.0**power), anchor="end"),
        ]
    parts += [_text(x_axis(tick), foot + 16, f"{tick:g}") for tick in _ticks(0, len(counts), 8)]
    # At most one bar per pixel: beyond that a bar stands for the mean of neighbours in rank.
    step = max(1, math.ceil(len(ordered) / (right - left)))
    path = [f"M{x_axis(0):.1f} {foot}"]
    for start in range(0, len(ordered), step):
        chunk = ordered[start : start + step]
        y = y_axis(math.log10(sum(chunk) / len(chunk) / total))
        path.append(f"V{y:.1f}H{x_axis(start + len(chunk)):.1f}")
    parts.append(f'<path d="{"".join(path)}V{foot}Z" fill="var(--series-0)" opacity="0.85"/>')
    level = y_axis(math.log10(even))
    parts += [
        _line("reference", left, level, right, level),
        _text(right, level - 5, "even use", anchor="end"),
        _text(right, foot + 32, "codes, most used first", anchor="end"),
    ]
    return _svg(parts, "codebook usage", width=width, height=height)


@dataclass(frozen=True, slots=True)
class _Axis:
    """Linear map from [low, high] to pixels [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low or 1.0
        return self.start + (value - self.low) / span * (self.end - self.start)


def _frame(x_axis: _Axis, y_axis: _Axis, x_label: str) -> list[str]:
    right = _WIDTH - _RIGHT
    parts = []
    for tick in _ticks(y_axis.low, y_axis.high, 5):
        y = y_axis(tick)
        parts += [_line("gridline", _LEFT, y, right, y), _text(_LEFT - 6, y + 4, _figure(tick), anchor="end")]
    parts += [_text(x_axis(x), _HEIGHT - 16, _figure(x)) for x in _ticks(x_axis.low, x_axis.high, 5)]
    return [*parts, _text(right, _HEIGHT - 2, x_label, anchor="end")]


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, content: str, *, anchor: str = "middle", ink: bool = False) -> str:
    style = ' class="ink"' if ink else ""
    return f'<text{style} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'


def _tip(content: str) -> str:
    return f"<title>{escape(content)}</title>"


def _polyline(
    x_axis: _Axis,
    y_axis: _Axis,
    points: Sequence[tuple[float, float]],
    color: str,
    width: str,
    *,
    dash: str = "none",
    opacity: str = "1",
) -> str:
    path = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in points)
    return (
        f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}" '
        f'stroke-dasharray="{dash}" opacity="{opacity}" stroke-linejoin="round"/>'
    )


def _svg(parts: Sequence[str], label: str, *, width: int = _WIDTH, height: int = _HEIGHT) -> str:
    opening = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}"'
    return f'{opening} style="max-width:{1.25 * width:.0f}px">{"".join(parts)}</svg>'


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round values inside [low, high], about `count` of them."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _padded(low: float, high: float) -> tuple[float, float]:
    """The range with 5 % of air, reaching down to 0 where the values start near it anyway."""
    span = (high - low) or abs(high) or 1.0
    start = 0.0 if 0 <= low < 0.35 * high else low - 0.05 * span
    return start, high + 0.05 * span


def _thinned(points: Sequence[tuple[float, float]], count: int) -> Sequence[tuple[float, float]]:
    step = max(1, math.ceil(len(points) / count))
    return [*points[:-1:step], points[-1]]


def _running_mean(points: Sequence[tuple[float, float]], count: int) -> list[tuple[float, float]]:
    """Mean over a centred window of a `count`-th part of the curve, so that its ends are not dragged."""
    values = np.array([y for _, y in points])
    half = max(2, len(points) // count)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    middle = np.arange(len(points))
    reach = np.minimum(half, np.minimum(middle, len(points) - 1 - middle))
    means = (sums[middle + reach + 1] - sums[middle - reach]) / (2 * reach + 1)
    smooth = [(x, float(mean)) for (x, _), mean in zip(points, means, strict=True)]
    return list(_thinned(smooth, 4 * count))


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def _figure(value: float) -> str:
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


_CSS = """
:root{color-scheme:light dark;--paper:#fcfcfb;--card:#ffffff;--ink:#1c1b1a;--muted:#6b6963;--rule:#e3e1da;
--series-0:#2a6fc9;--series-1:#d9622b;--series-2:#1f9d78;--series-3:#a3a097}
@media (prefers-color-scheme:dark){:root{--paper:#161615;--card:#1e1e1c;--ink:#ecebe6;--muted:#a09d94;
--rule:#35342f;--series-0:#5b9bea;--series-1:#ee8450;--series-2:#3fbf98;--series-3:#75726a}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:32px 24px 64px}
header{border-bottom:2px solid var(--ink);margin-bottom:8px}
h1{font-size:28px;line-height:1.2;margin:0 0 6px;letter-spacing:-.01em}
h2{font-size:19px;margin:36px 0 8px}
h3{font-size:14px;margin:0 0 2px}
p{margin:6px 0 12px;max-width:76ch}
.muted,figcaption{color:var(--muted)}
.verdict{border-left:3px solid var(--series-0);padding:4px 0 4px 12px;font-weight:600}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}
td,th{padding:5px 14px 5px 0;text-align:left;vertical-align:top;font-weight:400}
.summary .first td,.summary .first th{border-top:1px solid var(--rule)}
.summary .group{font-weight:600;white-space:nowrap}
.summary .value{font-weight:600;white-space:nowrap}
.plain th{color:var(--muted);font-size:13px;border-bottom:1px solid var(--rule)}
.plain td{border-bottom:1px solid var(--rule)}
.plain td:not(:first-child),.plain th:not(:first-child){text-align:right}
.plain td:last-child,.plain th:last-child{padding-right:0}
.grid{display:grid;gap:16px;grid-template-columns:repeat(auto-fill,minmax(min(100%,var(--cell)),1fr))}
figure{margin:0}
.chart{background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:12px 14px 8px}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:12.5px;color:var(--muted);margin-bottom:4px}
.legend b{color:var(--ink);font-weight:600}
.legend i{display:inline-block;width:14px;margin-right:5px;vertical-align:middle}
.legend .line{border-top:2.5px solid var(--c)}
.legend .dots{height:7px;width:7px;border-radius:50%;background:var(--c)}
svg{display:block;width:100%;height:auto}
svg text{font-size:11px;fill:var(--muted)}
svg text.ink{fill:var(--ink);font-size:13px}
.gridline{stroke:var(--rule)}
.reference{stroke:var(--ink);stroke-dasharray:3 3;opacity:.6}
.whisker{stroke:var(--ink);stroke-width:1.5;fill:none}
img{display:block;max-width:100%;height:auto;border-radius:3px}
.hard{image-rendering:pixelated}
.code{display:grid;grid-template-columns:var(--label,132px) 1fr;gap:12px;align-items:center;margin:6px 0}
.code b{display:block}
.code span{font-size:12.5px;color:var(--muted)}
.row{display:grid;grid-template-columns:repeat(var(--columns),minmax(0,1fr));gap:8px;margin:0 0 8px}
.tiles{display:flex;gap:4px}
.tiles img{min-width:0;flex:0 1 auto}
.row img{width:100%}
.heads{font-size:12.5px;color:var(--muted);margin-bottom:4px}
.key i{display:inline-block;width:11px;height:11px;border-radius:2px;margin:0 5px 0 12px;
vertical-align:-1px;background:var(--c)}
details{margin:10px 0}
summary{cursor:pointer;color:var(--muted)}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:12.5px;background:var(--card);
border:1px solid var(--rule);border-radius:6px;padding:10px 12px}
@media (max-width:640px){
.summary tr{display:grid;grid-template-columns:1fr auto;padding:4px 0}
.summary .group,.summary td.muted{grid-column:1/-1}
.summary th:empty,.summary td:empty{display:none}
.summary td,.summary th{padding-top:1px;padding-bottom:1px}
.summary tr.first{border-top:1px solid var(--rule)}
.summary .first td,.summary .first th{border-top:0}
.summary .value{white-space:normal;text-align:right;padding-right:0}
.code{grid-template-columns:1fr}
.tiles{flex-wrap:wrap}
.tiles img{width:calc((100% - 20px)/6)}
}
@media print{section{break-inside:avoid}}
"""

"""Charts draw the numbers they are given, and nothing that comes from outside becomes markup."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from jobs.report import html


class _Balanced(HTMLParser):
    """Fails on a closing tag that does not match; collects tag names."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()


def _tags(text: str) -> list[str]:
    parser = _Balanced()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser.seen


def _coordinates(svg: str) -> np.ndarray:
    """Points [n, 2] of the only line, without the last one, which stands twice."""
    [points] = re.findall(r'<polyline points="([^"]*)"', svg)
    return np.array([pair.split(",") for pair in points.split()], float)[:-1]


def _chart(points: list[tuple[float, float]], title: str = "loss") -> str:
    return html.line_chart(title, {"a": points}, x_label="step")


def test_text_from_outside_stays_text():
    evil = '<script>alert("x")</script>'
    sections = {
        evil: html.paragraph(evil) + html.details(evil, "") + html.table([evil], [[evil, evil]]),
        "chart": html.line_chart(evil, {evil: [(0, 1), (1, 2)]}, x_label=evil),
        "image": html.image(np.zeros((2, 2, 3), np.uint8), evil, width=2),
    }
    tags = _tags(html.page(evil, evil, sections, mark="<!-- mark -->").decode())
    assert "script" not in tags and tags.count("h2") == 3


def test_a_line_goes_through_its_points_in_proportion():
    svg = _chart([(0.0, 5.0), (10.0, 1.0), (40.0, 3.0)])
    _tags(svg)
    xs, ys = _coordinates(svg).T
    assert np.interp(10, [0, 40], [xs[0], xs[2]]) == pytest.approx(xs[1], abs=0.1)
    assert np.interp(3, [1, 5], [ys[1], ys[0]]) == pytest.approx(ys[2], abs=0.1)
    assert ys[0] < ys[2] < ys[1], "larger values stand higher"


def test_points_that_are_no_numbers_are_left_out_and_empty_charts_are_nothing():
    points = [(0.0, 1.0), (1.0, float("nan")), (2.0, float("inf")), (3.0, 2.0)]
    svg = _chart(points)
    assert len(_coordinates(svg)) == 2 and "nan" not in svg and "inf" not in svg
    assert _chart(points[1:3]) == "" == html.line_chart("loss", {}, x_label="step")


def test_one_point_and_constant_values_can_be_drawn():
    assert len(_coordinates(_chart([(3.0, 0.0)]))) == 1
    assert len(_coordinates(_chart([(0.0, 2.0), (1.0, 2.0)]))) == 2


@pytest.mark.parametrize("length", [41, 201, 5000])
def test_long_lines_are_means_of_neighbours(length: int):
    values = np.random.default_rng(0).normal(size=length)
    binned = html._binned([(float(i), float(value)) for i, value in enumerate(values)])
    assert len(binned) == min(length, html._BINS)
    ends = np.cumsum([len(part) for part in np.array_split(values, len(binned))])
    for (x, y), end in zip(binned, ends, strict=True):
        start = 0 if end == ends[0] else int(ends[ends < end].max())
        assert y == pytest.approx(values[start:end].mean()) and x == pytest.approx((start + end - 1) / 2)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 7.5), (0.0011, 0.0013), (1e6, 5e6), (0, 0.04)])
def test_ticks_are_round_and_inside(low: float, high: float):
    ticks = html._ticks(low, high, 5)
    assert 2 <= len(ticks) <= 8
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    steps = np.diff(ticks)
    assert np.allclose(steps, steps[0])
    mantissa = steps[0] / 10 ** np.floor(np.log10(steps[0]) + 1e-9)
    assert min(abs(mantissa - round_) for round_ in (1, 2, 2.5, 5, 10)) < 1e-6


def test_pictures_are_inlined_and_exact_where_they_should_be():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    [data] = re.findall(
        r'src="data:image/png;base64,([^"]+)"', html.image(pixels, "noise", width=14, photo=False)
    )
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), pixels)

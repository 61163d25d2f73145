"""Charts draw the numbers they are given, and nothing that comes from outside becomes markup."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from jobs.report import html as page


class _Balanced(HTMLParser):
    """Fails on a closing tag that does not match; collects tag names."""

    VOID = frozenset({"meta", "img", "line", "circle", "rect", "polyline", "path", "i"})

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


def _tags(html: str) -> list[str]:
    parser = _Balanced()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser.seen


def _coordinates(svg: str) -> list[tuple[float, float]]:
    [found] = re.findall(r'<polyline points="([^"]*)"', svg)
    return [tuple(map(float, pair.split(","))) for pair in found.split()]  # type: ignore[misc]


def test_text_from_outside_stays_text():
    evil = '<script>alert("x")</script>'
    html = page.page(
        evil,
        evil,
        [
            page.Section(title=evil, body=page.paragraph(evil)),
            page.Section(
                title="t", body=page.summary([page.TableRow(group=evil, name=evil, value=evil, note=evil)])
            ),
            page.Section(title="t", body=page.details(evil, "") + page.table([evil], [[evil]])),
            page.Section(
                title="t",
                body=page.line_chart(
                    evil, [page.Series(label=evil, points=[(0, 1), (1, 2)], marked=True)], x_label=evil
                ),
            ),
            page.Section(title="t", body=page.image(np.zeros((2, 2, 3), np.uint8), evil, width=2)),
        ],
    )
    assert "script" not in _tags(html)


def test_a_line_goes_through_its_points_in_proportion():
    points = [(0.0, 5.0), (10.0, 1.0), (40.0, 3.0)]
    svg = page.line_chart("loss", [page.Series(label="a", points=points)], x_label="step")
    _tags(svg)
    xs, ys = np.array(_coordinates(svg)).T
    assert np.interp(10, [0, 40], [xs[0], xs[2]]) == pytest.approx(xs[1], abs=0.1)
    assert np.interp(3, [1, 5], [ys[1], ys[0]]) == pytest.approx(ys[2], abs=0.1)
    assert ys[0] < ys[2] < ys[1], "larger values stand higher"


def test_points_that_are_no_numbers_are_left_out_and_empty_charts_are_nothing():
    points = [(0.0, 1.0), (1.0, float("nan")), (2.0, float("inf")), (3.0, 2.0)]
    svg = page.line_chart("loss", [page.Series(label="a", points=points)], x_label="step")
    assert len(_coordinates(svg)) == 2 and "nan" not in svg and "inf" not in svg
    assert page.line_chart("loss", [page.Series(label="a", points=points[1:3])], x_label="step") == ""
    assert page.line_chart("loss", [], x_label="step") == ""


def test_one_point_and_constant_values_can_be_drawn():
    for points in ([(3.0, 0.0)], [(0.0, 2.0), (1.0, 2.0)]):
        _tags(page.line_chart("x", [page.Series(label="a", points=points, marked=True)], x_label="step"))


@pytest.mark.parametrize("length", [41, 77, 400, 5000])
def test_running_mean_is_the_mean_of_a_centred_window(length: int):
    values = np.random.default_rng(0).normal(size=length)
    points = [(float(i), float(v)) for i, v in enumerate(values)]
    half = max(2, length // 80)
    for x, smooth in page._running_mean(points, 80):
        reach = min(half, int(x), length - 1 - int(x))
        slow = values[int(x) - reach : int(x) + reach + 1].mean()
        assert smooth == pytest.approx(slow)


def test_thinning_keeps_both_ends():
    points = [(float(i), 0.0) for i in range(1001)]
    thin = page._thinned(points, 100)
    assert thin[0] == points[0] and thin[-1] == points[-1] and len(thin) <= 102


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 7.5), (0.0011, 0.0013), (1e6, 5e6), (0, 0.04)])
def test_ticks_are_round_and_inside(low: float, high: float):
    ticks = page._ticks(low, high, 5)
    assert 2 <= len(ticks) <= 8
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    steps = np.diff(ticks)
    assert np.allclose(steps, steps[0])
    mantissa = steps[0] / 10 ** np.floor(np.log10(steps[0]) + 1e-9)
    assert min(abs(mantissa - round_) for round_ in (1, 2, 2.5, 5, 10)) < 1e-6


def test_bars_are_as_long_as_their_shares():
    rows = [
        page.Interval(label=f"m{i}", value=v, low=v - 0.05, high=v + 0.05) for i, v in enumerate((0.6, 0.3))
    ]
    svg = page.interval_chart(rows, reference=("chance", 0.1))
    _tags(svg)
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', svg)]
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.01)
    assert "m0: 60.0 % [55.0, 65.0]" in svg and "chance" in svg


@pytest.mark.parametrize("size", [2, 256, 8192])
def test_rank_chart_falls_from_the_most_used_code(size: int):
    counts = np.random.default_rng(0).zipf(1.5, size).clip(max=10**6)
    counts[: size // 4] = 0
    svg = page.rank_chart(counts.tolist())
    _tags(svg)
    heights = [float(y) for y in re.findall(r"V([\d.]+)H", svg)]
    assert heights == sorted(heights) and len(heights) <= 900
    assert page.rank_chart([0, 0]) == ""


def test_pictures_are_inlined_and_exact_where_they_should_be():
    import base64
    import io

    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    html = page.image(pixels, "noise", width=14, photo=False)
    data = base64.b64decode(re.findall(r'src="data:image/png;base64,([^"]+)"', html)[0])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)

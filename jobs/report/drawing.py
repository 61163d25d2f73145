"""Procedural pictures with labels and label maps: a textured object among distractors on a busy ground.

A class is a shape together with a texture. Place, size, rotation, colours, contrast sign, background and
light are random, so that no pixel's mean tells the class and a classifier has to see structure.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

SHAPES = ("star", "ring", "cross", "crescent", "heart", "gear")
TEXTURES = ("striped", "dotted", "checked", "speckled", "wavy", "bricked")
GROUNDS = ("gradient", "clouds", "contours", "facets", "bokeh", "weave")
MAX_CLASSES = len(SHAPES) * len(TEXTURES)

DRAWING_VERSION = 1
"""Goes up when the same arguments give another picture."""

Array = np.ndarray
Field = Callable[[Array, Array], Array]


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """One picture: `pixels` uint8 [S, S, 3] and `label_map` uint8 [S, S] (see `label_names`)."""

    pixels: Array
    label_map: Array
    label: int


def class_names(num_classes: int) -> tuple[str, ...]:
    """Names "texture-shape" in alphabetical order, which is the order an image folder gives its labels.

    Taken along diagonals of the shape × texture table: with 12 classes each shape wears two textures and each
    texture covers two shapes, so neither alone decides the class.
    """
    pairs = [
        (shape, TEXTURES[(row + diagonal) % len(TEXTURES)])
        for diagonal in range(len(TEXTURES))
        for row, shape in enumerate(SHAPES)
    ]
    return tuple(sorted(f"{texture}-{shape}" for shape, texture in pairs[:num_classes]))


def label_names(num_classes: int) -> tuple[str, ...]:
    """Meaning of a label map's values: 0 background, 1 + label the object, last the distractors."""
    return ("background", *class_names(num_classes), "distractor")


def draw(index: int, *, num_classes: int, image_size: int, seed: int) -> Drawing:
    """The picture of one index: a pure function of its arguments; its label is `index % num_classes`."""
    rng = np.random.Generator(np.random.Philox(key=[seed, index]))
    label = index % num_classes
    texture, shape = class_names(num_classes)[label].split("-")
    size = image_size
    y, x = np.meshgrid(*(2 * [np.arange(size, dtype=np.float32) + 0.5]), indexing="ij")

    # The sign of the contrast is a coin toss: otherwise "brighter in the middle" would tell shapes apart.
    dark_ground = rng.random() < 0.5
    ground_light = rng.uniform(0.24, 0.46) if dark_ground else rng.uniform(0.70, 0.90)
    hue = rng.uniform(0, 360)
    pixels = _ground(rng, x, y, size, ground_light, hue)
    label_map = np.zeros((size, size), np.uint8)

    for _ in range(rng.integers(2, 6)):
        alpha = _distractor(rng, x, y, size)
        color = _oklch(rng.uniform(0.25, 0.92), rng.uniform(0.03, 0.16), rng.uniform(0, 360))
        pixels = _over(pixels, alpha, color)
        label_map[alpha > 0.5] = num_classes + 1

    radius = size * rng.uniform(0.25, 0.42)
    distance = _placed(rng, _SHAPE_FIELDS[shape], size, radius)
    edge = distance(x, y)
    alpha = np.clip(0.5 - edge, 0, 1)
    if rng.random() < 0.6:
        angle, reach = rng.uniform(0, 2 * math.pi), radius * rng.uniform(0.08, 0.2)
        fall = distance(x - reach * math.cos(angle), y - reach * math.sin(angle))
        pixels *= 1 - rng.uniform(0.25, 0.5) * np.clip(0.5 - fall / (0.16 * radius), 0, 1)
    pixels = _over(
        pixels, alpha, _surface(rng, x, y, edge, texture=texture, dark_ground=dark_ground, hue=hue)
    )
    label_map[alpha > 0.5] = label + 1

    pixels = _lit(rng, pixels, x, y, size)
    rgb = np.ascontiguousarray((pixels * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0))
    return Drawing(pixels=rgb, label_map=label_map, label=label)


def label_palette(num_classes: int) -> list[int]:
    """Flat RGB palette for the label maps, so that any viewer shows them in colours."""
    hues = [_oklch(0.72, 0.15, 360 * i / num_classes) for i in range(num_classes)]
    colors = [_oklch(0.22, 0.0, 0), *hues, _oklch(0.55, 0.0, 0)]
    return [int(channel * 255 + 0.5) for color in colors for channel in color.ravel()]


# ------------------------------------------------------------------------------------------------ shapes
# Signed distance, negative inside, for an object of radius about 1 around the origin. Exact only near the
# outline, which is all that antialiasing needs.


def _star(x: Array, y: Array) -> Array:
    """Five points: the plane is folded into one half-sector, where the outline is a single segment."""
    sector = 2 * math.pi / 5
    angle = np.abs(np.mod(np.arctan2(y, x) + sector / 2, sector) - sector / 2)
    r = np.hypot(x, y)
    inner_x, inner_y = 0.46 * math.cos(sector / 2), 0.46 * math.sin(sector / 2)
    length = math.hypot(1 - inner_x, inner_y)
    return ((r * np.cos(angle) - 1) * inner_y + r * np.sin(angle) * (1 - inner_x)) / length


def _ring(x: Array, y: Array) -> Array:
    return np.abs(np.hypot(x, y) - 0.7) - 0.26


def _cross(x: Array, y: Array) -> Array:
    far, near = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
    return np.maximum(far - 0.95, near - 0.34)


def _crescent(x: Array, y: Array) -> Array:
    return np.maximum(np.hypot(x, y) - 1, 0.78 - np.hypot(x - 0.48, y))


def _heart(x: Array, y: Array) -> Array:
    """A square standing on its corner with a disc on each upper side."""
    half = 0.56
    u, v = (x + y) * math.sqrt(0.5), (x - y) * math.sqrt(0.5)
    square = np.maximum(np.abs(u), np.abs(v)) - half
    discs = np.minimum(np.hypot(u + half, v), np.hypot(u, v - half)) - half
    return np.minimum(square, discs)


def _gear(x: Array, y: Array) -> Array:
    r = np.hypot(x, y)
    teeth = 0.82 + 0.15 * np.tanh(4 * np.cos(8 * np.arctan2(y, x)))
    return np.maximum(0.6 * (r - teeth), 0.27 - r)


_SHAPE_FIELDS: dict[str, Field] = {
    "star": _star,
    "ring": _ring,
    "cross": _cross,
    "crescent": _crescent,
    "heart": _heart,
    "gear": _gear,
}


def _placed(rng: np.random.Generator, field: Field, size: int, radius: float) -> Field:
    """The shape's distance field in pixels, at a random place, rotation and slight stretch."""
    cx, cy = rng.uniform(0.85 * radius, size - 0.85 * radius, 2).tolist()
    angle, stretch = rng.uniform(0, 2 * math.pi), math.exp(rng.uniform(-0.16, 0.16))
    cos, sin = math.cos(angle) / radius, math.sin(angle) / radius

    def distance(x: Array, y: Array) -> Array:
        u, v = (x - cx) * cos + (y - cy) * sin, (y - cy) * cos - (x - cx) * sin
        return field(u * stretch, v / stretch) * radius

    return distance


# ------------------------------------------------------------------------------------------------ textures
# Weight of the second colour in [0, 1], in texture coordinates whose period is 1. `soft` is the period in
# pixels: edges are about one pixel wide.


def _sharpened(wave: Array, soft: float) -> Array:
    """A wave in [-1, 1] as a square wave in [0, 1] whose flanks are about one pixel wide."""
    return np.clip(0.5 + wave * soft / (2 * math.pi), 0, 1)


def _texture(rng: np.random.Generator, name: str, u: Array, v: Array, soft: float) -> Array:
    turn = 2 * math.pi
    match name:
        case "striped":
            return _sharpened(np.sin(turn * u) + rng.uniform(-0.35, 0.35), soft)
        case "dotted":
            row = np.floor(v * 1.15)
            du, dv = np.mod(u + 0.5 * np.mod(row, 2), 1) - 0.5, (v * 1.15 - row - 0.5) / 1.15
            return np.clip(0.5 + (rng.uniform(0.27, 0.36) - np.hypot(du, dv)) * soft, 0, 1)
        case "checked":
            return _sharpened(2 * np.sin(math.pi * u) * np.sin(math.pi * v), soft)
        case "speckled":
            return np.clip(0.5 + 1.6 * _noise(rng, u.shape[0], max(2.0, soft * 0.28)), 0, 1)
        case "wavy":
            zigzag = np.abs(np.mod(u * 0.8, 1) - 0.5) * 2.2
            return _sharpened(np.sin(turn * (v + zigzag)), soft)
        case "bricked":
            row = np.floor(v * 1.3)
            across = 0.5 - np.abs(np.mod(v * 1.3, 1) - 0.5)
            along = 0.5 - np.abs(np.mod(u * 0.62 + 0.5 * np.mod(row, 2), 1) - 0.5)
            return np.clip(0.5 + (np.minimum(across / 1.3, along / 0.62) - 0.1) * soft, 0, 1)
    raise ValueError(f"no texture {name!r}")


def _surface(
    rng: np.random.Generator, x: Array, y: Array, edge: Array, *, texture: str, dark_ground: bool, hue: float
) -> Array:
    """Textured colours of the object [3, S, S]: one stands off the ground, the other off the first."""
    size = x.shape[0]
    period = size / 128 * rng.uniform(8, 13)
    angle = rng.uniform(0, 2 * math.pi)
    cos, sin = math.cos(angle) / period, math.sin(angle) / period
    bend = _noise(rng, size, 0.4 * size) * (0.25 * period)
    u, v = (x + bend) * cos + (y - bend) * sin, (y - bend) * cos - (x + bend) * sin
    weight = _texture(rng, texture, u + rng.random(), v + rng.random(), period)

    main_hue = hue + rng.uniform(60, 300)
    lightness = rng.uniform(0.72, 0.92) if dark_ground else rng.uniform(0.28, 0.52)
    main = _oklch(lightness, rng.uniform(0.09, 0.19), main_hue)
    other_hue = main_hue + rng.normal(0, 50)
    step = rng.uniform(0.24, 0.42) * (-1 if dark_ground else 1)
    other = _oklch((0.82 if dark_ground else 0.4) + step, rng.uniform(0.03, 0.17), other_hue)
    if rng.random() < 0.5:
        main, other = other, main
    colors = main + weight * (other - main)
    # A darker rim keeps the outline visible where a texture colour happens to equal the ground.
    rim = rng.uniform(0.2, 0.6) * np.clip(1 + edge / (0.025 * size), 0, 1)
    return colors * (1 - rim)


# ------------------------------------------------------------------------------------------------ the rest


def _ground(rng: np.random.Generator, x: Array, y: Array, size: int, light: float, hue: float) -> Array:
    """Background [3, S, S]: one of `GROUNDS` between two related colours of about the given lightness."""
    spread = rng.uniform(0.07, 0.18)
    first = _oklch(light - spread, rng.uniform(0.02, 0.10), hue)
    second = _oklch(min(light + spread, 0.97), rng.uniform(0.02, 0.10), hue + rng.normal(0, 40))
    angle = rng.uniform(0, 2 * math.pi)
    u = (x * math.cos(angle) + y * math.sin(angle)) / size
    v = (y * math.cos(angle) - x * math.sin(angle)) / size
    match GROUNDS[rng.integers(len(GROUNDS))]:
        case "gradient":
            cx, cy = rng.uniform(0, size, 2).tolist()
            weight = np.hypot(x - cx, y - cy) / size if rng.random() < 0.5 else u - u.min()
        case "clouds":
            weight = 0.5 + 0.34 * sum(_noise(rng, size, size * s) * (3 * s + 0.2) for s in (0.3, 0.12, 0.05))
        case "contours":
            weight = np.floor(3 * _noise(rng, size, 0.28 * size) + 3.5) / 6
        case "facets":
            # The pixel's nearest site; |p|^2 is common to all sites and left out of the comparison.
            sites = rng.uniform(-0.05, 1.05, (rng.integers(14, 40), 2)).astype(np.float32) * size
            shades = rng.uniform(0, 1, len(sites)).astype(np.float32)
            pixel = np.stack([x.ravel(), y.ravel()], axis=1)
            nearest = np.argmin(np.square(sites).sum(axis=1) - 2 * pixel @ sites.T, axis=1)
            weight = shades[nearest].reshape(size, size)
        case "bokeh":
            weight = np.full((size, size), 0.15, np.float32)
            for _ in range(rng.integers(10, 22)):
                (cx, cy), r = rng.uniform(0, size, 2).tolist(), size * rng.uniform(0.03, 0.13)
                weight += rng.uniform(0.2, 0.5) * np.clip((r - np.hypot(x - cx, y - cy)) / 3 + 0.5, 0, 1)
        case "weave":
            count = 2 * math.pi * rng.uniform(4, 9)
            second_count = (0.0, 0.5, 1.0)[rng.integers(3)] * count
            weight = 0.5 + 0.3 * (np.sin(count * u) + np.sin(second_count * v))
    weight = np.clip(weight + 0.1 * _noise(rng, size, 0.02 * size), 0, 1)
    return first + weight * (second - first)


def _distractor(rng: np.random.Generator, x: Array, y: Array, size: int) -> Array:
    """Coverage [S, S] of a small plain disc, box, triangle or bar."""
    radius = size * rng.uniform(0.03, 0.075)
    sides = (0, 4, 3, 4)[kind := int(rng.integers(4))]
    angle, (cx, cy) = rng.uniform(0, 2 * math.pi), rng.uniform(0, size, 2).tolist()
    cos, sin = math.cos(angle), math.sin(angle)
    u, v = (x - cx) * cos + (y - cy) * sin, (y - cy) * cos - (x - cx) * sin
    if kind == 3:
        u = u / 2.2
    if sides == 0:
        return np.clip(0.5 + radius - np.hypot(u, v), 0, 1)
    turns = [2 * math.pi * i / sides for i in range(sides)]
    outside = np.maximum.reduce([u * math.cos(t) + v * math.sin(t) for t in turns])
    return np.clip(0.5 + 0.7 * radius - outside, 0, 1)


def _lit(rng: np.random.Generator, pixels: Array, x: Array, y: Array, size: int) -> Array:
    """Uneven light, vignette and sensor noise; result in [0, 1]."""
    angle, slope = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.45)
    u, v = x / size - 0.5, y / size - 0.5
    light = 1 + slope * (u * math.cos(angle) + v * math.sin(angle)) - rng.uniform(0, 0.5) * (u * u + v * v)
    noise = rng.standard_normal(pixels.shape, np.float32) * rng.uniform(0.004, 0.02)
    return np.clip(pixels * light + noise, 0, 1)


def _noise(rng: np.random.Generator, size: int, grain: float) -> Array:
    """Smooth noise [size, size] of about unit variance whose features are `grain` pixels wide."""
    cells = max(2, round(size / max(grain, 1.0)))
    coarse = rng.standard_normal((cells, cells), np.float32)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def _over(below: Array, alpha: Array, color: Array) -> Array:
    return below + alpha * (color - below)


def _oklch(lightness: float, chroma: float, hue: float) -> Array:
    """sRGB [3, 1, 1] in [0, 1] of an OKLCH colour, clipped to the gamut.

    Equal steps of lightness look equal at every hue, which keeps random colours readable
    (https://bottosson.github.io/posts/oklab).
    """
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = np.array(
        [
            4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
            -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
            -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
        ]
    ).clip(0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return srgb.astype(np.float32)[:, None, None]

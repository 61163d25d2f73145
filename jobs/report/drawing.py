"""Procedural pictures with labels and label maps: a textured shape among distractors on a busy ground.

A class is a shape together with a texture. Place, size, rotation, colours, contrast sign, background and
light are random, so that no pixel's mean tells the class and a classifier has to see structure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

SHAPES = ("ring", "cross", "crescent")
TEXTURES = ("striped", "checked", "dotted", "speckled")
MAX_CLASSES = len(SHAPES) * len(TEXTURES)
DRAWING_VERSION = 2
"""Goes up when the same arguments give another picture."""
Array = np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """One picture: `pixels` uint8 [S, S, 3] and `label_map` uint8 [S, S] (see `label_names`)."""

    pixels: Array
    label_map: Array
    label: int


def class_names(num_classes: int) -> tuple[str, ...]:
    """Names "texture-shape" in alphabetical order, which is the order an image folder gives its labels.

    Taken along diagonals of the shape x texture table, so that neither alone decides the class.
    """
    pairs = [(SHAPES[n % 3], TEXTURES[(n // 3 + n % 3) % 4]) for n in range(num_classes)]
    return tuple(sorted(f"{texture}-{shape}" for shape, texture in pairs))


def label_names(num_classes: int) -> tuple[str, ...]:
    """Meaning of a label map's values: 0 background, 1 + label the object, last the distractors."""
    return ("background", *class_names(num_classes), "distractor")


def label_palette(num_classes: int) -> list[int]:
    """Flat RGB palette for the label maps, so that any viewer shows them in colours."""
    objects = [_color(0.55, 0.35, 2 * math.pi * label / num_classes) for label in range(num_classes)]
    colors = [_color(0.1, 0, 0), *objects, _color(0.5, 0, 0)]
    return [int(channel * 255 + 0.5) for color in colors for channel in color.ravel()]


def draw(index: int, *, num_classes: int, image_size: int, seed: int) -> Drawing:
    """The picture of one index: a pure function of its arguments; its label is `index % num_classes`."""
    rng = np.random.Generator(np.random.Philox(key=[seed, index]))
    label, size = index % num_classes, image_size
    texture, shape = class_names(num_classes)[label].split("-")
    # The sign of the contrast is a coin toss: otherwise "brighter in the middle" would tell shapes apart.
    dark_ground = bool(rng.random() < 0.5)
    pixels = _ground(rng, size, rng.uniform(0.2, 0.4) if dark_ground else rng.uniform(0.6, 0.8))
    label_map = np.zeros((size, size), np.uint8)

    for _ in range(rng.integers(2, 6)):
        radius = size * rng.uniform(0.03, 0.075)
        u, v = _placed(rng, size, radius)
        edge = radius * ((np.hypot(u, v) if rng.random() < 0.5 else np.maximum(abs(u), abs(v))) - 1)
        pixels = _over(pixels, edge, _random_color(rng, 0.1, 0.9))
        label_map[edge < 0] = num_classes + 1

    radius = size * rng.uniform(0.25, 0.42)
    edge = radius * shape_distance(shape, *_placed(rng, size, radius))
    pixels = _over(pixels, edge, _surface(rng, edge, texture, dark_ground))
    label_map[edge < 0] = label + 1

    uneven_light = 1 + rng.uniform(0, 0.4) * _placed(rng, size, size)[0]
    sensor_noise = rng.standard_normal(pixels.shape, np.float32) * rng.uniform(0.004, 0.02)
    pixels = np.clip(pixels * uneven_light + sensor_noise, 0, 1) * 255 + 0.5
    rgb = np.ascontiguousarray(pixels.astype(np.uint8).transpose(1, 2, 0))
    return Drawing(pixels=rgb, label_map=label_map, label=label)


def shape_distance(shape: str, u: Array, v: Array) -> Array:
    """Signed distance to a shape of radius 1 around the origin, negative inside, exact near its outline."""
    match shape:
        case "ring":
            return np.abs(np.hypot(u, v) - 0.7) - 0.26
        case "cross":
            far, near = np.maximum(np.abs(u), np.abs(v)), np.minimum(np.abs(u), np.abs(v))
            return np.maximum(far - 0.95, near - 0.34)
        case "crescent":
            return np.maximum(np.hypot(u, v) - 1, 0.78 - np.hypot(u - 0.48, v))
    raise ValueError(f"no shape {shape!r}")


def texture_weight(rng: np.random.Generator, texture: str, u: Array, v: Array, period: float) -> Array:
    """Weight of the second colour [S, S] in [0, 1]; u and v grow by 1 in `period` pixels."""
    match texture:
        case "striped":
            wave = np.sin(2 * math.pi * u) + rng.uniform(-0.35, 0.35)
        case "checked":
            wave = 2 * np.sin(math.pi * u) * np.sin(math.pi * v)
        case "dotted":
            wave = np.cos(2 * math.pi * u) + np.cos(2 * math.pi * v) - rng.uniform(0.5, 0.8)
        case "speckled":
            wave = _noise(rng, len(u), 0.28 * period)
        case _:
            raise ValueError(f"no texture {texture!r}")
    return np.clip(0.5 + wave * period / (2 * math.pi), 0, 1)


# ------------------------------------------------------------------------------------------------ inside


def _surface(rng: np.random.Generator, edge: Array, texture: str, dark_ground: bool) -> Array:
    """Textured colours of the object [3, S, S]: one stands off the ground, the other off the first."""
    size = len(edge)
    period = size / 128 * rng.uniform(8, 13)
    bend = _noise(rng, size, 0.4 * size) * 0.25
    u, v = _placed(rng, size, period)
    first = _random_color(rng, 0.7, 0.95) if dark_ground else _random_color(rng, 0.05, 0.3)
    second = _random_color(rng, 0.3, 0.5) if dark_ground else _random_color(rng, 0.6, 0.8)
    if rng.random() < 0.5:
        first, second = second, first
    colors = first + texture_weight(rng, texture, u + bend, v - bend, period) * (second - first)
    # A darker rim keeps the outline visible where a colour of the texture happens to equal the ground.
    return colors * (1 - rng.uniform(0.2, 0.6) * np.clip(1 + edge / (0.025 * size), 0, 1))


def _ground(rng: np.random.Generator, size: int, light: float) -> Array:
    """Background [3, S, S] between two colours of about the given lightness: clouds, or a weave of waves."""
    spread = rng.uniform(0.05, 0.15)
    first, second = (_random_color(rng, low, low) for low in (light - spread, light + spread))
    if rng.random() < 0.5:
        weight = 0.5 + sum(_noise(rng, size, grain * size) * (grain + 0.06) for grain in (0.3, 0.12, 0.05))
    else:
        u, v = _placed(rng, size, size / (2 * math.pi * rng.uniform(4, 9)))
        weight = 0.5 + 0.3 * (np.sin(u) + np.sin(v * rng.choice((0.0, 0.5, 1.0))))
    return first + np.clip(weight + 0.1 * _noise(rng, size, 0.02 * size), 0, 1) * (second - first)


def _placed(rng: np.random.Generator, size: int, unit: float) -> tuple[Array, Array]:
    """Coordinates [S, S] around a random place, turned and slightly stretched, `unit` pixels long."""
    y, x = np.mgrid[:size, :size].astype(np.float32) + np.float32(0.5)
    margin = min(0.85 * unit, 0.5 * size)
    left, top = rng.uniform(margin, size - margin, 2).tolist()
    angle, stretch = rng.uniform(0, 2 * math.pi), math.exp(rng.uniform(-0.16, 0.16))
    cos, sin = math.cos(angle) / unit, math.sin(angle) / unit
    x, y = x - left, y - top
    return (x * cos + y * sin) * stretch, (y * cos - x * sin) / stretch


def _noise(rng: np.random.Generator, size: int, grain: float) -> Array:
    """Smooth noise [size, size] of about unit variance whose features are `grain` pixels wide."""
    cells = max(2, round(size / max(grain, 1.0)))
    coarse = rng.standard_normal((cells, cells), np.float32)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def _over(below: Array, edge: Array, color: Array) -> Array:
    """Colours [3, S, S] with `color` inside the outline where `edge` [S, S], in pixels, crosses 0."""
    return below + np.clip(0.5 - edge, 0, 1) * (color - below)


def _random_color(rng: np.random.Generator, low: float, high: float) -> Array:
    """A colour [3, 1, 1] of any hue, with a lightness between the two."""
    return _color(rng.uniform(low, high), rng.uniform(0.03, 0.2), rng.uniform(0, 2 * math.pi))


def _color(lightness: float, chroma: float, hue: float) -> Array:
    """sRGB [3, 1, 1] in [0, 1]: `chroma` away from the grey of this lightness, at the angle `hue`."""
    channels = lightness + chroma * np.cos(hue - 2 * math.pi / 3 * np.arange(3))
    return channels.clip(0, 1).astype(np.float32)[:, None, None]

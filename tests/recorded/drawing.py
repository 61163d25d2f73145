"""The images that everything recorded was made from, drawn with numpy from a fixed seed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("discs", "stripes")
NUM_IMAGES = 38


def draw_images(folder: Path) -> None:
    """Two folders of small JPEG and PNG images, among them a duplicate, and a file that is no image."""
    random = np.random.default_rng(20)
    for number in range(NUM_IMAGES):
        name = CLASSES[number % 2]
        height, width = (int(side) for side in random.integers(48, 81, 2))
        image = Image.fromarray(_picture(random, name, height, width)[0])
        path = folder / name / f"{number:03d}.{'png' if number % 9 == 0 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, **({} if path.suffix == ".png" else {"quality": 85}))
    (folder / "stripes" / "copy.jpg").write_bytes((folder / "stripes" / "005.jpg").read_bytes())
    (folder / "discs" / "broken.jpg").write_bytes((folder / "discs" / "002.jpg").read_bytes()[:200])


def draw_segmentation(folder: Path) -> None:
    """Images and label maps of three classes: background, disc and stripe; 255 along the left side."""
    random = np.random.default_rng(21)
    for part, count in (("train", 8), ("val", 3)):
        for number in range(count):
            height, width = (int(side) for side in random.integers(32, 49, 2))
            pixels, inside = _picture(random, CLASSES[number % 2], height, width)
            labels = np.where(inside, 1 + number % 2, 0).astype(np.uint8)
            labels[:, :2] = 255
            for kind, array in (("images", pixels), ("labels", labels)):
                path = folder / kind / part / f"{number:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array // 32 * 32 if kind == "images" else array).save(path, optimize=True)


def set_times(folder: Path, seconds: int) -> None:
    """Give every file the same modification time."""
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, (seconds, seconds))


def _picture(
    random: np.random.Generator, name: str, height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [H, W, 3] of a disc or of stripes on a gradient, and where they are."""
    rows, columns = np.mgrid[:height, :width]
    if name == "discs":
        row, column = random.uniform(0.3, 0.7, 2) * (height, width)
        inside = np.hypot(rows - row, columns - column) < random.uniform(0.2, 0.4) * min(height, width)
    else:
        angle, step = random.uniform(0, np.pi), random.uniform(8, 16)
        inside = (rows * np.sin(angle) + columns * np.cos(angle)) % step < step / 2
    front, back, slope = random.uniform(40, 215, (3, 3))
    ground = back + (slope - back) * (columns / width)[..., None]
    return np.where(inside[..., None], front, ground).round().astype(np.uint8), inside

"""Images with label maps for segmentation: two folders listed and checked, crops, distortion, batches.

Layout, resizing and augmentation are those of ADE20K training in the reference (reference.md §6.5). What is
drawn at random is a pure function of the seed and the position in the stream of samples.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline import storage
from pipeline.artifacts import fingerprint, sha256_hex
from pipeline.draws import permute
from pipeline.errors import InputError
from pipeline.threads import in_order
from pipeline.training.metrics import Progress
from pipeline.training.worker import Worker
from shards.pixels.decode import FORMATS, DecodeConfig, Rejected, decode_image

IGNORED = -1
"""The class of pixels that count nowhere."""

_CROP_TRIES = 10
_PAIR_STREAM = 0
_LABEL_FORMATS = ("PNG", "BMP", "GIF", "PPM", "TIFF")  # without loss
_LABEL_MODES = ("1", "L", "P", "I", "I;16", "I;16L", "I;16B", "I;16N")
_GREY_STEPS = {"L;2": 85, "L;4": 17}  # Pillow spreads grey of 2 and 4 bits over 0 to 255


@dataclass(frozen=True, kw_only=True)
class CropPolicy:
    """How images are resized for training and evaluation, and how training crops are drawn."""

    size: int = 512
    """Pixels a side of a crop, and of a window at evaluation."""
    short_side: int = 512
    """Images are resized to this shorter side, before the random ratio."""
    long_side: int | None = 2048
    """And to at most this longer side; null sets no limit."""
    ratio_range: tuple[float, float] = (0.5, 2.0)
    """Smallest and largest random ratio to that size in training."""
    cat_max_ratio: float = 0.75
    """A crop in which one class has this share of the labelled pixels or more is drawn again, up to 10 times;
    1 takes the first."""
    hflip_prob: float = 0.5
    """Share of training crops that are mirrored."""
    photometric_distortion: bool = True
    """Random brightness, contrast, saturation and hue in training."""

    def __post_init__(self) -> None:
        if min(self.size, self.short_side) < 1 or (self.long_side or self.short_side) < self.short_side:
            raise InputError(
                f"crops.size {self.size}, crops.short_side {self.short_side} and crops.long_side "
                f"{self.long_side} must be at least 1, and the long side not below the short one"
            )
        low, high = self.ratio_range
        if not 0 < low <= high < math.inf:
            raise InputError(f"crops.ratio_range is {[low, high]}; give two ratios, 0 < smallest <= largest")
        if not 0 < self.cat_max_ratio <= 1 or not 0 <= self.hflip_prob <= 1:
            raise InputError(
                f"crops.cat_max_ratio {self.cat_max_ratio} and crops.hflip_prob {self.hflip_prob} are "
                "shares; give 0 to 1, the first above 0"
            )

    def resized(self, height: int, width: int, ratio: float = 1.0) -> tuple[int, int]:
        """Height and width of an image after resizing, its proportions kept."""
        scale = self.short_side * ratio / min(height, width)
        if self.long_side is not None:
            scale = min(scale, self.long_side * ratio / max(height, width))
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


@dataclass(frozen=True, kw_only=True)
class LabelRules:
    """Meaning of the values of a label map."""

    num_classes: int
    ignore_index: int = 255
    reduce_zero_label: bool = False

    @property
    def largest(self) -> int:
        """The label value of the last class."""
        return self.num_classes if self.reduce_zero_label else self.num_classes - 1

    def classes(self, values: np.ndarray) -> np.ndarray:
        """Classes int32 [H, W], 0 to num_classes - 1 or IGNORED, of checked label values [H, W]."""
        classes = values.astype(np.int32) - int(self.reduce_zero_label)  # a reduced 0 is IGNORED
        classes[values == self.ignore_index] = IGNORED
        return classes

    def wrong(self, values: np.ndarray) -> tuple[int, int] | None:
        """Row and column of the first value that is neither a class nor ignored; None when there is none."""
        bad = ((values < 0) | (values > self.largest)) & (values != self.ignore_index)
        row, column = np.unravel_index(int(bad.argmax()), bad.shape)
        return (int(row), int(column)) if bad[row, column] else None


# ------------------------------------------------------------------------------------------------ folders


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """An image and its label map; `key` is their common name below their folders, without extension."""

    key: str
    image: str
    labels: str


@dataclass(frozen=True, kw_only=True)
class CheckedPairs:
    """Result of a check of all pairs: labelled pixels per class int64 [C], and a hash of all contents."""

    pixels_per_class: np.ndarray
    fingerprint: str


def list_pairs(images: str, labels: str) -> list[Pair]:
    """All pairs of two folders, sorted; InputError names the first that has no partner, or an empty folder.

    Files count when their extension is an image format's and no part of their path begins with a dot.
    """
    files, maps = _by_key(images), _by_key(labels)
    if not files:
        raise InputError(f"no images in {images}; check the URL")
    for key, url in files.items():
        if key not in maps:
            raise InputError(
                f"{url} has no label map {storage.join(labels, key)}.png; add it, or remove the image"
            )
    for key, url in maps.items():
        if key not in files:
            raise InputError(
                f"{url} has no image {storage.join(images, key)}.*; add it, or remove the label map"
            )
    return [Pair(key=key, image=url, labels=maps[key]) for key, url in files.items()]


def check_pairs(pairs: Sequence[Pair], rules: LabelRules, what: str, num_threads: int) -> CheckedPairs:
    """Decode every image and label map once, in threads; InputError names the first that does not fit."""
    progress = Progress(f"check {what}", len(pairs), "images")
    counts = np.zeros(rules.num_classes, np.int64)
    digests: list[tuple[str, str, str]] = []
    for pair, (pair_counts, image_hash, labels_hash) in zip(
        pairs, in_order(lambda pair: _check(pair, rules), pairs, num_threads), strict=True
    ):
        counts += pair_counts
        digests.append((pair.key, image_hash, labels_hash))
        progress.update()
    progress.close()
    if not counts.any():
        raise InputError(
            f"every pixel of the {what} label maps is ignored; check --ignore_index {rules.ignore_index} and "
            "--reduce_zero_label"
        )
    return CheckedPairs(pixels_per_class=counts, fingerprint=fingerprint(digests))


def decode_label_map(data: bytes, url: str) -> np.ndarray:
    """The values of a label map as they are stored, [H, W] integers; InputError when it is no label map."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.format not in _LABEL_FORMATS or image.mode not in _LABEL_MODES:
                raise InputError(
                    f"{url} is no label map but {image.mode} {image.format}; a label map is a PNG with one "
                    "channel or a palette, whose values are classes"
                )
            layout = image.tile[0][3] if image.tile else None
            values = np.asarray(image)
    except InputError:
        raise
    # As in shards.pixels.decode: whatever a decoder raises says the same thing about the file.
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{url} cannot be read as a label map ({message}); replace the file") from None
    if isinstance(layout, str) and layout in _GREY_STEPS:
        values = values // _GREY_STEPS[layout]
    return values.astype(np.uint8) if values.dtype == bool else values


def read_pair(pair: Pair, rules: LabelRules) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [H, W, 3] and classes int32 [H, W] of a checked pair."""
    image = decode_image(storage.read(pair.image), DecodeConfig())
    return image, rules.classes(decode_label_map(storage.read(pair.labels), pair.labels))


def _by_key(folder: str) -> dict[str, str]:
    Image.init()
    extensions = Image.registered_extensions()
    urls: dict[str, str] = {}
    for file in storage.list_files(folder):
        relative = file.url[len(folder.rstrip("/")) + 1 :]
        key, dot, extension = relative.rpartition(".")
        if f".{extension.lower()}" not in extensions or not dot or f"/{relative}".find("/.") >= 0:
            continue
        if key in urls:
            raise InputError(f"{urls[key]} and {file.url} have the same name; remove one of them")
        urls[key] = file.url
    return urls


def _check(pair: Pair, rules: LabelRules) -> tuple[np.ndarray, str, str]:
    """Labelled pixels per class [C], and the hashes of both files."""
    data, label_data = storage.read(pair.image), storage.read(pair.labels)
    try:
        height, width = decode_image(data, DecodeConfig()).shape[:2]
    except Rejected as error:
        raise InputError(f"{pair.image} cannot be read ({error}); replace or remove the pair") from None
    values = decode_label_map(label_data, pair.labels)
    if values.shape != (height, width):
        raise InputError(
            f"{pair.labels} is {values.shape[1]} x {values.shape[0]} pixels, but its image {pair.image} is "
            f"{width} x {height}; a label map has the size of its image"
        )
    if (place := rules.wrong(values)) is not None:
        raise InputError(
            f"{pair.labels} has label {values[place]} in row {place[0]}, column {place[1]}, but the last of "
            f"{rules.num_classes} classes is {rules.largest} and ignore_index {rules.ignore_index}; mend the "
            "label map, or --num_classes, --ignore_index, --reduce_zero_label"
        )
    counts = np.bincount(rules.classes(values).ravel() + 1, minlength=rules.num_classes + 1)[1:]
    return counts, sha256_hex(data), sha256_hex(label_data)


# ------------------------------------------------------------------------------------------------ crops


def resize_image(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3] -> [height, width, 3], bilinear.

    DEVIATION: averages where it shrinks, as Pillow does; the reference samples four pixels (OpenCV).
    """
    return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


def random_crop(
    pixels: np.ndarray, classes: np.ndarray, policy: CropPolicy, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A crop of an image resized by a random ratio: uint8 [h, w, 3] and int32 [h, w], both at most `size`.

    Only the crop is resized, to the same pixels as if the whole image had been.
    """
    source_height, source_width = classes.shape
    height, width = policy.resized(source_height, source_width, rng.uniform(*policy.ratio_range))
    rows, columns = min(policy.size, height), min(policy.size, width)
    row_step, column_step = source_height / height, source_width / width

    def draw() -> tuple[int, int, np.ndarray]:
        top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
        y = ((np.arange(top, top + rows) + 0.5) * row_step).astype(np.intp).clip(max=source_height - 1)
        x = ((np.arange(left, left + columns) + 0.5) * column_step).astype(np.intp).clip(max=source_width - 1)
        return top, left, classes[np.ix_(y, x)]

    top, left, labels = draw()
    for _ in range(_CROP_TRIES - 1):
        if policy.cat_max_ratio == 1 or largest_share(labels) < policy.cat_max_ratio:
            break
        top, left, labels = draw()
    # Rounding must not push the box past the image.
    box = (
        left * column_step,
        top * row_step,
        min((left + columns) * column_step, source_width),
        min((top + rows) * row_step, source_height),
    )
    image = Image.fromarray(pixels).resize((columns, rows), Image.Resampling.BILINEAR, box=box)
    return np.asarray(image), labels


def largest_share(classes: np.ndarray) -> float:
    """Share of the most frequent class among the labelled pixels; 1 where there are none."""
    counts = np.bincount(classes[classes != IGNORED])
    return float(counts.max() / counts.sum()) if counts.size else 1.0


def distort(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Photometric distortion of SSD, as in the reference: each of four changes with probability one half.

    pixels uint8 [H, W, 3]: brightness by up to 32 of 255, contrast and saturation by 0.5 to 1.5, hue by up to
    36 degrees; contrast comes first or last.
    """
    levels = np.arange(256, dtype=np.float64)

    def linear(factor: float, offset: float) -> np.ndarray:
        return np.clip(levels * factor + offset, 0, 255).astype(np.uint8)

    # All numbers are drawn at once, so that none depends on whether another change takes place.
    apply = rng.random(4) < 0.5
    brightness, contrast, saturation, hue = rng.uniform([-32, 0.5, 0.5, -36], [32, 1.5, 1.5, 36])
    contrast_first = rng.random() < 0.5
    if apply[0]:
        pixels = linear(1.0, brightness)[pixels]
    if apply[1] and contrast_first:
        pixels = linear(contrast, 0.0)[pixels]
    if apply[2] or apply[3]:
        hues, saturations, values = Image.fromarray(pixels).convert("HSV").split()
        if apply[2]:
            saturations = saturations.point(linear(saturation, 0.0).tolist())
        if apply[3]:
            hues = hues.point(np.roll(levels.astype(int), -round(hue * 256 / 360)).tolist())
        pixels = np.asarray(Image.merge("HSV", (hues, saturations, values)).convert("RGB"))
    if apply[1] and not contrast_first:
        pixels = linear(contrast, 0.0)[pixels]
    return pixels


# ------------------------------------------------------------------------------------------------ batches


@dataclass(frozen=True, kw_only=True)
class CropBatch:
    """A worker's share of a batch: pixels uint8 [b, S, S, 3], classes int32 [b, S, S] (or IGNORED)."""

    pixels: np.ndarray
    classes: np.ndarray


class CropReader:
    """Training crops of all pairs, shuffled anew in every pass, as one endless stream cut into batches.

    Crop p of the stream is a pure function of (pairs, policy, seed, p), so it can start at any step.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        rules: LabelRules,
        policy: CropPolicy,
        worker: Worker,
        *,
        fill: tuple[int, int, int],
        batch_size: int,
        seed: int,
        num_threads: int,
    ) -> None:
        """fill: the colour around images smaller than a crop; batch_size: images over all workers."""
        self._pairs, self._rules, self._policy = pairs, rules, policy
        self._fill, self._batch_size, self._seed = fill, batch_size, seed
        self._rank, self._share = worker.rank, batch_size // worker.world_size
        self._num_threads = num_threads
        self._order = functools.lru_cache(maxsize=4)(
            lambda epoch: permute(len(pairs), seed, epoch, _PAIR_STREAM, 0)
        )

    def keys(self, step: int) -> tuple[str, ...]:
        """The pairs of a step's whole batch, those of all workers."""
        first = step * self._batch_size
        return tuple(self._pair(position).key for position in range(first, first + self._batch_size))

    def batches(self, first_step: int, end_step: int) -> Iterator[CropBatch]:
        """This worker's share of the batches of steps [first_step, end_step)."""
        starts = (step * self._batch_size + self._rank * self._share for step in range(first_step, end_step))
        positions = (position for start in starts for position in range(start, start + self._share))
        ahead = 2 * self._share + self._num_threads
        with contextlib.closing(in_order(self._crop, positions, self._num_threads, ahead)) as crops:
            for _ in range(first_step, end_step):
                pixels, classes = zip(*itertools.islice(crops, self._share), strict=True)
                yield CropBatch(pixels=np.stack(pixels), classes=np.stack(classes))

    def _pair(self, position: int) -> Pair:
        epoch, i = divmod(position, len(self._pairs))
        return self._pairs[self._order(epoch)[i]]

    def _crop(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        pair = self._pair(position)
        rng = np.random.default_rng([self._seed, position])
        pixels, classes = random_crop(*read_pair(pair, self._rules), self._policy, rng)
        if rng.random() < self._policy.hflip_prob:
            pixels, classes = pixels[:, ::-1], classes[:, ::-1]
        if self._policy.photometric_distortion:
            pixels = distort(np.ascontiguousarray(pixels), rng)
        side = self._policy.size
        whole = np.empty((side, side, 3), np.uint8)
        whole[:] = self._fill
        labels = np.full((side, side), IGNORED, np.int32)
        rows, columns = classes.shape
        whole[:rows, :columns], labels[:rows, :columns] = pixels, classes
        return whole, labels

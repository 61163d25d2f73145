from __future__ import annotations

import colorsys
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import storage
from pipeline.errors import InputError
from pipeline.training.worker import Worker
from pretrain.segment.label_maps import (
    IGNORED,
    CropPolicy,
    CropReader,
    LabelRules,
    Pair,
    check_pairs,
    decode_label_map,
    distort,
    largest_share,
    list_pairs,
    random_crop,
    resize_image,
)

RULES = LabelRules(num_classes=3)
PALETTE = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200], [90, 90, 90]], np.uint8)

MakeSplit = Callable[..., tuple[str, str]]


def _png(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def _labels(seed: int, height: int, width: int) -> np.ndarray:
    """Blocks of three classes, and some ignored pixels."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 3, (height // 8 + 1, width // 8 + 1)).astype(np.uint8)
    values = np.kron(blocks, np.ones((8, 8), np.uint8))[:height, :width]
    values[:3, :5] = 255
    return values


def _coloured(values: np.ndarray) -> np.ndarray:
    return PALETTE[np.where(values == 255, 3, values)]


@pytest.fixture
def make_split(tmp_path: Path) -> MakeSplit:
    """`make_split(num=4)`: folders of images and label maps; a pixel's colour says its class."""

    def make(num: int = 4, *, height: int = 40, width: int = 56) -> tuple[str, str]:
        for i in range(num):
            values = _labels(i, height + i, width)
            storage.put(str(tmp_path / "images" / f"{i}.png"), _png(_coloured(values)))
            storage.put(str(tmp_path / "labels" / f"{i}.png"), _png(values))
        return str(tmp_path / "images"), str(tmp_path / "labels")

    return make


# ------------------------------------------------------------------------------------------------ folders


def test_pairs_are_found_by_name_in_subfolders_and_on_urls() -> None:
    root = "memory://list-pairs"
    for key in ("b", "town/a.b", "town/c"):
        storage.put(f"{root}/images/{key}.jpg", b"1")
        storage.put(f"{root}/labels/{key}.PNG", b"2")
    for other in ("images/.cache/x.png", "images/._b.jpg", "images/readme.txt", "images/b", "labels/x.db"):
        storage.put(f"{root}/{other}", b"3")
    pairs = list_pairs(f"{root}/images", f"{root}/labels/")
    assert [pair.key for pair in pairs] == ["b", "town/a.b", "town/c"]
    assert [storage.read(pair.image) + storage.read(pair.labels) for pair in pairs] == [b"12"] * 3


@pytest.mark.parametrize(
    ("removed", "added", "said"),
    [
        ("labels/1.png", None, r"images/1\.png has no label map .*labels/1\.png"),
        ("images/2.png", None, r"labels/2\.png has no image .*images/2\.\*"),
        (None, "images/3.jpg", r"3\.jpg and .*3\.png have the same name"),
    ],
)
def test_missing_and_double_partners_are_named(
    make_split: MakeSplit, tmp_path: Path, removed: str | None, added: str | None, said: str
) -> None:
    images, labels = make_split()
    if removed is not None:
        storage.remove(str(tmp_path / removed))
    if added is not None:
        storage.put(str(tmp_path / added), b"")
    with pytest.raises(InputError, match=said):
        list_pairs(images, labels)
    with pytest.raises(InputError, match=r"no images in .*nowhere"):
        list_pairs(str(tmp_path / "nowhere"), labels)


def _grey_png(values: np.ndarray, bits: int) -> bytes:
    """A grey PNG of 1, 2 or 4 bits a pixel, which Pillow does not write."""
    rows = []
    for row in values:
        text = "".join(f"{value:0{bits}b}" for value in row)
        text += "0" * (-len(text) % 8)
        rows.append(b"\0" + bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8)))
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"".join(rows))),
        (b"IEND", b""),
    ]
    body = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def test_stored_values_come_back_from_every_kind_of_label_map() -> None:
    values = np.arange(48, dtype=np.uint8).reshape(6, 8)
    palette = Image.fromarray(values)
    palette.putpalette(np.random.default_rng(0).integers(0, 255, 768).astype(np.uint8).tobytes())
    file = io.BytesIO()
    palette.save(file, "PNG")
    encoded = [_png(values), file.getvalue(), _png(values.astype(np.uint16) * 900)]
    decoded = [decode_label_map(data, "x.png") for data in encoded]
    assert all(np.array_equal(one, values) for one in decoded[:2])
    assert np.array_equal(decoded[2], values.astype(np.uint16) * 900)
    for bits in (1, 2, 4):
        few = values % (1 << bits)
        assert np.array_equal(decode_label_map(_grey_png(few, bits), "x.png"), few), bits


def test_other_files_are_no_label_maps() -> None:
    jpeg = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(jpeg, "JPEG")
    whole = _png(np.random.default_rng(0).integers(0, 9, (64, 64)).astype(np.uint8))
    for data, said in (
        (_png(np.zeros((8, 8, 3), np.uint8)), "no label map but RGB PNG"),
        (jpeg.getvalue(), "no label map but L JPEG"),
        (b"words", "cannot be read as a label map"),
        (whole[:400], "cannot be read as a label map"),
    ):
        with pytest.raises(InputError, match=rf"x\.png .*{said}"):
            decode_label_map(data, "x.png")


@pytest.mark.parametrize("reduce_zero_label", [False, True])
@pytest.mark.parametrize("ignore_index", [255, 4, 0])
def test_values_mean_classes_by_the_rules(ignore_index: int, reduce_zero_label: bool) -> None:
    rules = LabelRules(num_classes=4, ignore_index=ignore_index, reduce_zero_label=reduce_zero_label)
    values = np.array([[0, 1, 2], [3, 0, ignore_index]], np.uint8)
    assert rules.wrong(values) is None
    for value, found in zip(values.ravel(), rules.classes(values).ravel(), strict=True):
        ignored = value == ignore_index or (reduce_zero_label and value == 0)
        assert found == (IGNORED if ignored else int(value) - reduce_zero_label)
    for bad in (5, 254):
        values[1, 1] = bad
        assert rules.wrong(values) == (1, 1)


def test_check_counts_classes_and_notices_any_change(make_split: MakeSplit, tmp_path: Path) -> None:
    pairs = list_pairs(*make_split())
    first = check_pairs(pairs, RULES, "train", 2)
    maps = [decode_label_map(storage.read(pair.labels), pair.labels) for pair in pairs]
    assert first.pixels_per_class.tolist() == [sum(int((m == c).sum()) for m in maps) for c in range(3)]
    assert check_pairs(pairs, RULES, "train", 1).fingerprint == first.fingerprint
    changed = maps[2].copy()
    changed[20, 20] = (changed[20, 20] + 1) % 3
    storage.put(pairs[2].labels, _png(changed))
    assert check_pairs(pairs, RULES, "train", 2).fingerprint != first.fingerprint


def test_check_names_the_first_file_that_does_not_fit(make_split: MakeSplit) -> None:
    images, labels = make_split()
    pairs = list_pairs(images, labels)
    values = _labels(2, 42, 56)
    values[7, 9] = 3
    wrong = r"labels/2\.png has label 3 in row 7, column 9, but the last of 3 classes is 2 "
    for url, data, said in (
        (pairs[2].labels, _png(values), wrong),
        (pairs[2].labels, _png(values[:-1] % 3), r"labels/2\.png is 56 x 41 .*images/2\.png is 56 x 42"),
        (pairs[2].image, storage.read(pairs[2].image)[:120], r"images/2\.png cannot be read \(truncated"),
    ):
        good = storage.read(url)
        storage.put(url, data)
        with pytest.raises(InputError, match=said):
            check_pairs(pairs, RULES, "train", 2)
        storage.put(url, good)
    for pair in pairs:
        storage.put(pair.labels, _png(np.full_like(decode_label_map(storage.read(pair.labels), ""), 255)))
    with pytest.raises(InputError, match="every pixel of the val label maps is ignored"):
        check_pairs(pairs, RULES, "val", 2)


# ------------------------------------------------------------------------------------------------ crops


def test_resized_sizes_keep_proportions_within_both_sides() -> None:
    policy = CropPolicy(short_side=512, long_side=2048)
    assert policy.resized(512, 683) == (512, 683)
    assert policy.resized(1024, 768, 0.5) == (341, 256)
    assert policy.resized(100, 1000, 2.0) == (410, 4096)
    assert CropPolicy(short_side=512, long_side=None).resized(100, 1000) == (512, 5120)
    wrong = {"size": 0, "long_side": 100, "ratio_range": (0.0, 1.0), "cat_max_ratio": 0.0, "hflip_prob": 1.5}
    for name, value in wrong.items():
        with pytest.raises(InputError, match=name):
            CropPolicy(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.7])
def test_crop_is_a_part_of_the_resized_image_and_its_labels(ratio: float) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (50, 64, 3)).astype(np.uint8)
    classes = _labels(0, 50, 64).astype(np.int32)
    policy = CropPolicy(size=24, short_side=50, long_side=None, ratio_range=(ratio, ratio), cat_max_ratio=1)
    height, width = policy.resized(50, 64, ratio)
    whole = resize_image(pixels, height, width).astype(int)
    # Nearest neighbour: the source pixel in which the centre of the new one lies.
    rows, columns = ((np.arange(n) + 0.5) * source / n for n, source in ((height, 50), (width, 64)))
    whole_classes = classes[rows.astype(int)[:, None], columns.astype(int)]
    places = set()
    for seed in range(10):
        crop, labels = random_crop(pixels, classes, policy, np.random.default_rng(seed))
        assert crop.shape == (24, 24, 3) and labels.shape == (24, 24)
        matches = [
            (top, left)
            for top in range(height - 23)
            for left in range(width - 23)
            if np.abs(whole[top : top + 24, left : left + 24] - crop).max() <= 1
        ]
        assert len(matches) == 1
        top, left = matches[0]
        assert np.array_equal(whole_classes[top : top + 24, left : left + 24], labels)
        places.add(matches[0])
    assert len(places) > (1 if ratio > 0.5 else 0)


def test_crops_of_mostly_one_class_are_drawn_again() -> None:
    classes = np.zeros((100, 100), np.int32)
    classes[:20, :20] = 1
    classes[:, 60:] = IGNORED
    pixels = np.zeros((100, 100, 3), np.uint8)

    def shares(cat_max_ratio: float) -> np.ndarray:
        policy = CropPolicy(size=24, short_side=100, ratio_range=(1.0, 1.0), cat_max_ratio=cat_max_ratio)
        crops = (random_crop(pixels, classes, policy, np.random.default_rng(seed)) for seed in range(200))
        return np.array([largest_share(labels) for _, labels in crops])

    assert largest_share(np.array([[0, 0, 1, IGNORED, IGNORED, IGNORED]])) == pytest.approx(2 / 3)
    assert largest_share(np.full((2, 2), IGNORED)) == 1.0
    free, limited = (shares(1.0) < 0.75).mean(), (shares(0.75) < 0.75).mean()
    # Ten draws with a chance p each: 1 - (1 - p)^10.
    assert 0.01 < free < 0.2
    assert limited == pytest.approx(1 - (1 - free) ** 10, abs=0.15)


def test_distortion_equals_a_slow_one_in_floats() -> None:
    rng = np.random.default_rng(0)
    # Colours that no change clips much: hue and saturation are ill-defined in the dark.
    pixels = rng.integers(90, 180, (4, 5, 3)).astype(np.uint8)
    unchanged = 0
    for seed in range(60):
        found = distort(pixels, np.random.default_rng(seed))
        draws = np.random.default_rng(seed)
        apply = draws.random(4) < 0.5
        low, high = np.array([-32, 0.5, 0.5, -36]), np.array([32, 1.5, 1.5, 36])
        brightness, contrast, saturation, hue = draws.uniform(low, high)
        contrast_first = draws.random() < 0.5
        for y in range(4):
            for x in range(5):
                colour = pixels[y, x].astype(float)
                if apply[0]:
                    colour = np.clip(colour + brightness, 0, 255)
                if apply[1] and contrast_first:
                    colour = np.clip(colour * contrast, 0, 255)
                h, s, v = colorsys.rgb_to_hsv(*(colour / 255))
                s = min(s * saturation, 1) if apply[2] else s
                h = h + hue / 360 if apply[3] else h
                colour = np.array(colorsys.hsv_to_rgb(h % 1, s, v)) * 255
                if apply[1] and not contrast_first:
                    colour = np.clip(colour * contrast, 0, 255)
                assert np.abs(found[y, x] - colour).max() < 8, (seed, apply)
        unchanged += np.array_equal(found, pixels)
    assert unchanged > 0


# ------------------------------------------------------------------------------------------------ batches


def _reader(
    pairs: list[Pair], *, rank: int = 0, world_size: int = 1, threads: int = 2, seed: int = 3
) -> CropReader:
    policy = CropPolicy(size=48, short_side=40, ratio_range=(0.8, 1.4), photometric_distortion=False)
    worker = Worker(rank=rank, world_size=world_size)
    return CropReader(
        pairs, RULES, policy, worker, fill=(9, 8, 7), batch_size=4, seed=seed, num_threads=threads
    )


def test_batches_are_a_function_of_seed_and_step_alone(make_split: MakeSplit) -> None:
    pairs = list_pairs(*make_split(5))
    straight = list(_reader(pairs).batches(0, 6))
    resumed = list(_reader(pairs, threads=1).batches(4, 6))
    assert len(straight) == 6 and len(resumed) == 2
    for one, other in zip(straight[4:], resumed, strict=True):
        assert np.array_equal(one.pixels, other.pixels) and np.array_equal(one.classes, other.classes)
    halves = [list(_reader(pairs, rank=rank, world_size=2).batches(0, 2)) for rank in range(2)]
    for step in range(2):
        joined = np.concatenate([halves[0][step].pixels, halves[1][step].pixels])
        assert np.array_equal(joined, straight[step].pixels)
    other = next(iter(_reader(pairs, seed=4).batches(0, 1)))
    assert not np.array_equal(other.pixels, straight[0].pixels)


def test_every_pass_takes_each_pair_once_in_an_order_of_its_own(make_split: MakeSplit) -> None:
    reader = _reader(list_pairs(*make_split(5)))
    stream = [key for step in range(10) for key in reader.keys(step)]
    passes = [tuple(stream[i : i + 5]) for i in range(0, 40, 5)]
    assert all(sorted(one) == ["0", "1", "2", "3", "4"] for one in passes)
    assert len(set(passes)) > 4


def test_pixels_and_labels_stay_together_and_margins_are_filled(make_split: MakeSplit) -> None:
    pairs = list_pairs(*make_split(4))
    right = total = filled = 0
    mirrored = set()
    for batch in _reader(pairs).batches(0, 8):
        assert batch.pixels.shape == (4, 48, 48, 3) and batch.pixels.dtype == np.uint8
        for pixels, classes in zip(batch.pixels, batch.classes, strict=True):
            margin = (pixels == (9, 8, 7)).all(axis=2)
            assert (classes[margin] == IGNORED).all()
            filled += int(margin.any())
            # Colours between two blocks are blended; the nearest one is right nearly everywhere.
            distance = np.abs(pixels[:, :, None].astype(int) - PALETTE[None, None, :3]).sum(axis=3)
            labelled = classes != IGNORED
            right += int((distance.argmin(axis=2) == classes)[labelled].sum())
            total += int(labelled.sum())
            # Ignored pixels are at the top left of every image, so a mirrored one shows them on the right.
            ignored = np.argwhere(~labelled & ~margin)
            if len(ignored):
                mirrored.add(bool(ignored[:, 1].mean() > 20))
    assert right / total > 0.9
    assert filled > 0 and mirrored == {True, False}

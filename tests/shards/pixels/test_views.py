"""Views: crops follow the official rule, are pure functions, and render to the pixels torchvision gives."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import InputError
from shards.pixels.views import (
    CropBox,
    Jitter,
    View,
    ViewPolicy,
    center_view,
    decode_crop,
    encode_crop,
    render,
    view_at,
)

PINNED = {
    "index": 5,
    "crop": {"top": 0, "left": 37, "height": 374, "width": 407},
    "hflip": True,
    "jitter": {
        "brightness": 0.918887510913775,
        "contrast": 0.7287206610568475,
        "saturation": 1.290850512311788,
        "order": (0, 2, 1),
    },
    "image_size": 224,
}


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with some noise: what a JPEG and a resize treat like a photograph."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = np.stack([np.sin(9 * x + 2 * y), np.cos(7 * y - x), np.sin(5 * x * y)], axis=-1)
    return np.clip(128 + 90 * waves + rng.normal(0, 9, (height, width, 3)), 0, 255).astype(np.uint8)


def reference_crop(policy: ViewPolicy, uniforms: list[float], height: int, width: int) -> CropBox:
    """The official get_params, line by line, fed with the numbers its random generator would have given."""
    numbers = iter(uniforms)
    for _ in range(10):
        target_area = (policy.scale[0] + (policy.scale[1] - policy.scale[0]) * next(numbers)) * width * height
        low, high = math.log(policy.ratio[0]), math.log(policy.ratio[1])
        aspect_ratio = math.exp(low + (high - low) * next(numbers))
        top, left = next(numbers), next(numbers)
        w = round(math.sqrt(target_area * aspect_ratio))
        h = round(math.sqrt(target_area / aspect_ratio))
        if 0 < w <= width and 0 < h <= height:
            return CropBox(
                top=math.floor(top * (height - h + 1)),
                left=math.floor(left * (width - w + 1)),
                height=h,
                width=w,
            )
    in_ratio = width / height
    if in_ratio < policy.ratio[0]:
        w, h = width, round(width / policy.ratio[0])
    elif in_ratio > policy.ratio[1]:
        h, w = height, round(height * policy.ratio[1])
    else:
        w, h = width, height
    return CropBox(top=(height - h) // 2, left=(width - w) // 2, height=h, width=w)


def test_crops_follow_the_official_rule_for_the_same_random_numbers():
    policy = ViewPolicy(image_size=224, scale=(0.08, 1.0), seed=3)
    for sample_id, (height, width) in enumerate(itertools.product((9, 64, 375, 800), (11, 64, 500, 4000))):
        words = np.random.Philox(
            key=np.array([3, sample_id], np.uint64), counter=np.array([0, 5, 0x76696577, 0], np.uint64)
        ).random_raw(48)
        uniforms = [int(word) / 2.0**64 for word in words[8:]]
        expected = reference_crop(policy, uniforms, height, width)
        assert view_at(policy, sample_id, 5, height=height, width=width).crop == expected


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 7), (7, 1), (1, 5000), (5000, 1), (2, 3), (480, 640), (3, 3000)]
)
def test_crops_of_any_image_lie_inside_it(size):
    height, width = size
    for policy in (
        ViewPolicy(image_size=224, scale=(0.08, 1.0)),
        ViewPolicy(image_size=224, scale=(0.9, 1.0), ratio=(3.0, 4.0)),
    ):
        for sample_id in range(50):
            crop = view_at(policy, sample_id, 0, height=height, width=width).crop
            assert 0 <= crop.top <= crop.top + crop.height <= height and crop.height >= 1
            assert 0 <= crop.left <= crop.left + crop.width <= width and crop.width >= 1
        center = center_view(policy, height=height, width=width).crop
        assert center.top >= 0 and center.top + center.height <= height and center.height == center.width >= 1


def test_tiny_images_render():
    for height, width in [(1, 1), (1, 9), (9, 1)]:
        policy = ViewPolicy(image_size=32, color_jitter=0.4)
        view = view_at(policy, 0, 0, height=height, width=width)
        assert render(picture(height, width), view, "bicubic").shape == (32, 32, 3)


def test_distribution_of_crops_flips_and_jitter():
    policy = ViewPolicy(
        image_size=224, scale=(0.1, 0.5), hflip_prob=0.3, color_jitter=0.4
    )  # small: no try is refused
    views = [view_at(policy, sample_id, 0, height=1000, width=1000) for sample_id in range(4000)]
    area = np.array([view.crop.height * view.crop.width for view in views]) / 1e6
    log_ratio = np.array([math.log(view.crop.width / view.crop.height) for view in views])
    assert area.min() > 0.099 and area.max() < 0.501 and np.mean(area < 0.3) == pytest.approx(0.5, abs=0.03)
    assert abs(log_ratio.mean()) < 0.01 and np.abs(log_ratio).max() < math.log(4 / 3) + 0.01
    slack = np.array([[1000 - view.crop.height, 1000 - view.crop.width] for view in views])
    corner = np.array([[view.crop.top, view.crop.left] for view in views])
    assert np.mean(corner / np.maximum(slack, 1), axis=0) == pytest.approx([0.5, 0.5], abs=0.02)
    assert np.mean([view.hflip for view in views]) == pytest.approx(0.3, abs=0.03)
    jitters = [view.jitter for view in views if view.jitter is not None]
    assert len(jitters) == len(views)
    for name in ("brightness", "contrast", "saturation"):
        factors = np.array([getattr(jitter, name) for jitter in jitters])
        assert factors.min() >= 0.6 and factors.max() <= 1.4 and factors.mean() == pytest.approx(1, abs=0.02)
    orders = [jitter.order for jitter in jitters]
    for order in itertools.permutations(range(3)):
        assert orders.count(order) / len(orders) == pytest.approx(1 / 6, abs=0.025)


def test_a_view_depends_on_seed_sample_and_index_and_nothing_else():
    policy = ViewPolicy(image_size=224, color_jitter=0.2)
    view = view_at(policy, 7, 1, height=300, width=400)
    for other in range(5):
        view_at(policy, other, 0, height=300, width=400)
    assert view_at(policy, 7, 1, height=300, width=400) == view
    assert view_at(policy, 8, 1, height=300, width=400) != view
    assert view_at(policy, 7, 2, height=300, width=400).crop != view.crop
    assert view_at(dataclasses.replace(policy, seed=1), 7, 1, height=300, width=400).crop != view.crop
    # Sample ids and seeds use all their bits.
    assert view_at(policy, 7 + 2**33, 1, height=300, width=400).crop != view.crop


def test_switching_jitter_or_flip_on_moves_no_crop():
    plain = view_at(ViewPolicy(image_size=224, hflip_prob=0.0), 5, 0, height=300, width=400)
    changed = view_at(
        ViewPolicy(image_size=224, hflip_prob=1.0, color_jitter=0.4), 5, 0, height=300, width=400
    )
    assert plain.crop == changed.crop
    assert (plain.hflip, changed.hflip) == (False, True)
    assert plain.jitter is None and changed.jitter is not None


def test_views_are_pinned():
    """Stored datasets are replayed by later versions: these numbers may never change."""
    view = view_at(ViewPolicy(image_size=224, color_jitter=0.4, seed=12), 34, 5, height=375, width=500)
    assert dataclasses.asdict(view) == PINNED


def test_the_size_of_views_is_the_tokenizers():
    policy = ViewPolicy(scale=(0.5, 1.0))
    with pytest.raises(ValueError, match="image size"):
        view_at(policy, 0, 0, height=50, width=50)
    resolved = policy.resolve(112)
    assert resolved == ViewPolicy(scale=(0.5, 1.0), image_size=112) == resolved.resolve(112)
    assert view_at(resolved, 0, 0, height=50, width=50).image_size == 112
    with pytest.raises(InputError, match=r"224.*112"):
        ViewPolicy(image_size=224).resolve(112)


def test_center_first_is_the_evaluation_crop():
    policy = ViewPolicy(image_size=224, center_first=True)
    assert view_at(policy, 3, 0, height=256, width=400) == center_view(policy, height=256, width=400)
    assert center_view(policy, height=256, width=400).crop == CropBox(top=16, left=88, height=224, width=224)
    assert view_at(policy, 3, 1, height=256, width=400) != center_view(policy, height=256, width=400)


def test_views_are_json():
    view = view_at(ViewPolicy(image_size=224, color_jitter=0.4), 3, 1, height=300, width=400)
    record = json.loads(json.dumps(dataclasses.asdict(view)))
    jitter = record.pop("jitter")
    jitter["order"] = tuple(jitter["order"])
    assert View(**{**record, "crop": CropBox(**record["crop"]), "jitter": Jitter(**jitter)}) == view


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
def test_render_equals_torchvision(interpolation):
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    image = picture(180, 240)
    mode = {"bicubic": 3, "bilinear": 2, "lanczos": 1}[interpolation]
    policy = ViewPolicy(image_size=64, color_jitter=0.4)
    for sample_id in range(6):
        view = view_at(policy, sample_id, 0, height=180, width=240)
        expected = Image.fromarray(image)
        assert view.jitter is not None
        adjust = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
        factors = (view.jitter.brightness, view.jitter.contrast, view.jitter.saturation)
        for step in view.jitter.order:
            expected = adjust[step](expected, factors[step])
        crop = view.crop
        expected = functional.resized_crop(
            expected, crop.top, crop.left, crop.height, crop.width, [64, 64], interpolation=mode
        )
        if view.hflip:
            expected = functional.horizontal_flip(expected)
        rendered = render(image, view, interpolation)
        assert np.array_equal(rendered, np.asarray(expected))
        assert rendered.flags.c_contiguous and rendered.dtype == np.uint8


def test_render_reads_only_the_crop_and_leaves_the_image_alone():
    image = picture(100, 100)
    view = View(
        index=0, crop=CropBox(top=20, left=30, height=40, width=50), hflip=True, jitter=None, image_size=32
    )
    before = image.copy()
    expected = render(image, view, "bicubic")
    assert np.array_equal(image, before)
    image[:20] = image[60:] = 0
    image[:, :30] = image[:, 80:] = 0
    assert np.array_equal(render(image, view, "bicubic"), expected)


def test_render_refuses_a_box_outside_the_image():
    view = view_at(ViewPolicy(image_size=224), 0, 0, height=400, width=400)
    with pytest.raises(ValueError, match="outside"):
        render(picture(50, 50), view, "bicubic")


@pytest.mark.parametrize("size", [1, 7, 32, 112, 224])
def test_stored_crops_decode_to_the_same_pixels_everywhere(size):
    pixels = picture(size, size)
    data = encode_crop(pixels, 95)
    assert encode_crop(pixels, 95) == data
    decoded = decode_crop(data)
    assert decoded.shape == (size, size, 3) and decoded.dtype == np.uint8
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(np.asarray(image), decoded)
        assert image.format == "JPEG" and not image.info.get("progressive")
    if size >= 32:
        assert np.abs(decoded.astype(int) - pixels).mean() < 12
        assert len(encode_crop(pixels, 50)) < len(data)


def test_a_damaged_crop_is_an_error():
    data = encode_crop(picture(64, 64), 95)
    for damaged in (data[: len(data) // 2], b"", b"no jpeg"):
        with pytest.raises(ValueError):
            decode_crop(damaged)


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_size": 0},
        {"scale": (0.0, 1.0)},
        {"scale": (0.5, 0.2)},
        {"scale": (0.5, 1.5)},
        {"ratio": (0.0, 1.0)},
        {"ratio": (2.0, 1.0)},
        {"ratio": (1.0, math.inf)},
        {"interpolation": "nearest"},
        {"hflip_prob": 1.5},
        {"hflip_prob": math.nan},
        {"color_jitter": -0.1},
        {"views_per_image": -1},
        {"jpeg_quality": 0},
        {"seed": -1},
    ],
)
def test_wrong_values_are_named(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        ViewPolicy(**wrong)

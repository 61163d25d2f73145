from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.random_erasing import RandomErasing

from pipeline.errors import InputError
from pretrain.finetune.augment import AugmentConfig, RandAugment, erase, erase_each, mix, mix_batch
from pretrain.model.backbone import IMAGENET_MEAN

SPEC = "rand-m9-mstd0.5-inc1"


def picture(seed: int = 0, side: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


def normalised(num: int, side: int = 16) -> torch.Tensor:
    return torch.randn(num, 3, side, side, generator=torch.Generator().manual_seed(1))


def global_states() -> tuple[object, ...]:
    return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()


# ------------------------------------------------------------------------------------------------ RandAugment


@pytest.mark.parametrize("spec", [SPEC, "rand-m5-n3-mstd101-mmax20", "rand-m7-p0.9", "rand-m9-t3aw-inc1"])
def test_rand_augment_is_timms_for_the_same_draws(spec: str) -> None:
    """Against the transform that the official code builds, driven by the global generators."""
    pipeline = create_transform(224, is_training=True, auto_augment=spec, interpolation="bicubic")
    [timms] = [t for t in pipeline.transforms if type(t).__name__ == "RandAugment"]
    ours = RandAugment(spec, mean=IMAGENET_MEAN, seed=0)
    image, changed, refused = Image.fromarray(picture()), 0, 0
    for seed in range(150):
        found = np.asarray(ours.apply(image, random.Random(seed), np.random.RandomState(seed)))
        random.seed(seed)
        np.random.seed(seed)
        try:
            expected = np.asarray(timms(image))
        except ValueError as error:  # posterize to no bits at all: ours keeps one
            assert "bits must be between" in str(error)
            refused += 1
            continue
        assert np.array_equal(found, expected), (spec, seed)
        changed += not np.array_equal(found, picture())
    assert changed > 75 and refused < 10


def test_a_crop_depends_on_seed_sample_and_epoch_only() -> None:
    augment = RandAugment(SPEC, mean=IMAGENET_MEAN, seed=3)
    before = global_states()
    crops = [(picture(i), i, epoch) for i in range(40) for epoch in (0, 1)]
    one_by_one = [augment(*crop) for crop in crops]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda crop: augment(*crop), crops[::-1]))[::-1]
    assert all(np.array_equal(a, b) for a, b in zip(one_by_one, together, strict=True))
    assert global_states() == before

    def share_equal(other: RandAugment, shift: int, epoch: int) -> float:
        ours = [augment(picture(), i, 0) for i in range(60)]
        theirs = [other(picture(), i + shift, epoch) for i in range(60)]
        return float(np.mean([np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True)]))

    assert share_equal(augment, 0, 0) == 1.0
    reseeded = RandAugment(SPEC, mean=IMAGENET_MEAN, seed=4)
    # Two operations of even chance: a quarter of all crops stays as it is, so a few pairs are equal.
    for others in (share_equal(augment, 1, 0), share_equal(augment, 0, 1), share_equal(reseeded, 0, 0)):
        assert others < 0.5


# ------------------------------------------------------------------------------------------------ erasing


def test_erasing_is_timms_for_the_same_draws() -> None:
    timms = RandomErasing(0.5, mode="pixel", device="cpu")
    erased = 0
    for seed in range(60):
        expected, found = normalised(1)[0], normalised(1)[0]
        random.seed(seed)
        torch.manual_seed(seed)
        timms(expected)
        draws = random.Random(seed)
        if draws.random() <= 0.5:
            erase(found, draws, torch.Generator().manual_seed(seed))
        assert torch.equal(found, expected), seed
        erased += not torch.equal(found, normalised(1)[0])
    assert 15 < erased < 45


def test_each_image_is_erased_by_its_own_draws() -> None:
    pixels, ids = normalised(1).repeat(200, 1, 1, 1), np.arange(200)
    before = global_states()
    erase_each(pixels, ids, 2, prob=0.25, seed=7)
    assert global_states() == before
    touched = (pixels != normalised(1)).flatten(1).any(dim=1)
    assert 25 <= int(touched.sum()) <= 80
    alone = normalised(1).repeat(50, 1, 1, 1)
    erase_each(alone, ids[100:150], 2, prob=0.25, seed=7)
    assert torch.equal(alone, pixels[100:150])
    other = normalised(1).repeat(200, 1, 1, 1)
    erase_each(other, ids, 3, prob=0.25, seed=7)
    assert not torch.equal(other, pixels)
    erase_each(other, ids, 3, prob=0.0, seed=7)
    # What is erased is one rectangle of all channels: 2 % to a third of the image, rounded.
    for image in pixels[touched]:
        changed = (image != normalised(1)[0]).all(dim=0)
        rows, columns = changed.any(dim=1).sum(), changed.any(dim=0).sum()
        assert int(changed.sum()) == int(rows * columns) <= 16 * 16 * 0.45


# ------------------------------------------------------------------------------------------------ mixing


@pytest.mark.parametrize(
    ("mixup", "cutmix", "prob"), [(0.8, 1.0, 1.0), (0.8, 0.0, 1.0), (0.0, 1.0, 1.0), (0.8, 1.0, 0.5)]
)
def test_mixing_is_timms_for_the_same_draws(mixup: float, cutmix: float, prob: float) -> None:
    timms = Mixup(mixup, cutmix, prob=prob, switch_prob=0.5, label_smoothing=0.1, num_classes=7)
    config = AugmentConfig(mixup=mixup, cutmix=cutmix, mix_prob=prob)
    labels = torch.tensor([0, 1, 2, 6])
    for seed in range(40):
        np.random.seed(seed)
        pixels = normalised(4)
        expected, targets = timms(normalised(4), labels)
        found = mix(pixels, labels, 7, config, np.random.RandomState(seed))
        torch.testing.assert_close(pixels, expected)
        torch.testing.assert_close(found, targets)
        torch.testing.assert_close(found.sum(dim=1), torch.ones(4))


def test_without_mixing_pixels_stay_and_labels_are_smoothed() -> None:
    config = AugmentConfig(mixup=0.0, cutmix=0.0, label_smoothing=0.1)
    pixels, labels = normalised(3), torch.tensor([2, 0, 1])
    targets = mix(pixels, labels, 4, config, np.random.RandomState(0))
    assert torch.equal(pixels, normalised(3))
    expected = torch.full((3, 4), 0.025)
    expected[torch.arange(3), labels] = 0.925
    torch.testing.assert_close(targets, expected)
    logits = torch.randn(3, 4)
    smoothed = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(torch.nn.functional.cross_entropy(logits, targets), smoothed)


def test_groups_of_a_batch_are_mixed_by_draws_of_their_own() -> None:
    config = AugmentConfig(mixup=0.8, cutmix=1.0, mix_images=4, label_smoothing=0.0)
    labels = torch.arange(10)

    def mixed(rank: int = 0, position: int = 0, epoch: int = 0, seed: int = 0) -> torch.Tensor:
        pixels = normalised(10)
        return mix_batch(
            pixels, labels, 10, config, seed=seed, epoch=epoch, position=position, rank=rank
        ).targets

    before = global_states()
    targets = mixed()
    assert global_states() == before and torch.equal(targets, mixed())
    # Partners are found within a group, whose images all keep the same share of their own.
    for first, last in ((0, 3), (4, 7), (8, 9)):
        group = targets[first : last + 1, first : last + 1]
        torch.testing.assert_close(group.sum(dim=1), torch.ones(last + 1 - first))
        assert len({round(float(x), 5) for x in group.diagonal()}) == 1
    own = {round(float(targets[i, i]), 5) for i in (0, 4, 8)}
    assert len(own) == 3
    for other in (mixed(rank=1), mixed(position=10), mixed(epoch=1), mixed(seed=1)):
        assert not torch.equal(other, targets)


# ------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rand_augment": "m9"}, "rand_augment"),
        ({"rand_augment": "rand-x9"}, "rand-m9-mstd0.5-inc1"),
        ({"erase_prob": 1.5}, "erase_prob"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"mixup": -0.1}, "mixup"),
        ({"mix_images": 0}, "mix_images"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        AugmentConfig(**change)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)

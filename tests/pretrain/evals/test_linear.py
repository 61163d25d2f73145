from __future__ import annotations

import pytest
import torch

from pretrain.evals import linear
from pretrain.evals.linear import (
    LabelledFeatures,
    Sweep,
    choose_lr,
    hold_out,
    standardisation,
    train_classifiers,
)

CPU = torch.device("cpu")
SWEEP = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def sweep(*, lrs: tuple[float, ...] = SWEEP, holdout: float = 0.2, seed: int = 0) -> Sweep:
    return Sweep(lrs=lrs, epochs=15, batch_size=256, holdout=holdout, seed=seed)


def blobs(num: int, spread: float, seed: int, classes: int = 4, width: int = 12) -> LabelledFeatures:
    """Normal clusters around fixed centres, with offsets and scales that standardising must undo."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, classes, (num,), generator=generator)
    features = centres[labels] + spread * torch.randn(num, width, generator=generator)
    scales = 10.0 ** torch.arange(-3, width - 3, dtype=torch.float32).remainder(7)
    return LabelledFeatures(features * scales + 5 * scales, labels, classes)


def test_classifiers_of_a_sweep_do_not_touch_each_other():
    train, test = blobs(300, 1.0, seed=0), blobs(200, 1.0, seed=1)
    together = train_classifiers(train, test, [1e-5, 1e-3, 1e-1], sweep(), CPU)
    for lr, fit in zip([1e-5, 1e-3, 1e-1], together, strict=True):
        [alone] = train_classifiers(train, test, [lr], sweep(), CPU)
        assert torch.equal(alone.correct, fit.correct) and alone.loss == pytest.approx(fit.loss)
    assert len({round(fit.loss, 4) for fit in together}) == 3


def test_learning_rate_is_chosen_on_held_out_training_images():
    data = blobs(400, 1.5, seed=0)
    chosen_by = sweep(lrs=(1e-7, 3e-3, 1e4), holdout=0.25)
    lr, accuracy = choose_lr(data, chosen_by, CPU)
    assert lr == 3e-3
    order = torch.randperm(400, generator=torch.Generator().manual_seed(chosen_by.seed))
    [expected] = train_classifiers(data.rows(order[100:]), data.rows(order[:100]), [lr], chosen_by, CPU)
    assert accuracy == pytest.approx(expected.correct.double().mean().item())
    # Another seed holds out other images.
    assert choose_lr(data, sweep(lrs=(3e-3,), seed=1), CPU) != choose_lr(data, sweep(lrs=(3e-3,)), CPU)


def test_a_classifier_is_the_one_that_a_plain_loop_trains():
    train, test = blobs(300, 1.0, seed=0), blobs(100, 1.0, seed=1)
    mean, std = train.features.mean(dim=0), train.features.std(dim=0, correction=0)
    head = torch.nn.Linear(12, 4)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 15 * 2)
    generator = torch.Generator().manual_seed(3)
    for _ in range(15):
        for rows in torch.randperm(300, generator=generator).split(256):
            logits = head((train.features[rows] - mean) / std)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits, train.labels[rows]).backward()
            optimizer.step()
            schedule.step()
    logits = head((test.features - mean) / std)
    [fit] = train_classifiers(train, test, [1e-2], sweep(seed=3), CPU)
    assert fit.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, test.labels).item(), rel=1e-4)
    assert torch.equal(fit.correct, logits.argmax(dim=1) == test.labels)


def test_neither_chunks_nor_places_change_a_classifier(monkeypatch):
    train, test = blobs(300, 1.0, seed=0), blobs(90, 1.0, seed=1)
    whole = train_classifiers(train, test, SWEEP, sweep(), CPU)
    monkeypatch.setattr(linear, "_CHUNK_BYTES", 1000)
    monkeypatch.setattr(linear, "_RESIDENT_BYTES", 0)
    for one, other in zip(whole, train_classifiers(train, test, SWEEP, sweep(), CPU), strict=True):
        assert torch.equal(one.correct, other.correct) and one.loss == pytest.approx(other.loss, rel=1e-4)


def test_rows_are_a_view_of_their_own_images():
    data = blobs(50, 1.0, seed=0)
    some = data.rows(torch.tensor([4, 40, 7, 9])).rows(torch.tensor([2, 1]))
    assert some.features is data.features  # shared: a part of a large dataset costs nothing
    assert torch.equal(some.batch(torch.arange(2), CPU), data.features[[7, 40]])
    assert torch.equal(some.labels, data.labels[[7, 40]])


def test_held_out_images_are_not_trained_on():
    kept, held = hold_out(blobs(50, 1.0, seed=0), sweep(holdout=0.3))
    assert kept.chosen is not None and held.chosen is not None and len(held.labels) == 15
    assert sorted([*kept.chosen.tolist(), *held.chosen.tolist()]) == list(range(50))
    fewest = hold_out(blobs(2, 1.0, seed=0), sweep(holdout=0.999))
    assert [len(part.labels) for part in fewest] == [1, 1]


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_standardised_bytes_are_standardised_floats(offset):
    features = torch.randint(0, 256, (4000, 5), dtype=torch.uint8)
    features[:, 2] = 77
    labels = torch.zeros(4000, dtype=torch.int64)
    mean, scale = standardisation(LabelledFeatures(features.float() + offset, labels, 1), CPU)
    double = features.double() + offset
    torch.testing.assert_close(mean, double.mean(dim=0).float())
    expected = 1 / double.std(dim=0, correction=0)
    expected[2] = 0  # a constant
    torch.testing.assert_close(scale, expected.float(), rtol=1e-4, atol=0)
    if offset == 0:
        assert torch.equal(standardisation(LabelledFeatures(features, labels, 1), CPU)[1], scale)

from __future__ import annotations

import dataclasses
import math
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.training.worker import Worker
from pretrain.model.backbone import BackboneConfig
from pretrain.model.classifier import Classifier, ClassifierConfig
from pretrain.segment.upernet import (
    CPUSyncBatchNorm,
    FCNHead,
    FeaturePyramid,
    Segmenter,
    SegmenterOutput,
    UperHead,
    UperNetConfig,
    segmentation_loss,
    slide_logits,
    synchronize_batch_norm,
    window_starts,
)

WIDTH, CHANNELS, NUM_CLASSES = 24, 16, 5


def _classifier(depth: int = 3, image_size: int = 32) -> Classifier:
    torch.manual_seed(0)
    sizes = BackboneConfig(image_size=image_size, patch_size=8, width=WIDTH, depth=depth, heads=2)
    classifier = Classifier(ClassifierConfig(backbone=sizes, num_classes=0))
    for parameter in classifier.parameters():  # tables and biases start at zero, which would hide mistakes
        nn.init.normal_(parameter, std=0.1)
    return classifier


def _levels(grid: int, batch: int = 2) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(batch, WIDTH, side, side) for side in (4 * grid, 2 * grid, grid, grid // 2)]


def _theirs(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        key.replace(".bn.", ".batch_norm.").replace("conv_seg", "classifier"): x for key, x in state.items()
    }


def _randomize(module: nn.Module) -> None:
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5 if name.endswith("running_var") else -0.5, 1.0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grid", [6, 7])
def test_heads_equal_those_of_transformers(grid: int, training: bool) -> None:
    from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

    config = UperNetConfig(dropout=0.0, auxiliary_channels=12)
    decode = UperHead(WIDTH, CHANNELS, NUM_CLASSES, config).train(training)
    auxiliary = FCNHead(WIDTH, NUM_CLASSES, config).train(training)
    settings = SimpleNamespace(
        pool_scales=(1, 2, 3, 6), hidden_size=CHANNELS, num_labels=NUM_CLASSES, auxiliary_in_channels=None,
        auxiliary_channels=12, auxiliary_num_convs=1, auxiliary_concat_input=False,
    )  # fmt: skip
    oracles = UperNetHead(settings, [WIDTH] * 4), UperNetFCNHead(settings, [WIDTH] * 4)
    levels = _levels(grid)
    for ours, oracle in zip((decode, auxiliary), oracles, strict=True):
        _randomize(ours)
        oracle.load_state_dict(_theirs(ours.state_dict()))
        oracle.train(training)
        expected = oracle(list(levels))
        assert expected.shape[-1] == (4 * grid if ours is decode else grid)
        torch.testing.assert_close(ours(list(levels)), expected, rtol=1e-4, atol=1e-4)


def test_feature_pyramid_equals_that_of_transformers() -> None:
    from transformers.models.beit.modeling_beit import BeitFPNNeck

    ours, oracle = FeaturePyramid(WIDTH), BeitFPNNeck(SimpleNamespace(hidden_size=WIDTH))
    _randomize(ours)
    theirs = {
        "fpn1.0.": "fpn1.conv_transpose1.",
        "fpn1.1.": "fpn1.normalization.",
        "fpn1.3.": "fpn1.conv_transpose2.",
    }
    state = ours.state_dict()
    for name, other in theirs.items():
        state = {key.replace(name, other): value for key, value in state.items()}
    oracle.load_state_dict(state)
    maps = [torch.randn(2, WIDTH, 5, 5) for _ in range(4)]
    for level, expected in zip(ours(maps), oracle(maps), strict=True):
        torch.testing.assert_close(level, expected)


def test_levels_are_the_published_blocks_and_others_are_checked() -> None:
    assert UperNetConfig().levels(12) == (4, 6, 8, 12)
    assert UperNetConfig().levels(24) == (8, 12, 16, 24)
    for depth in range(1, 30):
        levels = UperNetConfig().levels(depth)
        assert list(levels) == sorted(levels) and levels[0] >= 1 and levels[-1] == depth
    assert UperNetConfig(layers=(1, 2, 2, 3)).levels(4) == (1, 2, 2, 3)
    for layers in ((0, 1, 2, 3), (1, 2, 3, 5), (2, 1, 3, 4)):
        with pytest.raises(InputError, match=r"four blocks of 1 to 4"):
            UperNetConfig(layers=layers).levels(4)


def test_segmenter_reads_the_raw_patches_of_its_blocks() -> None:
    classifier = _classifier(depth=4)
    pixels = torch.randn(2, 3, 32, 32)
    outputs = classifier.eval().layer_outputs(pixels)
    config = UperNetConfig(layers=(1, 2, 2, 3), channels=CHANNELS)
    segmenter = Segmenter(classifier, config, NUM_CLASSES).eval()
    maps = [outputs[i][:, 1:].transpose(1, 2).reshape(2, WIDTH, 4, 4) for i in (0, 1, 1, 2)]
    expected = segmenter.decode_head(segmenter.fpn(maps))
    out = segmenter(pixels)
    assert out.auxiliary is None and out.decode.shape == (2, NUM_CLASSES, 16, 16)
    torch.testing.assert_close(out.decode, expected)
    assert segmenter.segment(pixels).shape == (2, NUM_CLASSES, 32, 32)


@pytest.mark.parametrize("auxiliary_weight", [0.4, 0.0])
def test_every_parameter_is_trained(auxiliary_weight: float) -> None:
    config = UperNetConfig(layers=(1, 2, 2, 3), channels=CHANNELS, auxiliary_weight=auxiliary_weight)
    segmenter = Segmenter(_classifier(depth=4), config, NUM_CLASSES)
    out = segmenter(torch.randn(2, 3, 32, 32))
    loss = segmentation_loss(out, torch.randint(NUM_CLASSES, (2, 32, 32)), ignored=-1)
    (loss.decode + loss.auxiliary).backward()
    assert (out.auxiliary is not None) == (auxiliary_weight > 0)
    # Otherwise DistributedDataParallel stops.
    assert not [name for name, p in segmenter.named_parameters() if p.grad is None]


def test_crop_of_one_patch_is_refused() -> None:
    with pytest.raises(InputError, match=r"crops\.size"):
        Segmenter(_classifier(image_size=8), UperNetConfig(), NUM_CLASSES)


def test_loss_is_the_summed_cross_entropy_of_labelled_pixels() -> None:
    torch.manual_seed(0)
    output = SegmenterOutput(decode=torch.randn(2, 3, 4, 4), auxiliary=torch.randn(2, 3, 2, 2))
    classes = torch.randint(-1, 3, (2, 8, 8))
    loss = segmentation_loss(output, classes, ignored=-1)
    assert output.auxiliary is not None
    for logits, found in ((output.decode, loss.decode), (output.auxiliary, loss.auxiliary)):
        large = F.interpolate(logits, size=(8, 8), mode="bilinear", align_corners=False)
        expected, right, labelled = 0.0, 0, 0
        for b in range(2):
            for y in range(8):
                for x in range(8):
                    if (label := int(classes[b, y, x])) >= 0:
                        column = large[b, :, y, x]
                        expected += math.log(float(column.exp().sum())) - float(column[label])
                        right, labelled = right + int(column.argmax() == label), labelled + 1
        assert float(found) == pytest.approx(expected, rel=1e-4)
        if logits is output.decode:
            assert loss.sums().tolist()[2:] == [right, labelled]
    nothing = segmentation_loss(output, torch.full_like(classes, -1), ignored=-1)
    assert nothing.sums().tolist() == [0, 0, 0, 0]


def _position_dependent(windows: Tensor) -> Tensor:
    """Logits [n, 2, S, S] that depend on a pixel's place in its window, as a real model's do."""
    side = windows.shape[-1]
    ramp = torch.linspace(0, 1, side)
    return torch.stack([windows.sum(dim=1) * ramp, windows[:, 0] + ramp[:, None]], dim=1)


@pytest.mark.parametrize(("height", "width"), [(12, 12), (30, 17), (12, 40), (13, 12), (5, 31), (7, 6)])
def test_overlapping_windows_are_averaged_pixel_by_pixel(height: int, width: int) -> None:
    window, stride = 12, 8
    image = torch.randn(3, height, width)
    padded = torch.zeros(3, max(height, window), max(width, window))
    padded[:, :height, :width] = image
    votes: dict[tuple[int, int], list[Tensor]] = {}
    tops = {min(top, padded.shape[1] - window) for top in range(0, padded.shape[1], stride)}
    lefts = {min(left, padded.shape[2] - window) for left in range(0, padded.shape[2], stride)}
    for top in tops:
        for left in lefts:
            logits = _position_dependent(padded[None, :, top : top + window, left : left + window])[0]
            for y in range(window):
                for x in range(window):
                    votes.setdefault((top + y, left + x), []).append(logits[:, y, x])
    found = slide_logits(_position_dependent, image, window=window, stride=stride, batch=2)
    assert found.shape == (2, height, width)
    for y in range(height):
        for x in range(width):
            torch.testing.assert_close(found[:, y, x], torch.stack(votes[y, x]).mean(dim=0))


def test_windows_begin_as_published() -> None:
    assert window_starts(512, 512, 341) == [0]
    assert window_starts(683, 512, 341) == [0, 171]
    assert window_starts(2048, 512, 341) == [0, 341, 682, 1023, 1364, 1536]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Thread(Worker):
    """A worker that is a thread: sums meet at a barrier."""

    slots: list[Tensor | None]
    barrier_of_all: threading.Barrier

    def sum(self, tensor: Tensor) -> Tensor:
        self.slots[self.rank] = tensor.clone()
        self.barrier_of_all.wait(30)
        total = torch.stack([slot for slot in self.slots if slot is not None]).sum(dim=0)
        self.barrier_of_all.wait(30)
        return tensor.copy_(total)


def test_batch_norm_over_workers_equals_one_over_the_whole_batch() -> None:
    torch.manual_seed(0)
    whole = nn.BatchNorm2d(4)
    _randomize(whole)
    x = torch.randn(5, 4, 3, 2, requires_grad=True)
    weights = torch.randn(5, 4, 3, 2)
    state = {key: value.clone() for key, value in whole.state_dict().items()}
    expected = whole(x)
    (expected * weights).sum().backward()

    slots: list[Tensor | None] = [None, None]
    barrier = threading.Barrier(2)
    results: dict[int, tuple[nn.BatchNorm2d, Tensor, Tensor]] = {}

    def run(rank: int) -> None:
        rows = slice(0, 2) if rank == 0 else slice(2, 5)
        worker = _Thread(rank=rank, world_size=2, slots=slots, barrier_of_all=barrier)
        model = nn.Sequential(nn.BatchNorm2d(4))
        model[0].load_state_dict(state)
        synchronize_batch_norm(model, worker)
        assert isinstance(model[0], CPUSyncBatchNorm)
        part = x.detach()[rows].clone().requires_grad_()
        out = model(part)
        (out * weights[rows]).sum().backward()
        assert part.grad is not None
        results[rank] = (model[0], out.detach(), part.grad)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert x.grad is not None and whole.weight.grad is not None and whole.bias.grad is not None
    torch.testing.assert_close(torch.cat([results[0][1], results[1][1]]), expected.detach())
    torch.testing.assert_close(torch.cat([results[0][2], results[1][2]]), x.grad)
    gradients = [(norm.weight.grad, norm.bias.grad) for norm, _, _ in results.values()]
    torch.testing.assert_close(gradients[0][0] + gradients[1][0], whole.weight.grad)
    torch.testing.assert_close(gradients[0][1] + gradients[1][1], whole.bias.grad)
    for norm, _, _ in results.values():
        torch.testing.assert_close(norm.running_mean, whole.running_mean)
        torch.testing.assert_close(norm.running_var, whole.running_var)
        torch.testing.assert_close(norm.eval()(x), whole.eval()(x))
        whole.train()


def test_one_worker_keeps_its_batch_norm() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4))
    synchronize_batch_norm(model, Worker())
    assert type(model[0]) is nn.BatchNorm2d

from __future__ import annotations

import functools
import math
import operator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.training.worker import Worker
from tokenizer.model import quantizer
from tokenizer.model.quantizer import (
    CodeSums,
    CodeUsage,
    NormEMAQuantizer,
    code_sums,
    exact_float32,
    l2_normalize,
    nearest_code,
    sample_means,
    spherical_kmeans,
)

ALONE = Worker()


def unit_rows(rows: int, dim: int, seed: int) -> Tensor:
    return l2_normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)))


def ready_quantizer(codes: int = 12, dim: int = 5, seed: int = 0, **settings: float) -> NormEMAQuantizer:
    module = NormEMAQuantizer(codes, dim, kmeans_init=False, **settings)
    module.codebook.copy_(unit_rows(codes, dim, seed))
    return module.train()


# ------------------------------------------------------------------------------------------------ nearest


def test_nearest_code_equals_the_distance_table_in_double_precision():
    features = 3.0 * torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(1))
    codebook = unit_rows(20, 6, 2)
    codes = nearest_code(features, codebook)
    assert codes.shape == (4, 7) and codes.dtype == torch.int64
    z = features.double() / features.double().norm(dim=-1, keepdim=True)
    distances = ((z[..., None, :] - codebook.double()) ** 2).sum(-1)
    assert torch.equal(codes, distances.argmin(-1))


def test_nearest_code_does_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch):
    features, codebook = torch.randn(101, 8), unit_rows(16, 8, 0)
    whole = nearest_code(features, codebook)
    for elements in (1, 16, 16 * 7, 16 * 100):
        monkeypatch.setitem(quantizer._BLOCK_ELEMENTS, "cpu", elements)
        assert torch.equal(nearest_code(features, codebook), whole)
    assert nearest_code(features[:0], codebook).shape == (0,)


def test_the_first_of_equal_codes_is_chosen():
    codebook = unit_rows(6, 4, 3)[[2, 0, 1, 0, 2, 1]]
    assert nearest_code(codebook, codebook).tolist() == [0, 1, 2, 1, 0, 2]


def test_similarity_is_float32_under_autocast():
    """Two codes 0.1 % apart: bfloat16, with 8 bits, cannot tell them apart."""
    codebook = l2_normalize(torch.tensor([[1.0, 0.0], [1.0, 1e-3]]))
    features = l2_normalize(torch.tensor([[1.0, 1e-3], [1.0, 0.0]]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (features @ codebook.t()).argmax(-1).tolist() == [0, 0]
        assert nearest_code(features, codebook).tolist() == [1, 0]
        out = NormEMAQuantizer(4, 2, kmeans_init=False)(features.bfloat16())
    assert out.quantized.dtype == out.loss.dtype == torch.float32


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_exact_float32_puts_the_settings_back(precision: str):
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        outside = [setting.fp32_precision for setting in settings]
        with pytest.raises(KeyError), exact_float32(torch.device("cpu")):
            assert [setting.fp32_precision for setting in settings] == ["ieee", "ieee"]
            raise KeyError
        assert [setting.fp32_precision for setting in settings] == outside
    finally:
        torch.set_float32_matmul_precision(before)


# ------------------------------------------------------------------------------------------------ forward


def test_forward_gives_the_nearest_codes_and_the_mean_squared_distance():
    module = ready_quantizer(beta=0.25)
    features = 2.0 * torch.randn(3, 8, 5)
    out = module(features)
    z = l2_normalize(features)
    assert torch.equal(out.codes, nearest_code(features, module.codebook))
    torch.testing.assert_close(out.quantized, module.codebook[out.codes])
    expected = 0.25 * ((z - module.codebook[out.codes]) ** 2).sum() / (3 * 8 * 5)
    torch.testing.assert_close(out.loss, expected)


def test_gradient_passes_straight_through_to_the_normalised_features():
    module = ready_quantizer()
    features = torch.randn(9, 5, requires_grad=True)
    weights = torch.randn(9, 5)
    (module(features).quantized * weights).sum().backward()
    copy = features.detach().clone().requires_grad_()
    (l2_normalize(copy) * weights).sum().backward()
    torch.testing.assert_close(features.grad, copy.grad)


def test_statistics_equal_the_one_hot_product():
    tokens, codes = unit_rows(50, 6, 4), torch.randint(9, (50,))
    found = code_sums(tokens, codes, 11)
    one_hot = F.one_hot(codes, 11).float()
    assert torch.equal(found.counts, one_hot.sum(0))
    torch.testing.assert_close(found.sums, one_hot.t() @ tokens)


def test_update_equals_a_loop_over_codes():
    module = ready_quantizer(codes=30, decay=0.9)
    features = torch.randn(25, 5)
    out = module(features)
    old, old_sizes = module.codebook.clone().double(), module.cluster_size.clone()
    module.update_(out.code_sums, ALONE)
    z = features.double() / features.double().norm(dim=1, keepdim=True)
    for code in range(30):
        mine = z[out.codes == code]
        expected = old[code]
        if len(mine):
            centroid = mine.mean(0) / mine.mean(0).norm()
            expected = 0.9 * old[code] + 0.1 * centroid
            expected = expected / expected.norm()
        torch.testing.assert_close(module.codebook[code].double(), expected, atol=1e-6, rtol=0)
        assert float(module.cluster_size[code]) == pytest.approx(0.9 * old_sizes[code] + 0.1 * len(mine))
    unused = torch.bincount(out.codes, minlength=30) == 0
    assert unused.any() and torch.equal(module.codebook[unused].double(), old[unused])


def test_micro_batches_count_as_one_batch():
    features = torch.randn(40, 5)
    whole, parts = ready_quantizer(), ready_quantizer()
    whole.update_(whole(features).code_sums, ALONE)
    sums = [parts(part).code_sums for part in features.split(7)]
    parts.update_(functools.reduce(operator.add, sums), ALONE)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], tensor, atol=1e-6, rtol=1e-6)


# ------------------------------------------------------------------------------------------------ k-means


def slow_kmeans(tokens: np.ndarray, means: np.ndarray, iterations: int) -> np.ndarray:
    for _ in range(iterations):
        chosen = [int(np.argmax([token @ mean for mean in means])) for token in tokens]
        moved = means.copy()
        for cluster in set(chosen):
            total = sum(token for token, c in zip(tokens, chosen, strict=True) if c == cluster)
            moved[cluster] = total / np.linalg.norm(total)
        means = moved
    return means


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_kmeans_equals_a_loop(iterations: int):
    tokens = unit_rows(60, 4, 5)
    means = unit_rows(8, 4, 6)
    found = spherical_kmeans(tokens, means, iterations)
    expected = slow_kmeans(tokens.double().numpy(), means.double().numpy(), iterations)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_a_cluster_without_tokens_keeps_its_mean():
    tokens = l2_normalize(torch.tensor([1.0, 0.0, 0.0]) + 0.1 * torch.randn(30, 3))
    means = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]])
    found = spherical_kmeans(tokens, means)
    assert torch.equal(found[1], means[1]) and not torch.equal(found[0], means[0])


def test_kmeans_init_starts_the_codebook_once_and_for_a_seed():
    tokens = torch.randn(200, 5)
    codebooks = []
    for seed in (0, 0, 1):
        module = NormEMAQuantizer(20, 5)
        assert module.needs_kmeans and module.codebook.isnan().all()
        torch.rand(len(codebooks))  # the global generator plays no part
        assert module.kmeans_init_(tokens, ALONE, seed=seed) == 200
        assert not module.needs_kmeans and not module.cluster_size.any()
        codebooks.append(module.codebook.clone())
    assert torch.equal(codebooks[0], codebooks[1]) and not torch.equal(codebooks[0], codebooks[2])
    torch.testing.assert_close(codebooks[0].norm(dim=1), torch.ones(20))


def test_a_forgotten_start_is_loud():
    assert NormEMAQuantizer(8, 4)(torch.randn(5, 4)).loss.isnan()


def test_with_fewer_tokens_than_codes_all_codes_differ():
    tokens = unit_rows(7, 5, 8)
    means = sample_means(tokens, 40, torch.Generator().manual_seed(0))
    assert len({tuple(row.tolist()) for row in means}) == 40
    torch.testing.assert_close(means.norm(dim=1), torch.ones(40))
    assert {tuple(row.tolist()) for row in tokens} <= {tuple(row.tolist()) for row in means}
    with pytest.raises(ValueError, match="at least one token"):
        NormEMAQuantizer(8, 5).kmeans_init_(torch.zeros(0, 5), ALONE)


# ------------------------------------------------------------------------------------------------ restart


@pytest.mark.parametrize(("steps", "dead"), [(9, [9]), (8, [8, 9]), (1, list(range(1, 10)))])
def test_restart_moves_exactly_the_codes_not_chosen_lately(steps: int, dead: list[int]):
    """Code c was chosen once, c updates before the last one; code 9 never."""
    module = ready_quantizer(codes=10, dim=4)
    for ago in range(40, -1, -1):
        counts = torch.zeros(10)
        if ago < 9:
            counts[ago] = 1.0
        module.update_(CodeSums(counts=counts, sums=torch.zeros(10, 4)), ALONE)
    old = module.codebook.clone()
    features = 5.0 * torch.randn(30, 4)
    assert module.restart_dead_(features, ALONE, steps=steps, seed=3) == len(dead)
    moved = (module.codebook != old).any(dim=1).nonzero().flatten().tolist()
    tokens = {tuple(row.tolist()) for row in l2_normalize(features)}
    assert moved == dead and {tuple(module.codebook[code].tolist()) for code in dead} <= tokens
    # What was moved counts as chosen now, so the same step does not move it again.
    assert module.restart_dead_(features, ALONE, steps=steps, seed=4) == 0


# ------------------------------------------------------------------------------------------------ usage


def test_usage_and_perplexity():
    usage = CodeUsage(8)
    assert usage.perplexity == 0.0 and usage.used_fraction == 0.0
    usage.add(torch.tensor([[0, 0], [0, 0]]))
    assert usage.perplexity == 1.0 and usage.used_fraction == 1 / 8
    usage.add(torch.tensor([3, 3, 3, 3]))
    assert usage.perplexity == pytest.approx(2.0) and usage.used_fraction == 2 / 8
    everything = CodeUsage(8)
    everything.add(torch.arange(8).repeat(5))
    assert everything.perplexity == pytest.approx(8.0) and everything.used_fraction == 1.0
    skewed = CodeUsage(8)
    skewed.add(torch.tensor([0, 0, 0, 1]))
    assert skewed.perplexity == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pretrain.evals.knn import knn_predictions
from pretrain.evals.linear import LabelledFeatures

CPU = torch.device("cpu")


def clusters(num: int, seed: int, classes: int = 5, width: int = 8) -> LabelledFeatures:
    """Directions around fixed ones, of lengths that must not matter."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(0, classes, (num,), generator=generator)
    features = centres[labels] + 1.5 * torch.randn(num, width, generator=generator)
    return LabelledFeatures(features * 10 ** torch.randn(num, 1, generator=generator), labels, classes)


def voted(bank: LabelledFeatures, query: Tensor, k: int, temperature: float) -> int:
    """One query, written out."""
    similarities = [float(query @ other / (query.norm() * other.norm())) for other in bank.features.double()]
    nearest = sorted(range(len(similarities)), key=lambda i: -similarities[i])[:k]
    votes = [0.0] * bank.num_classes
    for i in nearest:
        votes[int(bank.labels[i])] += math.exp(similarities[i] / temperature)
    return votes.index(max(votes))


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_predictions_are_the_written_out_vote_whatever_the_chunks(temperature):
    bank, queries = clusters(120, 0), clusters(40, 1)
    ks = (20, 1, 7, 500)  # in any order; more than there are take all
    expected = [[voted(bank, query, k, temperature) for query in queries.features.double()] for k in ks]
    assert len({tuple(row) for row in expected}) > 1  # k matters here
    for queries_at_once, bank_at_once in ((1024, 16384), (7, 11), (40, 120), (1, 3)):
        sizes = {"queries_at_once": queries_at_once, "bank_at_once": bank_at_once}
        found = knn_predictions(bank, queries, ks, CPU, temperature=temperature, **sizes)
        assert found.tolist() == expected


def test_a_part_of_a_bank_votes_alone():
    bank, queries = clusters(60, 0), clusters(30, 1)
    some = torch.tensor([3, 59, 17, 20, 8])
    alone = LabelledFeatures(bank.features[some], bank.labels[some], bank.num_classes)
    found = knn_predictions(bank.rows(some), queries, (1, 3), CPU)
    assert torch.equal(found, knn_predictions(alone, queries, (1, 3), CPU))

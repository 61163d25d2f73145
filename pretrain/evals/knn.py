"""Weighted k nearest neighbours: what frozen features say of the labels when nothing is trained on them.

As in Wu et al. 2018 (arXiv 1805.01978, §3.4), which DINO (arXiv 2104.14294) evaluates with too: cosine
similarity, and a vote of exp(similarity / 0.07) for the class of each of the k nearest training images.
The paper reports no such figure.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.training.metrics import Progress
from pretrain.evals.linear import LabelledFeatures

TEMPERATURE = 0.07


@torch.inference_mode()
def knn_predictions(
    bank: LabelledFeatures,
    queries: LabelledFeatures,
    ks: Sequence[int],
    device: torch.device | str,
    *,
    temperature: float = TEMPERATURE,
    progress: Progress | None = None,
    queries_at_once: int = 1024,
    bank_at_once: int = 16384,
) -> Tensor:
    """The class of each query by its k nearest of the bank, int64 [len(ks), queries], for every k of `ks`.

    A k beyond the size of the bank takes all of it. Of equally near images at the k-th place any may vote;
    float32 makes some equal where all features point one way, as an untrained backbone's do. Memory does not
    grow with the bank: it is gone through for every few queries, of which the nearest so far are kept; at the
    default sizes similarities take 64 MiB.
    """
    bank, queries = bank.near(device), queries.near(device)
    predicted = torch.empty(len(ks), len(queries.labels), dtype=torch.int64)
    for asked in queries.chunks(queries_at_once):
        similarities, labels = _nearest(bank, queries, asked, max(ks), device, bank_at_once)
        votes = (similarities / temperature).exp()
        for i, k in enumerate(ks):
            per_class = torch.zeros(len(asked), bank.num_classes, device=device)
            per_class.scatter_add_(1, labels[:, :k], votes[:, :k])
            predicted[i, asked] = per_class.argmax(dim=1).cpu()
        if progress is not None:
            progress.update(len(asked))
    return predicted


def _nearest(
    bank: LabelledFeatures,
    queries: LabelledFeatures,
    asked: Tensor,
    k: int,
    device: torch.device | str,
    bank_at_once: int,
) -> tuple[Tensor, Tensor]:
    """Similarities and labels [len(asked), k] of the nearest in the bank, the nearest first."""
    directions = F.normalize(queries.batch(asked, device), dim=1)
    best = torch.empty(len(asked), 0, device=device)
    labels = torch.empty(len(asked), 0, dtype=torch.int64, device=device)
    for rows in bank.chunks(bank_at_once):
        similarities = directions @ F.normalize(bank.batch(rows, device), dim=1).T
        near, place = similarities.topk(min(k, len(rows)), dim=1)
        best = torch.cat([best, near], dim=1)
        labels = torch.cat([labels, bank.labels[rows].to(device)[place]], dim=1)
        best, place = best.topk(min(k, best.shape[1]), dim=1)
        labels = labels.gather(1, place)
    return best, labels

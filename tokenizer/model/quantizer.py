"""The codebook of VQ-KD: nearest code by cosine, straight-through gradient, moving average (§2.2, Eq. 1-2).

`forward` is a pure function of its input and the codebook. What changes the codebook (k-means start, update,
restart of dead codes) are methods that the training loop calls, once per optimizer step and on all ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.training.worker import Worker

# Shapes below: M tokens, K codes (codebook_size), D dimensions (code_dim).

KMEANS_TOKENS_PER_CODE = 4
"""Tokens per code that k-means starts from; the reference starts 8,192 codes from 12,544 tokens."""

_BLOCK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 24}
"""Size of one block of the M x K similarity table. On CPU 2 MB, which stays in the cache: 0.6 of the time of
one large product (1,568 tokens, 8,192 codes). On a GPU 67 MB: 2,048 tokens at 8,192 codes."""


@contextlib.contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Inside, matrix products are float32 for real: autocast off, TF32 and bfloat16 shortcuts off.

    DEVIATION: the reference takes the similarity in half precision under autocast, so its codes differ from
    a float32 tokenizer's wherever two codes are nearly as close.
    """
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


def l2_normalize(x: Tensor) -> Tensor:
    """Rows of unit length along the last dimension, in float32; zero stays zero."""
    return F.normalize(x.float(), dim=-1)


def nearest_code(features: Tensor, codebook: Tensor) -> Tensor:
    """Index of the closest code for each feature, by cosine similarity (Eq. 1); the first index on ties.

    features [..., D] need not be normalised; codebook [K, D] must be. The result is [...] int64. On unit
    vectors the squared distance is 2 - 2 cos, so one matrix product replaces the distance table. Always
    float32, in blocks of one shape: memory does not grow with M x K, and the same kernel runs for any M.
    """
    flat = l2_normalize(features).flatten(0, -2)
    rows = max(1, _BLOCK_ELEMENTS.get(features.device.type, 1 << 24) // codebook.shape[0])
    padded = F.pad(flat, (0, 0, 0, -flat.shape[0] % rows))
    codes = torch.empty(padded.shape[0], dtype=torch.int64, device=flat.device)
    with exact_float32(features.device):
        for first in range(0, padded.shape[0], rows):
            block = slice(first, first + rows)
            codes[block] = (padded[block] @ codebook.float().t()).argmax(dim=-1)
    return codes[: flat.shape[0]].view(features.shape[:-1])


# ------------------------------------------------------------------------------------------------ statistics


@dataclass(frozen=True, kw_only=True)
class CodeSums:
    """Per code, the number of tokens that chose it and their sum: what moves the codebook.

    Addable, so that the micro-batches of one optimizer step count as the one batch they are.
    """

    counts: Tensor
    """[K] float32, exact below 2^24."""
    sums: Tensor
    """[K, D] float32, sums of normalised tokens."""

    def __add__(self, other: CodeSums) -> CodeSums:
        return CodeSums(counts=self.counts + other.counts, sums=self.sums + other.sums)


def code_sums(tokens: Tensor, codes: Tensor, codebook_size: int) -> CodeSums:
    """Counts and sums of normalised tokens [M, D] by their codes [M]; no M x K one-hot table is built."""
    # Not bincount, which waits for the GPU to learn how long its result is.
    counts = tokens.new_zeros(codebook_size).index_add_(0, codes, torch.ones_like(codes, dtype=tokens.dtype))
    sums = tokens.new_zeros(codebook_size, tokens.shape[1]).index_add_(0, codes, tokens)
    return CodeSums(counts=counts, sums=sums)


class CodeUsage:
    """Counts of chosen codes over as many batches as are added: an epoch, a validation set."""

    def __init__(self, codebook_size: int, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(codebook_size, dtype=torch.int64, device=device)

    def add(self, codes: Tensor) -> None:
        """Count codes of any shape."""
        flat = codes.flatten().to(self.counts.device)
        self.counts.index_add_(0, flat, torch.ones_like(flat))

    def gather(self, worker: Worker) -> CodeUsage:
        """The same over all ranks; the local counts stay as they are."""
        total = CodeUsage(self.counts.shape[0], self.counts.device)
        total.counts = worker.sum(self.counts.clone())
        return total

    @property
    def used_fraction(self) -> float:
        """Fraction of codes hit at least once: the paper's codebook usage, over validation (Table 4)."""
        return int((self.counts > 0).sum()) / self.counts.shape[0]

    @property
    def perplexity(self) -> float:
        """exp of the entropy of the code frequencies: K when all are equally frequent, 1 after a collapse.

        The reference logs usage only, which one hit in an epoch satisfies. 0.0 when nothing was added.
        """
        counts = self.counts.double()
        if counts.sum() == 0:
            return 0.0
        frequencies = counts[counts > 0] / counts.sum()
        return float(torch.exp(-(frequencies * frequencies.log()).sum()))


# ------------------------------------------------------------------------------------------------ k-means


def spherical_kmeans(tokens: Tensor, means: Tensor, iterations: int = 10) -> Tensor:
    """Cosine k-means on the unit sphere: tokens [M, D] and starting means [K, D], unit rows -> means [K, D].

    A cluster that loses all its tokens keeps its mean.
    """
    for _ in range(iterations):
        sums = code_sums(tokens, nearest_code(tokens, means), means.shape[0])
        means = _updated(means, l2_normalize(_centroids(sums)), sums.counts)
    return means


def sample_means(tokens: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Starting means [count, D] for k-means: tokens drawn without replacement.

    DEVIATION: with fewer tokens than codes the reference draws with replacement, and the second of two equal
    codes can never be chosen. Here the repeats are moved a little, so that they can part.
    """
    order = torch.randperm(tokens.shape[0], generator=generator).to(tokens.device)
    drawn = tokens[order[:count]]
    missing = count - drawn.shape[0]
    if missing == 0:
        return drawn
    again = torch.randint(tokens.shape[0], (missing,), generator=generator).to(tokens.device)
    noise = torch.randn(missing, tokens.shape[1], generator=generator).to(tokens.device)
    moved = l2_normalize(tokens[again] + 0.01 * noise)
    return torch.cat([drawn, moved])


# ------------------------------------------------------------------------------------------------ the module


@dataclass(frozen=True, kw_only=True)
class QuantizerOutput:
    """Result of quantising features [..., D]."""

    quantized: Tensor
    """[..., D] float32: the chosen codes; its gradient goes to the features unchanged (straight-through)."""
    codes: Tensor
    """[...] int64."""
    loss: Tensor
    """Scalar: beta times the commitment of the features to their codes."""
    code_sums: CodeSums | None
    """For `update_`; only in training mode."""


class Codebook(nn.Module):
    """Unit-norm codes [K, D] and whether they mean anything yet; buffers: no gradient reaches them."""

    weight: Tensor
    initted: Tensor

    def __init__(self, codebook_size: int, code_dim: int, *, wait_for_kmeans: bool) -> None:
        super().__init__()
        weight = l2_normalize(torch.randn(codebook_size, code_dim))
        if wait_for_kmeans:
            # DEVIATION: not the reference's zeros. A loop that forgets k-means gets a NaN loss at once, not a
            # codebook of one code.
            weight = torch.full_like(weight, torch.nan)
        self.register_buffer("weight", weight)
        self.register_buffer("initted", torch.tensor([0.0 if wait_for_kmeans else 1.0]))


class NormEMAQuantizer(nn.Module):
    """Quantizer whose codes follow the tokens that choose them by a moving average, on the unit sphere.

    DEVIATION: neither mode of `forward` changes any state. The reference updates the codebook inside forward,
    runs k-means even in evaluation, and keeps (and all-reduces) usage statistics in evaluation too.
    """

    cluster_size: Tensor

    def __init__(
        self,
        codebook_size: int,
        code_dim: int,
        *,
        beta: float = 1.0,
        decay: float = 0.99,
        kmeans_init: bool = True,
    ) -> None:
        super().__init__()
        self.beta = beta
        self.decay = decay
        self.embedding = Codebook(codebook_size, code_dim, wait_for_kmeans=kmeans_init)
        self.register_buffer("cluster_size", torch.zeros(codebook_size))

    @property
    def codebook(self) -> Tensor:
        """[K, D] float32, unit rows."""
        return self.embedding.weight

    @property
    def codebook_size(self) -> int:
        """K."""
        return self.codebook.shape[0]

    @property
    def needs_kmeans(self) -> bool:
        """True until the codebook has been started, here or in a loaded state. Waits for the device."""
        return not bool(self.embedding.initted.item())

    def forward(self, features: Tensor) -> QuantizerOutput:
        """features [..., D] -> codes, quantized features and commitment loss, all in float32.

        The loss is the mean over all elements, also over D: a weight of beta / D against Eq. 2, as in the
        reference. Eq. 2's codebook term has no counterpart: the moving average takes its place.
        """
        with torch.autocast(features.device.type, enabled=False):
            z = l2_normalize(features)
            codes = nearest_code(z.detach(), self.codebook)
            nearest = self.codebook[codes]
            loss = self.beta * F.mse_loss(z, nearest)
            quantized = z + (nearest - z).detach()
            chosen = None
            if self.training:
                tokens = z.detach().flatten(0, -2)
                chosen = code_sums(tokens, codes.flatten(), self.codebook_size)
        return QuantizerOutput(quantized=quantized, codes=codes, loss=loss, code_sums=chosen)

    @torch.no_grad()
    def update_(self, sums: CodeSums, worker: Worker) -> Tensor:
        """Move every code that was chosen towards its tokens: w <- norm(decay w + (1 - decay) norm(mean)).

        `sums` adds up the `code_sums` of this rank's micro-batches since the last call; all ranks call
        together and hold the same codebook afterwards. Returns how many tokens chose each code, int64 [K].
        As in the reference this is an average of normalised batch centroids at one rate, however many tokens
        chose the code, not VQ-VAE's average of sums and counts.
        DEVIATION: one process is enough; the reference trains under torch.distributed only.
        """
        packed = worker.sum(torch.cat([sums.sums, sums.counts[:, None]], dim=1))
        total = CodeSums(sums=packed[:, :-1], counts=packed[:, -1])
        self.cluster_size.mul_(self.decay).add_(total.counts, alpha=1.0 - self.decay)
        towards = l2_normalize(_centroids(total))
        moved = l2_normalize(self.decay * self.codebook + (1.0 - self.decay) * towards)
        self.codebook.copy_(_updated(self.codebook, moved, total.counts))
        return total.counts.long()

    @torch.no_grad()
    def kmeans_init_(
        self, features: Tensor, worker: Worker, *, seed: int = 0, start: Tensor | None = None
    ) -> int:
        """Start the codebook from features [M, D] of every rank; returns how many tokens there were in all.

        K-means runs once, on rank 0, and its result goes to everybody: 10 iterations from `start` [K, D], or
        else from tokens drawn with `seed`.
        DEVIATION: the reference runs it on each rank over that rank's first micro-batch, so that ranks begin
        with different codebooks (0 % equal codes; about 600 steps until they agree).
        """
        tokens = worker.gather(l2_normalize(features))
        if tokens.shape[0] == 0:
            raise ValueError("k-means needs at least one token")
        if worker.is_main:
            if start is None:
                generator = torch.Generator().manual_seed(seed)
                start = sample_means(tokens, self.codebook_size, generator)
            self.codebook.copy_(spherical_kmeans(tokens, start))
        worker.broadcast(self.codebook)
        self.embedding.initted.fill_(1.0)
        return tokens.shape[0]

    @torch.no_grad()
    def restart_dead_(self, features: Tensor, worker: Worker, *, steps: int, seed: int) -> int:
        """Give codes not chosen in the last `steps` updates new places, at features [M, D]; returns how many.

        Features come from all ranks, the drawing from `seed` (use the step), the result from rank 0. A moved
        code counts as chosen once, so that it has time to be found. Not in the reference, where a code that
        k-means puts out of reach stays dead forever; off by default.
        """
        tokens = worker.gather(l2_normalize(features))
        moved = torch.zeros(1, dtype=torch.int64, device=self.codebook.device)
        if worker.is_main:
            # Chosen once, n updates ago, leaves (1 - decay) decay^n; the half step keeps rounding out of it.
            alive = (1.0 - self.decay) * self.decay ** (steps - 0.5)
            dead = (self.cluster_size < alive).nonzero().flatten()
            order = torch.randperm(tokens.shape[0], generator=torch.Generator().manual_seed(seed))
            order = order[: dead.shape[0]].to(tokens.device)
            dead = dead[: order.shape[0]]
            self.codebook[dead] = tokens[order]
            self.cluster_size[dead] = 1.0 - self.decay
            moved.fill_(dead.shape[0])
        worker.broadcast(self.codebook)
        worker.broadcast(self.cluster_size)
        return int(worker.broadcast(moved))

    @torch.no_grad()
    def check_equal_on_all_ranks(self, worker: Worker) -> None:
        """RuntimeError, naming the ranks, unless every rank holds rank 0's codebook bit for bit."""
        bits = self.codebook.view(torch.int32).flatten().long()
        weights = torch.arange(1, 2 * bits.shape[0], 2, device=bits.device)
        checksums = worker.gather((bits * weights).sum()[None])
        differing = (checksums != checksums[0]).nonzero().flatten().tolist()
        if differing:
            raise RuntimeError(f"the codebooks of ranks {differing} differ from rank 0's")


def _centroids(sums: CodeSums) -> Tensor:
    return sums.sums / sums.counts.clamp(min=1.0)[:, None]


def _updated(old: Tensor, new: Tensor, counts: Tensor) -> Tensor:
    """`new` where a code was chosen, `old` elsewhere."""
    return torch.where(counts[:, None] > 0, new, old)

"""Vector-quantised knowledge distillation (VQ-KD, §2.2): encode, quantise, predict a teacher's features.

Parameter names are those of the published `vqkd_encoder_*` checkpoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.training.worker import Worker
from tokenizer.model.quantizer import (
    KMEANS_TOKENS_PER_CODE,
    CodeSums,
    NormEMAQuantizer,
    QuantizerOutput,
    exact_float32,
)
from tokenizer.model.vit import TransformerSize, VisionTransformer, init_linear

# Shapes below: B images, S image size, N = grid^2 patches, K codes, D code_dim, T teacher's dimension.


ENCODERS = {
    "base": TransformerSize(width=768, depth=12, heads=12),
    "small": TransformerSize(width=384, depth=12, heads=6),
}
"""The paper's encoder, and a smaller one for less data."""


@dataclass(frozen=True, kw_only=True)
class VQKDConfig:
    """The tokenizer's architecture and codebook. Defaults: the paper's 3 x 768 x 12 tokenizer (Table 8)."""

    image_size: int = 224
    """Side of the square input, in pixels."""
    patch_size: int = 16
    """Side of a patch, in pixels; image_size / patch_size is the side of the grid of codes."""
    encoder: Literal["base", "small"] = "base"
    """Size of the encoder: base is 768 wide, 12 deep, 12 heads; small is 384 wide, 12 deep, 6 heads."""
    width: int | None = None
    """Encoder width, instead of the preset's."""
    depth: int | None = None
    """Encoder blocks, instead of the preset's."""
    heads: int | None = None
    """Encoder attention heads, instead of the preset's; must divide the width."""
    decoder_depth: int = 3
    """Decoder blocks: 1, 3 or 6 (Table 4). Deeper: better reconstruction, fewer codes used."""
    decoder_width: int | None = None
    """Decoder width; null: the encoder's."""
    decoder_heads: int | None = None
    """Decoder attention heads; null: the encoder's."""
    codebook_size: int = 8192
    """Number of codes (K), at most 65,536."""
    code_dim: int = 32
    """Dimension of a code (D)."""
    ema_decay: float = 0.99
    """How much of itself a code keeps in one step; the rest moves to the tokens that chose it."""
    beta: float = 1.0
    """Weight of the commitment loss: a mean over code_dim as in the reference, so 1 / code_dim of Eq. 2's."""
    kmeans_init: bool = True
    """Start the codebook by k-means over the first tokens, else from random directions."""
    restart_dead_codes: bool = False
    """Move codes that nothing chooses to live tokens. Off in the reference; meant for small data."""
    restart_every: int = 200
    """Steps between restarts, and how long a code may go unchosen; with restart_dead_codes only."""

    def __post_init__(self) -> None:
        if self.patch_size < 1 or self.image_size < 1 or self.image_size % self.patch_size:
            raise InputError(
                f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}; change either"
            )
        for what, size in (("encoder", self.encoder_size), ("decoder", self.decoder_size)):
            if min(size.width, size.depth, size.heads) < 1 or size.width % size.heads:
                raise InputError(
                    f"the {what} has width {size.width}, depth {size.depth}, {size.heads} heads; "
                    "all must be positive and the heads must divide the width"
                )
        if not 2 <= self.codebook_size <= 65536:
            raise InputError(
                f"codebook_size {self.codebook_size} is not 2 to 65536: codes are stored as uint16"
            )
        if self.code_dim < 1 or not 0.0 <= self.ema_decay < 1.0 or self.beta < 0.0 or self.restart_every < 1:
            raise InputError(
                f"code_dim {self.code_dim} and restart_every {self.restart_every} must be at least 1, "
                f"ema_decay {self.ema_decay} in [0, 1), beta {self.beta} not negative"
            )

    @property
    def grid(self) -> int:
        """Codes along one side: 14 for 224 / 16."""
        return self.image_size // self.patch_size

    @property
    def encoder_size(self) -> TransformerSize:
        """The preset, with whatever was set by hand."""
        sizes = {"width": self.width, "depth": self.depth, "heads": self.heads}
        given = {name: size for name, size in sizes.items() if size is not None}
        return dataclasses.replace(ENCODERS[self.encoder], **given)

    @property
    def decoder_size(self) -> TransformerSize:
        """The encoder's width and heads unless set."""
        encoder = self.encoder_size
        return TransformerSize(
            width=encoder.width if self.decoder_width is None else self.decoder_width,
            depth=self.decoder_depth,
            heads=encoder.heads if self.decoder_heads is None else self.decoder_heads,
        )

    def resolved(self) -> VQKDConfig:
        """The same with every size written out: what artifacts store, free of presets that may change."""
        encoder, decoder = self.encoder_size, self.decoder_size
        return dataclasses.replace(
            self,
            width=encoder.width,
            depth=encoder.depth,
            heads=encoder.heads,
            decoder_width=decoder.width,
            decoder_heads=decoder.heads,
        )


def channels_first(pixels: Tensor, image_size: int) -> Tensor:
    """uint8 images [B, 3, S, S] from [B, 3, S, S] or [B, S, S, 3] of side `image_size`, without a copy.

    Raises InputError for any other shape or type: nothing guesses a range from values.
    """
    if pixels.dtype != torch.uint8:
        raise InputError(f"images must be uint8, 0 to 255, not {pixels.dtype}; do not normalise them first")
    shape = tuple(pixels.shape)
    if len(shape) == 4 and shape[1:] == (3, image_size, image_size):
        return pixels
    if len(shape) == 4 and shape[1:] == (image_size, image_size, 3):
        return pixels.permute(0, 3, 1, 2)
    raise InputError(
        f"images of shape {list(shape)} do not fit image size {image_size}; "
        f"give [B, 3, {image_size}, {image_size}] or [B, {image_size}, {image_size}, 3]"
    )


def normalize_pixels(pixels: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] or [B, S, S, 3] -> float32 [B, 3, S, S] in [-1, 1], on the same device.

    DEVIATION: the reference guesses the range from each batch's maximum, and misreads one of zeros and ones.
    """
    return channels_first(pixels, pixels.shape[2]).float() / 127.5 - 1.0


def teacher_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean over [B, N] of 1 - cos(predicted, target), both [B, N, T]: Eq. 2 as a mean, its sign turned."""
    return 1.0 - F.cosine_similarity(predicted.float(), target.float(), dim=-1).mean()


@dataclass(frozen=True, kw_only=True)
class VQKDOutput:
    """One training or validation pass."""

    loss: Tensor
    """Scalar: rec_loss + emb_loss."""
    rec_loss: Tensor
    """Scalar: 1 - cosine to the teacher."""
    emb_loss: Tensor
    """Scalar: commitment, beta included."""
    codes: Tensor
    """[B, N] int64."""
    features: Tensor
    """[B, N, D] float32, before normalisation, detached: what `restart_dead_` draws from."""
    code_sums: CodeSums | None
    """For the codebook's update, after the optimizer's step; None in evaluation mode."""


@dataclass(frozen=True, kw_only=True)
class CodebookStart:
    """Report of a k-means start."""

    tokens: int
    """Tokens of all ranks."""
    wanted: int
    """Four per code."""
    batches: int
    """Batches that each rank took them from: more than one where one holds too few."""

    @property
    def enough(self) -> bool:
        """True if there were four tokens per code."""
        return self.tokens >= self.wanted

    def __str__(self) -> str:
        text = f"k-means started the codebook from {self.tokens:,} tokens"
        if self.batches > 1:
            text += f", gathered over {self.batches} batches because one has too few"
        return text if self.enough else f"{text}; {self.wanted:,} were wanted, so expect unused codes"


class VQKD(nn.Module):
    """Encoder, quantizer and decoder. The teacher is no part of it: its targets come as an argument.

    `target_dim` is the teacher's dimension; None leaves the decoder out, which is enough to encode.
    """

    def __init__(self, config: VQKDConfig, target_dim: int | None) -> None:
        super().__init__()
        self.config = config
        encoder, decoder = config.encoder_size, config.decoder_size
        self.encoder = VisionTransformer(
            encoder, grid=config.grid, patch_size=config.patch_size, in_channels=3
        )
        self.encode_task_layer = _task_layer(encoder.width, config.code_dim)
        self.quantize = NormEMAQuantizer(
            config.codebook_size,
            config.code_dim,
            beta=config.beta,
            decay=config.ema_decay,
            kmeans_init=config.kmeans_init,
        )
        if target_dim is not None:
            self.decoder = VisionTransformer(
                decoder, grid=config.grid, patch_size=1, in_channels=config.code_dim
            )
            self.decode_task_layer = _task_layer(decoder.width, target_dim)

    def forward(self, pixels: Tensor, target: Tensor) -> VQKDOutput:
        """pixels [B, 3, S, S] float in [-1, 1], target [B, N, T] -> losses and codes. Changes no state.

        A training step is: forward (per micro-batch), backward, optimizer step,
        `quantize.update_(sum of the code_sums, worker)`.
        """
        features = self.encode_features(pixels)
        quantizer: QuantizerOutput = self.quantize(features)
        rec_loss = teacher_loss(self.decode(quantizer.quantized), target)
        return VQKDOutput(
            loss=rec_loss + quantizer.loss,
            rec_loss=rec_loss,
            emb_loss=quantizer.loss,
            codes=quantizer.codes,
            features=features.detach(),
            code_sums=quantizer.code_sums,
        )

    def encode_features(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, S, S] float in [-1, 1] -> [B, N, D] float32, not yet normalised.

        The last two layers run in float32 whatever the precision around them, as in the reference.
        """
        features = self.encoder(pixels)
        with exact_float32(features.device):
            return self.encode_task_layer(features.float())

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, S, S] float in [-1, 1] -> codes [B, N] int64."""
        return self.quantize(self.encode_features(pixels)).codes

    def decode(self, quantized: Tensor) -> Tensor:
        """Unit-norm codes [B, N, D] -> predicted teacher features [B, N, T]."""
        batch, _, code_dim = quantized.shape
        image = quantized.transpose(1, 2).reshape(batch, code_dim, self.config.grid, self.config.grid)
        return self.decode_task_layer(self.decoder(image))

    @torch.no_grad()
    def start_codebook_(self, batches: Iterable[Tensor], worker: Worker, *, seed: int) -> CodebookStart:
        """K-means start over the encoder's tokens; call it once, on all ranks, while `quantize.needs_kmeans`.

        `batches` gives this rank's images, float [B, 3, S, S] in [-1, 1]; as many are taken as the four
        tokens per code need, this rank's share of them, or all there are.
        DEVIATION: the reference takes the first micro-batch, however few tokens it has: below 42 images of
        196 patches, 8,192 codes start with duplicates.
        """
        wanted = KMEANS_TOKENS_PER_CODE * self.config.codebook_size
        share = -(-wanted // worker.world_size)
        tokens, taken = torch.zeros(0, self.config.code_dim, device=self.quantize.codebook.device), 0
        for pixels in batches:
            tokens = torch.cat([tokens, self.encode_features(pixels).flatten(0, 1)])
            taken += 1
            if tokens.shape[0] >= share:
                break
        total = self.quantize.kmeans_init_(tokens, worker, seed=seed)
        return CodebookStart(tokens=total, wanted=wanted, batches=taken)


def _task_layer(width: int, out: int) -> nn.Sequential:
    layer = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, out))
    return layer.apply(init_linear)

"""The tokenizer artifact, `tokenizer.safetensors` + `tokenizer.json`, and the codes it gives.

tokenizer = VisualTokenizer.load("s3://bucket/tokenizer", device="cuda", precision="bf16")
codes = tokenizer.encode(pixels)  # uint8 [B, 224, 224, 3] -> int64 [B, 196], all < tokenizer.codebook_size
block = tokenizer.spec  # what a token dataset records of it
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pipeline import artifacts, storage
from pipeline.errors import InputError
from pipeline.training.optim import Precision, autocast, resolve_precision
from shards.format.manifest import EncoderPrecision, TokenizerSpec
from tokenizer.model.quantizer import exact_float32, l2_normalize
from tokenizer.model.teacher import Teacher, hash_tensors
from tokenizer.model.vqkd import VQKD, VQKDConfig, channels_first, normalize_pixels

NAME = "tokenizer"
WEIGHTS = "tokenizer.safetensors"
FORMAT_VERSION = 1

DECODER_PREFIXES = ("decoder.", "decode_task_layer.")
"""Tensors that only training and visualisation need."""

_NOT_IN_FINGERPRINT = ("quantize.cluster_size", "quantize.embedding.initted")
"""Tensors that decide no code, apart from the decoder's."""


METRICS = ("codebook_usage", "perplexity", "reconstruction_loss")
"""Figures in every header: fraction of codes hit at least once, exp of the entropy of the code frequencies,
mean of 1 - cosine to the teacher; over validation images if there were any."""


@dataclass(frozen=True, kw_only=True)
class TokenizerArtifact:
    """A finished tokenizer, described; `VisualTokenizer` and `load_vqkd` read its tensors."""

    url: str
    fingerprint: str
    """Over the tensors that decide codes and the preprocessing: equal fingerprints, equal codes."""
    config: VQKDConfig
    target_dim: int
    teacher: dict[str, Any]
    """`Teacher.spec`."""
    codebook_usage: float | None
    perplexity: float | None
    reconstruction_loss: float | None
    header: dict[str, Any]
    """`tokenizer.json` as it is."""


def preprocessing(config: VQKDConfig) -> dict[str, Any]:
    """Treatment of pixels before the encoder and of features after it; part of the fingerprint."""
    return {
        "input": "uint8 RGB",
        "range": [-1.0, 1.0],
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "encoder_heads": config.encoder_size.heads,
        "similarity": "cosine, float32, first index on ties",
    }


def tokenizer_fingerprint(config: VQKDConfig, tensors: Mapping[str, Tensor]) -> str:
    """Identity of a tokenizer: equal for equal codes, whatever its decoder, metrics or place."""
    deciding = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith(DECODER_PREFIXES) and name not in _NOT_IN_FINGERPRINT
    }
    return artifacts.fingerprint({"tensors": hash_tensors(deciding), "preprocessing": preprocessing(config)})


def save_tokenizer(
    url: str,
    model: VQKD,
    *,
    teacher: Teacher | Mapping[str, Any],
    metrics: Mapping[str, float],
    inputs: Mapping[str, str],
    run_config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Publish a trained VQ-KD with its decoder; returns the header, which is written last.

    `teacher` is the teacher itself, or its spec where it is not at hand. `metrics` holds at least METRICS (a
    NaN becomes null: not measured); `inputs` the fingerprints of what it was trained on; `run_config` the
    run's settings. None of them changes the tokenizer's fingerprint.
    """
    if absent := [name for name in METRICS if name not in metrics]:
        raise ValueError(f"metrics lack {absent}")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"not publishing a tokenizer with non-finite values in {broken[:3]}")
    config = model.config.resolved()
    header = {
        "kind": NAME,
        "format_version": FORMAT_VERSION,
        "fingerprint": tokenizer_fingerprint(config, tensors),
        "config": dataclasses.asdict(config),
        "target_dim": tensors["decode_task_layer.2.bias"].shape[0],
        "preprocessing": preprocessing(config),
        "teacher": teacher.spec if isinstance(teacher, Teacher) else dict(teacher),
        "metrics": {name: value if math.isfinite(value) else None for name, value in metrics.items()},
        "inputs": dict(inputs),
        "run_config": None if run_config is None else dict(run_config),
    }
    return artifacts.publish(url, NAME, {WEIGHTS: safetensors.torch.save(tensors)}, header)


def read_tokenizer(url: str) -> TokenizerArtifact:
    """Describe the tokenizer at `url`; InputError when there is no finished one or its header is not ours."""
    header = artifacts.read_header(url, NAME)
    location = storage.join(url, f"{NAME}.json")
    if header is None:
        raise InputError(f"no finished tokenizer at {url} (no {NAME}.json); check the URL or train one first")
    if header.get("kind") != NAME or header.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{location} is {header.get('kind')!r}, format {header.get('format_version')!r}; "
            f"this program reads {NAME!r}, format {FORMAT_VERSION}: use the version that wrote it"
        )
    try:
        return TokenizerArtifact(
            url=url,
            fingerprint=header["fingerprint"],
            config=VQKDConfig(**header["config"]),
            target_dim=header["target_dim"],
            teacher=header["teacher"],
            **{name: header["metrics"][name] for name in METRICS},
            header=header,
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"{location} does not describe a tokenizer ({error!r}); make it again") from None


def describe(artifact: TokenizerArtifact, precision: EncoderPrecision) -> TokenizerSpec:
    """The tokenizer block of a token dataset's manifest, for an encoder run in fp32, bf16 or fp16."""
    config, teacher = artifact.config, artifact.teacher
    return TokenizerSpec(
        fingerprint=artifacts.fingerprint({"tokenizer": artifact.fingerprint, "precision": precision}),
        artifact_fingerprint=artifact.fingerprint,
        precision=precision,
        codebook_size=config.codebook_size,
        image_size=config.image_size,
        grid=(config.grid, config.grid),
        other={
            "code_dim": config.code_dim,
            "patch_size": config.patch_size,
            "teacher": {"name": teacher.get("name"), "fingerprint": teacher.get("fingerprint")},
        },
    )


def load_vqkd(artifact: TokenizerArtifact) -> VQKD:
    """The whole model with its decoder, on the CPU, in evaluation mode: to visualise or train on."""
    return _load(artifact, artifact.target_dim)


def _load(artifact: TokenizerArtifact, target_dim: int | None) -> VQKD:
    location = storage.join(artifact.url, WEIGHTS)
    data = artifacts.read_file(artifact.url, artifact.header, WEIGHTS)
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise InputError(f"{location} is not a safetensors file ({error}); copy or make it again") from None
    fingerprint = tokenizer_fingerprint(artifact.config, tensors)
    if fingerprint != artifact.fingerprint:
        raise InputError(
            f"{location} has fingerprint {fingerprint[:8]}…, but tokenizer.json says "
            f"{artifact.fingerprint[:8]}…; they belong to different tokenizers, copy both files again"
        )
    if target_dim is None:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(DECODER_PREFIXES)}
    with torch.device("meta"):
        model = VQKD(artifact.config, target_dim)
    try:
        model.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:300]
        raise InputError(f"{location} does not fit tokenizer.json: {detail}; copy both again") from None
    if model.quantize.needs_kmeans:
        raise InputError(f"{location} holds a codebook that was never started; make the tokenizer again")
    return model.eval().requires_grad_(False)


class VisualTokenizer:
    """A frozen tokenizer on one device: images in, codes out."""

    def __init__(
        self,
        model: VQKD,
        artifact: TokenizerArtifact,
        *,
        device: torch.device,
        precision: Precision = "fp32",
        batch_size: int | None = None,
    ) -> None:
        self.artifact = artifact
        self.device = device
        self.batch_size = batch_size
        self._dtype = resolve_precision(precision, device)
        self._model = model.to(device)

    @classmethod
    def load(
        cls,
        url: str,
        device: torch.device | str = "cpu",
        precision: Precision = "fp32",
        batch_size: int | None = None,
    ) -> VisualTokenizer:
        """Read, check and place the tokenizer at `url`; InputError, naming the file, when something is off.

        `precision` is the encoder's; its last two layers and the similarity are float32 always. `batch_size`
        fixes the shape of every forward pass (a short one is padded): on CPU codes did not depend on the
        batch at all (widths 128, 384, 768; batches of 1 to 16; one and two threads: features equal bit for
        bit), but a GPU may pick another matrix kernel for another shape, and then round otherwise.
        """
        artifact = read_tokenizer(url)
        model = _load(artifact, target_dim=None)
        return cls(model, artifact, device=torch.device(device), precision=precision, batch_size=batch_size)

    @property
    def codebook_size(self) -> int:
        """K: every code is below."""
        return self.artifact.config.codebook_size

    @property
    def image_size(self) -> int:
        """Side of the images it takes."""
        return self.artifact.config.image_size

    @property
    def grid(self) -> int:
        """Codes along one side."""
        return self.artifact.config.grid

    @property
    def precision(self) -> EncoderPrecision:
        """Precision of the encoder in use."""
        names: dict[torch.dtype, EncoderPrecision] = {torch.float32: "fp32", torch.bfloat16: "bf16"}
        return names.get(self._dtype, "fp16")

    @property
    def fingerprint(self) -> str:
        """Identity of the codes it gives: the artifact's fingerprint and the encoder's precision."""
        return self.spec.fingerprint

    @property
    def spec(self) -> TokenizerSpec:
        """The tokenizer block of a token dataset's manifest."""
        return describe(self.artifact, self.precision)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Codes of uint8 images, [B, 3, S, S] or [B, S, S, 3] on any device -> [B, N] int64 on its own.

        N = grid^2, row by row. Images of another size or type are an InputError: nothing is resized here.
        """
        blocks = self._features(channels_first(pixels, self.image_size))
        return torch.cat([self._model.quantize(features).codes for features in blocks])

    @torch.no_grad()
    def code_gaps(self, pixels: Tensor, codes: Tensor) -> Tensor:
        """Gaps of given codes [B, N] to the best similarity: [B, N] float32, 0 where they are the best.

        `pixels` are as for `encode`. Cosine similarities in float32, so a gap is at most 2.
        """
        features = torch.cat(list(self._features(channels_first(pixels, self.image_size))))
        gaps: list[Tensor] = []
        with exact_float32(self.device):
            for feature, given in zip(l2_normalize(features), codes.to(self.device), strict=True):
                similarity = feature @ self._model.quantize.codebook.t()
                gaps.append(similarity.amax(dim=1) - similarity.gather(1, given[:, None])[:, 0])
        return torch.stack(gaps)

    def _features(self, images: Tensor) -> Iterator[Tensor]:
        """Encoder features [b, N, D] float32, block by block; each pass has the fixed shape, if any."""
        size = self.batch_size or len(images)
        for block in images.split(size):
            padded = torch.cat([block, block.new_zeros(size - len(block), *block.shape[1:])])
            with autocast(self.device, self._dtype):
                pixels = normalize_pixels(padded.to(self.device, non_blocking=True))
                features = self._model.encode_features(pixels)
            yield features[: len(block)]

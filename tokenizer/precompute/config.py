"""The settings of a precompute pass: what is written, from what, with which encoder."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.cluster.config import ClusterConfig
from pipeline.config import ASIDE, PLACE, URL
from pipeline.errors import InputError
from pipeline.training.optim import Precision
from shards.pixels.views import ViewPolicy


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig:
    """Write token shards: fixed crops of every image, each paired with its grid of codes.

    A rerun does only what is missing; a finished output is left alone. It grows by `extend` (more views of
    the same images) and by `code_layer` (another tokenizer over the stored crops), and is not rewritten.
    """

    output: str = field(metadata=PLACE)
    """Where the token shards go, or the dataset that grows: a folder or any fsspec URL."""
    tokenizer: str = field(metadata=URL)
    """Tokenizer artifact, the output of train_tokenizer."""
    images: str | None = field(default=None, metadata=URL)
    """Image shards, the output of prepare_images; not read for a code layer."""
    extend: bool = False
    """Add views to the finished dataset at output, up to views.views_per_image in all; the other settings are
    those it was made with."""
    code_layer: bool = False
    """Add the codes of another tokenizer for the crops stored at output; reads no images."""
    dry_run: bool = field(default=False, metadata=ASIDE)
    """Print what the pass would take, measured on a few images, and write nothing."""
    json: bool = field(default=False, metadata=ASIDE)
    """With dry_run: print one line of JSON instead of text."""
    views: ViewPolicy = ViewPolicy()
    """Which crops; views_per_image is the number that is stored of each image."""
    batch_size: int = 64
    """Crops per forward pass; every batch is padded to this size, so results do not depend on the rest."""
    precision: Precision = "auto"
    """Compute type of the encoder; similarities to the codebook are fp32 in any case."""
    samples_per_shard: int = 4000
    """At most so many crops in a shard, fewer where they would exceed 100 MB; what is added to a dataset has
    the ranges of its shards."""
    decode_threads: int = 2
    """Threads per worker that decode, crop and encode JPEG while the encoder runs."""
    encoder_threads: int = 2
    """CPU threads of the encoder; part of the plan, because sums may round otherwise with another number."""
    cluster: ClusterConfig = field(default=ClusterConfig(), metadata=ASIDE)
    """Ray actors that share the shards."""

    def __post_init__(self) -> None:
        if self.extend and self.code_layer:
            raise InputError("--extend and --code_layer are two passes; run one after the other")
        if self.images is None and not self.code_layer:
            raise InputError("--images is missing: name the image shards that the crops come from")
        if self.json and not self.dry_run:
            raise InputError("--json is the form of what --dry_run prints; give both or neither")

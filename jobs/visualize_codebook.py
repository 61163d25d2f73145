"""Show what the codes of a token dataset stand for (paper §3.4, Figures 4 and 5): a page and its figures.

python -m jobs.visualize_codebook --dataset runs/tokens --output runs/codebook [--tokenizer runs/tokenizer]
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jobs.report.codebook import codebook_files
from pipeline import storage
from pipeline.artifacts import claim, publish, read_header
from pipeline.config import ASIDE, PLACE, absolute_places, identity, run_job
from pipeline.errors import InputError
from pretrain.evals.codebook import (
    MIN_PATCHES,
    ExaminedCodebook,
    Likeness,
    examine_codebook,
)
from shards.dataset.codes import draw_sample
from shards.dataset.dataset import Dataset, open_dataset
from tokenizer.model.artifact import load_vqkd, read_tokenizer

ARTIFACT = "codebook"


@dataclass(frozen=True, kw_only=True)
class VisualizeConfig:
    """Show patches by code, how codes are used, and where they occur, as a page and as figures.

    Codes are counted over all stored crops; what their patches look like is seen in a sample.
    """

    dataset: str = field(metadata=PLACE)
    """Folder or URL of token shards."""
    output: str = field(metadata=PLACE)
    """Folder or URL of the page, codebook.html, its figures, PNGs, and their numbers, codebook.json."""
    tokenizer: str | None = field(default=None, metadata=PLACE)
    """The tokenizer that gave the codes: then each code's nearest codes in the codebook are named."""
    codes: str | None = field(default=None, metadata=ASIDE)
    """A code layer, named by the first 8 digits of its tokenizer, in place of the stored codes."""
    num_codes: int = 24
    """Codes that are shown."""
    patches_per_code: int = 12
    """Patches of each, from different images as long as there are any."""
    samples: int = 2000
    """Crops, of one view, in which patches are looked for and compared; more show rarer codes."""
    min_images: int = 12
    """A code in fewer crops of the sample is not shown."""
    seed: int = 0
    """Decides the sample, the patches that are shown, and the shifts that position is compared with."""

    def __post_init__(self) -> None:
        for key in ("num_codes", "patches_per_code", "samples", "min_images"):
            if getattr(self, key) < 1:
                raise InputError(f"--{key} is {getattr(self, key)}; give at least 1")
        if self.seed < 0:
            raise InputError(f"--seed is {self.seed}; give a number from 0 on")


def visualize_codebook(config: VisualizeConfig) -> None:
    """Publish the page, its figures and their numbers; what is finished with the same inputs stays."""
    config = absolute_places(config)
    dataset = open_dataset(config.dataset, "tokens", codes=config.codes)
    # Everything that can be refused is refused before anything is written.
    codebook = None if config.tokenizer is None else read_codebook(config.tokenizer, dataset)
    sample = draw_sample(dataset, config.samples, seed=config.seed)
    tokenizer = dataset.manifest.require_tokenizer()
    likeness = Likeness(sample.codes, tokenizer.codebook_size, tokenizer.patch_size)
    if len(likeness.eligible(config.min_images)) == 0:
        raise InputError(
            f"no code has {MIN_PATCHES} patches in {max(2, config.min_images)} of the {len(sample.codes):,} "
            f"crops sampled from {dataset.url}; raise --samples or lower --min_images"
        )
    settings = identity(config)
    inputs = {"dataset": dataset.fingerprint, "neighbours": codebook is not None}
    claim(config.output, {"job": "visualize_codebook", "config": settings, "inputs": inputs})
    if (header := read_header(config.output, ARTIFACT)) is not None:
        print(f"{header['table']}\n{config.output} is finished already, with the same settings and inputs")
        return

    examined = examine_codebook(
        dataset,
        sample,
        likeness,
        codebook=codebook,
        num_codes=config.num_codes,
        patches_per_code=config.patches_per_code,
        min_images=config.min_images,
        seed=config.seed,
    )
    files = codebook_files(dataset, sample, codebook, examined)
    header = {
        "kind": ARTIFACT,
        "config": settings,
        "inputs": inputs,
        "result": to_json(examined),
        "table": in_words(examined),
    }
    publish(config.output, ARTIFACT, files, header)
    print(header["table"])
    for name, data in files.items():
        print(f"{storage.join(config.output, name)}: {len(data):,} bytes")


def read_codebook(url: str, dataset: Dataset) -> np.ndarray:
    """The unit vectors [K, D] of a dataset's codes; InputError where they are those of another tokenizer."""
    artifact = read_tokenizer(url)
    tokenizer = dataset.manifest.require_tokenizer()
    if (given := tokenizer.artifact_fingerprint) != artifact.fingerprint:
        raise InputError(
            f"{dataset.url} has codes of tokenizer {str(given)[:8]}, but {url} is "
            f"{artifact.fingerprint[:8]}; give the tokenizer that the codes came from, or none"
        )
    return load_vqkd(artifact).quantize.codebook.numpy()


def in_words(examined: ExaminedCodebook) -> str:
    """For people: a few lines."""
    codes, position = examined.statistics, examined.position
    shown = ", ".join(f"{code.code} ({code.consistency:.2f})" for code in examined.codes[:8])
    more = ", …" if len(examined.codes) > 8 else ""
    return (
        f"codebook: {codes.patches:,} patches, usage {100 * codes.usage:.1f} % of "
        f"{codes.codebook_size:,} codes, perplexity {codes.perplexity:,.1f}\n"
        f"  place says {position.bits:.3f} of {position.code_entropy:.2f} bits of a patch's code, "
        f"{position.bits_shifted:.3f} by chance (grids shifted at random)\n"
        f"  most consistent: {shown}{more}; patches of any codes ({examined.likeness_of_any:.2f})"
    )


def to_json(examined: ExaminedCodebook) -> dict[str, Any]:
    """The numbers behind the page, for programs."""
    codes, position = examined.statistics, examined.position
    return {
        "codebook_size": codes.codebook_size,
        "patches": codes.patches,
        "codebook_usage": codes.usage,
        "perplexity": codes.perplexity,
        "counts": examined.counts.tolist(),
        "searched_crops": examined.searched,
        "eligible_codes": examined.eligible,
        "consistency_of_any": examined.likeness_of_any,
        "position_bits": position.bits,
        "position_bits_shifted": position.bits_shifted,
        "code_entropy_bits": position.code_entropy,
        "codes": [
            {
                **{key: getattr(shown, key) for key in ("code", "consistency", "images", "share")},
                "patches": [{"key": example.key, "patch": example.patch} for example in shown.examples],
                "position_bits": position.of(shown.code).bits,
                "position_bits_shifted": position.of(shown.code).bits_shifted,
                "classes": [vars(share) for share in shown.classes],
                "neighbours": [{"code": code, "cosine": cosine} for code, cosine in shown.neighbours],
            }
            for shown in examined.codes
        ],
    }


if __name__ == "__main__":
    run_job(visualize_codebook, VisualizeConfig)

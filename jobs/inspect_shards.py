"""Print what a finished dataset of images or tokens holds.

python -m jobs.inspect_shards --dataset runs/quickstart/tokens [--codes 1a2b3c4d] [--json]
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from pipeline.config import run_job
from shards.dataset.dataset import open_dataset
from shards.dataset.summary import in_words, summarize


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Print what a finished dataset holds: counts, sizes, parts, recipe, fingerprints, codes, one sample."""

    dataset: str
    """Folder or URL of image shards or token shards."""
    codes: str | None = None
    """A code layer, named by the first 8 digits of its tokenizer: its codes in place of the stored ones."""
    json: bool = False
    """Print one line of JSON instead of text."""


def main(config: InspectConfig) -> None:
    """Reads every index file once, no tar."""
    summary = summarize(open_dataset(config.dataset, codes=config.codes))
    print(json.dumps(summary.to_json(), sort_keys=True) if config.json else in_words(summary))


if __name__ == "__main__":
    run_job(main, InspectConfig)

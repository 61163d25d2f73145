"""Print what a finished dataset of images or tokens holds.

python -m jobs.inspect_shards --dataset runs/quickstart/tokens [--json]
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from pipeline.config import run_job
from shards.manifest import open_dataset
from shards.summary import as_text, summarize


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Print what a finished dataset holds: counts, sizes, recipe, fingerprints, codes, one sample."""

    dataset: str
    """Folder or URL of image shards or token shards."""
    json: bool = False
    """Print one line of JSON instead of text."""


def main(config: InspectConfig) -> None:
    """Reads every index file once, no tar."""
    summary = summarize(open_dataset(config.dataset))
    print(json.dumps(summary.to_json(), sort_keys=True) if config.json else as_text(summary))


if __name__ == "__main__":
    run_job(main, InspectConfig)

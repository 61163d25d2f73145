"""Between the stages: run the tokenizer once over the images and write token shards.

python -m jobs.precompute_shards --images … --tokenizer … --output … --views.views_per_image 2
"""

from __future__ import annotations

from pipeline.config import run_job
from tokenizer.precompute import PrecomputeConfig, precompute_shards


def main(config: PrecomputeConfig) -> None:
    """Write the shards and say what was written."""
    manifest = precompute_shards(config)
    rejected = sum(manifest.samples_rejected.values())
    print(
        f"token shards at {config.output}: {manifest.samples_written:,} crops written, {rejected:,} rejected"
    )


if __name__ == "__main__":
    run_job(main, PrecomputeConfig)

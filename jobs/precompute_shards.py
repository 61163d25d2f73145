"""Between the stages: run the tokenizer once over the images and write token shards.

python -m jobs.precompute_shards --images … --tokenizer … --output … --views.views_per_image 2 [--dry_run]
python -m jobs.precompute_shards --images … --tokenizer … --output … --views.views_per_image 4 --extend
python -m jobs.precompute_shards --code_layer --tokenizer … --output …
"""

from __future__ import annotations

import dataclasses
import json

from pipeline.config import run_job
from shards.dataset.parts import views_in_words
from tokenizer.precompute.config import PrecomputeConfig
from tokenizer.precompute.estimate import estimate_pass, in_words
from tokenizer.precompute.run import precompute_shards


def main(config: PrecomputeConfig) -> None:
    """Write the shards and say what was written, or what would be."""
    if config.dry_run:
        estimate = estimate_pass(config)
        as_json = json.dumps(dataclasses.asdict(estimate), sort_keys=True)
        print(as_json if config.json else in_words(estimate))
        return
    manifest = precompute_shards(config)
    rejected = sum(manifest.samples_rejected.values())
    done = f"{manifest.samples_written:,} crops written, {rejected:,} rejected"
    if config.code_layer:
        assert manifest.tokenizer is not None
        layer = manifest.require_tokenizer().fingerprint[:8]
        print(f"code layer {layer} at {config.output}: open it with --codes {layer}, or codes={layer!r}")
    elif config.extend:
        print(f"{views_in_words(manifest.first_view, manifest.num_views)} added at {config.output}: {done}")
    else:
        print(f"token shards at {config.output}: {done}")


if __name__ == "__main__":
    run_job(main, PrecomputeConfig)

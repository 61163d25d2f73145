"""Runs the rows of one of the paper's Tables 1 to 7 at a scale, and prints ours beside the paper's numbers.

python -m jobs.reproduce_table --table 5 --scale cifar10 --output runs/reproduce --cluster.num_workers 0 \
    --train_source cifar10/train --val_source cifar10/test --teacher cifar10-teacher.safetensors [--dry_run]
"""

from __future__ import annotations

import json
import sys

from jobs.stages.results import Result, collect, markdown, to_json, written_into
from jobs.stages.rows import ReproduceConfig
from jobs.stages.runner import job_starter
from jobs.stages.tables import plan_table, run_all, show
from pipeline import artifacts, storage
from pipeline.config import run_job
from pipeline.errors import InputError


def publish(result: Result) -> None:
    """Print the table, keep it as JSON beside the stages, and write it into a document where one is named."""
    config = result.plan.config
    print(f"\n{markdown(result)}", flush=True)
    document = None if config.write is None else storage.read(config.write).decode()
    url = storage.join(config.root, f"table-{config.table}-{config.scale_name}.json")
    data = {**to_json(result), "code_version": artifacts.code_version()}
    storage.put(url, json.dumps(data, indent=2, ensure_ascii=False).encode() + b"\n")
    if config.write is not None and document is not None:
        storage.put(config.write, written_into(document, result, config.write).encode())
        print(f"written into {config.write}", flush=True)


def reproduce_table(config: ReproduceConfig) -> None:
    """Run a table and show it; SystemExit 1 where a stage failed."""
    plan = plan_table(config)
    if config.write is not None and not storage.exists(config.write):
        raise InputError(f"write names {config.write}, which is not there; name a Markdown file")
    if config.dry_run:
        show(plan)
        return
    images = {option: config.given[option] for option in ("train_source", "val_source")}
    with job_starter(config.address, plan.stages, {"output": config.root, **images}) as start:
        lost = run_all(plan, start)
    publish(collect(plan, lost))
    if lost:
        reasons = ", ".join(dict.fromkeys(lost.values()))
        print(f"error: the table is not complete: {reasons}", file=sys.stderr, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    run_job(reproduce_table, ReproduceConfig)

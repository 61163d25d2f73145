"""The precompute pass: every missing shard is written by the workers, then the manifest (FORMAT.md).

One work item is one (view, range of sample ids). A finished dataset grows by passes of their own: more views
of the same images, or the codes of another tokenizer.
"""

from __future__ import annotations

import functools
import os

from pipeline.cluster.config import device_type
from pipeline.cluster.items import map_items
from pipeline.config import absolute_places, identity
from pipeline.training.metrics import Progress
from shards.dataset.parts import views_in_words
from shards.format.manifest import Manifest
from shards.format.plan import Plan
from shards.pixels.views import decode_crop
from shards.writer.commit import Unfinished, finish, record_run, start
from tokenizer.precompute.config import PrecomputeConfig
from tokenizer.precompute.items import ItemWriter
from tokenizer.precompute.plans import CROP_BYTES_PER_PIXEL, WritePass, planned_passes


def precompute_shards(config: PrecomputeConfig) -> Manifest:
    """Write all missing shards, then the manifest; returns it, or that of what was added last."""
    # For the workers of a Ray that this job starts: OpenMP threads that wait give their core to the cropping
    # instead of spinning on it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    config = absolute_places(config)
    passes = planned_passes(config, device_type(config.cluster))
    return [_write(config, write_pass) for write_pass in passes][-1]


def _write(config: PrecomputeConfig, write_pass: WritePass) -> Manifest:
    root, plan = write_pass.root, start(write_pass.root, write_pass.plan)
    record_run(root, identity(config))
    todo = Unfinished(root, plan)
    _announce(plan, todo)
    progress = Progress("precompute", todo.samples, "images")
    shards, rejected, busy_s, wait_s = 0, 0, 0.0, 0.0
    for report in map_items(todo, functools.partial(ItemWriter, config, plan, root), config.cluster):
        shards, rejected = shards + 1, rejected + report.rejected
        busy_s, wait_s = busy_s + report.seconds, wait_s + report.wait_s
        progress.update(
            report.written + report.rejected,
            shards=f"{shards}/{len(todo)}",
            rejected=rejected,
            encoder_waited=f"{100 * wait_s / max(busy_s, 1e-9):.0f} %",
        )
    if todo:
        progress.close(shards=f"{shards}/{len(todo)}", rejected=rejected)
    return finish(root, plan, decode_crop)


def _announce(plan: Plan, todo: Unfinished) -> None:
    per_view = plan.samples_per_view
    crops, done = per_view * plan.views, plan.num_items - len(todo)
    shards = f"in {plan.num_items} shards ({done} committed already)"
    if plan.kind == "codes":
        tokenizer = plan.require_tokenizer()
        print(
            f"codes of tokenizer {tokenizer.fingerprint[:8]} for "
            f"{views_in_words(plan.first_view, plan.views)}: {crops:,} stored crops {shards}",
            flush=True,
        )
        return
    size = crops * plan.require_tokenizer().image_size ** 2 * CROP_BYTES_PER_PIXEL / 1e9
    views = plan.first_view + plan.views
    seen = "E" if views == 1 else f"E/{views}"
    print(
        f"{per_view:,} images, {views_in_words(plan.first_view, plan.views)}: {crops:,} crops, about "
        f"{size:.2f} GB, {shards}; a run of E epochs sees each crop {seen} times",
        flush=True,
    )

"""Print which samples a rank sees, step by step.

python -m jobs.inspect_order --dataset runs/tokens --seed 0 --epoch 3 --world_size 8 --rank 2 \
    --global_batch 256 --start 5120 --steps 2 [--json]
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.config import run_job
from pipeline.errors import InputError
from shards.dataset.corpus import SubsetConfig, namespaced_key, open_corpus
from shards.dataset.dataset import Dataset
from shards.reader.disk_cache import CacheConfig
from shards.reader.order import ORDER_VERSION, Batches, Order, batch_plans, view_of_epoch
from shards.reader.reader import order_shape


@dataclass(frozen=True, kw_only=True)
class InspectOrderConfig:
    """Print the keys of the samples that a rank sees in each step of training. No image is decoded."""

    dataset: str
    """Image shards or token shards, or several with commas between them."""
    seed: int = 0
    """The run's seed."""
    epoch: int = 0
    """Which epoch."""
    world_size: int = 1
    """Number of workers."""
    rank: int = 0
    """Which of them."""
    global_batch: int = 256
    """The run's batch size, over all workers."""
    start: int = 0
    """Position in the epoch: samples that were consumed before, by all workers."""
    steps: int = 1
    """Steps to print, as far as the epoch goes."""
    json: bool = False
    """Print {"steps": [[key, …], …]} and nothing else."""
    stored_views: int | None = None
    """Views that the run reads of each image; null takes all that are there."""
    codes: str | None = None
    """The run's code layer."""
    subset: SubsetConfig = SubsetConfig()
    """The run's subset."""
    lanes: int | None = None
    """The run's lanes; null is what a new run would take."""
    window: int | None = None
    """The run's shards per window; null is what a new run would take."""
    cache: CacheConfig = CacheConfig()
    """The run's cache, which limits the lanes where shards have to be fetched."""

    def __post_init__(self) -> None:
        if min(self.steps, self.start, self.epoch) < 0 or not 0 <= self.seed < 1 << 64:
            raise InputError("seed, epoch, start and steps are numbers from 0 on, the seed below 2^64")
        if not 0 <= self.rank < self.world_size <= self.global_batch:
            raise InputError(
                f"rank {self.rank} of {self.world_size} workers with a global batch of {self.global_batch} "
                "makes no sense; ranks count from 0, and each needs at least one sample of a batch"
            )


def main(config: InspectOrderConfig) -> None:
    """Reads the indexes of the shards concerned."""
    dataset = open_corpus(config.dataset, views=config.stored_views, codes=config.codes, subset=config.subset)
    view = view_of_epoch(dataset.num_views, config.seed, config.epoch)
    lanes, window = order_shape(dataset, config.cache)
    order = Order(
        dataset.shard_sizes(view),
        config.seed,
        config.epoch,
        lanes if config.lanes is None else config.lanes,
        window if config.window is None else config.window,
    )
    if max(config.global_batch, config.start) > order.num_samples:
        raise InputError(
            f"{dataset.url} has {order.num_samples} samples: a batch of {config.global_batch} from position "
            f"{config.start} lies beyond; lower --global_batch or --start"
        )
    steps = list(_steps(config, dataset, order, view))
    if config.json:
        print(json.dumps({"steps": steps}))
        return
    for number, keys in enumerate(steps):
        print(f"position {config.start + number * config.global_batch}: {' '.join(keys)}")
    print(
        f"order version {ORDER_VERSION}, view {view} of {dataset.num_views}, {order.num_samples:,} samples "
        f"in {dataset.num_shards:,} shards, {order.lanes} lanes of {order.window} shards; the last "
        f"{order.num_samples % config.global_batch} positions of the epoch are dropped"
    )


def _steps(config: InspectOrderConfig, dataset: Dataset, order: Order, view: int) -> Iterator[list[str]]:
    @functools.lru_cache(maxsize=1024)
    def ids_of(number: int) -> np.ndarray:
        return dataset.read_index(view, number, ("sample_id",)).column("sample_id").to_numpy()

    first_view = dataset.manifest.first_view
    batches = Batches(config.global_batch, rank=config.rank, world_size=config.world_size)
    for plan in itertools.islice(batch_plans(order, config.start, batches), config.steps):
        places = zip(plan.shards.tolist(), plan.rows.tolist(), strict=True)
        yield [namespaced_key(int(ids_of(number)[row]), first_view + view) for number, row in places]


if __name__ == "__main__":
    run_job(main, InspectOrderConfig)

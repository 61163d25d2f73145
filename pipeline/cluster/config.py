"""Where work runs: settings, connecting to a cluster or starting one, and each worker's part of it."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where the work runs, and how many processes share it."""

    num_workers: int = 1
    """Worker processes; 0 runs in this process, without Ray."""
    use_gpu: bool | None = None
    """One GPU per worker; null takes GPUs where the cluster has them now."""
    cpus_per_worker: int | None = None
    """CPU cores each worker reserves; null divides this machine's cores, or takes 1 on a running cluster."""
    address: str | None = None
    """A running Ray cluster, such as auto; null takes RAY_ADDRESS (set within a job) or starts one."""
    max_failures: int = 3
    """How often a training group is restarted from its last checkpoint after a worker died."""
    collective_timeout_s: float = 600.0
    """How long ranks wait for each other before the group is given up."""

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise InputError(f"cluster.num_workers is {self.num_workers}; give 0 (in process) or more")
        if self.collective_timeout_s < 1:
            raise InputError(f"cluster.collective_timeout_s is {self.collective_timeout_s}; give 1 or more")


class WorkerFailedError(Exception):
    """A worker died or raised; the message names it and carries its traceback."""


def device_type(cluster: ClusterConfig) -> Literal["cpu", "cuda"]:
    """What the workers will compute on: decided here, before any of them runs."""
    if cluster.num_workers == 0:
        import torch

        return "cuda" if torch.cuda.is_available() and cluster.use_gpu is not False else "cpu"
    connect(cluster)
    return "cuda" if worker_resources(cluster)[0] else "cpu"


def connect(cluster: ClusterConfig) -> Any:
    """The ray module, connected: to the given cluster, to the one this job runs in, or to a new one."""
    if not sys.stdout.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    # Ray Train patches print; without this, lines show twice.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    # Nodes are given 30 s of notice: hear of it soon.
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "2")
    # A worker's imports take 15 s on an idle machine, and more than Ray Train's minute on a busy one.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")
    try:
        import ray
    except ImportError:
        raise InputError(
            "ray is not installed; install it, or run in process with --cluster.num_workers 0"
        ) from None
    if ray.is_initialized():
        return ray
    if cluster.address is not None or "RAY_ADDRESS" in os.environ:
        # No runtime_env here: inside a job it would have to be merged with the job's own.
        ray.init(address=cluster.address, log_to_driver=True)
    else:
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, cluster.num_workers * (cluster.cpus_per_worker or 1)),
            include_dashboard=True,
            object_store_memory=512 << 20,
            log_to_driver=True,
        )
    return ray


def worker_resources(cluster: ClusterConfig) -> tuple[bool, int]:
    """Whether workers take a GPU each, and how many CPU cores each takes."""
    import ray

    available = ray.cluster_resources()
    use_gpu = cluster.use_gpu if cluster.use_gpu is not None else available.get("GPU", 0) >= 1
    cpus = cluster.cpus_per_worker
    if cpus is None:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        cpus = max(1, int(available.get("CPU", 1)) // cluster.num_workers) if len(nodes) == 1 else 1
    return use_gpu, cpus


def set_num_threads(num_threads: int) -> None:
    import torch

    torch.set_num_threads(num_threads)

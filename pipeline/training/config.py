"""What every training job is told, whatever it trains, and how it takes its output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from pipeline.artifacts import claim, claimed_config, read_header
from pipeline.cluster.config import ClusterConfig
from pipeline.config import ASIDE, PLACE, absolute_places, identity
from pipeline.errors import InputError
from pipeline.training.optim import Precision


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The fields that stand in the configuration of every training job; each job adds its own."""

    output: str = field(metadata=PLACE)
    """Where the result goes: a folder or any fsspec URL."""
    batch_size: int
    """Images per optimizer step, over all workers."""
    micro_batch_size: int | None = field(default=None, metadata=ASIDE)
    """Images per forward pass and worker; null takes a worker's whole share at once."""
    precision: Precision = "auto"
    """Compute type: auto is bf16 or fp16 on CUDA, fp32 on CPU."""
    seed: int = 0
    """Decides initial weights, order, crops and all else that is drawn."""
    decode_threads: int = field(default=2, metadata=ASIDE)
    """Threads per worker that decode and crop."""
    checkpoint_every_s: float = field(default=600.0, metadata=ASIDE)
    """Seconds between checkpoints; one is also written at the end of each epoch, and on SIGTERM."""
    checkpoint_keep: int = field(default=2, metadata=ASIDE)
    """How many of the newest checkpoints stay, beside the best."""
    log_every_steps: int = field(default=10, metadata=ASIDE)
    """Steps between records in metrics.jsonl."""
    cluster: ClusterConfig = field(default=ClusterConfig(), metadata=ASIDE)
    """Workers that share each batch."""

    def require_positive(self, *names: str) -> None:
        """InputError for the first of these fields that is set and below 1."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; give 1 or more")


ConfigT = TypeVar("ConfigT", bound=TrainingConfig)


def resolve(config: ConfigT, *kept: str) -> ConfigT:
    """The settings with absolute places; `kept` ones that are not given are those the run began with."""
    config = absolute_places(config)
    earlier = claimed_config(config.output)
    settled: dict[str, Any] = {name: getattr(config, name) or earlier.get(name) for name in kept}
    return replace(config, **settled)


def claim_output(
    config: TrainingConfig, job: str, artifact: str, inputs: Mapping[str, str], *, fixed_batch: bool = False
) -> bool:
    """Take `config.output` for this run; False, said aloud, where its artifact is finished already.

    `inputs` are fingerprints. InputError where the output belongs to a run of other settings or inputs; but
    for `fixed_batch`, an unfinished one may go on with another batch size.
    """
    finished = read_header(config.output, artifact) is not None
    run = {"job": job, "config": identity(config), "inputs": dict(inputs)}
    claim(config.output, run, may_change=() if fixed_batch else ("config.batch_size",), finished=finished)
    if finished:
        message = f"{config.output} is finished already, with the same settings and inputs: nothing to do"
        print(message, flush=True)
    return not finished

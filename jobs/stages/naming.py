"""The stages of a table, each in a folder named by what decides its result.

The folder is `<job>-<8 digits>`: a hash of the settings, where these are not the job's defaults, of the
content that is given from outside, and of the names of the stages it reads. Places, workers and threads are
no part of it, so two rows that need the same run share it, and outputs may be moved.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jobs.stages.stage import ClusterOverride, Stage, StageConfig, leaves
from pipeline import artifacts, storage
from pipeline.config import parse, to_dict
from pipeline.errors import InputError
from pretrain.config import PretrainConfig
from pretrain.evals.probe import ProbeConfig
from pretrain.evals.robustness import RobustnessConfig
from pretrain.finetune.config import FinetuneConfig
from pretrain.segment.config import SegmentationConfig
from shards.writer.prepare import PrepareConfig
from tokenizer.config import TokenizerTrainConfig
from tokenizer.precompute.config import PrecomputeConfig


@dataclass(frozen=True)
class Job:
    """A job that a table may run."""

    config: type[Any]
    header: str
    """Name of the header that it writes last."""
    seeded: bool = True
    """Repeated for every seed; images and crops stay the same."""
    required: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Settings without which its defaults cannot be read; they are always part of the name."""


JOBS = {
    "prepare_images": Job(PrepareConfig, "manifest", seeded=False),
    "train_tokenizer": Job(TokenizerTrainConfig, "tokenizer"),
    "precompute_shards": Job(PrecomputeConfig, "manifest", seeded=False),
    "pretrain_mim": Job(PretrainConfig, "backbone"),
    "probe_linear": Job(ProbeConfig, "probe"),
    "finetune_classifier": Job(FinetuneConfig, "classifier"),
    "finetune_segmentation": Job(SegmentationConfig, "segmentation", required={"num_classes": "2"}),
    "evaluate_robustness": Job(
        RobustnessConfig, "robustness", seeded=False, required={"corruptions": "jpeg"}
    ),
}

HOW_IT_RUNS = (
    "output", "cluster", "decode_threads", "encoder_threads", "check_threads", "micro_batch_size",
    "images_per_batch", "checkpoint_every_s", "checkpoint_keep", "log_every_steps", "num_pictures", "cache",
    "dry_run", "json",
)  # fmt: skip
"""Settings that say how and where a job runs, not what comes out."""

FILLED_IN = ("lanes", "window", "stored_views")
"""Settings that a job takes from its input where they are null, and writes into run.json."""

FILES = ("teacher.pretrained", "subset.ids")
"""Settings that may name a file, which then counts by its content."""


def make_stage(
    job: str,
    settings: StageConfig,
    root: str,
    *,
    flags: Mapping[str, str] | None = None,
    data: Mapping[str, str] | None = None,
    needs: Mapping[str, Stage] | None = None,
) -> Stage:
    """A stage in its folder below `root`; InputError for a setting that its job does not know.

    flags: what the row decides besides the settings; data: places outside the graph; needs: stages it reads,
    both by flag.
    """
    flags, data, needs = flags or {}, data or {}, needs or {}
    # Stand-ins for places: what they are does not matter, and equal settings are then parsed once.
    places = dict.fromkeys((*data, *needs, "output"), "somewhere")
    required = JOBS[job].required
    resolved = _resolve(job, settings, {**flags, **places})
    defaults = _resolve(job, StageConfig(), {**flags, **places, **required})
    left_out = {*HOW_IT_RUNS, *data, *needs}
    deciding = {
        key: value
        for key, value in resolved.items()
        if key.split(".")[0] not in left_out
        # A new setting with a default leaves all names as they are.
        and (key in required or key not in defaults or defaults[key] != value)
    }
    for key in FILES:
        if deciding.get(key) is not None and storage.exists(deciding[key]):
            deciding[key] = artifacts.sha256_hex(storage.read(deciding[key]))
    identity = {
        "job": job,
        "flags": dict(flags),
        "settings": deciding,
        "data": {flag: listing_fingerprint(url) for flag, url in data.items()},
        "reads": {flag: stage.name for flag, stage in needs.items()},
    }
    name = f"{job}-{artifacts.fingerprint(identity)[:8]}"
    output = storage.join(root, name)
    outputs_read = {flag: stage.output for flag, stage in needs.items()}
    return Stage(
        job=job,
        name=name,
        settings=settings,
        flags={**flags, **data, **outputs_read, "output": output},
        inputs=tuple(url for stage in needs.values() for url in stage.outputs),
        outputs=(storage.join(output, f"{JOBS[job].header}.json"),),
        needs=needs,
        resolved=resolved,
    )


def _resolve(job: str, settings: StageConfig, flags: Mapping[str, str]) -> Mapping[str, Any]:
    """All settings that a job runs with, by dotted key; InputError for a key or value it does not know."""
    stage = Stage(job=job, name=job, settings=settings, flags=flags, inputs=(), outputs=())
    argv = stage.argv(ClusterOverride())
    return _parsed(job, tuple(argv), stage.settings_fingerprint(argv))


@functools.cache
def _parsed(job: str, argv: tuple[str, ...], fingerprint: str) -> Mapping[str, Any]:
    del fingerprint  # part of the key: argv names a file, whose content may change
    return dict(leaves(to_dict(parse(JOBS[job].config, argv))))


def other_run(stage: Stage) -> str | None:
    """How the run in a stage's folder differs from the stage, where somebody moved another one there.

    It is compared with run.json, in which a training keeps its settings; image shards and token shards have
    none. Files named in settings count by content, which the folder's name covers; settings that the job does
    not have any more decide nothing.
    """
    asked = stage.resolved
    known = {key.split(".")[0] for key in asked}
    differing = [
        f"{key}: there {value!r}, asked {asked.get(key)!r}"
        for key, value in leaves(artifacts.claimed_config(stage.output))
        if key not in FILES
        and key.split(".")[0] in known
        and not (key in FILLED_IN and asked.get(key) is None)
        and asked.get(key) != value
    ]
    return "; ".join(differing[:4]) or None


@functools.cache
def listing_fingerprint(url: str) -> str:
    """Fingerprint of the names and sizes below a folder, wherever it lies; of a file, of its name and size.

    A remote folder counts by its URL alone, because listing millions of objects takes minutes. InputError
    where there is nothing.
    """
    if not storage.is_local(url):
        return artifacts.fingerprint({"url": url.rstrip("/")})
    root = storage.absolute(url)
    if (file := storage.stat(root)) is not None:
        return artifacts.fingerprint([[storage.name(root), file.bytes]])
    files = [[os.fsencode(file.url[len(root) :]).hex(), file.bytes] for file in storage.list_files(root)]
    if not files:
        raise InputError(f"there are no files at {url}; name a folder of images")
    return artifacts.fingerprint(files)

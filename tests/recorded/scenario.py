"""The commands whose results are recorded, and how results are compared; for record.py and the test.

A command names its places by placeholders: `{source}`, the drawn images; `{inputs}`, a folder with what
earlier commands made; `{outputs}`, where this one writes. The recorded runs had one folder for all three.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

PLACE = Path("/tmp/recorded")
"""Where everything was recorded. The listing of an image dataset holds the paths of its sources, so that the
drawn images must lie in the same place again for a new dataset to have the same bytes."""
SOURCE = PLACE / "images"
SOURCE_TIME = 1_700_000_000
"""Modification time of the drawn images, in seconds: the listing holds it."""
DATA = Path(__file__).resolve().parent / "data"
LIBRARIES = ("torch", "numpy", "pillow", "pyarrow", "simplejpeg", "timm", "scipy")

_LOOP = {"batch_size": 8, "log_every_steps": 1, "decode_threads": 1}
_OPTIM = {"optim.peak_lr": 0.002, "optim.min_lr": 0.0001, "optim.warmup_epochs": 1}
_TOKENIZER: dict[str, Any] = {
    "images": "{inputs}/prepared/train",
    "val_images": "{inputs}/prepared/val",
    "model.image_size": 32,
    "model.patch_size": 8,
    "model.heads": 2,
    "model.depth": 1,
    "model.decoder_depth": 1,
    "model.codebook_size": 32,
    "model.code_dim": 8,
    "model.ema_decay": 0.9,
    "views.scale": "[0.3,1.0]",
    **_OPTIM,
    **_LOOP,
}
_MIM: dict[str, Any] = {
    "backbone.width": 24,
    "backbone.heads": 2,
    "backbone.depth": 3,
    "backbone.drop_path": 0.1,
    "mim.patch_aggregation.layer": 2,
    "mim.patch_aggregation.head_depth": 1,
    **_OPTIM,
    **_LOOP,
}
_TOKENS: dict[str, Any] = {
    "images": "{inputs}/prepared/train",
    "tokenizer": "{inputs}/tokenizer",
    "samples_per_shard": 16,
    "batch_size": 16,
    "encoder_threads": 1,
    "decode_threads": 1,
}

COMMANDS: dict[str, tuple[str, dict[str, Any]]] = {
    "prepared": (
        "prepare_images",
        {
            "source": "{source}",
            "output": "{outputs}/prepared",
            "val_fraction": 0.2,
            "max_shard_samples": 8,
        },
    ),
    "tokenizer": (
        "train_tokenizer",
        {**_TOKENIZER, "output": "{outputs}/tokenizer", "model.width": 24, "epochs": 3},
    ),
    "tokenizer_2": (
        "train_tokenizer",
        {
            **_TOKENIZER,
            "output": "{outputs}/tokenizer_2",
            "model.width": 16,
            "model.restart_dead_codes": True,
            "model.restart_every": 3,
            "epochs": 2,
            "seed": 1,
        },
    ),
    "tokens": (
        "precompute_shards",
        {**_TOKENS, "output": "{outputs}/tokens", "views.views_per_image": 2},
    ),
    "extended": (
        "precompute_shards",
        {**_TOKENS, "output": "{outputs}/extended", "views.views_per_image": 3, "extend": True},
    ),
    "layered": (
        "precompute_shards",
        {
            "output": "{outputs}/layered",
            "tokenizer": "{inputs}/tokenizer_2",
            "code_layer": True,
            "batch_size": 16,
            "encoder_threads": 1,
            "decode_threads": 1,
        },
    ),
    "backbone": (
        "pretrain_mim",
        {**_MIM, "shards": "{inputs}/tokens", "output": "{outputs}/backbone", "epochs": 3},
    ),
    "online": (
        "pretrain_mim",
        {
            **_MIM,
            "images": "{inputs}/prepared/train",
            "tokenizer": "{inputs}/tokenizer",
            "output": "{outputs}/online",
            "epochs": 1,
        },
    ),
    "classifier": (
        "finetune_classifier",
        {
            **_OPTIM,
            **_LOOP,
            "backbone": "{inputs}/backbone",
            "train": "{inputs}/prepared/train",
            "val": "{inputs}/prepared/val",
            "output": "{outputs}/classifier",
            "augment.mix_images": 4,
            "epochs": 2,
        },
    ),
    "segmenter": (
        "finetune_segmentation",
        {
            "train_images": "{inputs}/segmentation/images/train",
            "train_labels": "{inputs}/segmentation/labels/train",
            "val_images": "{inputs}/segmentation/images/val",
            "val_labels": "{inputs}/segmentation/labels/val",
            "num_classes": 3,
            "output": "{outputs}/segmenter",
            "init": "scratch",
            "scratch.width": 8,
            "scratch.depth": 4,
            "scratch.heads": 2,
            "patch_size": 8,
            "head.channels": 4,
            "head.auxiliary_channels": 4,
            "crops.size": 32,
            "crops.short_side": 32,
            "optim.peak_lr": 0.001,
            "optim.warmup_steps": 2,
            "steps": 8,
            "batch_size": 4,
            "log_every_steps": 4,
            "num_pictures": 0,
            "decode_threads": 1,
            "check_threads": 1,
        },
    ),
    "probe": (
        "probe_linear",
        {
            "backbone": "{inputs}/backbone",
            "train": "{inputs}/prepared/train",
            "val": "{inputs}/prepared/val",
            "output": "{outputs}/probe",
            "lrs": "[0.001,0.01]",
            "epochs": 4,
            "knn": "[3]",
            "decode_threads": 1,
        },
    ),
    "robustness": (
        "evaluate_robustness",
        {
            "classifier": "{inputs}/classifier",
            "clean": "{inputs}/prepared/val",
            "output": "{outputs}/robustness",
            "corruptions": "gaussian_noise,jpeg",
            "severities": "1,5",
            "decode_threads": 1,
        },
    ),
    "inspect_prepared": ("inspect_shards", {"dataset": "{inputs}/prepared/train", "json": True}),
    "inspect_tokens": ("inspect_shards", {"dataset": "{inputs}/tokens", "json": True}),
    "verify_prepared": ("verify_shards", {"dataset": "{inputs}/prepared/train"}),
    "verify_tokens": (
        "verify_shards",
        {"dataset": "{inputs}/tokens", "tokenizer": "{inputs}/tokenizer", "retokenize": 0.2},
    ),
    "gc_prepared": ("gc_shards", {"dataset": "{inputs}/prepared/train"}),
    "gc_tokens": ("gc_shards", {"dataset": "{inputs}/tokens"}),
    "unknown_key": ("pretrain_mim", {"shards": "{inputs}/tokens", "output": "{outputs}/x", "nonsense": 1}),
    "another_run": (
        "pretrain_mim",
        {**_MIM, "shards": "{inputs}/tokens", "output": "{inputs}/backbone", "epochs": 3, "seed": 7},
    ),
    "no_dataset": ("inspect_shards", {"dataset": "{inputs}/nothing"}),
}
AGAIN = ("prepared", "tokenizer", "tokens", "backbone", "classifier", "segmenter", "probe", "robustness")
"""Run a second time, on their finished outputs."""
HALF = ("tokenizer", "backbone", "classifier", "segmenter")
"""Stored as they were when a SIGTERM ended them."""
DATASETS = ("prepared", "tokens")
HEADERS = {
    "tokenizer": "tokenizer.json",
    "tokenizer_2": "tokenizer.json",
    "backbone": "backbone.json",
    "online": "backbone.json",
    "classifier": "classifier.json",
    "segmenter": "segmentation.json",
    "probe": "probe.json",
    "robustness": "robustness.json",
}
WITHOUT_CLUSTER = ("inspect_shards", "verify_shards", "gc_shards", "inspect_order")
"""Jobs without a --cluster."""


def orders() -> dict[str, tuple[str, dict[str, Any]]]:
    """The commands that print the order: both datasets, two seeds, two epochs, one rank and each of two."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for dataset in ("prepared/train", "tokens"):
        for seed in (0, 1):
            for epoch in (0, 1):
                for rank, ranks in ((0, 1), (0, 2), (1, 2)):
                    name = f"{dataset}, seed {seed}, epoch {epoch}, rank {rank} of {ranks}"
                    found[name] = (
                        "inspect_order",
                        {
                            "dataset": f"{{inputs}}/{dataset}",
                            "seed": seed,
                            "epoch": epoch,
                            "rank": rank,
                            "world_size": ranks,
                            "global_batch": 8,
                            "steps": 4,
                            "json": True,
                        },
                    )
    return found


def command(name: str, *, inputs: Path, outputs: Path) -> tuple[str, list[str]]:
    """The job and the arguments of a command."""
    job, settings = COMMANDS[name] if name in COMMANDS else orders()[name]
    places = {"source": SOURCE, "inputs": inputs, "outputs": outputs}
    words: list[str] = []
    for key, value in settings.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        words += [f"--{key}", text.format(**places)]
    return job, words if job in WITHOUT_CLUSTER else [*words, "--cluster.num_workers", "0"]


# ---------------------------------------------------------------------------------------------- this machine


def machine() -> dict[str, str]:
    """What floating-point results may depend on: the processor and the libraries."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        info = ""
    model = re.search(r"^model name\s*:\s*(.*)$", info, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.*)$", info, re.MULTILINE)
    listed = " ".join(sorted(flags[1].split())) if flags else ""
    return {
        "cpu": model[1] if model else platform.processor(),
        "cpu_flags_sha256": hashlib.sha256(listed.encode()).hexdigest()[:16],
        **{name: metadata.version(name) for name in LIBRARIES},
    }


# ---------------------------------------------------------------------------------------------- comparable


def read_json(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A file with JSON in every line, such as metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def neutral(text: str, *places: Path) -> str:
    """Text without paths, and without what depends on the clock."""
    for place in sorted({*map(str, places), str(PLACE)}, key=len, reverse=True):
        text = text.replace(place, "PLACE")
    return re.sub(r", seconds [\d.e+-]+", "", text)


def last_lines(text: str, *places: Path) -> list[str]:
    """What a job said in the end, on stdout or stderr: its lines but those with rates and times."""
    lines = [line.rstrip() for line in neutral(text, *places).splitlines() if line.strip()]
    kept = [line for line in lines if not re.search(r"/s, |ETA|\d s\b|Warning|warnings\.warn", line)]
    return kept[-6:]


def comparable(value: Any, *places: Path) -> Any:
    """A header or a config.json without times, places and the version of the code."""
    if isinstance(value, dict):
        return {
            key: comparable(inner, *places)
            for key, inner in value.items()
            if key not in ("seconds", "code_version")
        }
    if isinstance(value, list):
        return [comparable(inner, *places) for inner in value]
    return neutral(value, *places) if isinstance(value, str) else value


def dataset_files(root: Path, *places: Path) -> dict[str, Any]:
    """Every file of a dataset by its place: size and hash; of config.json what it says but places."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        data = path.read_bytes()
        name = path.relative_to(root).as_posix()
        if path.name == "config.json":
            found[name] = comparable(json.loads(data), *places)
        else:
            found[name] = f"{len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}"
    return found


def halved(root: Path) -> list[str]:
    """The files that make a finished dataset half-finished once they are gone, relative to its root.

    The manifest, the shard table, and the receipt, tar and index of the second shard.
    """
    receipt = sorted(root.glob("receipts/*/*.json"))[1]
    shard = read_json(receipt)["shard"]
    gone = ["manifest.json", *(path.name for path in root.glob("manifest-*.parquet"))]
    return sorted([*gone, receipt.relative_to(root).as_posix(), shard["tar"], shard["index"]])


TOLERANCE = 2e-3
"""Relative, on another processor or with other libraries; of shares and perplexities, which count codes or
images, 0.15."""
_COUNTED = re.compile(r"acc|top|usage|perplexity|iou|hits|knn|share|correct|error|result", re.IGNORECASE)
_WEIGHTS = ("fingerprint", "sha256", "files", "inputs")


def differences(held: Any, found: Any, *, exact: bool = True, path: str = "") -> list[str]:
    """`key: recorded X, found Y` for every leaf in which two JSON values differ."""
    if isinstance(held, dict) and isinstance(found, dict):
        lines: list[str] = []
        for key in sorted({*held, *found}):
            if not exact and key in _WEIGHTS:
                continue
            here = f"{path}.{key}" if path else str(key)
            if key not in held or key not in found:
                lines.append(f"{here}: only in what was {'found' if key in found else 'recorded'}")
            else:
                lines += differences(held[key], found[key], exact=exact, path=here)
        return lines
    if isinstance(held, list) and isinstance(found, list):
        lines = [f"{path}: {len(held)} recorded, {len(found)} found"] if len(held) != len(found) else []
        for number, (one, other) in enumerate(zip(held, found, strict=False)):
            lines += differences(one, other, exact=exact, path=f"{path}[{number}]")
        return lines
    if not exact and isinstance(held, int | float) and isinstance(found, int | float):
        allowed = 0.15 if _COUNTED.search(path) else TOLERANCE
        equal = math.isclose(held, found, rel_tol=allowed, abs_tol=allowed * 0.1)
    elif not exact and isinstance(held, str) and isinstance(found, str):
        equal = _without_figures(held) == _without_figures(found)
    else:
        equal = held == found and type(held) is type(found)
    return [] if equal else [f"{path}: recorded {held!r}, found {found!r}"]


def _without_figures(text: str) -> str:
    return re.sub(r"\b[0-9a-f]{8,64}\b|\d+(\.\d+)?(e[+-]\d+)?", "#", text)

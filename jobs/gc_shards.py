"""Deletes what lies in a finished dataset and is named by nothing: leftovers of attempts that lost.

python -m jobs.gc_shards --dataset s3://bucket/tokens            # says what would go
python -m jobs.gc_shards --dataset s3://bucket/tokens --delete
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from pipeline.config import run_job
from pipeline.errors import InputError
from shards.upkeep.gc import Garbage, delete, find_garbage

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


@dataclass(frozen=True, kw_only=True)
class GcConfig:
    """Find what a finished dataset does not need, and delete it if asked to."""

    dataset: str
    """Folder or URL of image shards or token shards, with everything that was added to them."""
    delete: bool = False
    """Delete; otherwise only say what would be deleted."""
    older_than: str = "1d"
    """Younger objects stay, whatever they are: a number with s, m, h, d or w."""
    json: bool = False
    """Print one line of JSON instead of text."""


def main(config: GcConfig) -> None:
    """Nothing is deleted that a manifest or any receipt names; an unfinished dataset is refused."""
    garbage = find_garbage(config.dataset, older_than_s=seconds(config.older_than))
    if not config.json:
        for line in in_words(garbage, config.delete):
            print(line)
    if config.delete:
        delete(garbage)
    if config.json:
        print(json.dumps(to_json(garbage, config.delete), sort_keys=True))


def seconds(age: str) -> float:
    """`36h` as seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", age)
    if match is None:
        raise InputError(f"older_than is {age}; give a number with s, m, h, d or w, such as 1d")
    return float(match[1]) * _UNITS_S[match[2]]


def in_words(garbage: Garbage, deleting: bool) -> list[str]:
    """A line for each object, then one for all."""
    lines = [f"{file.url}  {file.bytes:,} bytes" for file in garbage.objects]
    lines += [f"{file.url}  {file.bytes:,} bytes, a write that never ended" for file in garbage.writes]
    lines += [f"note: {file.url} is none of the dataset's, and stays" for file in garbage.others]
    if garbage.young:
        lines.append(f"note: {garbage.young:,} more are too young")
    count = len(garbage.objects) + len(garbage.writes)
    verb = "deleting" if deleting else "to delete with --delete:"
    lines.append(f"{verb} {count:,} objects, {garbage.bytes:,} bytes" if count else "nothing to delete")
    return lines


def to_json(garbage: Garbage, deleted: bool) -> dict[str, Any]:
    """The same for programs."""
    return {
        "dataset": garbage.url,
        "deleted": deleted,
        "bytes": garbage.bytes,
        "objects": [{"url": file.url, "bytes": file.bytes} for file in garbage.objects],
        "unfinished_writes": [{"url": file.url, "bytes": file.bytes} for file in garbage.writes],
        "young": garbage.young,
        "others": [file.url for file in garbage.others],
    }


if __name__ == "__main__":
    run_job(main, GcConfig)

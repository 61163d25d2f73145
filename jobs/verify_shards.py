"""Checks a dataset object by object, its codes against their tokenizer, and brings back what is lost.

python -m jobs.verify_shards --dataset s3://bucket/tokens --sample 0.01
python -m jobs.verify_shards --dataset s3://bucket/tokens --tokenizer s3://bucket/tokenizer --retokenize 0.001
python -m jobs.verify_shards --dataset s3://bucket/tokens --repair --images s3://bucket/images

Exit status 0: sound; 1: unsound, a line for each problem; 2: not a dataset, unfinished, or another tokenizer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline import storage
from pipeline.config import URL, absolute_places, run_job
from pipeline.errors import InputError
from shards.dataset.dataset import open_dataset
from shards.format.build import BuiltShard
from shards.format.plan import Item, Plan
from shards.upkeep.repair import Codes, Repair, repair_dataset
from shards.upkeep.verify import Verification, verify_dataset
from shards.writer.commit import RUN_CONFIG

if TYPE_CHECKING:
    from tokenizer.precompute.pairing import Retokenized

RETOKENIZE = 0.001


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Check every object of a dataset, and of what was added to it: sizes, hashes, counts, images, codes."""

    dataset: str = field(metadata=URL)
    """Folder or URL of image shards or token shards."""
    sample: float = 1.0
    """Share of the stored images that are decoded, chosen by sample id, at least one of each shard; all else
    is always checked."""
    tokenizer: str | None = field(default=None, metadata=URL)
    """Tokenizer artifact: crops are decoded and tokenized again, and their codes compared."""
    retokenize: float | None = None
    """With tokenizer: the share of crops, at least one of each shard; null is 0.001."""
    repair: bool = False
    """Bring back what is lost or damaged, bit for bit, where that can be done."""
    images: str | None = field(default=None, metadata=URL)
    """With repair: the image shards that the crops were made from, for pixels that are lost; null takes those
    that the dataset's config.json names, if they are still there."""
    use_gpu: bool | None = None
    """Tokenize on a GPU; null takes one where there is one."""
    num_threads: int = 4
    """Shards that are read at the same time; each takes a few times 100 MB of memory."""
    json: bool = False
    """Print one JSON document on stdout; progress goes to stderr."""

    def __post_init__(self) -> None:
        if self.retokenize is not None and self.tokenizer is None:
            raise InputError("retokenize needs a tokenizer; give --tokenizer, the one that wrote the codes")
        for name in ("sample", "retokenize"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise InputError(f"{name} is {share}; give a share from 0 to 1")
        if self.images is not None and not self.repair:
            raise InputError("images are needed for a repair only; give --repair, or leave --images out")
        if self.num_threads < 1:
            raise InputError(f"num_threads is {self.num_threads}; give 1 or more")


@dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """Everything a run established and did."""

    verification: Verification
    repairs: tuple[Repair, ...]
    retokenized: Retokenized | None

    @property
    def sound(self) -> bool:
        return self.verification.sound and (self.retokenized is None or self.retokenized.sound)


def main(config: VerifyConfig) -> None:
    """Prints what is wrong, and ends with status 1 where anything is."""
    config = absolute_places(config)
    with contextlib.redirect_stdout(sys.stderr) if config.json else contextlib.nullcontext():
        report = verify(config)
    print(json.dumps(to_json(report), sort_keys=True) if config.json else "\n".join(in_words(report)))
    if not report.sound:
        sys.exit(1)


def verify(config: VerifyConfig) -> Report:
    """Verification, repair and a second look at what was repaired, then the codes."""
    look = functools.partial(
        verify_dataset,
        config.dataset,
        sample=config.sample,
        num_threads=config.num_threads,
        absent=config.repair,
    )
    verification, repairs = look(), list[Repair]()
    if config.repair and any(problem.damaged for problem in verification.problems):
        images = _images(config, verification)

        def make_item(plan: Plan, item: Item, codes: Codes | None) -> BuiltShard:
            from tokenizer.precompute.remake import RepairInputs  # torch, which image shards do not need

            given = RepairInputs(dataset=verification.url, images=images, tokenizer=config.tokenizer)
            return given.make(plan, item, codes)

        repairs = repair_dataset(verification, make_item)
        verification = dataclasses.replace(look(after=verification), notes=verification.notes)
    return Report(
        verification=verification,
        repairs=tuple(repairs),
        retokenized=_retokenize(config, verification),
    )


def _images(config: VerifyConfig, verification: Verification) -> str | None:
    """The image shards that were given, or those that the writer read, where they are still to be found."""
    named = {part.manifest.inputs.get("images") for part in verification.parts} - {None}
    if config.images is not None:
        fingerprint = open_dataset(config.images, "images").fingerprint
        if named and fingerprint not in named:
            raise InputError(
                f"{config.images} is {fingerprint}, but the crops were made from "
                f"{', '.join(sorted(map(str, named)))}; give that image dataset with --images"
            )
        return config.images
    try:
        record = json.loads(storage.read(storage.join(verification.url, RUN_CONFIG)))
        url = record["config"]["images"]
        return url if open_dataset(url, "images").fingerprint in named else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, InputError):
        return None


def _retokenize(config: VerifyConfig, verification: Verification) -> Retokenized | None:
    share = RETOKENIZE if config.retokenize is None else config.retokenize
    if config.tokenizer is None or share == 0 or not verification.parts:
        return None
    import torch

    from tokenizer.precompute.pairing import retokenize

    if config.use_gpu and not torch.cuda.is_available():
        raise InputError("use_gpu is true, but there is no GPU here; leave it out")
    bad = {(problem.part, problem.view, problem.number) for problem in verification.problems}
    return retokenize(
        [part.table for part in verification.parts],
        config.tokenizer,
        share,
        device="cuda" if torch.cuda.is_available() and config.use_gpu is not False else "cpu",
        skip=lambda part, view, number: (part, view, number) in bad,
    )


def in_words(report: Report) -> list[str]:
    """A line for each problem and repair, then a summary."""
    verification, total = report.verification, report.verification.total
    lines = [f"repair: {repair}" for repair in report.repairs]
    lines += [str(problem) for problem in verification.problems]
    lines += [f"note: {note}" for note in verification.notes]
    state = "sound" if report.sound else f"UNSOUND, {len(verification.problems):,} problems"
    lines.append(
        f"{verification.url}: {state}; sound: parts {len(verification.parts):,}, shards {total.shards:,}, "
        f"objects {total.objects:,}, bytes {total.bytes:,}, samples {total.samples:,}, of them decoded "
        f"{total.decoded:,}, rejects {sum(total.rejected.values()):,}"
    )
    if report.retokenized is not None:
        lines.append(f"codes: {report.retokenized}")
    return lines


def to_json(report: Report) -> dict[str, Any]:
    """The same for programs."""
    verification, retokenized = report.verification, report.retokenized
    base = next((part for part in verification.parts if part.kind == "base"), None)
    return {
        "dataset": verification.url,
        "sound": report.sound,
        "fingerprint": None if base is None or base.manifest_lost else base.manifest.fingerprint,
        "problems": [dataclasses.asdict(problem) for problem in verification.problems],
        "notes": list(verification.notes),
        "checked": dataclasses.asdict(verification.total),
        "parts": [
            {"url": part.url, "kind": part.kind, **dataclasses.asdict(verification.tallies[part.url])}
            for part in verification.parts
        ],
        "repairs": [dataclasses.asdict(repair) for repair in report.repairs],
        "retokenized": retokenized and {**dataclasses.asdict(retokenized), "sound": retokenized.sound},
    }


if __name__ == "__main__":
    run_job(main, VerifyConfig)

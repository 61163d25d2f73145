"""Brings back what verification found lost, bit for bit: an item is made again by the writer's own code.

What was made is put only where it has the hash that the shard table names; nothing sound is written to. An
image shard is made from its sources; a shard of crops from its image shards, with the codes of its index or,
where that is lost, of its tar, whichever device computed them; a code layer from its tokenizer. Table and
manifest follow from plan and receipts, a receipt from table and rejects. The plan and the listing of sources
cannot be made again: copy them from another copy of the dataset.
"""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from pipeline import storage
from pipeline.artifacts import sha256_hex
from pipeline.errors import InputError
from shards.dataset.rows import read_checked, read_shard_index, read_shard_rejects
from shards.format.build import BuildError, BuiltShard
from shards.format.index import codes_of
from shards.format.manifest import ShardInfo
from shards.format.plan import Item, Plan, item_at
from shards.format.tar import iter_members
from shards.sources.table import SOURCES, Source, load_rows
from shards.upkeep.parts import OpenedPart, Problem, decoder_of
from shards.upkeep.verify import Verification, reasons_of
from shards.writer.commit import CommitError, Receipt, collect, manifest_of, probes
from shards.writer.prepare import make_item as make_image_item

Codes = dict[int, np.ndarray]
"""Codes by sample id, uint16 [grid area]."""
MakeItem = Callable[[Plan, Item, Codes | None], BuiltShard]
"""Makes a shard of crops or codes as it was written; given codes take the place of the tokenizer's.

Raises InputError that says what is missing: images, or a tokenizer.
"""

_READ_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class Repair:
    """What became of one lost object: whether it was brought back, and how, or why not."""

    object: str
    done: bool
    how: str

    def __str__(self) -> str:
        return f"{self.object}: {'brought back' if self.done else 'not brought back'}, {self.how}"


def repair_dataset(verification: Verification, make_item: MakeItem) -> list[Repair]:
    """Bring back the damaged objects of a verification; a line for each of them."""
    repairs: list[Repair] = []
    for part in verification.parts:
        damaged = [p for p in verification.problems if p.damaged and p.part == part.url]
        repairs += _repair_part(part, damaged, make_item)
    opened = {part.url for part in verification.parts}
    repairs += [
        Repair(object=problem.object, done=False, how="too much of its part is lost")
        for problem in verification.problems
        if problem.damaged and problem.part not in opened
    ]
    return repairs


def _repair_part(part: OpenedPart, damaged: Sequence[Problem], make_item: MakeItem) -> list[Repair]:
    """Bring back the shards of a part, then what describes them."""
    repairs: list[Repair] = []
    shards: dict[tuple[int | None, int | None], list[Problem]] = {}
    for problem in damaged:
        if problem.kind in ("tar", "index", "rejects"):
            shards.setdefault((problem.view, problem.number), []).append(problem)
    for problems in shards.values():
        repairs += _repair_shard(part, problems, make_item)
    for problem in damaged:
        if problem.kind in ("plan", "sources"):
            how = "it cannot be made again; copy it from another copy of the dataset"
            repairs.append(Repair(object=problem.object, done=False, how=how))
    kinds = ("table", "receipt", "manifest")
    for problem in sorted((p for p in damaged if p.kind in kinds), key=lambda p: kinds.index(p.kind)):
        failed = [repair.object for repair in repairs if not repair.done]
        try:
            if problem.kind == "manifest" and failed:
                raise InputError(f"{len(failed)} objects that it names are lost, such as {failed[0]}")
            storage.put(problem.object, _description(part, problem))
            repairs.append(Repair(object=problem.object, done=True, how="made again"))
        except (InputError, CommitError) as error:
            repairs.append(Repair(object=problem.object, done=False, how=str(error)))
    return repairs


def _description(part: OpenedPart, problem: Problem) -> bytes:
    """A shard table, receipt or manifest, from what it follows from."""
    if problem.kind == "receipt":
        shard = _shard_of(part, problem)
        stored = part.table.stored(shard.view - part.manifest.first_view, shard.number)
        reasons = reasons_of(read_shard_rejects(shard))
        return Receipt(plan=part.manifest.plan, shard=stored, rejected=reasons).to_bytes()
    decode = decoder_of(part.manifest)
    if part.plan is None or decode is None:
        raise InputError("its plan is lost, too, or its images were prepared with another decode version")
    if problem.kind == "table":
        return collect(part.url, part.plan, objects=False).table
    summary = collect(part.url, part.plan)
    return manifest_of(part.plan, summary, probes(part.url, part.plan, summary, decode)).to_bytes()


# ------------------------------------------------------------------------------------------------ shards


def _repair_shard(part: OpenedPart, problems: Sequence[Problem], make_item: MakeItem) -> list[Repair]:
    """Make one shard again, and put those of its objects that are lost."""
    shard = _shard_of(part, problems[0])
    lost = {problem.kind for problem in problems}
    try:
        if shard.in_place and "tar" in lost:
            raise InputError("the tar is not ours; bring the old one back, or prepare again")
        if part.plan is None:
            raise InputError("its plan is lost, too; copy that from another copy of the dataset first")
        item = item_at(part.plan, shard.view, shard.number)
        if part.plan.kind == "images":
            built = _make_images(part, part.plan, item)
        else:
            built = make_item(part.plan, item, _stored_codes(part, shard, lost))
    except (InputError, BuildError) as error:
        return [Repair(object=problem.object, done=False, how=str(error)) for problem in problems]
    made = {"tar": built.tar, "index": built.index, "rejects": built.rejects}
    written = {"tar": shard.tar_sha256, "index": shard.index_sha256, "rejects": shard.rejects_sha256}
    repairs: list[Repair] = []
    for problem in problems:
        data, sha256 = made[problem.kind], written[problem.kind] or ""
        if data is not None and sha256_hex(data) == sha256:
            storage.put(problem.object, data)
            repairs.append(Repair(object=problem.object, done=True, how="made again, the same bytes"))
        else:
            now = "nothing" if data is None else f"{len(data)} bytes with sha256 {sha256_hex(data)[:8]}…"
            how = f"made again it is {now}, written was {sha256[:8]}…; its inputs or the library versions of "
            repairs.append(Repair(object=problem.object, done=False, how=f"{how}the recipe have changed"))
    return repairs


def _make_images(part: OpenedPart, plan: Plan, item: Item) -> BuiltShard:
    """An image shard from its sources. Their bytes decide whether they are the same, not when written."""
    url = storage.join(part.url, SOURCES)
    data = storage.read_or_none(url)
    if data is None or sha256_hex(data) != plan.inputs["sources"]:
        raise InputError(f"{url}, which says where the images came from, is lost; copy it first")

    @functools.cache
    def version(file_url: str) -> str | None:
        stat = storage.stat(file_url)
        return None if stat is None else stat.version

    def current(source: Source) -> Source:
        return dataclasses.replace(source, version=version(source.url) or source.version)

    rows = [current(source) for source in load_rows(url, item.first_id, item.end_id)]
    with ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="read") as pool:
        return make_image_item(plan, item, rows, pool)


def _stored_codes(part: OpenedPart, shard: ShardInfo, lost: set[str]) -> Codes | None:
    """The codes of a shard of crops from its index, or else from its tar; None where both are lost."""
    if part.manifest.kind == "codes":
        return None
    if "index" not in lost:
        index = read_shard_index(shard, ("sample_id", "codes"))
        return dict(zip(index.column("sample_id").to_pylist(), codes_of(index), strict=True))
    if "tar" in lost or shard.tar_sha256 is None:
        return None
    data = read_checked(shard.tar, shard.tar_bytes, shard.tar_sha256, shard.name)
    codes: Codes = {}
    for member in iter_members(io.BytesIO(data)):
        if member.name.endswith(".npy"):
            payload = io.BytesIO(data[member.offset : member.offset + member.bytes])
            sample_id = int(member.name.partition("-")[0])
            codes[sample_id] = np.lib.format.read_array(payload, allow_pickle=False)
    return codes


def _shard_of(part: OpenedPart, problem: Problem) -> ShardInfo:
    """The shard of a problem, with complete URLs."""
    assert problem.view is not None and problem.number is not None
    return part.table.shard(problem.view - part.manifest.first_view, problem.number)

"""One part of a dataset, opened although its plan, its shard table or its manifest may be lost.

Each of the three follows from the others or from the receipts, and fingerprints tell whether what follows is
what was written. So everything else can be checked, and mended, before anything is put back.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.artifacts import sha256_hex
from pipeline.errors import InputError
from shards.dataset.dataset import ShardTable
from shards.dataset.parts import PLAN, PartKind
from shards.dataset.rows import read_checked
from shards.format.manifest import MANIFEST, DamageError, Manifest, TableWriter, read_manifest, shard_name
from shards.format.plan import Plan, items
from shards.writer.commit import CommitError, Receipt, Summary, collect, in_order, manifest_of

ObjectKind = Literal["manifest", "plan", "table", "sources", "tar", "index", "rejects", "receipt"]

MEND = "copy it from another copy of the dataset, or run jobs.verify_shards --repair"
TABLE_NAME = re.compile(r"manifest-[0-9a-f]{8}\.parquet")

_MISSING = "missing"
ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""What reading raises where no object is, whatever is there instead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One object of a dataset that is not as it must be: what is wrong, and what to do about it.

    `part` is the URL of the dataset, or of what was added to it, `view` and `number` tell the shard. An
    object is `damaged` where it is absent or holds other bytes than were written, those of hash
    `found_sha256`; otherwise what was written is wrong in itself.
    """

    object: str
    kind: ObjectKind
    part: str
    what: str
    mend: str = MEND
    view: int | None = None
    number: int | None = None
    damaged: bool = True
    found_sha256: str | None = None

    def __str__(self) -> str:
        return f"{self.object}: {self.what}; {self.mend}"


class UnreadablePartError(Exception):
    """Too much of a part is lost to check the rest; `problems` say what."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(map(str, problems)))
        self.problems = tuple(problems)


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenedPart:
    """One part with its plan and table, as they were written.

    `problems` are those of manifest, plan and table. `recovered` holds the right bytes, by URL, of the plan
    and the table where those are lost. Of a lost manifest everything is known but its decode probe.
    """

    kind: PartKind
    table: ShardTable
    plan: Plan
    problems: tuple[Problem, ...] = ()
    recovered: dict[str, bytes] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return self.table.url

    @property
    def manifest(self) -> Manifest:
        return self.table.manifest

    @property
    def manifest_lost(self) -> bool:
        return any(problem.kind == "manifest" for problem in self.problems)


def open_damaged(url: str, kind: PartKind, *, absent: bool = False) -> OpenedPart:
    """Open a finished part, in spite of damage to what describes it.

    With `absent` a manifest that is missing counts as lost where every receipt is there. InputError where
    there is no dataset, or an unfinished one; UnreadablePartError where too much is lost.
    """
    problems: list[Problem] = []
    recovered: dict[str, bytes] = {}
    plan = _stored_plan(url)
    manifest = _stored_manifest(url, plan, absent, problems)
    if plan is not None and manifest is not None and plan.fingerprint != manifest.plan:
        plan = None
    if plan is None:
        state = "damaged, or of another dataset" if storage.exists(storage.join(url, PLAN)) else "missing"
        problems.append(_lost(url, PLAN, "plan", state))
    written: bytes | None = None
    if manifest is None:
        if plan is None:
            raise UnreadablePartError(problems)
        try:
            summary = collect(url, plan, objects=False)
        except CommitError as error:
            beside = _table_beside(url, plan)
            if beside is None:
                if problems[0].what == _MISSING:
                    read_manifest(url)  # says that it is unfinished
                problems.append(_lost(url, "receipts", "receipt", str(error)))
                raise UnreadablePartError(problems) from None
            summary = beside
        manifest, written = manifest_of(plan, summary, ()), summary.table
    location = storage.join(url, manifest.table.path)
    try:
        data = read_checked(location, manifest.table.bytes, manifest.table.sha256, "table (all shards)")
    except DamageError:
        state = "damaged" if storage.exists(location) else _MISSING
        problems.append(_lost(url, manifest.table.path, "table", state))
        written = table_from_receipts(url, manifest) if written is None else written
        if written is None:
            raise UnreadablePartError(problems) from None
        recovered[location] = data = written
    table = ShardTable(url, manifest, data)
    if plan is None:
        plan = plan_of(table)
        if plan is None:
            raise UnreadablePartError(problems)
        recovered[storage.join(url, PLAN)] = plan.to_bytes()
    return OpenedPart(kind=kind, table=table, plan=plan, problems=tuple(problems), recovered=recovered)


def _stored_plan(url: str) -> Plan | None:
    """The plan that lies there, if it is whole."""
    data = read_or_none(storage.join(url, PLAN))
    try:
        plan = None if data is None else Plan.from_bytes(data)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return plan if plan is not None and plan.to_bytes() == data else None


def _stored_manifest(url: str, plan: Plan | None, absent: bool, problems: list[Problem]) -> Manifest | None:
    """The manifest that lies there, if it is whole and this part's; otherwise a problem is added."""
    try:
        manifest = read_manifest(url)
    except DamageError:
        if not storage.exists(storage.join(url, PLAN)):
            raise
        problems.append(_lost(url, MANIFEST, "manifest", "damaged"))
        return None
    except InputError:
        if not absent or plan is None or storage.exists(storage.join(url, MANIFEST)):
            raise
        problems.append(_lost(url, MANIFEST, "manifest", _MISSING))
        return None
    if plan is not None and plan.fingerprint != manifest.plan:
        # Two that are whole and disagree: the receipts lie under the name of the plan that made them.
        passes = storage.list_folders(storage.join(url, "receipts"))
        if plan.plan8 in passes and manifest.plan[:8] not in passes:
            problems.append(_lost(url, MANIFEST, "manifest", "of another dataset"))
            return None
    return manifest


def _table_beside(url: str, plan: Plan) -> Summary | None:
    """What a shard table adds up to that lies there under its hash; rejects are not told apart.

    It was put when every receipt was there, so the pass was complete.
    """
    for found in storage.list_files(url):
        name = storage.name(found.url)
        if storage.join(url, name) != found.url or not TABLE_NAME.fullmatch(name):
            continue
        data = storage.read(found.url)
        if not name.startswith(f"manifest-{sha256_hex(data)[:8]}."):
            continue
        samples = pq.read_table(pa.BufferReader(data), columns=["samples"]).column("samples").to_numpy()
        if len(samples) == plan.num_items:
            return Summary(
                table=data,
                written_per_view=samples.reshape(plan.views, plan.num_ranges).sum(axis=1).tolist(),
                samples_in=sum(item.samples for item in items(plan)),
                rejected={},
                probed=[],
            )
    return None


def plan_of(table: ShardTable) -> Plan | None:
    """The plan that a manifest and its table came from; None where its fingerprint cannot be met."""
    manifest = table.manifest
    first_ids: list[int] = []
    counts: list[int] = []
    end_id = 0
    for shard in table.shards(0):
        first_ids.append(shard.first_id)
        counts.append(shard.samples + shard.rejected)
        end_id = shard.end_id
    for samples in (tuple(counts), None):  # a plan leaves out the sizes where every id is a sample
        try:
            plan = Plan(
                kind=manifest.kind,
                inputs=manifest.inputs,
                recipe=manifest.recipe,
                first_ids=(*first_ids, end_id),
                views=manifest.num_views,
                tokenizer=manifest.tokenizer,
                class_names=manifest.class_names,
                details=manifest.details,
                samples=samples,
                first_view=manifest.first_view,
            )
        except ValueError:
            continue
        if plan.fingerprint == manifest.plan:
            return plan
    return None


def table_from_receipts(url: str, manifest: Manifest) -> bytes | None:
    """The shard table that a manifest names, from the receipts; None where it does not come out."""
    writer = TableWriter()
    views = range(manifest.first_view, manifest.first_view + manifest.num_views)
    places = itertools.product(views, range(manifest.shards_per_view))
    for held in in_order(lambda place: _receipt(url, manifest.plan, *place), places):
        if held is None:
            return None
        writer.append(held.shard)
    data = writer.finish()
    named = (manifest.table.bytes, manifest.table.sha256)
    return data if (len(data), sha256_hex(data)) == named else None


def read_or_none(url: str) -> bytes | None:
    """The bytes of an object, or None where there is none."""
    try:
        return storage.read(url)
    except ABSENT:
        return None


def _receipt(url: str, plan: str, view: int, number: int) -> Receipt | None:
    data = read_or_none(storage.join(url, "receipts", plan[:8], f"{shard_name(view, number)}.json"))
    try:
        held = None if data is None else Receipt.from_bytes(data)
    except (ValueError, KeyError, TypeError):
        return None
    mine = held is not None and (held.plan, held.shard.view, held.shard.number) == (plan, view, number)
    return held if mine else None


def _lost(part: str, path: str, kind: ObjectKind, what: str) -> Problem:
    return Problem(object=storage.join(part, path), kind=kind, part=part, what=what)

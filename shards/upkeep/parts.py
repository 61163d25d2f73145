"""One part of a dataset, opened although its manifest or its shard table may be lost.

Both follow from plan and receipts, so everything else can be checked, and mended, before they are put back.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

from pipeline import storage
from pipeline.artifacts import sha256_hex
from pipeline.errors import InputError
from shards.dataset.dataset import ShardTable
from shards.dataset.parts import PLAN, PartKind, read_plan
from shards.dataset.rows import Decode, read_checked
from shards.format.manifest import MANIFEST, DamageError, Manifest, read_manifest
from shards.format.plan import Plan
from shards.pixels.decode import decode_config_of, decode_image
from shards.pixels.views import decode_crop
from shards.writer.commit import CommitError, collect, manifest_of

ObjectKind = Literal["manifest", "plan", "table", "sources", "tar", "index", "rejects", "receipt"]

MEND = "copy it from another copy of the dataset, or run jobs.verify_shards --repair"
COPY = "copy it from another copy of the dataset"
BRING_BACK = "bring the old tar back, or prepare again"
NOT_AS_WRITTEN = "what was written is wrong: write the dataset again, and report this"


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One object of a dataset that is not as it must be: what is wrong, and what to do about it.

    `part` is the URL of the dataset, or of what was added to it; `view` and `number` name the shard. An
    object is `damaged` where it is absent or holds other bytes than were written; otherwise it is intact, but
    its content is wrong.
    """

    object: str
    kind: ObjectKind
    part: str
    what: str
    mend: str = MEND
    view: int | None = None
    number: int | None = None
    damaged: bool = True

    def __str__(self) -> str:
        return f"{self.object}: {self.what}; {self.mend}"


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenedPart:
    """The dataset or something added to it, opened although parts of its description may be damaged.

    Where manifest or shard table are lost, `table` holds what plan and receipts say; such a manifest has no
    decode probe. `plan` is None where it is lost.
    """

    kind: PartKind
    table: ShardTable
    plan: Plan | None
    problems: tuple[Problem, ...] = ()

    @property
    def url(self) -> str:
        return self.table.url

    @property
    def manifest(self) -> Manifest:
        return self.table.manifest

    @property
    def manifest_lost(self) -> bool:
        return any(problem.kind == "manifest" for problem in self.problems)


class UnreadablePartError(Exception):
    """Too much of a part is lost to check the rest; `problems` say what."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("; ".join(map(str, problems)))
        self.problems = problems


def open_part(url: str, kind: PartKind, absent: bool) -> OpenedPart:
    """A finished part with plan and table; what is lost of manifest and table follows from the receipts."""
    problems: list[Problem] = []

    def lost(path: str, kind: ObjectKind, what: str, mend: str = MEND) -> None:
        problems.append(Problem(object=storage.join(url, path), kind=kind, part=url, what=what, mend=mend))

    try:
        plan = read_plan(url)
        if plan is not None and plan.to_bytes() != storage.read(storage.join(url, PLAN)):
            plan = None
    except InputError:
        plan = None
    manifest: Manifest | None = None
    try:
        manifest = read_manifest(url)
    except DamageError:
        if not storage.exists(storage.join(url, PLAN)):
            raise
        lost(MANIFEST, "manifest", "damaged")
    except InputError:
        if not absent or plan is None or storage.exists(storage.join(url, MANIFEST)):
            raise
        lost(MANIFEST, "manifest", "missing")
    if plan is None or (manifest is not None and plan.fingerprint != manifest.plan):
        lost(PLAN, "plan", "missing, damaged, or of another dataset", COPY)
        plan = None
    data: bytes | None = None
    if manifest is not None:
        named = manifest.table
        try:
            data = read_checked(
                storage.join(url, named.path), named.bytes, named.sha256, "table (all shards)"
            )
        except DamageError:
            lost(named.path, "table", "missing or damaged")
    if data is None or manifest is None:
        if plan is None:
            raise UnreadablePartError(problems)
        try:
            summary = collect(url, plan, objects=False)
        except CommitError as error:
            if problems[0].what == "missing" and manifest is None:
                read_manifest(url)  # says that the part is unfinished
            lost("receipts", "receipt", str(error))
            raise UnreadablePartError(problems) from None
        if manifest is not None and sha256_hex(summary.table) != manifest.table.sha256:
            lost("receipts", "receipt", "they name other objects than the manifest", COPY)
            raise UnreadablePartError(problems)
        data = summary.table
        if manifest is None:
            manifest = manifest_of(plan, summary, ())
            if storage.read_or_none(storage.join(url, manifest.table.path)) != data:
                lost(manifest.table.path, "table", "missing or damaged")
    return OpenedPart(kind=kind, table=ShardTable(url, manifest, data), plan=plan, problems=tuple(problems))


def decoder_of(manifest: Manifest) -> Decode | None:
    """How stored images become pixels; None for images that another decode version prepared."""
    if manifest.kind != "images":
        return decode_crop
    try:
        return functools.partial(decode_image, config=decode_config_of(manifest.recipe.require_decode()))
    except InputError:
        return None

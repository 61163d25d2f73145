"""The write pass of a dataset: plan, work items, receipts, manifest.

Objects are published under names that hold their hash; a shard exists when its receipt does, a dataset when
its manifest does. Plan, receipts and manifest are created only if absent, so a kill between any two steps, a
rerun, or a second driver started by mistake leaves the same bytes.

    plan = start(root, Plan(...))
    for item in pending(root, plan):          # on any number of machines
        commit(root, plan, item, build_shard(...))
    finish(root, plan, decode)
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pipeline import storage
from pipeline.artifacts import canonical_json, code_version, differences, sha256_hex
from pipeline.errors import InputError
from pipeline.threads import in_order
from shards.dataset.parts import PLAN
from shards.dataset.rows import Decode, check_in_place, probe_shard
from shards.format.build import BuiltShard
from shards.format.index import FORMAT_VERSION
from shards.format.manifest import (
    MANIFEST,
    Manifest,
    ProbeEntry,
    Recipe,
    ShardInfo,
    TableName,
    TableWriter,
    read_manifest,
)
from shards.format.plan import Item, Plan, items

RUN_CONFIG = "config.json"
PROBES = 16
CHECK_THREADS = 16
"""Receipts and sizes that are asked for at once: at 30 ms a request, 10,000 shards take a minute."""


class CommitError(Exception):
    """The pass cannot go on: shards are missing, or what was committed does not add up."""


# ------------------------------------------------------------------------------------------------ start


def record_run(root: str, config: dict[str, Any]) -> None:
    """Beside the dataset, once: the settings of the run that began it, and the version of its code.

    Not part of the dataset: its bytes are decided by the plan alone.
    """
    record = {"config": config, "code_version": code_version()}
    storage.create(storage.join(root, RUN_CONFIG), canonical_json(record) + b"\n")


def start(root: str, plan: Plan, *, beside: Sequence[str] = ()) -> Plan:
    """Take `root` for this plan, or go on with the same plan that is there already.

    Raises InputError where another plan is there, naming what differs, and where `root` holds other things
    than those named in `beside` (file names relative to the root), which a caller may put there before.
    Until the dataset is finished, every start tries to create the plan once more: a store that does not
    refuse gets a warning, because nothing protects against a second driver there.
    """
    url, text = storage.join(root, PLAN), plan.to_bytes()
    stored = storage.read_or_none(url)
    if stored is None:
        if storage.exists(root):
            raise InputError(f"{root} is a file; choose a folder for the output")
        other = _first_other_file(root, beside)
        # Another driver may have started between the two looks.
        stored = storage.read_or_none(url)
        if stored is None and other is not None:
            raise InputError(
                f"{root} already holds something else ({other}); choose another output or empty it"
            )
    if stored is None and not storage.create(url, text):
        stored = storage.read(url)
    accepted = plan if stored is None else same_plan(root, stored, plan)
    # A probe: the plan plus a newline, which is the same JSON. A store that takes it cannot stop a driver.
    if not storage.exists(storage.join(root, MANIFEST)) and storage.create(url, text + b"\n"):
        storage.put(url, text)
        storage.warn_one_driver(url)
    return accepted


def _first_other_file(root: str, beside: Sequence[str]) -> str | None:
    root = storage.absolute(root)
    expected = {storage.join(root, name) for name in beside}
    others = (file.url for file in storage.list_files(root) if file.url not in expected)
    # asked by name as well: a store's listing may show what is no longer there
    return next((url for url in others if storage.is_local(url) or storage.exists(url)), None)


def same_plan(root: str, stored: bytes, plan: Plan) -> Plan:
    """The plan that is stored at `root`; InputError where it differs from `plan`, naming in what."""
    if stored == plan.to_bytes():
        return plan
    try:
        there, there_plan = json.loads(stored), Plan.from_bytes(stored)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{storage.join(root, PLAN)} is not a plan of this format ({error!r}); choose another output, or "
            "bring back the plan that was there"
        ) from None
    asked = json.loads(plan.to_bytes())
    keys = ("first_id", "range_ids", "range_samples")
    ranges = [[value.pop(key) for key in keys] for value in (there, asked)]
    differing = differences(there, asked)
    if ranges[0] != ranges[1]:
        differing.append(f"id ranges: there {there_plan.ranges_in_words()}, asked {plan.ranges_in_words()}")
    if differing:
        shown = "; ".join(differing[:6]) + (f"; and {len(differing) - 6} more" if len(differing) > 6 else "")
        raise InputError(
            f"{root} was begun with another plan, which differs in {shown}; choose another output, or "
            "repeat the inputs and settings it was begun with"
        )
    return there_plan


# ------------------------------------------------------------------------------------------------ receipts


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """The commit point of one item: its objects by place, size and hash, and its rejects by reason."""

    plan: str
    shard: ShardInfo
    rejected: dict[str, int]

    def to_bytes(self) -> bytes:
        return canonical_json({"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}) + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> Receipt:
        value = json.loads(data)
        return cls(plan=value["plan"], shard=ShardInfo(**value["shard"]), rejected=value["rejected"])


def receipt_url(root: str, plan: Plan, item: Item) -> str:
    return storage.join(root, "receipts", plan.plan_prefix, f"{item.name}.json")


def receipt(root: str, plan: Plan, item: Item) -> Receipt | None:
    """The receipt of an item whose work is done: it exists, and so do its objects with their sizes."""
    stored = _read_receipt(root, plan, item)
    return stored if stored is not None and _has_objects(root, stored) else None


def pending(root: str, plan: Plan) -> Iterator[Item]:
    """The items without a good receipt, in order; many are asked for at once, few are held.

    None once the manifest is there: what is finished is not looked at again, `verify` is for that.
    """
    if storage.exists(storage.join(root, MANIFEST)):
        return
    looked_up = in_order(lambda item: (item, receipt(root, plan, item)), items(plan), CHECK_THREADS)
    yield from (item for item, stored in looked_up if stored is None)


class Unfinished:
    """All that `pending` gives, counted before any of it is done; `samples` is what these items hold.

    A byte for each item of the plan says whether it is missing, where a list of items would take a hundred.
    """

    def __init__(self, root: str, plan: Plan) -> None:
        self._plan, self._missing, self.samples = plan, bytearray(plan.num_items), 0
        for item in pending(root, plan):
            self._missing[(item.view - plan.first_view) * plan.num_ranges + item.number] = True
            self.samples += item.samples

    def __len__(self) -> int:
        return sum(self._missing)

    def __iter__(self) -> Iterator[Item]:
        return itertools.compress(items(self._plan), self._missing)


def commit(root: str, plan: Plan, item: Item, built: BuiltShard) -> Receipt:
    """Publish what was built for an item, then its receipt; returns the receipt that stands.

    Where another attempt was first and its objects are there, that one's receipt stands and nothing of it is
    touched; what this attempt put is left for gc. Raises CommitError where the objects are not this item's.
    """
    _check_belongs(plan, item, built)
    mine = Receipt(plan=plan.fingerprint, shard=_shard_info(item, built), rejected=built.rejected)
    shard = mine.shard
    for place, data in ((shard.tar, built.tar), (shard.index, built.index), (shard.rejects, built.rejects)):
        if place is not None and data is not None:
            put_object(root, place, data)
    return create_receipt(root, plan, item, mine)


def _shard_info(item: Item, built: BuiltShard) -> ShardInfo:
    """The objects of a shard by the names that they are published under, sizes and hashes."""
    tar_sha256 = tar_version = rejects = rejects_sha256 = None
    if built.foreign is not None:
        tar, tar_bytes, tar_version = built.foreign.url, built.foreign.bytes, built.foreign.version
    elif built.pixels is not None:
        tar, tar_bytes, tar_sha256 = built.pixels.path, built.pixels.bytes, built.pixels.sha256
    else:
        assert built.tar is not None
        tar_bytes, tar_sha256 = len(built.tar), sha256_hex(built.tar)
        tar = _object("shards", item, tar_sha256)
    index_sha256 = sha256_hex(built.index)
    if built.rejects is not None:
        rejects_sha256 = sha256_hex(built.rejects)
        rejects = _object("rejects", item, rejects_sha256)
    return ShardInfo(
        view=item.view,
        number=item.number,
        first_id=item.first_id,
        end_id=item.end_id,
        samples=built.samples,
        rejected=sum(built.rejected.values()),
        tar=tar,
        tar_bytes=tar_bytes,
        tar_sha256=tar_sha256,
        tar_version=tar_version,
        index=_object("index", item, index_sha256),
        index_bytes=len(built.index),
        index_sha256=index_sha256,
        rejects=rejects,
        rejects_bytes=None if built.rejects is None else len(built.rejects),
        rejects_sha256=rejects_sha256,
    )


def _object(folder: Literal["shards", "index", "rejects"], item: Item, sha256: str) -> str:
    return f"{folder}/{item.name}-{sha256[:8]}.{'tar' if folder == 'shards' else 'parquet'}"


def put_object(root: str, place: str, data: bytes) -> None:
    """Publish an object under the name that holds its hash."""
    storage.put(storage.join(root, place), data)


def create_receipt(root: str, plan: Plan, item: Item, mine: Receipt) -> Receipt:
    """Create the receipt, unless one stands already; returns the one that stands.

    A receipt whose objects are gone cannot stand: the rerun's, whose objects are there, replaces it.
    """
    url = receipt_url(root, plan, item)
    if storage.create(url, mine.to_bytes()):
        return mine
    stored = receipt(root, plan, item)
    if stored is None:
        storage.put(url, mine.to_bytes())
    return stored or mine


def _check_belongs(plan: Plan, item: Item, built: BuiltShard) -> None:
    ids, wrong = np.concatenate([built.sample_ids, built.rejected_ids]), None
    names, label, tokenizer = plan.class_names, built.max_label, plan.tokenizer
    expected = None if tokenizer is None else (*tokenizer.grid, tokenizer.codebook_size)
    given = None if built.grid is None else (*built.grid, built.codebook_size)
    if len(ids) != item.samples:
        wrong = f"{len(ids)} samples written or rejected, the plan says {item.samples}"
    elif len(ids) and (ids.min() < item.first_id or ids.max() >= item.end_id):
        wrong = f"ids {ids.min()} to {ids.max()} are not in [{item.first_id}, {item.end_id})"
    elif built.view not in (None, item.view):
        wrong = f"the samples are of view {built.view}"
    elif names is not None and label is not None and label >= len(names):
        wrong = f"label {label} is none of the {len(names)} classes of the plan"
    elif given != expected:
        wrong = f"built with grid and codebook {given}, the plan's tokenizer says {expected}"
    if wrong is not None:
        raise CommitError(f"{item.name}: {wrong}")


def _read_receipt(root: str, plan: Plan, item: Item) -> Receipt | None:
    """The receipt; None where there is none, or one that is not this item's, which a warning names."""
    url = receipt_url(root, plan, item)
    data = storage.read_or_none(url)
    if data is None:
        return None
    try:
        stored = Receipt.from_bytes(data)
        if _belongs(stored, plan, item):
            return stored
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    warnings.warn(f"{url} is not the receipt of {item.name} in this plan; it does not count", stacklevel=2)
    return None


def _belongs(stored: Receipt, plan: Plan, item: Item) -> bool:
    """Whether a receipt is of this item, and its objects have the names that their hashes give them."""
    shard = stored.shard
    theirs = (stored.plan, shard.view, shard.number, shard.first_id, shard.end_id)
    own_tar = plan.kind == "tokens" or (plan.kind == "images" and not shard.in_place)
    return (
        theirs == (plan.fingerprint, item.view, item.number, item.first_id, item.end_id)
        and shard.index == _object("index", item, shard.index_sha256)
        and (not own_tar or shard.tar == _object("shards", item, shard.tar_sha256 or ""))
        and shard.rejects == (shard.rejects_sha256 and _object("rejects", item, shard.rejects_sha256))
    )


def _has_objects(root: str, stored: Receipt) -> bool:
    """Whether the objects that a receipt names are there with their sizes, but for tars indexed in place."""
    shard = stored.shard.resolved(root)
    objects = [(shard.index, shard.index_bytes)]
    if not shard.in_place:
        objects.append((shard.tar, shard.tar_bytes))
    if shard.rejects is not None:
        objects.append((shard.rejects, shard.rejects_bytes or 0))
    stats = ((storage.stat(url), num_bytes) for url, num_bytes in objects)
    return all(stat is not None and stat.bytes == num_bytes for stat, num_bytes in stats)


# ------------------------------------------------------------------------------------------------ finish


def finish(root: str, plan: Plan, decode: Decode) -> Manifest:
    """Check every receipt and object, then write the shard table and, last, the manifest.

    `decode` turns a stored image into pixels, for the decode probe. Memory does not grow with samples, and
    with shards only by the 80 bytes of a table row. Raises CommitError naming shards that are not done or do
    not add up, InputError where a foreign tar has changed or another plan was finished here. Finishing twice
    gives the same manifest.
    """
    root = storage.absolute(root)
    if storage.exists(storage.join(root, MANIFEST)):
        return _finished_by(root, plan)
    totals = collect(root, plan)
    manifest = manifest_of(plan, totals, probes(root, plan, totals, decode))
    storage.put(storage.join(root, manifest.table.path), totals.table)
    return create_manifest(root, plan, manifest)


def probes(root: str, plan: Plan, totals: PassTotals, decode: Decode) -> list[ProbeEntry]:
    """The decode probe of a complete pass; a code layer has none, the manifest of its pixels does."""
    chosen = totals.probed if plan.kind != "codes" else []
    return [entry for shard, rows in chosen for entry in probe_shard(shard.resolved(root), rows, decode)]


def manifest_of(plan: Plan, totals: PassTotals, probe: Sequence[ProbeEntry]) -> Manifest:
    """The manifest that follows from a plan and what its pass added up to."""
    sha256 = sha256_hex(totals.table)
    table = TableName(path=f"manifest-{sha256[:8]}.parquet", bytes=len(totals.table), sha256=sha256)
    return Manifest(
        kind=plan.kind,
        plan=plan.fingerprint,
        inputs=plan.inputs,
        recipe=Recipe.from_json(plan.recipe.to_json()),
        first_view=plan.first_view,
        shards_per_view=plan.num_ranges,
        written_per_view=tuple(totals.written_per_view),
        samples_in=totals.samples_in,
        samples_written=sum(totals.written_per_view),
        samples_rejected=totals.rejected,
        class_names=plan.class_names,
        tokenizer=plan.tokenizer,
        details=json.loads(canonical_json(plan.details)),
        probe=tuple(probe),
        table=table,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PassTotals:
    """What the receipts of a complete pass add up to; `probed` are shards with the rows to decode."""

    table: bytes
    written_per_view: list[int]
    samples_in: int
    rejected: dict[str, int]
    probed: list[tuple[ShardInfo, list[int]]]


def collect(root: str, plan: Plan, *, objects: bool = True) -> PassTotals:
    """Read every receipt by its expected name and, unless told otherwise, ask for every object it names."""
    read = receipt if objects else _read_receipt
    writer = TableWriter()
    written = [0] * plan.views
    rejected: Counter[str] = Counter()
    undone: list[str] = []
    probed: list[tuple[ShardInfo, list[int]]] = []
    num_undone, last_tar, probe_positions = 0, "", _probe_positions(plan.num_items)
    receipts = in_order(lambda item: (item, read(root, plan, item)), items(plan), CHECK_THREADS)
    for position, (item, stored) in enumerate(receipts):
        if stored is None:
            num_undone += 1
            undone = [*undone, item.name][:5]
            continue
        shard, num_rejected = stored.shard, sum(stored.rejected.values())
        if shard.samples + num_rejected != item.samples:
            counts = f"{shard.samples} written and {num_rejected} rejected"
            raise CommitError(f"{item.name}: {counts}, but {item.samples} were read")
        if objects and shard.in_place and shard.tar != last_tar:  # ranges of one tar follow each other
            check_in_place(shard)
            last_tar = shard.tar
        writer.append(shard)
        written[item.view - plan.first_view] += shard.samples
        rejected.update(stored.rejected)
        rows = sorted({int(part * shard.samples) for part in probe_positions.get(position, ())})
        if rows and shard.samples:
            probed.append((shard, rows))
    if num_undone:
        raise CommitError(
            f"{num_undone} of {plan.num_items} shards of {root} are not done ({', '.join(undone)}"
            f"{', …' if num_undone > len(undone) else ''}); run the same command again to do what is missing"
        )
    return PassTotals(
        table=writer.finish(),
        written_per_view=written,
        samples_in=sum(written) + rejected.total(),
        rejected=dict(sorted(rejected.items())),
        probed=probed,
    )


def create_manifest(root: str, plan: Plan, manifest: Manifest) -> Manifest:
    """Create the manifest, or agree with the one that another driver of the same plan created first."""
    if storage.create(storage.join(root, MANIFEST), manifest.to_bytes()):
        return manifest
    return _finished_by(root, plan)


def _finished_by(root: str, plan: Plan) -> Manifest:
    manifest = read_manifest(root)
    if manifest.plan != plan.fingerprint:
        raise InputError(
            f"{root} was finished with another plan, {manifest.plan[:8]} instead of {plan.plan_prefix}; "
            "choose another output"
        )
    return manifest


def _probe_positions(num_items: int) -> dict[int, list[float]]:
    """Item -> fractions of its samples, spread evenly over all items: 16 places in all."""
    places: dict[int, list[float]] = {}
    for probe in range(PROBES):
        number, rest = divmod(probe * num_items, PROBES)
        places.setdefault(number, []).append(rest / PROBES)
    return places

"""Is a dataset what it says it is? Every object is read and hashed, every row and every code looked at.

    verification = verify_dataset("s3://bucket/tokens", sample=0.01)
    for problem in verification.problems:
        print(problem)

What is always checked, of the dataset and of everything added to it: manifest, plan and shard table against
each other; size and sha256 of every object; receipts; of every index its schema, ids, keys, labels, crop
boxes (inside the source, and those that the recipe's policy draws) and codes; of every tar that its bytes are
the archive of what its index lists; of every stored image its hash; rejects, by count and reason; the decode
probe. `sample` is the share of stored images that are decoded as well, to see that they have the size and the
JPEG parameters that the recipe says: samples are chosen by a hash of their id, at least one of each shard.
Tars indexed in place have no hash: their version and the hash of every image are checked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pipeline import storage
from pipeline.artifacts import differences, sha256_hex
from pipeline.errors import InputError
from pipeline.training.metrics import Progress
from shards.dataset.dataset import ShardTable, views_url
from shards.dataset.parts import places
from shards.format.manifest import MANIFEST
from shards.format.plan import items
from shards.sources.table import SOURCES
from shards.upkeep.check import NOT_AS_WRITTEN, Found, ShardChecker, Tally, decode_settings, view_policy
from shards.upkeep.gc import strangers
from shards.upkeep.recover import ABSENT, OpenedPart, Problem, UnreadablePartError, open_damaged
from shards.writer.commit import Summary, in_order, manifest_of

NUM_THREADS = 4
"""Each holds one shard, at most 100 MB or so, a few times over."""


# ------------------------------------------------------------------------------------------------ report


@dataclass(frozen=True, kw_only=True, eq=False)
class Verification:
    """What was found: sound where there are no problems. Notes are worth knowing and harm nobody.

    `parts` are those that could be opened, `tallies` theirs by URL.
    """

    url: str
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    parts: tuple[OpenedPart, ...]
    tallies: dict[str, Tally]

    @property
    def sound(self) -> bool:
        return not self.problems

    @property
    def total(self) -> Tally:
        """Over all parts."""
        return sum(self.tallies.values(), Tally())


def verify_dataset(
    url: str,
    *,
    sample: float = 1.0,
    num_threads: int = NUM_THREADS,
    absent: bool = False,
    after: Verification | None = None,
) -> Verification:
    """Check a finished dataset with everything added to it; what that comprises is told above.

    With `absent` a missing manifest is a problem like others where all receipts are there: nothing tells
    whether it was lost or never written. With `after` only the shards that had a problem then are read
    again. Memory is bounded by one shard for each thread. InputError where there is no dataset, or an
    unfinished one.
    """
    url = storage.absolute(url)
    if not 0 <= sample <= 1:
        raise InputError(f"sample is {sample}; give the share of images to decode, 0 to 1")
    opened: dict[str, OpenedPart] = {}
    problems: list[Problem] = []
    notes: list[str] = []
    for place, kind in places(url).items():
        try:
            opened[place] = open_damaged(place, kind, absent=absent)
        except UnreadablePartError as error:
            problems += error.problems
            notes.append(f"too much of what describes {place} is lost: its shards are not checked")
        except InputError:
            if kind == "base" or storage.exists(storage.join(place, MANIFEST)):
                raise
            notes.append(f"{place} is unfinished, and not looked at; run the job that writes it again")
    known = {} if after is None else {part.url: _shards_with_problems(part, after) for part in after.parts}
    progress = Progress(
        "verifying",
        sum(len(known[place]) if place in known else p.plan.num_items for place, p in opened.items()),
        "shards",
    )
    tallies: dict[str, Tally] = {}
    for place, part in opened.items():
        found = _verify_part(url, part, opened, sample, num_threads, known.get(place), progress)
        before = Tally() if after is None else after.tallies.get(place, Tally())
        tallies[place] = before + found.tally
        problems += [*part.problems, *found.problems]
        if not found.problems and not part.manifest_lost:
            problems += _check_counts(part, tallies[place]) + _unknown_probes(part)
        problems += _check_inputs(url, part, opened)
    progress.close(problems=len(problems))
    if after is None:
        found = [stranger.url for stranger in strangers(url, [part.table for part in opened.values()])]
        for part in opened.values():
            if part.manifest.kind == "images" and decode_settings(part.manifest) is None:
                notes.append(f"{part.url} was prepared with another decode version; no image is decoded")
            if part.manifest.kind == "tokens" and view_policy(part.manifest) is None:
                notes.append(f"the recipe of {part.url} names no view policy; crop boxes are not compared")
        notes += [f"{stranger} is named by no manifest" for stranger in found[:20]]
        if len(found) > 20:
            notes.append(f"{len(found) - 20} more are named by no manifest; jobs.gc_shards lists them")
    return Verification(
        url=url,
        problems=tuple(dict.fromkeys(_with_swaps(problems, opened.values()))),
        notes=tuple(notes),
        parts=tuple(opened.values()),
        tallies=tallies,
    )


# ------------------------------------------------------------------------------------------------ one part


def _verify_part(
    root: str,
    part: OpenedPart,
    opened: dict[str, OpenedPart],
    sample: float,
    num_threads: int,
    only: set[tuple[int, int]] | None,
    progress: Progress,
) -> Found:
    """Check the shards of a part, all or `only` some, given by view and number."""
    plan, manifest = part.plan, part.manifest
    planned = (plan.first_view, plan.views, plan.num_ranges)
    if planned != (manifest.first_view, manifest.num_views, manifest.shards_per_view):
        what = "names other views or shards than its plan"
        return Found(problems=[_of_manifest(part, what)], tally=Tally())
    chosen = (item for item in items(plan) if only is None or (item.view, item.number) in only)
    pixels = opened.get(views_url(root, manifest.first_view)) if part.kind == "codes" else None
    check = ShardChecker(part, None if pixels is None else pixels.table, sample)
    problems: list[Problem] = []
    tally = Tally()
    for found in in_order(check, chosen, num_threads):
        problems += found.problems
        tally += found.tally
        progress.update(problems=len(problems))
    return Found(problems=problems, tally=tally)


def _shards_with_problems(part: OpenedPart, after: Verification) -> set[tuple[int, int]]:
    return {
        (problem.view, problem.number)
        for problem in after.problems
        if problem.part == part.url and problem.view is not None and problem.number is not None
    }


def _check_counts(part: OpenedPart, tally: Tally) -> list[Problem]:
    """Compare the manifest with the one that follows from the plan and from what the shards hold."""
    table, plan = part.table, part.plan
    written = [int(table.shard_sizes(view).sum()) for view in range(plan.views)]
    summary = Summary(
        table=b"",
        written_per_view=written,
        samples_in=sum(item.samples for item in items(plan)),
        rejected=tally.rejected,
        probed=[],
    )
    follows = dataclasses.replace(manifest_of(plan, summary, part.manifest.probe), table=part.manifest.table)
    differing = differences(part.manifest.to_json(), follows.to_json())
    if not differing:
        return []
    return [_of_manifest(part, f"disagrees with plan and shards (asked) in {'; '.join(differing[:4])}")]


def _unknown_probes(part: OpenedPart) -> list[Problem]:
    """Entries of the decode probe that name no stored image; the others are decoded with their shards."""
    manifest = part.manifest
    views = range(manifest.first_view, manifest.first_view + manifest.num_views)
    return [
        _of_manifest(part, f"its decode probe names {entry.key}, which is not stored")
        for entry in manifest.probe
        if entry.view not in views
        or not 0 <= entry.number < manifest.shards_per_view
        or not 0 <= entry.row < part.table.shard_sizes(entry.view - views.start)[entry.number]
    ]


def _check_inputs(root: str, part: OpenedPart, opened: dict[str, OpenedPart]) -> list[Problem]:
    """What a part was made from, as far as it lies in the dataset: its listing of sources, its base."""
    inputs = part.manifest.inputs
    if part.manifest.kind == "images" and "sources" in inputs:
        url = storage.join(part.url, SOURCES)
        try:
            found = sha256_hex(storage.read(url))
        except ABSENT:
            return [Problem(object=url, kind="sources", part=part.url, what="missing")]
        if found != inputs["sources"]:
            what = f"damaged: its sha256 is {found[:8]}…, the manifest says {inputs['sources'][:8]}…"
            return [Problem(object=url, kind="sources", part=part.url, what=what, found_sha256=found)]
    for name, place in (("base", root), ("pixels", views_url(root, part.manifest.first_view))):
        other = opened.get(place)
        if part.kind == "base" or name not in inputs or other is None or other.manifest_lost:
            continue
        if inputs[name] != other.manifest.fingerprint:
            what = f"was made for {inputs[name][:8]}…, but {place} is {other.manifest.fingerprint[:8]}…"
            return [_of_manifest(part, what)]
    return []


def _of_manifest(part: OpenedPart, what: str) -> Problem:
    return Problem(
        object=storage.join(part.url, MANIFEST),
        kind="manifest",
        part=part.url,
        what=what,
        mend=NOT_AS_WRITTEN,
        damaged=False,
    )


def _with_swaps(problems: list[Problem], parts: Iterable[OpenedPart]) -> Iterator[Problem]:
    """The problems; where an object holds the bytes of another damaged one, it says whose."""
    tables = {part.url: part.table for part in parts}
    owners: dict[str, str] = {}
    for problem in problems:
        if problem.damaged and problem.view is not None:
            sha256 = expected_sha256(tables[problem.part], problem)
            if sha256 is not None:
                owners[sha256] = problem.object
    for problem in problems:
        owner = owners.get(problem.found_sha256 or "", problem.object)
        if owner != problem.object:
            problem = dataclasses.replace(problem, what=f"{problem.what}: these are the bytes of {owner}")
        yield problem


def expected_sha256(table: ShardTable, problem: Problem) -> str | None:
    """The hash that the shard table gives the object of a problem; None where it gives none."""
    if problem.view is None or problem.number is None:
        return None
    shard = table.shard(problem.view - table.manifest.first_view, problem.number)
    match problem.kind:
        case "tar":
            return shard.tar_sha256
        case "index":
            return shard.index_sha256
        case "rejects":
            return shard.rejects_sha256
    return None

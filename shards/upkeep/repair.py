"""Brings back what verification found lost, bit for bit: from other objects, or from the sources.

Every object is made again in memory and put only where it has the very hash that the shard table names, in
the place of one that verification found damaged. Nothing sound is written to.

What follows from what: the plan from manifest and table; the table from the receipts; a receipt from the
table and the rejects; an image from what is left of its tar, or from its source; codes from the index, from
the tar, or from the tokenizer; the rows of an index from the tar, the view policy, and another index of the
same images; the manifest, last, from all of them. Bytes that lie under another name, as after a swap, are
put where they belong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from pipeline import storage
from pipeline.artifacts import sha256_hex
from pipeline.cluster.config import ClusterConfig
from pipeline.errors import InputError
from shards.dataset.dataset import Dataset, ShardTable, views_url
from shards.dataset.rows import read_shard_rejects
from shards.format.build import BuildError, BuiltShard
from shards.format.manifest import ShardInfo
from shards.sources.listing import SourceConfig, list_sources
from shards.sources.table import SOURCES, load_sources, split_by_content
from shards.upkeep.check import reasons_of
from shards.upkeep.gc import strangers
from shards.upkeep.rebuild import (
    CannotRebuildError,
    Encoder,
    ImageShard,
    TokenShard,
    decoder_of,
    rebuilt_layer,
)
from shards.upkeep.recover import ObjectKind, OpenedPart, Problem
from shards.upkeep.verify import Verification, expected_sha256
from shards.writer.commit import CommitError, Receipt, collect, manifest_of, probes


@dataclass(frozen=True, kw_only=True)
class Repair:
    """What became of one lost object: brought back, or not, and how or why."""

    object: str
    done: bool
    how: str

    def __str__(self) -> str:
        return f"{self.object}: {'brought back' if self.done else 'not brought back'}, {self.how}"


# ------------------------------------------------------------------------------------------------ all of it


def repair_dataset(
    found: Verification, *, images: Dataset | None = None, encoder: Encoder | None = None
) -> list[Repair]:
    """Bring back the damaged objects of a verification; a line for each of them.

    `images` is the image dataset that crops were made from, needed where pixels or a lost index cannot be
    had from within; InputError where it is not the one that the manifest names.
    """
    lost = [problem for problem in found.problems if problem.damaged]
    if images is not None:
        _require_images(found.parts, images)
    repairs = _put_back_headers(found.parts) + _put_back_strays(found, lost)
    done = {repair.object for repair in repairs if repair.done}
    for part in found.parts:
        left = [problem for problem in lost if problem.part == part.url and problem.object not in done]
        mended = _PartRepair(found, part, left, images, encoder).run()
        done |= {repair.object for repair in mended if repair.done}
        repairs += mended
    handled = {repair.object for repair in repairs}
    too_much = "too much of its part is lost"
    repairs += [
        Repair(object=problem.object, done=False, how=too_much)
        for problem in lost
        if problem.object not in handled
    ]
    return repairs


def _require_images(parts: Sequence[OpenedPart], images: Dataset) -> None:
    named = {part.manifest.inputs["images"] for part in parts if "images" in part.manifest.inputs}
    if named and images.fingerprint not in named:
        raise InputError(
            f"{images.url} is {images.fingerprint}, but the crops were made from {', '.join(sorted(named))}; "
            "give that image dataset with --images"
        )


def _put_back_headers(parts: Sequence[OpenedPart]) -> list[Repair]:
    """Plans and tables, recovered when their parts were opened."""
    repairs: list[Repair] = []
    for part in parts:
        for url, data in part.recovered.items():
            storage.put(url, data)
            repairs.append(Repair(object=url, done=True, how="made again from what is left"))
    return repairs


def _put_back_strays(found: Verification, lost: Sequence[Problem]) -> list[Repair]:
    """Put objects back whose bytes lie under the name of another lost one, or of none of the dataset's."""
    tables = {part.url: part.table for part in found.parts}
    expected: dict[str, str] = {}
    sizes: set[int] = set()
    for problem in lost:
        sha256 = expected_sha256(tables[problem.part], problem) if problem.view is not None else None
        if sha256 is not None:
            expected[problem.object] = sha256
            sizes |= _sizes(tables[problem.part], problem)
    if not expected:
        return []
    holders = {problem.found_sha256: problem.object for problem in lost if problem.found_sha256 is not None}
    for stranger in strangers(found.url, list(tables.values())):
        if stranger.bytes in sizes:
            holders.setdefault(sha256_hex(storage.read(stranger.url)), stranger.url)
    moves = {url: holders[sha256] for url, sha256 in expected.items() if sha256 in holders}
    held: dict[str, bytes] = {}
    repairs: list[Repair] = []
    while moves:
        # A place whose present bytes nobody waits for; in a ring of swaps those of one place are held.
        target = next((url for url in moves if url not in moves.values()), None)
        if target is None:
            target = next(iter(moves))
            held[target] = storage.read(target)
        source = moves.pop(target)
        data = held.pop(source) if source in held else storage.read(source)
        if sha256_hex(data) == expected[target]:
            storage.put(target, data)
            repairs.append(Repair(object=target, done=True, how=f"its bytes lay at {source}"))
    return repairs


def _sizes(table: ShardTable, problem: Problem) -> set[int]:
    assert problem.view is not None and problem.number is not None
    shard = table.shard(problem.view - table.manifest.first_view, problem.number)
    return {shard.tar_bytes, shard.index_bytes, shard.rejects_bytes or 0}


# ------------------------------------------------------------------------------------------------ one part


class _PartRepair:
    """Repairs one part: its shards first, then receipts, sources and the manifest."""

    def __init__(
        self,
        found: Verification,
        part: OpenedPart,
        lost: Sequence[Problem],
        images: Dataset | None,
        encoder: Encoder | None,
    ) -> None:
        self._root = found.url
        self._parts = found.parts
        self._part = part
        self._lost = lost
        self._images = images
        self._encoder = encoder
        self._repairs: list[Repair] = []

    def run(self) -> list[Repair]:
        """A line for each lost object of the part."""
        for problem in self._of_kind("sources"):
            self._attempt(problem.object, self._sources)
        shards: dict[tuple[int, int], list[Problem]] = {}
        for problem in self._of_kind("tar", "index", "rejects"):
            assert problem.view is not None and problem.number is not None
            shards.setdefault((problem.view, problem.number), []).append(problem)
        for (view, number), problems in shards.items():
            self._shard(view, number, problems)
        for problem in self._of_kind("receipt"):
            self._attempt(problem.object, lambda problem=problem: self._receipt(problem))
        for problem in self._of_kind("manifest"):
            self._attempt(problem.object, self._manifest)
        return self._repairs

    def _of_kind(self, *kinds: ObjectKind) -> Iterator[Problem]:
        return (problem for problem in self._lost if problem.kind in kinds)

    def _attempt(self, url: str, make: Callable[[], bytes]) -> None:
        """Put what `make` returns, which it has compared with what is known of it."""
        try:
            data = make()
        except (CannotRebuildError, InputError, CommitError) as error:
            self._repairs.append(Repair(object=url, done=False, how=str(error)))
            return
        storage.put(url, data)
        self._repairs.append(Repair(object=url, done=True, how="made again"))

    def _shard(self, view: int, number: int, problems: Sequence[Problem]) -> None:
        table = self._part.table
        shard = table.shard(view - self._part.manifest.first_view, number)
        kinds: set[ObjectKind] = {problem.kind for problem in problems}
        try:
            if shard.is_foreign and "tar" in kinds:
                raise CannotRebuildError("the tar is not ours; bring the old one back, or prepare again")
            built = self._rebuilt(shard, kinds)
        except (CannotRebuildError, InputError, BuildError) as error:
            self._repairs += [Repair(object=p.object, done=False, how=str(error)) for p in problems]
            return
        made = {"tar": built.tar, "index": built.index, "rejects": built.rejects}
        for problem in problems:
            data, expected = made[problem.kind], expected_sha256(table, problem)
            if data is not None and sha256_hex(data) == expected:
                storage.put(problem.object, data)
                self._repairs.append(
                    Repair(object=problem.object, done=True, how="made again, the same bytes")
                )
            else:
                found = (
                    "nothing" if data is None else f"{len(data)} bytes with sha256 {sha256_hex(data)[:8]}…"
                )
                written = f"written was {(expected or '')[:8]}…"
                how = f"made again it is {found}, {written}; use the library versions of the recipe"
                self._repairs.append(Repair(object=problem.object, done=False, how=how))

    def _rebuilt(self, shard: ShardInfo, lost: set[ObjectKind]) -> BuiltShard:
        match self._part.manifest.kind:
            case "images":
                url = storage.join(self._part.url, SOURCES)
                failed = any(repair.object == url and not repair.done for repair in self._repairs)
                return ImageShard(self._part, shard, lost, None if failed else url).rebuilt()
            case "tokens":
                return TokenShard(self._parts, self._part, shard, lost, self._images, self._encoder).rebuilt()
            case _:
                place = views_url(self._root, self._part.manifest.first_view)
                pixels = next((part.table for part in self._parts if part.url == place), None)
                if pixels is None:
                    raise CannotRebuildError(f"{place}, which holds its crops, cannot be opened")
                return rebuilt_layer(self._part, pixels, shard, self._encoder)

    def _receipt(self, problem: Problem) -> bytes:
        assert problem.view is not None and problem.number is not None
        view = problem.view - self._part.manifest.first_view
        stored = self._part.table.stored(view, problem.number)
        return Receipt(
            plan=self._part.plan.fingerprint,
            shard=stored,
            rejected=reasons_of(read_shard_rejects(stored.resolved(self._part.url))),
        ).to_bytes()

    def _sources(self) -> bytes:
        """The listing of sources, made again: it comes out the same only where nothing there was touched."""
        details = dict(self._part.manifest.details.get("source", {}))
        kind, part = details.pop("kind", None), details.pop("part", None)
        if kind is None:
            raise CannotRebuildError("the manifest does not say what was listed")
        if part is None:
            settings = {key: value for key, value in details.items() if key != "val_fraction"}
            listed = list_sources(SourceConfig(**settings), ClusterConfig(num_workers=0))
            data = replace(listed, origin=details).to_bytes()
        else:
            above = storage.join(self._part.url.rpartition("/")[0], SOURCES)
            whole = load_sources(above)
            if whole is None:
                raise CannotRebuildError(f"{above}, of which it is a part, is missing too")
            train, val = split_by_content(whole, details["val_fraction"], details["seed"])
            data = (train if part == "train" else val).to_bytes()
        if sha256_hex(data) != self._part.manifest.inputs["sources"]:
            raise CannotRebuildError(f"the sources at {details['url']} are no longer those that were listed")
        return data

    def _manifest(self) -> bytes:
        """The manifest that the complete pass gives: only once everything that it names is there again."""
        failed = [repair.object for repair in self._repairs if not repair.done]
        if failed:
            raise CannotRebuildError(f"{len(failed)} objects that it names are lost, such as {failed[0]}")
        plan, url = self._part.plan, self._part.url
        summary = collect(url, plan)
        return manifest_of(
            plan, summary, probes(url, plan, summary, decoder_of(plan.kind, plan.recipe))
        ).to_bytes()

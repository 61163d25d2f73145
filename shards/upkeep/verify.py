"""Is a dataset what it says it is? Every object is read and hashed, a sample of the images decoded.

    verification = verify_dataset("s3://bucket/tokens", sample=0.01)
    for problem in verification.problems:
        print(problem)

Checked, of the dataset and of everything added to it: manifest, plan and shard table against each other; size
and sha256 of every object; receipts; counts; that no code lies beyond the codebook; the decode probe. An
object's content was compared with its sources before it was published, and its hash vouches for it since.
`sample` is the share of images that are decoded, chosen by a hash of the sample id, at least one of each
shard. Tars indexed in place have no hash: their version and the hash of every image are checked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.artifacts import differences, sha256_hex
from pipeline.draws import SPLITMIX_STEP, splitmix
from pipeline.errors import InputError
from pipeline.threads import in_order
from pipeline.training.metrics import Progress
from shards.dataset.dataset import views_url
from shards.dataset.parts import places
from shards.dataset.rows import check_in_place, pixels_hash, read_rows
from shards.format.index import IndexFormatError, codes_of, read_index, read_rejects
from shards.format.manifest import MANIFEST, ShardInfo
from shards.pixels.decode import Rejected
from shards.sources.table import SOURCES
from shards.upkeep.gc import unreferenced_files
from shards.upkeep.parts import (
    BRING_BACK,
    COPY,
    MEND,
    NOT_AS_WRITTEN,
    ObjectKind,
    OpenedPart,
    Problem,
    UnreadablePartError,
    decoder_of,
    open_part,
)
from shards.writer.commit import Receipt, Summary, manifest_of

NUM_THREADS = 4
"""Shards that are read at once; each takes at most 100 MB or so, a few times over."""


# ------------------------------------------------------------------------------------------------ report


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Sums over the shards without a problem; `rejected` counts by reason."""

    shards: int = 0
    objects: int = 0
    bytes: int = 0
    samples: int = 0
    decoded: int = 0
    rejected: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            shards=self.shards + other.shards,
            objects=self.objects + other.objects,
            bytes=self.bytes + other.bytes,
            samples=self.samples + other.samples,
            decoded=self.decoded + other.decoded,
            rejected=dict(sorted((Counter(self.rejected) + Counter(other.rejected)).items())),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Verification:
    """The outcome: sound where there are no problems; `notes` are worth knowing and harm nobody.

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


def is_chosen(sample_ids: np.ndarray, share: float) -> np.ndarray:
    """Which samples belong to a share of all, bool [n]: by a hash of the id, and at least one of those given.

    A larger share contains a smaller one, and every view and every run chooses the same.
    """
    words = splitmix(sample_ids.astype(np.uint64) + np.uint64(SPLITMIX_STEP))
    chosen = (words >> np.uint64(11)).astype(np.float64) < share * 2.0**53
    if share > 0 and len(words):
        chosen[int(words.argmin())] = True
    return chosen


def verify_dataset(
    url: str,
    *,
    sample: float = 1.0,
    num_threads: int = NUM_THREADS,
    absent: bool = False,
    after: Verification | None = None,
) -> Verification:
    """Check a finished dataset with everything added to it.

    With `absent` a missing manifest is a problem like others where all receipts are there: nothing tells
    whether it was lost or never written. With `after` only the shards that had a problem then are read
    again. InputError where there is no dataset, or an unfinished one.
    """
    url = storage.absolute(url)
    if not 0 <= sample <= 1:
        raise InputError(f"sample is {sample}; give the share of images to decode, 0 to 1")
    parts: list[OpenedPart] = []
    problems: list[Problem] = []
    notes: list[str] = []
    for place, kind in places(url).items():
        try:
            parts.append(open_part(place, kind, absent))
        except UnreadablePartError as error:
            problems += error.problems
            notes.append(f"too much of what describes {place} is lost: its shards are not checked")
        except InputError:
            if kind == "base" or storage.exists(storage.join(place, MANIFEST)):
                raise
            notes.append(f"{place} is unfinished, and not looked at; run the job that writes it again")
    shards = {part.url: _shards_to_check(part, after) for part in parts}
    progress = Progress("verifying", sum(map(len, shards.values())), "shards")
    tallies: dict[str, Tally] = {}
    for part in parts:
        check, wrong = ShardChecker(part, sample), list[Problem]()
        tallies[part.url] = Tally() if after is None else after.tallies.get(part.url, Tally())
        for checked in in_order(check, shards[part.url], num_threads):
            wrong += checked.problems
            tallies[part.url] += checked.tally
            progress.update(problems=len(problems) + len(wrong))
        problems += [*part.problems, *wrong, *_check_inputs(url, part, parts)]
        if not wrong and not part.manifest_lost:
            problems += _check_counts(part, tallies[part.url])
            if after is None and check.decode is not None and check.undecoded_probe:
                problems.append(_of_manifest(part, "its decode probe names an image that is not stored"))
        if check.decode is None and part.kind != "codes":
            notes.append(f"{part.url} was prepared with another decode version; no image is decoded")
    progress.close(problems=len(problems))
    files = unreferenced_files(url, [part.table for part in parts]) if after is None else iter(())
    notes += [f"{file.url} is named by no manifest" for file in itertools.islice(files, 20)]
    if more := sum(1 for _ in files):
        notes.append(f"{more} more are named by no manifest; jobs.gc_shards lists them")
    return Verification(
        url=url,
        problems=tuple(dict.fromkeys(problems)),
        notes=tuple(notes),
        parts=tuple(parts),
        tallies=tallies,
    )


# ------------------------------------------------------------------------------------------------ one part


def _shards_to_check(part: OpenedPart, after: Verification | None) -> list[tuple[int, int]]:
    """Views and numbers of the shards of a part: all, or those that had a problem in `after`."""
    first_view, num_views = part.manifest.first_view, part.manifest.num_views
    every = itertools.product(range(first_view, first_view + num_views), range(part.table.num_shards))
    if after is None or part.url not in after.tallies:
        return list(every)
    wrong = {(problem.view, problem.number) for problem in after.problems if problem.part == part.url}
    return [place for place in every if place in wrong]


def _check_counts(part: OpenedPart, tally: Tally) -> list[Problem]:
    """Compare the manifest with the one that follows from the plan and from what the shards hold."""
    table, plan, manifest = part.table, part.plan, part.manifest
    if plan is None:
        return []
    summary = Summary(
        table=b"",
        written_per_view=[int(table.shard_sizes(view).sum()) for view in range(table.num_views)],
        samples_in=plan.samples_per_view * plan.views,
        rejected=tally.rejected,
        probed=[],
    )
    follows = dataclasses.replace(manifest_of(plan, summary, manifest.probe), table=manifest.table)
    differing = differences(manifest.to_json(), follows.to_json())
    if manifest.samples_in != manifest.samples_written + sum(manifest.samples_rejected.values()):
        differing.append(f"samples_in {manifest.samples_in}, not the sum of written and rejected ones")
    if not differing:
        return []
    return [_of_manifest(part, f"disagrees with plan and shards (asked) in {'; '.join(differing[:4])}")]


def _check_inputs(root: str, part: OpenedPart, parts: Iterable[OpenedPart]) -> list[Problem]:
    """What a part was made from, as far as it lies in the dataset: its listing of sources, its base."""
    inputs = part.manifest.inputs
    if part.manifest.kind == "images" and "sources" in inputs:
        url = storage.join(part.url, SOURCES)
        data = storage.read_or_none(url)
        if data is None or sha256_hex(data) != inputs["sources"]:
            what = "missing" if data is None else f"damaged: its sha256 is not {inputs['sources'][:8]}…"
            return [Problem(object=url, kind="sources", part=part.url, what=what, mend=COPY)]
    name, place = "base", root
    if part.kind == "codes":
        name, place = "pixels", views_url(root, part.manifest.first_view)
    for other in parts:
        made_for, there = inputs.get(name), other.manifest.fingerprint
        if part.kind != "base" and other.url == place and not other.manifest_lost and made_for != there:
            return [_of_manifest(part, f"was made for {made_for}, but {place} is {there}")]
    return []


def _of_manifest(part: OpenedPart, what: str) -> Problem:
    url = storage.join(part.url, MANIFEST)
    return Problem(object=url, kind="manifest", part=part.url, what=what, mend=NOT_AS_WRITTEN, damaged=False)


# ------------------------------------------------------------------------------------------------ one shard


@dataclass(frozen=True, kw_only=True, eq=False)
class CheckedShard:
    """Problems of one shard, and what it adds to the tally where there are none."""

    problems: list[Problem]
    tally: Tally


class _Objects:
    """Reads the objects of one shard and collects what is wrong with them."""

    def __init__(self, part_url: str, view: int, number: int) -> None:
        self._place = {"part": part_url, "view": view, "number": number}
        self.problems: list[Problem] = []
        self.count = 0
        self.bytes = 0

    def damaged(self, kind: ObjectKind, url: str, what: str, mend: str = MEND) -> None:
        """An object that is absent, or holds other bytes than were written."""
        self.problems.append(Problem(object=url, kind=kind, what=what, mend=mend, **self._place))

    def wrong(self, kind: ObjectKind, url: str, what: str, mend: str = NOT_AS_WRITTEN) -> None:
        """An object that is intact, but its content is wrong."""
        problem = Problem(object=url, kind=kind, what=what, mend=mend, damaged=False, **self._place)
        self.problems.append(problem)

    def read(self, kind: ObjectKind, url: str, num_bytes: int, sha256: str) -> bytes | None:
        """The bytes of an object, if they are those that were written."""
        self.count += 1
        try:
            data = storage.read(url)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return self.damaged(kind, url, "missing")
        except OSError as error:
            if not storage.is_local(url):
                raise
            return self.damaged(kind, url, f"cannot be read: {error.strerror}")
        self.bytes += len(data)
        if (len(data), actual := sha256_hex(data)) == (num_bytes, sha256):
            return data
        written = f"written were {num_bytes} with {sha256[:8]}…"
        return self.damaged(kind, url, f"damaged: {len(data)} bytes with sha256 {actual[:8]}…, {written}")


class ShardChecker:
    """Checks one shard of a part with each call; called from several threads."""

    def __init__(self, part: OpenedPart, sample: float) -> None:
        self._part = part
        self._sample = sample
        self._probe = {(entry.view, entry.number, entry.row): entry for entry in part.manifest.probe}
        self.undecoded_probe = set(self._probe)
        self.decode = decoder_of(part.manifest)

    def __call__(self, place: tuple[int, int]) -> CheckedShard:
        """Read and check what the table names for a view and number."""
        manifest = self._part.manifest
        stored = self._part.table.stored(place[0] - manifest.first_view, place[1])
        shard = stored.resolved(self._part.url)
        objects = _Objects(self._part.url, *place)
        reasons = self._check_rejects_and_receipt(objects, stored, shard)
        index = self._read_index(objects, shard)
        images: Iterable[bytes] | None = None
        if manifest.kind != "codes" and shard.in_place:
            images = self._images_in_place(objects, shard, index)
        elif manifest.kind != "codes":
            data = objects.read("tar", shard.tar, shard.tar_bytes, shard.tar_sha256 or "")
            if data is not None and index is not None:
                starts, lengths = index.column("image_offset"), index.column("image_bytes")
                spans = zip(starts.to_pylist(), lengths.to_pylist(), strict=True)
                images = (data[start : start + length] for start, length in spans)
        decoded = 0 if images is None or index is None else self._decode(objects, shard, index, images)
        if objects.problems:
            return CheckedShard(problems=objects.problems, tally=Tally())
        tally = Tally(
            shards=1,
            objects=objects.count,
            bytes=objects.bytes,
            samples=shard.samples,
            decoded=decoded,
            rejected=reasons,
        )
        return CheckedShard(problems=[], tally=tally)

    def _check_rejects_and_receipt(
        self, objects: _Objects, stored: ShardInfo, shard: ShardInfo
    ) -> dict[str, int]:
        """Rejects by reason; the receipt must be the one that follows from them and from the table."""
        url = storage.join(self._part.url, "receipts", self._part.manifest.plan[:8], f"{stored.name}.json")
        reasons: dict[str, int] = {}
        if shard.rejects is not None:
            data = objects.read(
                "rejects", shard.rejects, shard.rejects_bytes or 0, shard.rejects_sha256 or ""
            )
            if data is not None:
                reasons = reasons_of(read_rejects(data))
            else:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    reasons = Receipt.from_bytes(storage.read_or_none(url) or b"").rejected
        expected = Receipt(plan=self._part.manifest.plan, shard=stored, rejected=reasons).to_bytes()
        objects.read("receipt", url, len(expected), sha256_hex(expected))
        return reasons

    def _read_index(self, objects: _Objects, shard: ShardInfo) -> pa.Table | None:
        """The index; its codes must lie within the codebook."""
        data = objects.read("index", shard.index, shard.index_bytes, shard.index_sha256)
        if data is None:
            return None
        try:
            table = read_index(data)
        except IndexFormatError as error:
            return objects.wrong("index", shard.index, str(error))
        if table.num_rows != shard.samples:
            return objects.wrong("index", shard.index, f"has {table.num_rows} rows, not {shard.samples}")
        tokenizer = self._part.manifest.tokenizer
        if tokenizer is not None:
            beyond = (codes_of(table) >= tokenizer.codebook_size).any(axis=1)
            if beyond.any():
                first = table.column("key")[int(beyond.argmax())]
                what = f"codes beyond the codebook in {beyond.sum()} of {table.num_rows} rows, first {first}"
                objects.wrong("index", shard.index, what)
        return table

    def _images_in_place(
        self, objects: _Objects, shard: ShardInfo, index: pa.Table | None
    ) -> list[bytes] | None:
        """The images of a tar that is still the one that was indexed, each with the bytes it had then."""
        objects.count += 1
        try:
            check_in_place(shard)
            if index is None:
                return None
            images = [row.image for row in read_rows(shard)]
        except InputError as error:
            what = str(error).partition("; ")[0].removeprefix(f"{shard.tar}, ")
            return objects.damaged("tar", shard.tar, what, BRING_BACK)
        objects.bytes += sum(map(len, images))
        return images

    def _decode(self, objects: _Objects, shard: ShardInfo, index: pa.Table, images: Iterable[bytes]) -> int:
        """Decode the chosen images and those of the decode probe; returns the number of chosen ones."""
        if self.decode is None:
            return 0
        chosen = is_chosen(index.column("sample_id").to_numpy(), self._sample)
        keys = index.column("key").to_pylist()
        troubles: list[str] = []
        for row, data in enumerate(images):
            entry = self._probe.get((shard.view, shard.number, row))
            self.undecoded_probe.discard((shard.view, shard.number, row))
            if not chosen[row] and entry is None:
                continue
            try:
                pixels = self.decode(data)
            except (Rejected, ValueError) as error:
                troubles.append(f"{keys[row]} cannot be decoded ({error})")
                continue
            height, width = self._size(index, row)
            if pixels.shape[:2] != (height, width):
                actual = f"{pixels.shape[1]} x {pixels.shape[0]}"
                troubles.append(f"{keys[row]} is {actual} pixels, not {width} x {height}")
            if entry is not None and (entry.key, entry.sha256) != (keys[row], pixels_hash(pixels)):
                what = f"{entry.key} of the decode probe has other pixels here than at the writer's"
                objects.wrong("tar", shard.tar, what, "decode with the library versions of the recipe")
        if troubles:
            what = f"{len(troubles)} of {len(keys)} images are wrong, first {troubles[0]}"
            objects.wrong("tar", shard.tar, what)
        return int(chosen.sum())

    def _size(self, index: pa.Table, row: int) -> tuple[int, int]:
        """Height and width that a stored image must have."""
        tokenizer = self._part.manifest.tokenizer
        if tokenizer is not None:
            return tokenizer.image_size, tokenizer.image_size
        return index.column("source_height")[row].as_py(), index.column("source_width")[row].as_py()


def reasons_of(rejects: pa.Table | None) -> dict[str, int]:
    """Rejects by reason, as receipts count them."""
    counts = Counter([] if rejects is None else rejects.column("reason").to_pylist())
    return dict(sorted(counts.items()))

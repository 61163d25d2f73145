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
import functools
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
from shards.dataset.rows import pixels_hash, read_rows
from shards.format.index import IndexFormatError, codes_of, read_index, read_rejects
from shards.format.manifest import MANIFEST, ProbeEntry
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
from shards.writer.commit import PassTotals, Receipt, manifest_of

NUM_THREADS = 4
"""Shards that are read at once; each takes at most 100 MB or so, a few times over."""

Probed = tuple[int, int, int]


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
        names = ("shards", "objects", "bytes", "samples", "decoded")
        rejected = Counter(self.rejected) + Counter(other.rejected)
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return Tally(**sums, rejected=dict(sorted(rejected.items())))


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
        wrong = list[Problem]()
        probe = {(entry.view, entry.number, entry.row): entry for entry in part.manifest.probe}
        check = functools.partial(ShardCheck, part, sample=sample, probe=probe)
        tallies[part.url] = Tally() if after is None else after.tallies.get(part.url, Tally())
        for checked in in_order(check, shards[part.url], num_threads):
            wrong += checked.problems
            tallies[part.url] += checked.tally
            progress.update(problems=len(problems) + len(wrong))
        problems += [*part.problems, *wrong, *_check_inputs(url, part, parts)]
        if not wrong and not part.manifest_lost:
            problems += _check_counts(part, tallies[part.url])
            if probe and after is None and decoder_of(part.manifest) is not None:
                problems.append(_of_manifest(part, "its decode probe names an image that is not stored"))
        if decoder_of(part.manifest) is None:
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
    summary = PassTotals(
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
    first_view = part.manifest.first_view
    name, place = ("base", root) if part.kind == "views" else ("pixels", views_url(root, first_view))
    other = next((other for other in parts if other.url == place and not other.manifest_lost), None)
    if part.kind == "base" or other is None or inputs.get(name) == other.manifest.fingerprint:
        return []
    what = f"was made for {inputs.get(name)}, but {place} is {other.manifest.fingerprint}"
    return [_of_manifest(part, what)]


def _of_manifest(part: OpenedPart, what: str) -> Problem:
    url = storage.join(part.url, MANIFEST)
    return Problem(object=url, kind="manifest", part=part.url, what=what, mend=NOT_AS_WRITTEN, damaged=False)


# ------------------------------------------------------------------------------------------------ one shard


class ShardCheck:
    """Checks one shard when it is made: `problems`, and what the shard adds to the `tally` without any.

    `probe` are the entries of the decode probe by (view, number, row); those that were looked at are removed.
    """

    def __init__(
        self, part: OpenedPart, place: tuple[int, int], sample: float, probe: dict[Probed, ProbeEntry]
    ) -> None:
        self._part = part
        self._sample = sample
        self._probe = probe
        self._stored = part.table.stored(place[0] - part.manifest.first_view, place[1])
        self._shard = self._stored.resolved(part.url)
        self._objects = self._bytes = self._decoded = 0
        self.problems: list[Problem] = []
        reasons = self._check_rejects_and_receipt()
        index = self._read_index()
        if part.kind != "codes":
            self._check_images(index)
        self.tally = Tally()
        if not self.problems:
            self.tally = Tally(
                shards=1,
                objects=self._objects,
                bytes=self._bytes,
                samples=self._shard.samples,
                decoded=self._decoded,
                rejected=reasons,
            )

    def _check_rejects_and_receipt(self) -> dict[str, int]:
        """Rejects by reason; the receipt must be the one that follows from them and from the table."""
        shard, plan = self._shard, self._part.manifest.plan
        url = storage.join(self._part.url, "receipts", plan[:8], f"{shard.name}.json")
        reasons: dict[str, int] = {}
        if shard.rejects is not None:
            data = self._read("rejects", shard.rejects, shard.rejects_bytes, shard.rejects_sha256)
            if data is not None:
                reasons = reasons_of(read_rejects(data))
            else:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    reasons = Receipt.from_bytes(storage.read_or_none(url) or b"").rejected
        expected = Receipt(plan=plan, shard=self._stored, rejected=reasons).to_bytes()
        self._read("receipt", url, len(expected), sha256_hex(expected))
        return reasons

    def _read_index(self) -> pa.Table | None:
        """The index; its codes must lie within the codebook."""
        shard, tokenizer = self._shard, self._part.manifest.tokenizer
        data = self._read("index", shard.index, shard.index_bytes, shard.index_sha256)
        if data is None:
            return None
        try:
            table = read_index(data)
        except IndexFormatError as error:
            return self._wrong("index", shard.index, str(error))
        if table.num_rows != shard.samples:
            return self._wrong("index", shard.index, f"has {table.num_rows} rows, not {shard.samples}")
        if tokenizer is not None:
            beyond = (codes_of(table) >= tokenizer.codebook_size).any(axis=1)
            if beyond.any():
                first = table.column("key")[int(beyond.argmax())]
                what = f"codes beyond the codebook in {beyond.sum()} of {table.num_rows} rows, first {first}"
                self._wrong("index", shard.index, what)
        return table

    def _check_images(self, index: pa.Table | None) -> None:
        """The tar, and the chosen images in it; of one that was indexed in place the hash of every image."""
        shard = self._shard
        if shard.tar_sha256 is not None:
            data = self._read("tar", shard.tar, shard.tar_bytes, shard.tar_sha256)
            if data is not None and index is not None:
                starts, lengths = index.column("image_offset"), index.column("image_bytes")
                spans = zip(starts.to_pylist(), lengths.to_pylist(), strict=True)
                self._decode(index, (data[start : start + length] for start, length in spans))
        elif index is not None:
            self._objects += 1
            try:
                images = [row.image for row in read_rows(shard)]
            except InputError as error:
                what = str(error).partition("; ")[0].removeprefix(f"{shard.tar}, ")
                return self._problem("tar", shard.tar, what, BRING_BACK)
            self._bytes += sum(map(len, images))
            self._decode(index, images)

    def _decode(self, index: pa.Table, images: Iterable[bytes]) -> None:
        """Decode the chosen images and those of the decode probe."""
        shard, tokenizer, decode = self._shard, self._part.manifest.tokenizer, decoder_of(self._part.manifest)
        if decode is None:
            return
        chosen = is_chosen(index.column("sample_id").to_numpy(), self._sample)
        self._decoded = int(chosen.sum())
        troubles: list[str] = []
        for row, data in enumerate(images):
            entry = self._probe.pop((shard.view, shard.number, row), None)
            if not chosen[row] and entry is None:
                continue
            key = str(index.column("key")[row])
            try:
                pixels = decode(data)
            except (Rejected, ValueError) as error:
                troubles.append(f"{key} cannot be decoded ({error})")
                continue
            height, width = pixels.shape[:2]
            if tokenizer is None:
                right = index.column("source_height")[row].as_py(), index.column("source_width")[row].as_py()
            else:
                right = tokenizer.image_size, tokenizer.image_size
            if (height, width) != right:
                troubles.append(f"{key} is {width} x {height} pixels, not {right[1]} x {right[0]}")
            if entry is not None and (entry.key, entry.sha256) != (key, pixels_hash(pixels)):
                what = f"{entry.key} of the decode probe has other pixels here than at the writer's"
                self._wrong("tar", shard.tar, what, "decode with the library versions of the recipe")
        if troubles:
            what = f"{len(troubles)} of {index.num_rows} images are wrong, first {troubles[0]}"
            self._wrong("tar", shard.tar, what)

    def _read(self, kind: ObjectKind, url: str, num_bytes: int | None, sha256: str | None) -> bytes | None:
        """The bytes of an object, if they are those that were written."""
        self._objects += 1
        try:
            data = storage.read(url)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return self._problem(kind, url, "missing")
        except OSError as error:
            if not storage.is_local(url):
                raise
            return self._problem(kind, url, f"cannot be read: {error.strerror}")
        self._bytes += len(data)
        actual = sha256_hex(data)
        if (len(data), actual) == (num_bytes, sha256):
            return data
        what = f"damaged: {len(data)} bytes with sha256 {actual[:8]}…, written were {num_bytes} with"
        return self._problem(kind, url, f"{what} {(sha256 or '')[:8]}…")

    def _problem(self, kind: ObjectKind, url: str, what: str, mend: str = MEND, damaged: bool = True) -> None:
        shard = self._shard
        problem = Problem(object=url, kind=kind, part=self._part.url, what=what, mend=mend, damaged=damaged)
        self.problems.append(dataclasses.replace(problem, view=shard.view, number=shard.number))

    def _wrong(self, kind: ObjectKind, url: str, what: str, mend: str = NOT_AS_WRITTEN) -> None:
        """An object that is intact, but its content is wrong."""
        self._problem(kind, url, what, mend, damaged=False)


def reasons_of(rejects: pa.Table | None) -> dict[str, int]:
    """Rejects by reason, as receipts count them."""
    counts = Counter([] if rejects is None else rejects.column("reason").to_pylist())
    return dict(sorted(counts.items()))

"""Files of a finished dataset that no manifest and no receipt refers to: objects of attempts that lost.

    garbage = find_garbage("s3://bucket/tokens")
    delete(garbage)

Only names that the write pass gives are ever deleted: a file that somebody put there stays. Uploads to an
object store that never ended are not files; a lifecycle rule of the bucket removes them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline import storage
from pipeline.errors import InputError
from pipeline.storage import FileStat
from pipeline.threads import in_order
from shards.dataset.dataset import ShardTable, open_table
from shards.dataset.parts import PLAN, parts, places
from shards.format.manifest import MANIFEST, read_manifest, shard_name
from shards.sources.table import SOURCES
from shards.writer.commit import CHECK_THREADS, RUN_CONFIG, Receipt

DAY_S = 86_400.0

_OBJECT = re.compile(r"(shards|index|rejects)/v(\d{2,})-(\d{5,})-[0-9a-f]{8}\.(tar|parquet)")
_RECEIPT = re.compile(r"receipts/([0-9a-f]{8})/v(\d{2,})-(\d{5,})\.json")
_TABLE = re.compile(r"manifest-[0-9a-f]{8}\.parquet")


@dataclass(frozen=True, kw_only=True, eq=False)
class Garbage:
    """Files that may be deleted: `objects`, and temporary files of local `writes` that never ended.

    `young` more are too young for that; `others` have names that the write pass does not give, and stay.
    """

    url: str
    objects: tuple[FileStat, ...]
    writes: tuple[FileStat, ...]
    young: int
    others: tuple[FileStat, ...]

    @property
    def bytes(self) -> int:
        """Bytes that deleting frees."""
        return sum(file.bytes for file in (*self.objects, *self.writes))


def find_garbage(url: str, *, older_than_s: float = DAY_S) -> Garbage:
    """Look for garbage in a finished dataset; nothing is deleted.

    InputError where the dataset, or something that is being added to it, is unfinished: what no manifest
    names yet may be needed.
    """
    url = storage.absolute(url)
    base, *added = parts(url)
    if not base.finished:
        read_manifest(url)  # says why there is none
    for part in added:
        if not part.finished:
            raise InputError(
                f"{part.url} is unfinished, and may need what no manifest names yet; run the job that writes "
                "it again, or remove that folder"
            )
    tables = [open_table(part.url) for part in (base, *added)]
    oldest = time.time() - older_than_s
    objects: list[FileStat] = []
    others: list[FileStat] = []
    files = unreferenced_files(url, tables)
    for file, unclaimed in in_order(lambda file: (file, _is_unclaimed(file, tables)), files, CHECK_THREADS):
        (objects if unclaimed else others).append(file)
    writes = list(storage.temporary_files(url))
    old, old_writes = (
        tuple(file for file in some if file.modified is not None and file.modified < oldest)
        for some in (objects, writes)
    )
    young = len(objects) + len(writes) - len(old) - len(old_writes)
    return Garbage(url=url, objects=old, writes=old_writes, young=young, others=tuple(others))


def delete(garbage: Garbage) -> None:
    """Delete what was found to be garbage."""
    for _ in in_order(storage.remove, [f.url for f in (*garbage.objects, *garbage.writes)], CHECK_THREADS):
        pass


def unreferenced_files(url: str, tables: Sequence[ShardTable]) -> Iterator[FileStat]:
    """Every file below a dataset that none of its manifests names; unfinished parts are left out.

    `tables` are those of its finished parts. Names are looked up in the tables: no list of them is held.
    """
    finished = {table.url: table for table in tables}
    nested = sorted(places(url), key=len, reverse=True)
    for file in storage.list_files(url):
        place = next(place for place in nested if file.url.startswith(f"{place}/"))
        if place in finished and not _is_named(finished[place], file.url.removeprefix(f"{place}/")):
            yield file


def _is_named(table: ShardTable, path: str) -> bool:
    manifest = table.manifest
    if path in (MANIFEST, PLAN, RUN_CONFIG, SOURCES, manifest.table.path):
        return True
    match = _RECEIPT.fullmatch(path) or _OBJECT.fullmatch(path)
    view, number = (int(match[2]) - manifest.first_view, int(match[3])) if match else (-1, -1)
    if not (0 <= view < table.num_views and 0 <= number < table.num_shards):
        return False
    shard = table.stored(view, number)
    receipt = f"receipts/{manifest.plan[:8]}/{shard.name}.json"
    return path in (receipt, shard.tar, shard.index, shard.rejects)


def _is_unclaimed(file: FileStat, tables: Sequence[ShardTable]) -> bool:
    """True for an object of the write pass that no receipt names either."""
    place = max((table.url for table in tables if file.url.startswith(f"{table.url}/")), key=len)
    path = file.url.removeprefix(f"{place}/")
    if _TABLE.fullmatch(path):
        return True
    match = _OBJECT.fullmatch(path)
    if match is None:
        return False
    name = shard_name(int(match[2]), int(match[3]))
    receipts = storage.join(place, "receipts")
    urls = [storage.join(receipts, prefix, f"{name}.json") for prefix in storage.list_folders(receipts)]
    return not any(_may_name(path, url) for url in urls)


def _may_name(path: str, url: str) -> bool:
    """Whether a receipt names a path; one that cannot be read may name anything."""
    data = storage.read_or_none(url)
    if data is None:
        return False
    try:
        shard = Receipt.from_bytes(data).shard
    except (ValueError, KeyError, TypeError):
        return True
    return path in (shard.tar, shard.index, shard.rejects)

"""What lies in a finished dataset and is nobody's: objects of attempts that lost, writes that never ended.

    garbage = find_garbage("s3://bucket/tokens")
    delete(garbage)

Nothing is garbage that a manifest names, of the dataset, of added views or of a code layer, or a receipt of
whatever plan. Only names that the write pass gives are ever deleted: a file that somebody put there stays.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline import storage
from pipeline.errors import InputError
from pipeline.storage import FileStat
from shards.dataset.dataset import ShardTable
from shards.dataset.parts import PLAN, open_part, parts, places
from shards.format.manifest import MANIFEST, read_manifest, shard_name
from shards.sources.table import SOURCES
from shards.writer.commit import RUN_CONFIG, Receipt, in_order

DAY_S = 86_400.0

_OBJECT = re.compile(r"(shards|index|rejects)/v(\d{2,})-(\d{5,})-[0-9a-f]{8}\.(tar|parquet)")
_RECEIPT = re.compile(r"receipts/([0-9a-f]{8})/v(\d{2,})-(\d{5,})\.json")
_TABLE = re.compile(r"manifest-[0-9a-f]{8}\.parquet")


@dataclass(frozen=True, kw_only=True, eq=False)
class Garbage:
    """What may be deleted: `objects` and `writes`.

    So many more are too `young` for that; `others` are names that the write pass does not give.
    """

    url: str
    objects: tuple[FileStat, ...]
    writes: tuple[FileStat, ...]
    young: int
    others: tuple[FileStat, ...]

    @property
    def bytes(self) -> int:
        """To be freed; the parts of a multipart upload on S3 come on top, and are not known."""
        return sum(found.bytes for found in self.objects) + sum(write.bytes or 0 for write in self.writes)


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
    tables = [open_part(part) for part in (base, *added)]
    now = time.time()
    objects: list[FileStat] = []
    others: list[FileStat] = []
    young = 0
    strange = strangers(url, tables)
    for found, unclaimed in in_order(lambda found: (found, _is_unclaimed(found, tables)), strange):
        if not unclaimed:
            others.append(found)
        elif found.modified is None or now - found.modified <= older_than_s:
            young += 1
        else:
            objects.append(found)
    writes = list(storage.temporary_files(url))
    stale = tuple(write for write in writes if now - (write.modified or now) > older_than_s)
    return Garbage(
        url=url,
        objects=tuple(objects),
        writes=stale,
        young=young + len(writes) - len(stale),
        others=tuple(others),
    )


def delete(garbage: Garbage) -> None:
    """Delete objects, and abort writes, that were found to be garbage."""
    for _ in in_order(storage.remove, (found.url for found in garbage.objects)):
        pass
    for _ in in_order(storage.remove, (write.url for write in garbage.writes)):
        pass


def strangers(url: str, tables: Sequence[ShardTable]) -> Iterator[FileStat]:
    """Every file below a dataset that none of its manifests names; unfinished parts are left out.

    `tables` are those of its finished parts. Names are looked up in the tables: no list of them is held.
    """
    finished = {table.url: table for table in tables}
    nested = sorted(places(url), key=len, reverse=True)
    for found in storage.list_files(url):
        place = next(place for place in nested if found.url.startswith(f"{place}/"))
        if place in finished and not _is_named(finished[place], found.url.removeprefix(f"{place}/")):
            yield found


def _is_named(table: ShardTable, path: str) -> bool:
    manifest = table.manifest
    if path in (MANIFEST, PLAN, RUN_CONFIG, SOURCES, manifest.table.path):
        return True
    if match := _RECEIPT.fullmatch(path):
        view, number = int(match[2]) - manifest.first_view, int(match[3])
        return match[1] == manifest.plan[:8] and _is_shard(table, view, number)
    if match := _OBJECT.fullmatch(path):
        view, number = int(match[2]) - manifest.first_view, int(match[3])
        if not _is_shard(table, view, number):
            return False
        shard = table.stored(view, number)
        return path in (shard.tar, shard.index, shard.rejects)
    return False


def _is_shard(table: ShardTable, view: int, number: int) -> bool:
    return 0 <= view < table.num_views and 0 <= number < table.num_shards


def _is_unclaimed(found: FileStat, tables: Sequence[ShardTable]) -> bool:
    """True for an object of the write pass that no receipt names either."""
    place = max((table.url for table in tables if found.url.startswith(f"{table.url}/")), key=len)
    path = found.url.removeprefix(f"{place}/")
    if _TABLE.fullmatch(path):
        return True
    match = _OBJECT.fullmatch(path)
    if match is None:
        return False
    name = shard_name(int(match[2]), int(match[3]))
    receipts = storage.join(place, "receipts")
    urls = [storage.join(receipts, plan8, f"{name}.json") for plan8 in storage.list_folders(receipts)]
    return not any(_may_name(path, url) for url in urls)


def _may_name(path: str, url: str) -> bool:
    """Whether a receipt names a path; one that cannot be read may name anything."""
    try:
        shard = Receipt.from_bytes(storage.read(url)).shard
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError):
        return True
    return path in (shard.tar, shard.index, shard.rejects)

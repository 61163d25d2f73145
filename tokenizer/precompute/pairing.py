"""Proof of pairing: stored crops are decoded and tokenized again, and their codes compared.

Computed as the recipe says, on a CPU as the writer's, codes are equal. Anywhere else sums round otherwise,
and a code may differ where two are as good as equally near: it is sound within 1e-4 of the best similarity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata

import numpy as np
import torch

from pipeline.errors import InputError
from pipeline.threads import in_order
from pipeline.training.metrics import Progress
from shards.dataset.dataset import ShardTable, views_url
from shards.dataset.rows import read_rows, read_shard_index
from shards.format.index import codes_of
from shards.format.manifest import Manifest, ShardInfo
from shards.pixels.views import decode_crop
from shards.upkeep.verify import is_chosen
from tokenizer.model.artifact import VisualTokenizer, read_tokenizer

NEAR_TIE = 1e-4
"""Cosine similarity by which a code may miss the best one, where codes cannot be expected to be equal."""
LISTED = 8
"""Samples that are named at most."""

_READ_THREADS = 4


@dataclass(kw_only=True)
class Retokenized:
    """Codes of some crops, compared one by one: `compared` = `equal` + `near_ties` + `wrong`."""

    device: str
    precision: str = ""
    exact: bool = True
    """Near ties count as wrong, too: the codes were computed as the writer's were."""
    samples: int = 0
    compared: int = 0
    equal: int = 0
    near_ties: int = 0
    wrong: int = 0
    worst_gap: float = 0.0
    """The largest similarity that a code misses."""
    differing: tuple[str, ...] = ()
    """Keys of some samples that are not sound."""

    @property
    def sound(self) -> bool:
        return self.wrong == 0 and not (self.exact and self.near_ties)

    def __str__(self) -> str:
        near = "near ties" + (", which count as wrong here" if self.exact and self.near_ties else "")
        text = (
            f"{self.samples:,} crops tokenized on {self.device} in {self.precision}: {self.compared:,} codes "
            f"compared, {self.equal:,} equal, {self.near_ties:,} {near}, {self.wrong:,} wrong"
        )
        return text + (f", such as in {', '.join(self.differing)}" if self.differing else "")

    def add(self, tokenizer: VisualTokenizer, crops: StoredCrops) -> None:
        """Tokenize some crops; where a code differs, ask how far it is from the best."""
        pixels, stored = torch.from_numpy(crops.pixels), torch.from_numpy(crops.codes.astype(np.int64))
        differs = tokenizer.encode(pixels).cpu() != stored
        self.samples += len(crops.keys)
        self.compared += differs.numel()
        self.equal += int((~differs).sum())
        rows = differs.any(dim=1)
        if not rows.any():
            return
        gaps = tokenizer.code_gaps(pixels[rows], stored[rows]).cpu()
        wrong = differs[rows] & ~(gaps <= NEAR_TIE)
        self.worst_gap = max(self.worst_gap, float(gaps[differs[rows]].max()))
        self.wrong += int(wrong.sum())
        self.near_ties += int((differs[rows] & ~wrong).sum())
        keys = [crops.keys[row] for row in rows.nonzero()[:, 0].tolist()]
        unsound = [key for key, bad in zip(keys, wrong.any(dim=1).tolist(), strict=True) if bad or self.exact]
        self.differing = (*self.differing, *unsound)[:LISTED]


def parts_of_tokenizer(parts: Sequence[ShardTable], tokenizer_url: str) -> list[ShardTable]:
    """The parts whose codes a tokenizer gave; InputError, naming the fingerprints, where there are none."""
    artifact = read_tokenizer(tokenizer_url)
    tokenizers = (part.manifest.tokenizer for part in parts)
    writers = [None if tokenizer is None else tokenizer.artifact_fingerprint for tokenizer in tokenizers]
    chosen = [part for part, writer in zip(parts, writers, strict=True) if writer == artifact.fingerprint]
    if not chosen:
        names = sorted({str(writer) for writer in writers} - {"None"})
        what = f"has codes of {' and '.join(names)}" if names else "has no codes"
        raise InputError(
            f"{tokenizer_url} is tokenizer {artifact.fingerprint}, but {parts[0].url} {what}; "
            "give the tokenizer that wrote them"
        )
    return chosen


def retokenize(
    parts: Sequence[ShardTable],
    tokenizer_url: str,
    share: float,
    *,
    device: str = "cpu",
    skip: Callable[[str, int, int], bool] = lambda part, view, number: False,
) -> Retokenized:
    """Tokenize a share of the crops, chosen by sample id, and compare; at least one of each shard.

    `parts` are those of a dataset, of which the parts with codes of this tokenizer are compared: the crops of
    a code layer lie in another one. Shards are skipped where `skip(part url, view, number)` says so, as they
    are known to be damaged. InputError names an object that is not what was written.
    """
    result = Retokenized(device=device)
    tables = {part.url: part for part in parts}
    chosen = parts_of_tokenizer(parts, tokenizer_url)
    progress = Progress(
        "tokenizing again", sum(part.num_views * part.num_shards for part in chosen), "shards"
    )
    for part in chosen:
        tokenizer = load_as_written(part.manifest, tokenizer_url, device)
        result.precision = tokenizer.precision
        result.exact = result.exact and computes_alike(part.manifest, tokenizer)
        shards = _shard_pairs(part, tables, skip)
        for crops in in_order(lambda pair: _read_crops(*pair, share), shards, _READ_THREADS, _READ_THREADS):
            if crops.keys:
                result.add(tokenizer, crops)
            progress.update(codes=result.compared, near_ties=result.near_ties, wrong=result.wrong)
    progress.close(codes=result.compared, near_ties=result.near_ties, wrong=result.wrong)
    return result


def computes_alike(manifest: Manifest, tokenizer: VisualTokenizer) -> bool:
    """Whether codes must come out equal: a CPU, as the writer's, in its precision and with its torch.

    Of a GPU the recipe does not say which one it was.
    """
    encode, libraries = manifest.recipe.encode, manifest.recipe.libraries or {}
    return (
        encode is not None
        and encode.device == tokenizer.device.type == "cpu"
        and manifest.require_tokenizer().precision == tokenizer.precision
        and libraries.get("torch") == metadata.version("torch")
    )


def load_as_written(manifest: Manifest, tokenizer_url: str, device: str) -> VisualTokenizer:
    """The tokenizer, to be run as the manifest's recipe says, as far as this device can."""
    encode = manifest.recipe.encode
    precision = manifest.require_tokenizer().precision or "fp32"
    if precision == "fp16" and device == "cpu":
        precision = "fp32"
    if device == "cpu" and encode is not None:
        torch.set_num_threads(encode.threads)
    batch_size = None if encode is None else encode.batch_size
    return VisualTokenizer.load(tokenizer_url, device=device, precision=precision, batch_size=batch_size)


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredCrops:
    """Some crops of a shard: keys, pixels uint8 [n, S, S, 3] and stored codes uint16 [n, grid area]."""

    keys: list[str]
    pixels: np.ndarray
    codes: np.ndarray


def _shard_pairs(
    part: ShardTable, tables: dict[str, ShardTable], skip: Callable[[str, int, int], bool]
) -> Iterator[tuple[ShardInfo, ShardInfo]]:
    """Every shard of a part, as (shard that has its crops, shard that has its codes)."""
    pixels, first_view = part, part.manifest.first_view
    if part.manifest.kind == "codes":
        place = views_url(part.url.rpartition("/codes/")[0], first_view)
        if place not in tables:
            raise InputError(f"the crops of {part.url}, {place}, cannot be opened; verify the dataset")
        pixels = tables[place]
    for view in range(part.num_views):
        for number in range(part.num_shards):
            if not any(skip(table.url, first_view + view, number) for table in (part, pixels)):
                yield pixels.shard(view, number), part.shard(view, number)


def _read_crops(crops: ShardInfo, codes: ShardInfo, share: float) -> StoredCrops:
    """Chosen rows of one shard; only their images are read, each checked by its hash."""
    ids = read_shard_index(crops, ("sample_id",)).column("sample_id").to_numpy()
    chosen = list(read_rows(crops, np.flatnonzero(is_chosen(ids, share))))
    rows = [row.row for row in chosen]
    pixels = [decode_crop(row.image) for row in chosen]
    return StoredCrops(
        keys=[row.key for row in chosen],
        pixels=np.stack(pixels) if pixels else np.empty((0, 0, 0, 3), np.uint8),
        codes=codes_of(read_shard_index(codes, ("codes",)))[rows],
    )

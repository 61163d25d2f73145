"""Proof of pairing: stored crops are decoded and tokenized again, and their codes compared.

Computed as the recipe says, on a CPU as the writer's, codes are equal. Anywhere else sums round otherwise,
and a code may differ where two are as good as equally near: it is sound within 1e-4 of the best similarity.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch

from pipeline import storage
from pipeline.errors import InputError
from pipeline.training.metrics import Progress
from pipeline.training.optim import Precision
from shards.dataset.dataset import ShardTable, views_url
from shards.dataset.rows import read_shard_index
from shards.format.index import codes_of
from shards.format.manifest import Manifest, ShardInfo
from shards.pixels.views import decode_crop
from shards.upkeep.check import is_chosen
from shards.upkeep.recover import OpenedPart
from tokenizer.model.artifact import VisualTokenizer, read_tokenizer

NEAR_TIE = 1e-4
"""Cosine similarity by which a code may miss the best one, where codes cannot be expected to be equal."""
LISTED = 8

_READ_THREADS = 4


@dataclass(frozen=True, kw_only=True)
class Retokenized:
    """Codes of so many crops, compared one by one: `compared` = `equal` + `near_ties` + `wrong`.

    `exact` says that near ties count as wrong, too: the codes were computed as the writer's were. `worst_gap`
    is the largest similarity missed. `differing` lists some samples that are not sound.
    """

    device: str
    precision: str
    exact: bool
    samples: int
    compared: int
    equal: int
    near_ties: int
    wrong: int
    worst_gap: float
    differing: tuple[str, ...]

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


def parts_of_tokenizer(parts: Sequence[OpenedPart], tokenizer_url: str) -> list[OpenedPart]:
    """The parts whose codes a tokenizer gave; InputError, naming the fingerprints, where there are none."""
    artifact = read_tokenizer(tokenizer_url)
    named = [_block(part.manifest).get("artifact_fingerprint") for part in parts]
    mine = [part for part, name in zip(parts, named, strict=True) if name == artifact.fingerprint]
    if not mine:
        held = sorted({str(name) for name in named} - {"None"})
        what = f"has codes of {' and '.join(held)}" if held else "has no codes"
        raise InputError(
            f"{tokenizer_url} is tokenizer {artifact.fingerprint}, but {parts[0].url} {what}; "
            "give the tokenizer that wrote them"
        )
    return mine


def load_as_written(manifest: Manifest, tokenizer_url: str, device: str) -> VisualTokenizer:
    """The tokenizer, to be run as the manifest's recipe says, as far as this device can."""
    encode: dict[str, Any] = manifest.recipe.get("encode", {})
    precision: Precision = _block(manifest).get("precision", "fp32")
    if precision == "fp16" and device == "cpu":
        precision = "fp32"
    if device == "cpu" and "threads" in encode:
        torch.set_num_threads(encode["threads"])
    return VisualTokenizer.load(
        tokenizer_url, device=device, precision=precision, batch_size=encode.get("batch_size")
    )


def retokenize(
    parts: Sequence[OpenedPart],
    opened: Sequence[OpenedPart],
    tokenizer_url: str,
    share: float,
    *,
    device: str = "cpu",
    skip: Callable[[str, int, int], bool] = lambda part, view, number: False,
) -> Retokenized:
    """Tokenize a share of the crops of `parts`, chosen by sample id, and compare; at least one of each shard.

    `opened` are all parts of the dataset: the crops of a code layer lie in another one. Shards are skipped
    where `skip(part url, view, number)` says so, as they are known to be damaged. InputError names an object
    that is not what was written.
    """
    total = _Count(exact=True)
    tables = {part.url: part.table for part in opened}
    shards = sum(part.manifest.num_views * part.manifest.shards_per_view for part in parts)
    progress = Progress("tokenizing again", shards, "shards")
    precision = ""
    for part in parts:
        tokenizer = load_as_written(part.manifest, tokenizer_url, device)
        precision = tokenizer.precision
        total.exact = total.exact and computes_alike(part.manifest, tokenizer)
        for crops in _chosen_crops(part, tables, share, skip):
            total.add(tokenizer, crops)
            progress.update(codes=total.compared, near_ties=total.near_ties, wrong=total.wrong)
    progress.close(codes=total.compared, near_ties=total.near_ties, wrong=total.wrong)
    return Retokenized(
        device=device,
        precision=precision,
        exact=total.exact,
        samples=total.samples,
        compared=total.compared,
        equal=total.compared - total.near_ties - total.wrong,
        near_ties=total.near_ties,
        wrong=total.wrong,
        worst_gap=total.worst_gap,
        differing=tuple(total.differing),
    )


def computes_alike(manifest: Manifest, tokenizer: VisualTokenizer) -> bool:
    """Whether codes must come out equal: a CPU, as the writer's, in its precision and with its torch.

    Of a GPU the recipe does not say which one it was.
    """
    encode = manifest.recipe.get("encode", {})
    libraries = manifest.recipe.get("libraries", {})
    return (
        encode.get("device") == tokenizer.device.type == "cpu"
        and _block(manifest).get("precision") == tokenizer.precision
        and libraries.get("torch") == metadata.version("torch")
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Crops:
    """Chosen crops of a shard: keys, pixels uint8 [n, S, S, 3] and stored codes uint16 [n, N]."""

    keys: list[str]
    pixels: np.ndarray
    codes: np.ndarray


@dataclass
class _Count:
    """The comparison so far."""

    exact: bool
    samples: int = 0
    compared: int = 0
    near_ties: int = 0
    wrong: int = 0
    worst_gap: float = 0.0

    def __post_init__(self) -> None:
        self.differing: list[str] = []

    def add(self, tokenizer: VisualTokenizer, crops: _Crops) -> None:
        """Tokenize some crops; where a code differs, ask how far it is from the best."""
        pixels, stored = torch.from_numpy(crops.pixels), torch.from_numpy(crops.codes.astype(np.int64))
        codes = tokenizer.encode(pixels).cpu()
        self.samples += len(crops.keys)
        self.compared += codes.numel()
        rows = (codes != stored).any(dim=1)
        if not rows.any():
            return
        differing = (codes != stored)[rows]
        gaps = tokenizer.code_gaps(pixels[rows], stored[rows]).cpu()
        wrong = differing & ~(gaps <= NEAR_TIE)
        self.worst_gap = max(self.worst_gap, float(gaps[differing].max()))
        self.wrong += int(wrong.sum())
        self.near_ties += int((differing & ~wrong).sum())
        keys = [key for key, differs in zip(crops.keys, rows.tolist(), strict=True) if differs]
        unsound = [key for key, bad in zip(keys, wrong.any(dim=1).tolist(), strict=True) if bad or self.exact]
        self.differing += unsound[: LISTED - len(self.differing)]


def _block(manifest: Manifest) -> dict[str, Any]:
    return manifest.tokenizer or {}


def _chosen_crops(
    part: OpenedPart,
    tables: dict[str, ShardTable],
    share: float,
    skip: Callable[[str, int, int], bool],
) -> Iterator[_Crops]:
    """The chosen crops of every shard of a part, read a few shards ahead."""
    manifest = part.manifest
    pixels = part.table
    if part.kind == "codes":
        place = views_url(part.url.rpartition("/codes/")[0], manifest.first_view)
        if place not in tables:
            raise InputError(f"the crops of {part.url}, {place}, cannot be opened; verify the dataset")
        pixels = tables[place]
    shards = (
        (pixels.shard(view, number), part.table.shard(view, number))
        for view in range(manifest.num_views)
        for number in range(manifest.shards_per_view)
        if not skip(part.url, manifest.first_view + view, number)
        and not skip(pixels.url, manifest.first_view + view, number)
    )
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        waiting: list[Any] = []
        for crops, codes in shards:
            waiting.append(pool.submit(_read_crops, crops, codes, share))
            if len(waiting) > _READ_THREADS:
                yield from _nonempty(waiting.pop(0).result())
        for future in waiting:
            yield from _nonempty(future.result())


def _nonempty(crops: _Crops) -> Iterator[_Crops]:
    if crops.keys:
        yield crops


def _read_crops(crops: ShardInfo, codes: ShardInfo, share: float) -> _Crops:
    """Chosen rows of one shard; only their images are read, each checked by its hash."""
    columns = ("key", "sample_id", "image_offset", "image_bytes", "image_hash")
    index = read_shard_index(crops, columns if codes.index != crops.index else (*columns, "codes"))
    stored = codes_of(index if codes.index == crops.index else read_shard_index(codes, ("codes",)))
    rows = np.flatnonzero(is_chosen(index.column("sample_id").to_numpy(), share))
    chosen = index.select(list(columns)).take(rows).to_pylist()
    pixels: list[np.ndarray] = []
    for row in chosen:
        data = storage.read(crops.tar, row["image_offset"], row["image_bytes"])
        if hashlib.sha256(data).digest() != row["image_hash"]:
            raise InputError(f"{crops.tar} of shard {crops.name} is damaged at {row['key']}; repair it")
        pixels.append(decode_crop(data))
    return _Crops(
        keys=[row["key"] for row in chosen],
        pixels=np.stack(pixels) if pixels else np.empty((0, 0, 0, 3), np.uint8),
        codes=stored[rows],
    )

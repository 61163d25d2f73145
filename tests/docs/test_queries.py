"""The snippets of docs/queries.md are run as they stand, and what they find is counted again, slowly."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.dataset.dataset import layer_url, open_table, views_url
from shards.format.build import build_shard
from shards.format.manifest import Recipe, TokenizerSpec
from shards.format.plan import Plan
from shards.format.records import StoredSample, sample_key
from shards.pixels.views import CropBox, decode_crop, encode_crop
from shards.writer.commit import commit, finish, pending, start
from shards.writer.layers import build_layer_shard, layer_plan

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "queries.md"
GRID, CODEBOOK_SIZE, CLASSES = (2, 3), 12, ["ant", "bee", "cat"]
RANGES = (0, 5, 9, 14)

Codes = dict[tuple[int, int], np.ndarray]
"""(sample id, view) -> codes uint16 [2, 3]."""


def label_of(sample_id: int) -> int | None:
    return None if sample_id % 5 == 4 else sample_id % 3


def drawn_codes(seed: int, like: Codes | None = None) -> Codes:
    """Random codes, skewed, and none of 7 and 11; with `like` half of them are taken from there."""
    rng = np.random.default_rng(seed)
    allowed = np.array([0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 8, 9, 10])
    codes: Codes = {}
    for sample_id in range(RANGES[-1]):
        for view in range(2):
            drawn = rng.choice(allowed, GRID).astype(np.uint16)
            if like is not None:
                drawn = np.where(rng.random(GRID) < 0.5, like[sample_id, view], drawn)
            codes[sample_id, view] = drawn
    return codes


def write(root: str, codes: Codes) -> None:
    tokenizer = TokenizerSpec(fingerprint="a" * 64, grid=GRID, codebook_size=CODEBOOK_SIZE, image_size=8)
    plan = Plan(
        kind="tokens",
        inputs={"images": "i" * 64},
        first_ids=RANGES,
        views=2,
        class_names=tuple(CLASSES),
        tokenizer=tokenizer,
    )
    start(root, plan)
    for item in pending(root, plan):
        samples = [
            StoredSample(
                sample_id=i,
                view=item.view,
                image=encode_crop(np.full((8, 8, 3), 10 * i, np.uint8), 95),
                extension="jpg",
                source=f"pictures/{i}.jpg",
                source_width=8,
                source_height=8,
                label=label_of(i),
                crop=CropBox(top=0, left=0, height=8, width=8),
                codes=codes[i, item.view],
            )
            for i in range(item.first_id, item.end_id)
        ]
        commit(root, plan, item, build_shard(samples, [], grid=GRID, codebook_size=CODEBOOK_SIZE))
    finish(root, plan, decode_crop)


def write_layer(root: str, codes: Codes) -> None:
    pixels = open_table(views_url(root, 0))
    tokenizer = TokenizerSpec(fingerprint="b" * 64, grid=GRID, codebook_size=CODEBOOK_SIZE, image_size=8)
    plan = layer_plan(pixels, tokenizer, Recipe())
    place = layer_url(root, "b" * 64, 0)
    start(place, plan)
    for item in pending(place, plan):
        ids = np.arange(item.first_id, item.end_id)
        rows = np.stack([codes[int(i), item.view].reshape(-1) for i in ids])
        shard = pixels.shard(item.view, item.number)
        built = build_layer_shard(shard, 0, ids, rows, grid=GRID, codebook_size=CODEBOOK_SIZE)
        commit(place, plan, item, built)
    finish(place, plan, decode_crop)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Codes, Codes]:
    """Every name the snippets define, and the codes of both tokenizers."""
    folder = tmp_path_factory.mktemp("queries")
    before = drawn_codes(1)
    after = drawn_codes(2, like=before)
    write(str(folder / "runs" / "tokens"), before)
    write_layer(str(folder / "runs" / "tokens"), after)
    snippets = re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    assert len(snippets) == 7
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for number, snippet in enumerate(snippets):
            exec(compile(snippet, f"docs/queries.md, snippet {number}", "exec"), names)
    return names, before, after


def all_codes(codes: Codes) -> list[int]:
    return [code for grid in codes.values() for code in grid.ravel().tolist()]


def entropy(values: Sequence[object]) -> float:
    counted = Counter(values)
    return -sum(n / len(values) * math.log(n / len(values)) for n in counted.values())


def test_usage_perplexity_and_dead_codes(found: tuple[dict[str, Any], Codes, Codes]) -> None:
    names, before, _ = found
    values = all_codes(before)
    assert names["counts"].tolist() == [values.count(code) for code in range(CODEBOOK_SIZE)]
    assert names["usage"] == len(set(values)) / CODEBOOK_SIZE
    assert names["perplexity"] == pytest.approx(math.exp(entropy(values)))
    assert {7, 11} <= set(names["dead"].tolist()) == set(range(CODEBOOK_SIZE)) - set(values)
    ranked = sorted(set(values), key=lambda code: (values.count(code), code))
    assert names["rarest"] == ranked[:10]


def test_codes_per_class(found: tuple[dict[str, Any], Codes, Codes]) -> None:
    names, before, _ = found
    expected = Counter(
        (label_of(i), code) for (i, _), grid in before.items() for code in grid.ravel().tolist()
    )
    for label in range(3):
        row = [expected[label, code] for code in range(CODEBOOK_SIZE)]
        assert names["per_class"][label].tolist() == row
    labelled = [n for (label, _), n in expected.items() if label is not None]
    for label, name in enumerate(CLASSES):
        own = sum(expected[label, code] for code in range(CODEBOOK_SIZE))
        excess = [
            expected[label, code] / own - sum(expected[one, code] for one in range(3)) / sum(labelled)
            for code in range(CODEBOOK_SIZE)
        ]
        listed = names["typical"][name]
        assert [excess[code] for code in listed] == pytest.approx(sorted(excess, reverse=True)[:5])


def test_images_by_code(found: tuple[dict[str, Any], Codes, Codes]) -> None:
    names, before, _ = found
    values = all_codes(before)
    wanted = max(range(CODEBOOK_SIZE), key=values.count)
    assert names["wanted"] == wanted
    expected = [
        (int((grid == wanted).sum()), sample_key(i, view), f"pictures/{i}.jpg")
        for (i, view), grid in before.items()
        if wanted in grid
    ]
    assert names["holders"] == sorted(expected, key=lambda holder: (-holder[0], holder[1]))


def test_drift_between_two_tokenizers(found: tuple[dict[str, Any], Codes, Codes]) -> None:
    names, before, after = found
    first, second = all_codes(before), all_codes({place: after[place] for place in before})
    assert names["layer"] == "b" * 8
    assert names["equal_share"] == sum(a == b for a, b in zip(first, second, strict=True)) / len(first)
    shared = entropy(first) + entropy(second) - entropy(list(zip(first, second, strict=True)))
    assert names["agreement"] == pytest.approx(shared / min(entropy(first), entropy(second)))
    assert 0.1 < names["agreement"] < 1


def test_duckdb_counts_the_same(found: tuple[dict[str, Any], Codes, Codes]) -> None:
    names, before, _ = found
    counted = Counter(
        (label_of(i), code)
        for (i, view), grid in before.items()
        if view == 0
        for code in grid.ravel().tolist()
    )
    most = names["most"]
    assert len(most) == 10 and all(counted[label, code] == patches for label, code, patches in most)
    assert [patches for *_, patches in most] == sorted(counted.values(), reverse=True)[:10]

"""Code statistics against a count by hand, and summaries against what was written."""

from __future__ import annotations

import gc
import json
import math
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputError
from shards.dataset import dataset as dataset_module
from shards.dataset.codes import CodeCount, code_statistics, count_codes, perplexity
from shards.dataset.dataset import open_dataset
from shards.dataset.summary import in_words, summarize
from shards.writer.commit import items


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30))
def test_statistics_of_any_counts(numbers: list[int]) -> None:
    counts = np.array(numbers, np.int64)
    found = code_statistics(counts)
    used = [n for n in numbers if n]
    entropy = -sum(n / sum(used) * math.log(n / sum(used)) for n in used)
    assert found.perplexity == pytest.approx(math.exp(entropy) if used else 0.0)
    assert found.perplexity <= len(used) + 1e-9
    assert found.usage == len(used) / len(numbers)
    assert found.num_dead == numbers.count(0)
    assert found.dead == tuple(code for code, n in enumerate(numbers) if n == 0)[:8]
    ranked = sorted(range(len(numbers)), key=lambda code: (-numbers[code], code))
    expected = [CodeCount(code=code, patches=numbers[code]) for code in ranked if numbers[code]]
    assert found.most_used == tuple(expected[:8])
    rarest = sorted(expected, key=lambda count: (count.patches, count.code))
    assert found.least_used == tuple(rarest[:8])


def test_perplexity_of_known_cases() -> None:
    assert perplexity(np.full(64, 3)) == pytest.approx(64)
    assert perplexity(np.array([0, 9, 0])) == pytest.approx(1)
    assert perplexity(np.array([2, 1, 1])) == pytest.approx(2 * math.sqrt(2))


def test_tokens_are_counted_over_all_views(tmp_path: Path, small_dataset: Callable[..., Any]) -> None:
    small = small_dataset()
    small.write(str(tmp_path))
    dataset = open_dataset(str(tmp_path))
    samples = [sample for item in items(small.plan) for sample in small.content(item)[0]]
    codes = Counter(code for sample in samples for code in sample.codes.ravel().tolist())
    assert count_codes(dataset).tolist() == [codes[code] for code in range(16)]
    of_second = Counter(code for s in samples if s.view == 1 for code in s.codes.ravel().tolist())
    assert count_codes(dataset, views=[1]).tolist() == [of_second[code] for code in range(16)]

    found = summarize(dataset)
    json_names = ("kind", "views", "samples", "samples_in", "samples_written", "samples_rejected")
    told = found.to_json()
    assert [told[name] for name in json_names] == ["tokens", 2, [8, 8], 18, 16, {"truncated": 2}]
    assert found.labelled == dict(
        sorted(Counter(s.label for s in samples if s.view == 0 and s.label is not None).items())
    )
    for field, folder in (("tar_bytes", "shards"), ("index_bytes", "index"), ("rejects_bytes", "rejects")):
        stored = sum(path.stat().st_size for path in (tmp_path / folder).iterdir())
        assert getattr(found, field) == stored
    assert found.fingerprint == dataset.fingerprint
    assert found.codes == code_statistics(count_codes(dataset))
    first = samples[0]
    assert found.example is not None and found.example.key == first.key
    assert np.array_equal(found.example.grid, first.codes)

    text = in_words(found)
    for row in first.codes.tolist():
        width = len(str(first.codes.max()))
        assert "  " + " ".join(f"{code:>{width}}" for code in row) in text.splitlines()
    for part in (
        found.fingerprint,
        "18 in = 16 written + 2 rejected",
        "truncated 2",
        "150 times in 300 epochs",
    ):
        assert part in text
    assert json.loads(json.dumps(found.to_json()))["codes"]["perplexity"] == found.codes.perplexity


def test_images_have_no_codes(tmp_path: Path, small_dataset: Callable[..., Any]) -> None:
    small_dataset("images", views=1, rejected={}).write(str(tmp_path))
    dataset = open_dataset(str(tmp_path))
    found = summarize(dataset)
    assert found.codes is None and found.to_json()["tokenizer"] is None
    assert found.example is not None and found.example.grid is None
    assert found.rejects_bytes == 0
    assert "rejected      none" in in_words(found)
    with pytest.raises(InputError, match="image dataset has no codes"):
        count_codes(dataset)


def test_one_index_is_held_at_a_time(
    tmp_path: Path, small_dataset: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory stays flat: no table of an earlier shard is alive when the next one is read."""
    alive: list[weakref.ref[Any]] = []
    most = 0
    read = dataset_module.read_shard_index

    def watched(*arguments: Any) -> Any:
        nonlocal most
        gc.collect()
        most = max(most, sum(reference() is not None for reference in alive))
        table = read(*arguments)
        alive.append(weakref.ref(table))
        return table

    small_dataset(first_ids=tuple(range(0, 24, 3)), rejected={}).write(str(tmp_path))
    monkeypatch.setattr(dataset_module, "read_shard_index", watched)
    summarize(open_dataset(str(tmp_path)))
    assert len(alive) == 15 and most <= 1  # the previous one may still bear its name

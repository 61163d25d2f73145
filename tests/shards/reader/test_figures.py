"""What a reader says of itself: counts that add up, and a verdict that names what to raise."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shards.dataset.dataset import open_dataset
from shards.pixels.crops import StoredCrops
from shards.reader.figures import READER_FILE, ReaderFigures, ReaderReports, Telemetry
from shards.reader.reader import Batches, ShardReader

if TYPE_CHECKING:
    from tests.shards.conftest import Written


def test_figures_add_up_and_begin_anew() -> None:
    telemetry = Telemetry()
    for get_s in (0.1, 0.2, 0.3, 5.0):
        telemetry.fetched(100, get_s)
    telemetry.retried()
    telemetry.opened(hit=True)
    telemetry.opened(hit=False)
    telemetry.delivered(8, 0.5)
    telemetry.delivered(8, 0.25)
    telemetry.decoded(2.0, 0.125)
    found = telemetry.take()
    assert (found.samples, found.wait_s, found.decode_s, found.shard_wait_s) == (16, 0.75, 2.0, 0.125)
    assert (found.shards_opened, found.cache_hits, found.gets, found.retries) == (2, 1, 4, 1)
    assert (found.bytes_fetched, found.get_p50_s, found.get_p99_s) == (400, 0.3, 5.0)
    again = telemetry.take()
    assert dataclasses.replace(again, seconds=0.0) == ReaderFigures()


def test_the_verdict_names_the_limit_and_what_to_raise() -> None:
    calm = ReaderFigures(seconds=10, samples=100, wait_s=0.1)
    assert calm.verdict(2) == "reader: 10.0 samples/s, 1.0% of the time waiting for data: bound by compute"
    decoding = dataclasses.replace(calm, wait_s=5.0, decode_s=18.0)
    assert "bound by data, by decoding; raise --decode_threads (now 2)" in decoding.verdict(2)
    fetching = dataclasses.replace(decoding, shard_wait_s=19.0, gets=7, get_p50_s=2.5, retries=3)
    said = fetching.verdict(2)
    assert said.startswith("warning: ") and "7 fetches of 2.5 s" in said and "3 retries" in said
    assert "raise --cache.bytes" in said


def test_reports_are_written_beside_the_metrics(
    written_once: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path)
    with ShardReader(open_dataset(written_once.tokens), StoredCrops(), Batches(4, num_threads=1)) as reader:
        reports = ReaderReports(output, reader.telemetry, num_threads=1)
        for step, _ in enumerate(reader.batches(0), start=1):
            reports.at(step)
        reports.close()
    records = [json.loads(line) for line in (tmp_path / READER_FILE).read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]
    assert sum(record["reader_samples"] for record in records) == 12
    assert sum(record["reader_decode_s"] for record in records) > 0
    assert sum(record["reader_shards_opened"] for record in records) == 3
    assert all(record["split"] == "reader" for record in records)
    assert capsys.readouterr().out.count("reader: ") == 1
    assert not (tmp_path / "metrics.jsonl").exists()
    ReaderReports(output, Telemetry(), num_threads=1, resume_step=2).close()
    assert len((tmp_path / READER_FILE).read_text().splitlines()) == 2

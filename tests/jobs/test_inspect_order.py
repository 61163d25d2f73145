"""What the job prints is what a reader reads: every sample once, whatever the ranks, batches and restarts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.inspect_order import InspectOrderConfig, main
from pipeline.errors import InputError
from shards.dataset.corpus import SubsetConfig
from shards.dataset.dataset import open_dataset
from shards.format.build import build_shard
from shards.format.manifest import TokenizerSpec
from shards.format.plan import Plan
from shards.format.records import RejectedSample, StoredSample
from shards.pixels.crops import StoredCrops
from shards.pixels.views import CropBox, decode_crop, encode_crop
from shards.reader.order import view_of_epoch
from shards.reader.reader import Batches, ShardReader
from shards.writer.commit import commit, finish, pending, start

NUM_SAMPLES = 60
REJECTED = (7, 31)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    """58 of 60 samples in two views, shards of 1 to 12."""
    root = str(tmp_path_factory.mktemp("order") / "tokens")
    spec = TokenizerSpec(fingerprint="f" * 64, grid=(1, 1), codebook_size=4, image_size=8)
    plan = Plan(
        kind="tokens",
        inputs={},
        first_ids=(0, 12, 20, 21, 32, 41, 50, NUM_SAMPLES),
        views=2,
        tokenizer=spec,
        class_names=("even", "odd"),
    )
    image = encode_crop(np.zeros((8, 8, 3), np.uint8), 95)
    start(root, plan)
    for item in pending(root, plan):
        ids = range(item.first_id, item.end_id)
        samples = [
            StoredSample(
                sample_id=i,
                view=item.view,
                image=image,
                extension="jpg",
                source=f"{i}.png",
                source_width=8,
                source_height=8,
                label=i % 2,
                crop=CropBox(top=0, left=0, height=8, width=8),
                codes=np.full((1, 1), i % 4, np.uint16),
            )
            for i in ids
            if i not in REJECTED
        ]
        rejects = [
            RejectedSample(sample_id=i, source=f"{i}.png", reason="corrupt", message="")
            for i in ids
            if i in REJECTED
        ]
        commit(root, plan, item, build_shard(samples, rejects, grid=(1, 1), codebook_size=4))
    finish(root, plan, decode_crop)
    return root


def steps_of(capsys: pytest.CaptureFixture[str], config: InspectOrderConfig) -> list[list[str]]:
    capsys.readouterr()
    main(dataclasses.replace(config, json=True))
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["steps"]
    return found["steps"]


@given(
    world_size=st.integers(1, 6),
    batch=st.integers(6, 25),
    epoch=st.integers(0, 3),
    lanes=st.sampled_from([None, 1, 3, 16]),
    data=st.data(),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ranks_see_every_sample_once_also_after_a_change(
    tokens: str,
    capsys: pytest.CaptureFixture[str],
    world_size: int,
    batch: int,
    epoch: int,
    lanes: int | None,
    data: st.DataObject,
) -> None:
    config = InspectOrderConfig(
        dataset=tokens, seed=5, epoch=epoch, global_batch=batch, steps=100, lanes=lanes, window=None
    )
    alone = steps_of(capsys, config)
    ranks = [
        steps_of(capsys, dataclasses.replace(config, world_size=world_size, rank=rank))
        for rank in range(world_size)
    ]
    assert len(alone) == 58 // batch
    for step, whole in enumerate(alone):
        assert sorted(key for rank in ranks for key in rank[step]) == sorted(whole)
    # Another batch size and number of workers take over.
    done = data.draw(st.integers(0, len(alone)))
    other, workers = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 3))
    workers = min(workers, other)
    seen = [key for whole in alone[:done] for key in whole]
    for rank in range(workers):
        rest = dataclasses.replace(
            config, start=done * batch, global_batch=other, world_size=workers, rank=rank
        )
        seen += [key for keys in steps_of(capsys, rest) for key in keys]
    tail = (58 - done * batch) % other
    view = view_of_epoch(2, 5, epoch)
    everything = {f"{i:010d}-{view:02d}" for i in range(NUM_SAMPLES) if i not in REJECTED}
    assert len(seen) == len(set(seen)) == 58 - tail and set(seen) <= everything


def test_it_prints_what_the_reader_reads(tokens: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = InspectOrderConfig(
        dataset=tokens, seed=2, epoch=1, global_batch=11, world_size=3, rank=1, start=11, steps=3
    )
    for num_threads in (0, 3):
        batches = Batches(11, seed=2, rank=1, world_size=3, num_threads=num_threads)
        with ShardReader(open_dataset(tokens), StoredCrops(), batches) as reader:
            assert steps_of(capsys, config) == [batch.keys for batch in reader.batches(1, 11)][:3]


def test_text_says_the_order_and_a_subset_is_followed(
    tokens: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(InspectOrderConfig(dataset=tokens, global_batch=20, world_size=2, steps=2, lanes=2, window=1))
    said = capsys.readouterr().out
    for part in ("position 20: 00000", "2 lanes of 1 shards", "the last 18 positions"):
        assert part in said
    (tmp_path / "ids").write_text("3\n4\n40\n")
    subset = SubsetConfig(ids=str(tmp_path / "ids"))
    found = steps_of(capsys, InspectOrderConfig(dataset=tokens, global_batch=3, subset=subset))
    assert sorted(key[:10] for key in found[0]) == ["0000000003", "0000000004", "0000000040"]


def test_wrong_settings_are_named(tokens: str) -> None:
    for change, message in (
        ({"global_batch": 59}, "58 samples"),
        ({"start": 59, "global_batch": 5}, "58 samples"),
    ):
        with pytest.raises(InputError, match=message):
            main(InspectOrderConfig(dataset=tokens, **change))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="rank 2 of 2"):
        InspectOrderConfig(dataset=tokens, rank=2, world_size=2)
    with pytest.raises(InputError, match="from 0 on"):
        InspectOrderConfig(dataset=tokens, seed=-1)

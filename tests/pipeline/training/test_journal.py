from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.cluster.config import ClusterConfig
from pipeline.errors import InputError
from pipeline.training.checkpoints import CheckpointStore, TrainState
from pipeline.training.config import TrainingConfig, claim_output
from pipeline.training.interruption import InterruptedRunError, Interruption
from pipeline.training.journal import Journal
from pipeline.training.metrics import Progress, read_metrics
from pipeline.training.worker import Worker


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig):
    """A job that adds a number to a weight in every step."""

    batch_size: int = 4
    rate: float = 1.0


@dataclass
class Reports:
    """What is written of the reader, as a list."""

    steps: list[int] = field(default_factory=list)
    closed: bool = False

    def at(self, step: int) -> None:
        self.steps.append(step)

    def close(self) -> None:
        self.closed = True


@dataclass
class Loop:
    """The bookkeeping of a loop of two epochs of three steps, without any training."""

    config: Config
    worker: Worker
    reports: Reports = field(default_factory=Reports)

    def __post_init__(self) -> None:
        self.model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(self.model.weight)
        self.journal = Journal(self.config, self.worker, {"model": self.model})
        self.own = {"sum": 0} if self.journal.resumed is None else self.journal.resumed

    def begin(self) -> None:
        state = self.journal.state
        progress = Progress("count", 24, "images", done=12 * state.epoch + state.position)
        self.journal.begin("it begins", progress, lambda: dict(self.own), epochs=2, reports=self.reports)

    def step(self, epoch: int, number: int, *, may_save: bool = True) -> None:
        with torch.no_grad():
            self.model.weight += self.config.rate
        self.own["sum"] += number
        here = TrainState(epoch=epoch, position=4 * (number % 3 + 1), step=number + 1)
        self.journal.record(here, {"weight": self.model.weight.item()})
        self.journal.after_step(here, 4, {"weight": 1.0}, may_save=may_save)

    def run(self, after: Callable[[int], None] = lambda step: None) -> None:
        self.begin()
        state = self.journal.state
        for epoch in range(state.epoch, 2):
            first = state.position // 4 if epoch == state.epoch else 0
            for number in range(3 * epoch + first, 3 * epoch + 3):
                self.step(epoch, number, may_save=number % 3 != 2)
                after(number + 1)
            place = TrainState(epoch=epoch + 1, step=3 * epoch + 3)
            self.journal.save_together(place, score=0.5 + epoch, figures={"val_loss": 0.5 + epoch})


@pytest.fixture
def make_loop(tmp_path: Path) -> Callable[..., Loop]:
    def make(folder: str = "out", worker: Worker | None = None, **settings: Any) -> Loop:
        return Loop(Config(output=str(tmp_path / folder), **settings), worker or Worker())

    return make


def _saved(loop: Loop) -> list[int]:
    """Steps of the checkpoints that are there."""
    loop.journal._checkpoints.wait()
    folder = Path(loop.config.output) / "checkpoints"
    return sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("*.json"))


def test_a_whole_run_leaves_records_and_no_checkpoints(
    make_loop: Callable[..., Loop], capsys: pytest.CaptureFixture[str]
) -> None:
    loop = make_loop()
    assert loop.journal.resumed is None and loop.journal.state == TrainState()
    loop.run()
    assert loop.journal.account() == {
        "steps": 6,
        "seconds": pytest.approx(0, abs=60),
        "config": {"batch_size": 4, "precision": "auto", "rate": 1.0, "seed": 0},
    }
    best = loop.journal.best()
    assert best is not None and best[0] == TrainState(epoch=1, step=3) and best[1]["sum"] == 3
    assert _saved(loop) == [3, 6] and not loop.reports.closed
    loop.journal.finish(val_loss=1.5)
    assert _saved(loop) == [] and loop.reports.closed and loop.reports.steps == [1, 2, 3, 4, 5, 6]
    records = read_metrics(loop.config.output)
    assert [r["step"] for r in records] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert [r["split"] for r in records] == [*["train"] * 3, "epoch"] * 2
    assert records[3] == {"step": 3, "split": "epoch", "epoch": 1, "val_loss": 0.5}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "it begins" and "epoch 1/2: val loss 0.5" in lines
    assert lines[-1].startswith("count: 24/24 images (100 %)") and lines[-1].endswith("val_loss 1.5")


@pytest.mark.parametrize("at_step", [1, 2, 3, 5])
def test_asked_to_end_it_saves_at_once_and_goes_on_there(
    make_loop: Callable[..., Loop], at_step: int
) -> None:
    make_loop("straight").run()
    interruption = Interruption()
    stopped = make_loop(worker=Worker(interruption=interruption))
    with pytest.raises(InterruptedRunError):
        if at_step == 1:
            interruption.ask()
        stopped.run(lambda step: interruption.ask() if step == at_step - 1 else None)
    assert _saved(stopped)[-1] == at_step
    loop = make_loop()
    assert loop.journal.state.step == at_step and loop.model.weight.item() == at_step
    assert loop.own == {"sum": sum(range(at_step))}
    loop.run()
    loop.journal.finish()
    assert loop.model.weight.item() == 6 and loop.own == {"sum": 15}
    straight = str(Path(loop.config.output).parent / "straight")
    assert read_metrics(loop.config.output) == read_metrics(straight)


def test_a_node_that_is_only_threatened_saves_and_trains_on(make_loop: Callable[..., Loop]) -> None:
    interruption = Interruption(on_saved=lambda: None)
    loop = make_loop(worker=Worker(interruption=interruption), checkpoint_keep=9)
    loop.run(lambda step: interruption.ask() if step in (1, 3) else None)
    # Asked after step 1, so saved after step 2; asked after the last step of an epoch, saved after step 4.
    assert _saved(loop) == [2, 3, 4, 6]


def test_due_checkpoints_keep_their_distance_and_skip_steps_that_may_not_be_saved(
    make_loop: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    loop = make_loop(checkpoint_every_s=10.0, checkpoint_keep=9)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    loop.begin()
    saved = []
    for number, (seconds, may_save) in enumerate([(9, True), (2, False), (1, True), (9, True), (2, True)]):
        now[0] += seconds
        loop.step(0, number, may_save=may_save)
        saved.append(_saved(loop))
    assert saved == [[], [], [3], [3], [3, 5]]
    now[0] += 99
    monkeypatch.setattr(CheckpointStore, "is_writing", property(lambda self: True))
    loop.step(0, 5)  # does not wait for the one that is being written
    assert _saved(loop) == [3, 5]


def test_what_must_not_be_saved_is_said_by_the_tensors(make_loop: Callable[..., Loop]) -> None:
    """Nothing is written where `tensors` raises: the last good checkpoint stays the newest."""
    loop = make_loop(checkpoint_every_s=-1.0)
    loop.begin()
    loop.step(0, 0)
    assert _saved(loop) == [1]

    def broken() -> dict[str, Any]:
        raise ValueError("not finite")

    loop.journal._tensors = broken
    with pytest.raises(ValueError, match="not finite"):
        loop.step(0, 1)
    assert _saved(loop) == [1]


def test_records_are_published_before_their_checkpoint(
    make_loop: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(
        CheckpointStore, "save", lambda self, *_, **__: seen.append(len(read_metrics(loop.config.output)))
    )
    loop = make_loop(checkpoint_every_s=-1.0)
    loop.begin()
    loop.step(0, 0)
    loop.step(0, 1)
    assert seen == [1, 2]


def test_other_ranks_follow_without_writing(
    make_loop: Callable[..., Loop], capsys: pytest.CaptureFixture[str]
) -> None:
    interruption = Interruption()
    interruption.ask()  # heard by every rank of a node; the main rank answers
    loop = make_loop(worker=Worker(rank=1, interruption=interruption), checkpoint_every_s=-1.0)
    loop.run()
    loop.journal.finish()
    assert not Path(loop.config.output).exists() and capsys.readouterr().out == ""
    assert loop.journal.state == TrainState(epoch=2, step=6)


def test_an_output_is_taken_for_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def claimed(seed: int = 0, workers: int = 1, batch_size: int = 4) -> bool:
        cluster = ClusterConfig(num_workers=workers)
        config = Config(output=str(tmp_path / "out"), seed=seed, cluster=cluster, batch_size=batch_size)
        return claim_output(config, "count", "counted", {"images": "abc"})

    assert claimed() and claimed(workers=2, batch_size=8)
    with pytest.raises(InputError, match=r"config\.seed: there 0, asked 1"):
        claimed(seed=1)
    (tmp_path / "out" / "counted.json").write_text('{"files": {}}')
    assert not claimed(workers=3) and "nothing to do" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"config\.batch_size: there 4, asked 8"):
        claimed(batch_size=8)


def test_what_must_be_positive_is_named() -> None:
    with pytest.raises(InputError, match="batch_size is 0; give 1 or more"):
        Config(output="x", batch_size=0).require_positive("micro_batch_size", "batch_size")

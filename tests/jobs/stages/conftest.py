"""A tiny scale with a handful of images, and stand-ins for the jobs of a table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

from jobs.stages.results import Result, collect
from jobs.stages.rows import ReproduceConfig
from jobs.stages.stage import Stage
from jobs.stages.tables import TablePlan, plan_table, run_all
from pipeline import storage
from pipeline.cluster.config import ClusterConfig
from shards.writer.prepare import PrepareConfig, prepare_images

SCALE = """
stages:
  prepare_images: {}
  train_tokenizer: {overrides: {epochs: 3}}
  precompute_shards: {}
  pretrain_mim: {config: FOLDER/pretrain.yaml}
  probe_linear: {}
  finetune_classifier: {overrides: {epochs: 2}}
recipes:
  base_300: {}
teachers:
  clip: {teacher.name: timm:vit_base_patch16_224}
  hog: {teacher.name: hog}
teacher_from_file: true
translate:
  pretrain_mim:
    mim.patch_aggregation.head_depth: {"1": null}
controls:
  "5": [hog, untrained]
"""


class TableJobs:
    """Stands in for the jobs: real image shards, and headers with the numbers a test wants."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.fails: Callable[[Stage], bool] = lambda stage: False
        self.top1: Callable[[Sequence[str]], float] = lambda argv: 0.5

    def __call__(self, stage: Stage, argv: Sequence[str], on_line: Callable[[str], None]) -> int:
        self.ran.append(stage.name)
        on_line("something was printed")
        if self.fails(stage):
            on_line("the reason why")
            return 1
        for url in stage.inputs:
            assert storage.exists(url), f"{stage.name} runs before {url} is there"
        if stage.job == "prepare_images":
            cluster = ClusterConfig(num_workers=0)
            prepare_images(PrepareConfig(source=stage.flags["source"], output=stage.output, cluster=cluster))
            return 0
        top1 = self.top1(argv)
        scores = [
            {"model": model, "top1": share, "low": share - 0.02, "high": share + 0.02}
            for model, share in (("pretrained", top1), ("pretrained", 0.9), ("untrained", 0.125))
        ]
        metrics = {"reconstruction_loss": 0.25, "codebook_usage": 0.75, "val_top1": top1}
        header = {"files": {}, "metrics": metrics, "result": {"skipped": None, "scores": scores}}
        storage.put(stage.outputs[0], json.dumps(header).encode())
        return 0

    def run(self, plan: TablePlan) -> dict[str, str]:
        """The stages of no use."""
        self.ran = []
        return run_all(plan, self)

    def result(self, config: ReproduceConfig) -> Result:
        """The table after everything was run."""
        plan = plan_table(config)
        assert self.run(plan) == {}
        return collect(plan, {})


@pytest.fixture
def jobs() -> TableJobs:
    return TableJobs()


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the user has; in one place for all tests, so that equal settings are parsed once."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "pretrain.yaml").write_text("# a comment\nepochs: 4\n")
    (folder / "tiny.yaml").write_text(SCALE.replace("FOLDER", str(folder)))
    (folder / "teacher.safetensors").write_bytes(b"weights")
    for part, count in (("train", 3), ("val", 5)):
        for label, colour in (("cat", "red"), ("dog", "blue")):
            (folder / part / label).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8 + i), colour).save(folder / part / label / f"{i}.png")
    return folder


@pytest.fixture
def config(given: Path, tmp_path: Path) -> ReproduceConfig:
    return ReproduceConfig(
        table=5,
        scale=str(given / "tiny.yaml"),
        train_source=str(given / "train"),
        val_source=str(given / "val"),
        output=str(tmp_path / "runs"),
        teacher=str(given / "teacher.safetensors"),
    )

"""`python -m jobs.verify_shards`: exit status, a line for each problem, repair, one JSON document."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.verify_shards import VerifyConfig, main
from pipeline.cluster.config import ClusterConfig
from pipeline.errors import InputError
from shards.dataset.dataset import open_dataset
from shards.writer.prepare import PrepareConfig, prepare_images

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def images(make_image_folder: Callable[..., Path], tmp_path: Path) -> str:
    output = str(tmp_path / "images")
    source = make_image_folder(classes=2, per_class=4, size=24)
    (source / "class-0" / "broken.jpg").write_bytes(b"no image")
    prepare_images(
        PrepareConfig(
            source=str(source), output=output, max_shard_samples=3, cluster=ClusterConfig(num_workers=0)
        )
    )
    return output


def status(config: VerifyConfig) -> int:
    try:
        main(config)
    except SystemExit as ended:
        assert isinstance(ended.code, int)
        return ended.code
    return 0


def test_a_sound_dataset(images: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(VerifyConfig(dataset=images)) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"{images}: sound; sound: parts 1, shards 3, objects 10, bytes ")
    assert last.endswith("samples 8, of them decoded 8, rejects 1")


def test_each_problem_is_a_line_and_repair_mends_it(images: str, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (open_dataset(images).shard(0, number) for number in (0, 1))
    tar, index = Path(one.tar), Path(other.index)
    before = tar.read_bytes(), index.read_bytes()
    tar.write_bytes(before[0][:-1])
    index.unlink()
    assert status(VerifyConfig(dataset=images, sample=0)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith(f"{tar}: damaged: {len(before[0]) - 1} bytes")]
    assert [line for line in lines if line.startswith(f"{index}: missing; copy it")]
    assert lines[-1].startswith(f"{images}: UNSOUND, 2 problems")

    assert status(VerifyConfig(dataset=images, repair=True)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("repair: ") and "brought back" in line for line in lines) == 2
    assert f"{images}: sound; sound: parts 1, shards 3" in lines[-1]
    assert (tar.read_bytes(), index.read_bytes()) == before


def test_what_cannot_be_repaired_is_said_and_stays_unsound(
    images: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = Path(open_dataset(images).shard(0, 0).tar)
    tar.unlink()
    for file in (Path(images).parent / "pictures").rglob("*.*"):
        file.unlink()
    assert status(VerifyConfig(dataset=images, repair=True)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith(f"repair: {tar}: not brought back, ")]
    assert [line for line in lines if line.startswith(f"{tar}: missing")]


def test_from_the_command_line(images: str) -> None:
    command = [sys.executable, "-m", "jobs.verify_shards", "--json", "--dataset"]
    tar = Path(open_dataset(images).shard(0, 2).tar)
    tar.write_bytes(b"")
    done = subprocess.run([*command, images], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    said = json.loads(done.stdout)
    assert not said["sound"] and [problem["object"] for problem in said["problems"]] == [str(tar)]
    assert said["checked"]["shards"] == 2 and said["retokenized"] is None
    assert "verifying: 3/3 shards" in done.stderr


def test_unfinished_is_bad_input_and_repair_finishes_what_is_complete(images: str) -> None:
    manifest = Path(images) / "manifest.json"
    data = manifest.read_bytes()
    manifest.unlink()
    with pytest.raises(InputError, match="is unfinished"):
        main(VerifyConfig(dataset=images))
    with pytest.raises(InputError, match="there is no dataset"):
        main(VerifyConfig(dataset=f"{images}/nowhere"))
    assert status(VerifyConfig(dataset=images, repair=True)) == 0 and manifest.read_bytes() == data


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"retokenize": 0.1}, "--tokenizer"),
        ({"sample": 1.5}, "sample is 1.5"),
        ({"images": "x"}, "--repair"),
        ({"num_threads": 0}, "num_threads"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        VerifyConfig(dataset="x", **settings)  # type: ignore[arg-type]

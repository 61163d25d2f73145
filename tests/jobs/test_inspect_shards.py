"""`python -m jobs.inspect_shards` from the command line: text, JSON, and one clear line for anything else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jobs.inspect_shards import InspectConfig, main
from pipeline.errors import InputError
from shards.format.build import build_shard
from shards.format.manifest import Recipe, TokenizerSpec
from shards.format.records import StoredSample
from shards.pixels.views import CropBox, decode_crop, encode_crop
from shards.writer.commit import Plan, commit, finish, pending, start

ROOT = Path(__file__).resolve().parents[2]


def write_tokens(root: str) -> None:
    """Two shards of three samples whose codes are 0 to 3, and nothing else of a codebook of 8."""
    tokenizer = TokenizerSpec(fingerprint="f" * 64, grid=(2, 2), codebook_size=8, image_size=8)
    plan = Plan(
        kind="tokens",
        inputs={"images": "a" * 64},
        recipe=Recipe(views={"image_size": 8}),
        first_ids=(0, 3, 6),
        views=1,
        tokenizer=tokenizer,
    )
    start(root, plan)
    for item in pending(root, plan):
        samples = [
            StoredSample(
                sample_id=i,
                view=0,
                image=encode_crop(np.full((8, 8, 3), 40 * i, np.uint8), 95),
                extension="jpg",
                source=f"pictures/{i}.jpg",
                source_width=8,
                source_height=8,
                label=None,
                crop=CropBox(top=0, left=0, height=8, width=8),
                codes=np.array([[0, 1], [2, 3]], np.uint16),
            )
            for i in range(item.first_id, item.end_id)
        ]
        commit(root, plan, item, build_shard(samples, [], grid=(2, 2), codebook_size=8))
    finish(root, plan, decode_crop)


def inspect(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.inspect_shards", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tokens(str(tmp_path))
    main(InspectConfig(dataset=str(tmp_path)))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == ["codes", "  0 1", "  2 3"]
    assert "usage         50.0 % of 8 codes" in lines
    assert "perplexity    4.0 of at most 8" in lines
    assert "dead codes    4: 4, 5, 6, 7" in lines
    assert "samples       6 in = 6 written + 0 rejected" in lines


def test_json_is_one_line_on_stdout(tmp_path: Path) -> None:
    write_tokens(str(tmp_path))
    done = inspect("--dataset", str(tmp_path), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["codes"]["usage"] == 0.5 and found["codes"]["patches"] == 24
    assert found["example"]["grid"] == [[0, 1], [2, 3]]
    assert found["recipe"] == {"views": {"image_size": 8}}


def test_what_is_not_a_finished_dataset_is_one_line_and_status_2(tmp_path: Path) -> None:
    done = inspect("--dataset", str(tmp_path / "nowhere"))
    assert (done.returncode, done.stdout) == (2, "")
    assert str(tmp_path / "nowhere") in done.stderr and len(done.stderr.strip().splitlines()) == 1

    write_tokens(str(tmp_path / "unfinished"))
    (tmp_path / "unfinished" / "manifest.json").unlink()
    with pytest.raises(InputError, match="unfinished: a plan but no manifest"):
        main(InspectConfig(dataset=str(tmp_path / "unfinished")))

    write_tokens(str(tmp_path / "damaged"))
    [index, _] = sorted((tmp_path / "damaged" / "index").iterdir())
    index.write_bytes(index.read_bytes()[:-1] + b"!")
    with pytest.raises(InputError, match=f"{index.name} of shard v00-00000 is damaged"):
        main(InspectConfig(dataset=str(tmp_path / "damaged")))

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline import artifacts
from pipeline.errors import InputError


def test_published_artifact_reads_back_and_names_every_file(tmp_path: Path) -> None:
    url = str(tmp_path / "a")
    artifacts.publish(url, "thing", {"x.bin": b"12345", "y.bin": b""}, {"kind": "thing"})
    header = artifacts.read_header(url, "thing")
    assert header is not None and header["kind"] == "thing" and set(header["files"]) == {"x.bin", "y.bin"}
    assert artifacts.read_file(url, header, "x.bin") == b"12345"


def test_without_header_there_is_no_artifact(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"12345")
    assert artifacts.read_header(str(tmp_path), "thing") is None


@pytest.mark.parametrize("damage", [b"12344", b"1234", b"123456"])
def test_damaged_file_is_refused_by_name(tmp_path: Path, damage: bytes) -> None:
    artifacts.publish(str(tmp_path), "thing", {"x.bin": b"12345"}, {})
    (tmp_path / "x.bin").write_bytes(damage)
    header = artifacts.read_header(str(tmp_path), "thing")
    assert header is not None
    with pytest.raises(InputError, match=r"x\.bin is damaged"):
        artifacts.read_file(str(tmp_path), header, "x.bin")


def test_header_that_is_no_header_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thing.json").write_text("not json")
    with pytest.raises(InputError, match="is not JSON"):
        artifacts.read_header(str(tmp_path), "thing")
    (tmp_path / "thing.json").write_text("[1]")
    with pytest.raises(InputError, match="not the header"):
        artifacts.read_header(str(tmp_path), "thing")


def test_fingerprint_ignores_order_of_keys_and_sees_every_value() -> None:
    assert artifacts.fingerprint({"a": 1, "b": [1, 2]}) == artifacts.fingerprint({"b": [1, 2], "a": 1})
    assert artifacts.fingerprint({"a": 1, "b": [1, 2]}) != artifacts.fingerprint({"a": 1, "b": [2, 1]})
    with pytest.raises(ValueError):
        artifacts.fingerprint(float("nan"))


def test_claim_is_taken_once_and_kept(tmp_path: Path) -> None:
    url = str(tmp_path / "out")
    identity = {"job": "train", "config": {"seed": 1, "lr": 0.1}}
    artifacts.claim(url, identity)
    artifacts.claim(url, json.loads(json.dumps(identity)))
    with pytest.raises(InputError, match=r"config\.seed: there 1, asked 2"):
        artifacts.claim(url, {"job": "train", "config": {"seed": 2, "lr": 0.1}})


def test_claim_refuses_a_place_with_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="already holds something else"):
        artifacts.claim(str(tmp_path), {"job": "train"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis.tex"]


def test_code_version_is_package_version_and_source_hash() -> None:
    version, _, digest = artifacts.code_version().partition("+")
    assert version and len(digest) == 8

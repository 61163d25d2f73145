"""Files of tensors: what is in them comes back, what is more than tensors is refused and not run."""

from __future__ import annotations

import argparse
import hashlib
import http.server
import pickle
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from pipeline import tensorfile
from pipeline.errors import InputError
from pipeline.tensorfile import as_float32, common_size, count_numbered, match, read_tensors

STATE = {"b.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.tensor([1, 2]), "c": torch.tensor(0.5)}


class Trap:
    """What a hostile pickle does on loading: it makes a file."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.victim), "w")


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "module"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_state_dict_comes_back_from_where_checkpoints_keep_it(tmp_path: Path, wrapper, legacy):
    path = tmp_path / "checkpoint.pth"
    extra = {
        "args": argparse.Namespace(lr=1e-3, model="beit", betas=[0.9, 0.98]),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 3,
    }
    held = STATE if wrapper is None else {wrapper: STATE, **extra}
    torch.save(held, path, _use_new_zipfile_serialization=not legacy)
    found = read_tensors(str(path))
    assert equal(found.tensors, STATE) and found.url == str(path)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_content_decides_not_the_name(tmp_path: Path):
    safetensors.torch.save_file(STATE, tmp_path / "one.pth")
    torch.save(STATE, tmp_path / "two.safetensors")
    assert equal(read_tensors(str(tmp_path / "one.pth")).tensors, STATE)
    assert equal(read_tensors(str(tmp_path / "two.safetensors")).tensors, STATE)


def test_prefixes_are_dropped_and_those_of_parallel_training_removed(tmp_path: Path):
    held = {f"module.{key}": value for key, value in {**STATE, "teacher.x": "no tensor"}.items()}
    torch.save({"model": held}, tmp_path / "x.pth")
    assert equal(read_tensors(str(tmp_path / "x.pth"), drop=["teacher"]).tensors, STATE)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """An HTTP server of the test's folder, without range requests."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            del arguments

    handler = partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_from_a_url_whose_query_is_kept_out_of_what_is_said(tmp_path: Path, server: str, monkeypatch):
    torch.save(STATE, tmp_path / "weights.pth")
    found = read_tensors(f"{server}/weights.pth?signature=secret")
    assert equal(found.tensors, STATE) and found.url == f"{server}/weights.pth"

    monkeypatch.setattr(tensorfile, "_UNREADABLE_S", 0.0)
    nobody = server.rsplit(":", 1)[0] + ":1"
    for url in (f"{server}/absent.pth?signature=secret", f"{nobody}/x.pth?signature=secret", "s3x://a/b"):
        with pytest.raises(InputError, match=r"cannot (read|open)") as caught:
            read_tensors(url)
        assert url.split("?")[0] in str(caught.value)
        assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("place", ["zip", "bare", "inside a state dict"])
def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path: Path, protocol, place):
    """Of a protocol that torch's restricted unpickler knows, the name of what it calls is told too."""
    victim, path = tmp_path / "victim", tmp_path / "weights.pth"
    trap = Trap(victim)
    match place:
        case "zip":
            torch.save({"model": trap}, path, pickle_protocol=protocol)
        case "bare":
            path.write_bytes(pickle.dumps(trap, protocol=protocol))
        case "inside a state dict":
            torch.save({"model": {**STATE, "d": trap}}, path, pickle_protocol=protocol)
    reason = r"asks for \S*open, .*nothing was executed" if protocol == 2 else "no checkpoint"
    with pytest.raises(InputError, match=reason) as caught:
        read_tensors(str(path))
    assert not victim.exists() and "\n" not in str(caught.value)


def test_only_arguments_and_tensors_may_be_named(tmp_path: Path):
    torch.save({"model": STATE, "path": tmp_path}, tmp_path / "x.pth")
    with pytest.raises(InputError, match="PosixPath"):
        read_tensors(str(tmp_path / "x.pth"))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def _flip(path: Path) -> None:
    """One bit of a tensor's bytes, which torch keeps uncompressed with a checksum."""
    with zipfile.ZipFile(path) as archive:
        entry = next(entry for entry in archive.infolist() if entry.filename.endswith("data/0"))
    data = bytearray(path.read_bytes())
    data[data.index(STATE["b.weight"].numpy().tobytes()) + 1] ^= 1
    assert entry.file_size == STATE["b.weight"].nbytes
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_cut, "cut or damaged"),
        (_flip, "cut or damaged"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(b"<!DOCTYPE html><title>404</title>"), "cut or damaged"),
        (lambda path: path.write_bytes(b"cposix\nsystem\n"), "posix.system"),
        (lambda path: path.unlink(), "no such file"),
        (lambda path: (path.unlink(), path.mkdir()), "no such file"),
        (lambda path: path.write_bytes(safetensors.torch.save(STATE)[:-3]), "cut or damaged"),
        (lambda path: torch.save([STATE], path), "a list, not a state dict"),
        (lambda path: torch.save({"model": {}}, path), "nothing"),
        (lambda path: torch.save({"epoch": 3, "optimizer": {}}, path), "epoch is a int"),
        (lambda path: torch.save({3: torch.zeros(1)}, path), "no names"),
        (lambda path: torch.save({"w": torch.zeros(1).expand(1 << 40)}, path), "w is no plain tensor"),
        (lambda path: torch.save({"w": torch.zeros(3, device="meta")}, path), "w is no plain tensor"),
        (lambda path: torch.save({"w": torch.eye(3).to_sparse()}, path), "w is no plain tensor"),
    ],
)
def test_what_is_no_file_of_tensors_is_refused_in_one_line(tmp_path: Path, damage, says, recwarn):
    path = tmp_path / "weights.pth"
    torch.save(STATE, path)
    damage(path)
    with pytest.raises(InputError, match=says) as caught:
        read_tensors(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert len(recwarn) == 0


def test_torchscript_is_refused(tmp_path: Path, recwarn):
    path = tmp_path / "model.pt"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), path)
    before = len(recwarn)  # of torch.jit itself
    with pytest.raises(InputError, match="TorchScript"):
        read_tensors(str(path))
    assert len(recwarn) == before


# ------------------------------------------------------------------------------------------------ shapes


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"b.weight": None}, "b.weight is missing"),
        ({"b.weight": torch.zeros(3, 2)}, "b.weight is 3x2, but 2x3 in a thing"),
        ({"b.weight": torch.zeros(2, 3, dtype=torch.int64)}, "b.weight is torch.int64"),
        ({"b.weight": torch.zeros(2, 3, dtype=torch.complex64)}, "b.weight is torch.complex64"),
        ({"a.bias": torch.zeros(2)}, "a.bias is torch.float32"),
        ({"a.bias": torch.zeros(2, dtype=torch.int32)}, "a.bias is torch.int32"),
        ({"c": torch.tensor(torch.nan)}, "c holds NaN"),
        ({"d": torch.zeros(1)}, "d has no place in a thing"),
    ],
)
def test_the_first_key_that_does_not_match_is_named(change: dict[str, Any], says: str):
    found = {key: value for key, value in {**STATE, **change}.items() if value is not None}
    match(STATE, {**STATE, "b.weight": STATE["b.weight"].half()}, "file", "a thing")
    with pytest.raises(InputError, match=says):
        match(STATE, found, "file", "a thing")


def test_float32_copies_share_nothing():
    whole = torch.arange(12.0).view(3, 4)
    given = {"a": whole[:, :2], "b": whole, "c": whole.half(), "d": torch.tensor([1])}
    copied = as_float32(given)
    assert all(torch.equal(copied[key], given[key].to(copied[key].dtype)) for key in given)
    assert copied["c"].dtype == torch.float32 and copied["d"].dtype == torch.int64
    assert len({tensor.untyped_storage().data_ptr() for tensor in copied.values()}) == 4
    assert all(tensor.is_contiguous() for tensor in copied.values())


def test_sizes_go_by_what_most_tensors_say():
    tensors = {f"blocks.{i}.x": torch.zeros(4) for i in range(11)} | {"blocks.2.x": torch.zeros(5)}
    assert common_size(tensors, "file", [(".x", 0), (".y", 7)], prefix="blocks.") == 4
    assert count_numbered(tensors, "blocks.") == 11
    assert count_numbered(tensors, "other.") == 0
    with pytest.raises(InputError, match=r"file: heads\.x is missing"):
        common_size(tensors, "file", [(".x", 0)], prefix="heads")

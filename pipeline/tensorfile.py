"""Other people's checkpoints, read without running what is in them: torch's .pth and .pt, and safetensors.

The content of a file decides its format, not its name. Nothing here knows what the tensors mean.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import re
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline import storage
from pipeline.errors import InputError

WRAPPERS = ("model", "state_dict", "module")
"""Where training checkpoints keep the tensors, beside optimizer and arguments."""

_UNREADABLE_S = 20.0
"""Seconds for which a store that does not answer is asked again: a mistyped address should be known soon."""

_DATA_ONLY = (argparse.Namespace,)
"""Types beside torch's own that a file may hold: published checkpoints carry the arguments of their run."""


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """The tensors of one file, on the CPU, with the types they were stored in, and where they are from."""

    url: str
    """Without the query of a signed URL, which is a secret."""
    sha256: str
    """Of the whole file."""
    tensors: dict[str, Tensor]


def read_tensors(url: str, *, drop: Sequence[str] = (), wrappers: Sequence[str] = WRAPPERS) -> TensorFile:
    """The state dict in the file at a path or URL, without the keys that start with a prefix in `drop`.

    It may stand alone or below one of `wrappers`, and all keys may begin with `module.`.
    Raises InputError, in one line, for a file that cannot be read, that is cut or damaged, that holds
    anything but tensors, or that asks for a class or function by name: nothing of it is executed.
    """
    shown = url if storage.is_local(url) else url.split("?", 1)[0]
    with _local_copy(url, shown) as path:
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        state = _load(path, shown)
    for _ in range(len(wrappers)):
        inner = [state[name] for name in wrappers if isinstance(state, Mapping) and name in state]
        state = next((value for value in inner if isinstance(value, Mapping)), state)
    if not isinstance(state, Mapping) or not state:
        content = "nothing" if isinstance(state, Mapping) else f"a {type(state).__name__}"
        raise InputError(f"{shown} holds {content}, not a state dict; give a file of named tensors")
    if not all(isinstance(key, str) for key in state):
        raise InputError(f"{shown} has keys that are no names; give a state dict")
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    tensors = {key: value for key, value in state.items() if not key.startswith(tuple(drop))}
    for key, value in tensors.items():
        if not _is_plain(value):
            kind = "no plain" if isinstance(value, Tensor) else f"a {type(value).__name__}, not a"
            raise InputError(f"{shown}: {key} is {kind} tensor; give a state dict")
    return TensorFile(url=shown, sha256=sha256, tensors={key: t.detach() for key, t in tensors.items()})


def match(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], url: str, what: str) -> None:
    """InputError, naming the first key, unless `found` has exactly the keys and shapes of `expected`.

    Types too: finite floating point of 16 to 64 bits where that is expected, and the same integer type.
    `what` describes the model that the shapes were read as.
    """
    for key, wanted in expected.items():
        tensor = found.get(key)
        if tensor is None:
            raise InputError(f"{url}: {key} is missing, which {what} has; is the file complete?")
        if tensor.shape != wanted.shape:
            raise InputError(
                f"{url}: {key} is {shape_text(tensor)}, but {shape_text(wanted)} in {what}; "
                "check the file, or what it is said to be"
            )
        allowed = _FLOATS if wanted.is_floating_point() else (wanted.dtype,)
        if tensor.dtype not in allowed:
            raise InputError(f"{url}: {key} is {tensor.dtype}, but {wanted.dtype} in {what}; check the file")
        if not tensor.isfinite().all():
            raise InputError(
                f"{url}: {key} holds NaN or infinity; the file is damaged or its training failed"
            )
    for key in found:
        if key not in expected:
            raise InputError(f"{url}: {key} has no place in {what}; is it a checkpoint of another model?")


def as_float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that share no memory: floating point as float32, everything else in its type."""
    layout = torch.contiguous_format
    return {
        key: tensor.to(torch.float32, copy=True, memory_format=layout)
        if tensor.is_floating_point()
        else tensor.clone(memory_format=layout)
        for key, tensor in tensors.items()
    }


def common_size(
    tensors: Mapping[str, Tensor], url: str, places: Sequence[tuple[str, int]], *, prefix: str = ""
) -> int:
    """The size that most of these tensors have along these axes.

    places: endings of keys (below `prefix`), each with an axis. Going by most of them makes `match` name the
    one that differs. InputError, naming the first place, where there is none.
    """
    sizes = Counter(
        tensor.shape[axis]
        for ending, axis in places
        for key, tensor in tensors.items()
        if key.startswith(prefix) and key.endswith(ending) and tensor.ndim > axis
    )
    if not sizes:
        raise InputError(f"{url}: {prefix}{places[0][0]} is missing or misshapen; is the file complete?")
    return sizes.most_common(1)[0][0]


def count_numbered(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many different numbers follow `prefix`, such as 12 for `blocks.0.…` to `blocks.11.…`."""
    numbered = re.compile(re.escape(prefix) + r"(\d+)\.")
    return len({found[1] for key in tensors if (found := numbered.match(key))})


def shape_text(tensor: Tensor) -> str:
    """12x768, or `a scalar`."""
    return "x".join(str(size) for size in tensor.shape) or "a scalar"


# ------------------------------------------------------------------------------------------------ inside


@contextlib.contextmanager
def _local_copy(url: str, shown: str) -> Iterator[str]:
    """A local path to the file: its own, or a temporary copy's."""
    if storage.is_local(url):
        path = storage.absolute(url)
        try:
            if storage.stat(url) is None:
                raise InputError(f"cannot read {shown}: there is no such file; check the path")
            with open(path, "rb"):
                pass
        except OSError as error:
            raise InputError(f"cannot read {shown}: {error.strerror}; check the path") from None
        yield path
        return
    try:
        data = storage.read(url, retry_s=_UNREADABLE_S)
    except InputError:
        raise
    except Exception as error:  # every store's client has errors of its own
        reason = _one_line(f"{type(error).__name__}: {error}".replace(url, shown))
        raise InputError(f"cannot read {shown}: {reason}; check the URL and that it may be read") from None
    with tempfile.NamedTemporaryFile(prefix="checkpoint-") as file:
        file.write(data)
        file.flush()
        del data
        yield file.name


def _load(path: str, url: str) -> Any:
    """What the file holds: a dict of tensors, or whatever a torch file has at its top."""
    with open(path, "rb") as file:
        head = file.read(9)
    if not head:
        raise InputError(f"{url} is empty; copy or download it again")
    try:
        if head[8:] == b"{":
            return safetensors.torch.load_file(path)
        if head.startswith(b"PK"):
            with zipfile.ZipFile(path) as archive:  # torch does not look at the checksums
                if (damaged := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"{damaged} does not have its checksum")
        with (
            open(path, "rb") as file,  # given a name, torch would go by its ending
            torch.serialization.safe_globals(list(_DATA_ONLY)),
            warnings.catch_warnings(action="ignore"),
        ):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes fail anywhere in a parser
        if (refused := re.search(r"GLOBAL (\S+)", str(error))) is not None:
            raise InputError(
                f"{url} asks for {refused[1]}, which could run code; nothing was executed. Give a file of "
                "tensors alone: torch.save of a state dict, or safetensors"
            ) from None
        raise InputError(
            f"{url} is no checkpoint, or cut or damaged ({_first_sentence(error)}); "
            "give a .pth of a state dict or a .safetensors, and download or copy it again"
        ) from None


def _is_plain(value: Any) -> bool:
    """A dense CPU tensor whose memory is all there: no subclass, no view that repeats its storage."""
    return (
        type(value) in (Tensor, nn.Parameter)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and value.nbytes <= value.untyped_storage().nbytes()
    )


def _first_sentence(error: Exception) -> str:
    """What torch says went wrong, without its advice to load the file anyway."""
    text = str(error).split("WeightsUnpickler error:")[-1]
    return _one_line(text.split("Check the documentation")[0].split(". ")[0]) or type(error).__name__


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]

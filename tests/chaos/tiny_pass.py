"""A small token dataset, written in a fraction of a second and without torch: what the tests here kill.

    python tests/chaos/tiny_pass.py serve          forks a pass for every line of JSON on stdin
    python tests/chaos/tiny_pass.py drive JSON     one pass with the actors of a Ray cluster

The encoder is a stand-in (codes are the brightness of cells); crops, shards, receipts and manifest are real.
"""

from __future__ import annotations

import builtins
import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from pipeline import remote, storage
from pipeline.artifacts import sha256_hex
from pipeline.cluster.config import ClusterConfig
from pipeline.cluster.items import map_items
from shards.format.build import build_shard
from shards.format.manifest import Manifest, Recipe, TokenizerSpec
from shards.format.plan import Item, Plan, items
from shards.format.records import RejectedSample, StoredSample
from shards.pixels.views import ViewPolicy, decode_crop, encode_crop, render, view_at
from shards.writer import commit

SIDE = 16
GRID = (4, 4)
CODEBOOK_SIZE = 16
REASONS = ("truncated", "empty", "too_large")


def fake_codes(pixels: np.ndarray) -> np.ndarray:
    """uint16 [4, 4]: the mean of each 4 x 4 cell of uint8 [16, 16, 3], in 16 steps."""
    return (pixels.reshape(4, 4, 4, 4, 3).mean((1, 3, 4)) // 16).astype(np.uint16)


@dataclass(frozen=True, kw_only=True)
class TinyPass:
    """A pass over drawn images: `num_shards` ranges of `per_shard` ids; every fifth id is rejected."""

    num_shards: int = 2
    per_shard: int = 3
    views: int = 1
    seed: int = 0

    @property
    def policy(self) -> ViewPolicy:
        return ViewPolicy(image_size=SIDE, views_per_image=self.views, seed=self.seed)

    @property
    def plan(self) -> Plan:
        tokenizer = TokenizerSpec(fingerprint="f" * 64, grid=GRID, codebook_size=CODEBOOK_SIZE, image_size=8)
        return Plan(
            kind="tokens",
            inputs={"images": "a" * 64},
            recipe=Recipe(views={"seed": self.seed}),
            first_ids=tuple(self.per_shard * number for number in range(self.num_shards + 1)),
            views=self.views,
            class_names=("ant", "bee"),
            tokenizer=tokenizer,
        )

    def rejected_sources(self) -> dict[str, str]:
        """Source -> reason, of every image that no view of is written."""
        ids = range(1, self.num_shards * self.per_shard, 5)
        return {source_of(sample_id): REASONS[sample_id % 3] for sample_id in ids}

    def write_item(self, root: str, item: Item) -> None:
        """Crop, encode, decode what will be stored, tokenize that, build, commit."""
        samples: list[StoredSample] = []
        rejects: list[RejectedSample] = []
        for sample_id in range(item.first_id, item.end_id):
            source = source_of(sample_id)
            if sample_id % 5 == 1:
                reason = REASONS[sample_id % 3]
                rejects.append(
                    RejectedSample(sample_id=sample_id, source=source, reason=reason, message="drawn so")
                )
                continue
            rng = np.random.default_rng(sample_id)
            pixels = rng.integers(0, 256, (20 + sample_id % 5, 24, 3), np.uint8)
            view = view_at(self.policy, sample_id, item.view, height=pixels.shape[0], width=24)
            jpeg = encode_crop(render(pixels, view, "bicubic"), 95)
            samples.append(
                StoredSample(
                    sample_id=sample_id,
                    view=item.view,
                    image=jpeg,
                    extension="jpg",
                    source=source,
                    source_width=24,
                    source_height=pixels.shape[0],
                    label=sample_id % 2,
                    crop=view.crop,
                    hflip=view.hflip,
                    codes=fake_codes(decode_crop(jpeg)),
                )
            )
        built = build_shard(samples, rejects, grid=GRID, codebook_size=CODEBOOK_SIZE)
        commit.commit(root, self.plan, item, built)

    def write(self, root: str) -> Manifest:
        """The whole pass, going on from wherever an earlier one ended."""
        plan = commit.start(root, self.plan)
        for item in commit.pending(root, plan):
            self.write_item(root, item)
        return commit.finish(root, plan, decode_crop)


def source_of(sample_id: int) -> str:
    return f"s3://somewhere/images/{sample_id}.png"


def tree(root: str) -> dict[str, bytes]:
    """Every finished object below a folder or URL, by relative path."""
    return {file.url.removeprefix(root): storage.read(file.url) for file in storage.list_files(root)}


def check_receipts(root: str, plan: Plan) -> int:
    """How many items are committed, after checking that their objects are there with size and hash."""
    committed = 0
    for item in items(plan):
        url = commit.receipt_url(root, plan, item)
        if not storage.exists(url):
            continue
        committed += 1
        shard = commit.Receipt.from_bytes(storage.read(url)).shard.resolved(root)
        objects = [(shard.tar, shard.tar_sha256), (shard.index, shard.index_sha256)]
        if shard.rejects is not None:
            objects.append((shard.rejects, shard.rejects_sha256))
        for place, sha256 in objects:
            assert sha256_hex(storage.read(place)) == sha256, place
    return committed


# ------------------------------------------------------------------------------------- dying at a step

_EFFECTS = {"open", "write", "flush", "fsync", "link", "replace", "unlink", "mkdir", "close"}
_TRIFLES = {"is_local", "absolute", "join", "name", "<lambda>", "<genexpr>"}


class Steps:
    """Counts the steps of storage and commit in this thread, and dies by SIGKILL at the given one.

    A step is the begin or the end of one of their functions, of a system call that has an effect, and the
    middle of a file being written.
    """

    def __init__(self, fatal: int | None = None) -> None:
        self.count = 0
        self._fatal = fatal
        self._files = {storage.__file__, remote.__file__, commit.__file__}

    def step(self) -> None:
        self.count += 1
        if self.count == self._fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, frame: FrameType, event: str, argument: Any) -> None:
        """A profile function of the interpreter: called before and after every call."""
        code = frame.f_code
        if event in ("call", "return"):
            if code.co_filename in self._files and code.co_name not in _TRIFLES:
                self.step()
        elif getattr(argument, "__name__", "") in _EFFECTS and (
            code.co_filename in self._files or code.co_filename.endswith("pathlib.py")
        ):
            self.step()

    @contextmanager
    def counting(self) -> Iterator[None]:
        storage.open = self._open  # type: ignore[attr-defined]  # shadows the builtin in that module
        sys.setprofile(self.watch)
        try:
            yield
        finally:
            sys.setprofile(None)
            del storage.open  # type: ignore[attr-defined]

    def _open(self, path: Any, mode: str, opener: Any = None) -> Any:
        file = builtins.open(path, mode, opener=opener)  # noqa: SIM115
        return _TornFile(file, self) if mode == "wb" else file


class _TornFile:
    """A file whose writes have a middle."""

    def __init__(self, file: Any, steps: Steps) -> None:
        self._file = file
        self._steps = steps
        self.flush, self.fileno = file.flush, file.fileno

    def __enter__(self) -> _TornFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> None:
        half = len(data) // 2
        self._file.write(data[:half])
        self._file.flush()
        self._steps.step()
        self._file.write(data[half:])


# ------------------------------------------------------------------------------------- forked passes


class ForkedPasses:
    """Passes in processes of their own that cost a fork instead of a second of imports.

    They are forked from one helper process without threads: this one may have some.
    """

    def __init__(self, *, s3: bool = False) -> None:
        command = [sys.executable, os.path.abspath(__file__), "serve", *(["s3"] if s3 else [])]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        self._helper = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._ended: dict[int, int] = {}

    def start(self, root: str, tiny: TinyPass, *, fatal_step: int | None = None, at: float = 0.0) -> int:
        """Begin a pass, at time.monotonic() == `at` or now; its process id, which stays taken until wait."""
        job = {"root": root, "pass": vars(tiny), "fatal_step": fatal_step, "at": at}
        return self._say(job)["pid"]

    def wait(self, pid: int) -> int:
        """How it ended: exit status (2 = InputError), or minus the signal."""
        return self._say({"wait": pid})["status"]

    def run(self, root: str, tiny: TinyPass, *, fatal_step: int | None = None) -> int:
        return self.wait(self.start(root, tiny, fatal_step=fatal_step))

    def errors(self) -> list[str]:
        """The last lines of the passes that ended with an exception, since the last call."""
        return self._say({"errors": True})["errors"]

    def close(self) -> None:
        assert self._helper.stdin is not None
        self._helper.stdin.close()
        self._helper.wait(60)

    def _say(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self._helper.stdin is not None and self._helper.stdout is not None
        self._helper.stdin.write(json.dumps(job) + "\n")
        self._helper.stdin.flush()
        return json.loads(self._helper.stdout.readline())


def _serve() -> None:
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            _, status = os.waitpid(job["wait"], 0)
            answer: dict[str, Any] = {"status": os.waitstatus_to_exitcode(status)}
        elif "errors" in job:
            try:
                said = os.read(read_end, 1 << 16).decode()
            except BlockingIOError:
                said = ""
            answer = {"errors": said.splitlines()}
        else:
            pid = os.fork()
            if pid == 0:
                _forked(job, write_end)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


def _forked(job: dict[str, Any], errors: int) -> None:
    status = 1
    try:
        os.dup2(2, 1)  # stdout is the helper's voice
        steps = Steps(job["fatal_step"])
        while time.monotonic() < job["at"]:
            pass
        with steps.counting() if job["fatal_step"] is not None else _nothing():
            TinyPass(**job["pass"]).write(job["root"])
        status = 0
    except Exception as error:
        status = 2 if isinstance(error, storage.InputError) else 1
        os.write(errors, f"{type(error).__name__}: {' '.join(str(error).split())}\n".encode())
    finally:
        os._exit(status)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


# ------------------------------------------------------------------------------------- on Ray


@dataclass(frozen=True, kw_only=True)
class DriveConfig:
    """A pass on actors that say who they are in `pids` and take their time at every write."""

    root: str
    address: str
    pids: str
    tiny: TinyPass
    pause_s: float


class SlowWriter:
    """Runs in an actor: writes one item per call, with pauses in which it can be killed."""

    def __init__(self, config: DriveConfig) -> None:
        self._config = config
        rng = random.Random(os.getpid())

        def slowed(write: Callable[[str, bytes], Any]) -> Callable[[str, bytes], Any]:
            def paused(url: str, data: bytes) -> Any:
                time.sleep(rng.uniform(0, config.pause_s))
                return write(url, data)

            return paused

        storage.put, storage.create = slowed(storage.put), slowed(storage.create)
        Path(config.pids, str(os.getpid())).touch()

    def __call__(self, item: Item) -> str:
        if commit.receipt(self._config.root, self._config.tiny.plan, item) is None:
            self._config.tiny.write_item(self._config.root, item)
        return item.name


def drive(config: DriveConfig) -> None:
    """What precompute_shards does, with the stand-in encoder."""
    plan = commit.start(config.root, config.tiny.plan)
    cluster = ClusterConfig(num_workers=2, cpus_per_worker=1, use_gpu=False, address=config.address)
    todo: Iterable[Item] = list(commit.pending(config.root, plan))
    for _ in map_items(todo, functools.partial(SlowWriter, config), cluster):
        pass
    commit.finish(config.root, plan, decode_crop)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        # Before the forks: what is imported when it is first used would cost seconds in every one of them.
        import pandas  # noqa: F401
        import webdataset  # noqa: F401

        if "s3" in sys.argv[2:]:
            import s3fs  # noqa: F401
        _serve()
    else:
        given = json.loads(sys.argv[2])
        drive(DriveConfig(**{**given, "tiny": TinyPass(**given["tiny"])}))

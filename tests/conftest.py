"""What many tests stand on: a Ray head with its job server, an S3 server, small pictures, shared data."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

    from tests.chaos.proxy import FaultProxy

# Before anything imports torch: tiny tensors on a shared machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
S3_CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def pytest_configure(config: pytest.Config) -> None:
    """Nobody asks a hub for weights, and Ray is locked.

    Ray listens on every interface and runs what it is sent, so every cluster of the tests asks for a token.
    It is set here, for this process and all it starts; otherwise Ray would write one to the home folder.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What waits for a cluster comes first, so that other tests fill the gaps of the other test process."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)


@dataclass(frozen=True, kw_only=True)
class RayHead:
    """A running local cluster of one node."""

    address: str
    """For `ray.init` and `--cluster.address`: host:port."""
    job_server: str
    """For `JobSubmissionClient` and `--address`: http://host:port."""


@dataclass(frozen=True, kw_only=True)
class S3Server:
    """A running S3 look-alike on loopback; the AWS_* variables of this process point at it."""

    endpoint: str

    def new_bucket(self, name: str) -> str:
        """Creates an empty bucket and returns its URL."""
        request = urllib.request.Request(f"{self.endpoint}/{name}", method="PUT")
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert answer.status == 200
        return f"s3://{name}"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of reference values and real images beside the project, or a skip."""
    folder = Path(os.environ.get("BEIT2_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no reference data at {folder}; set BEIT2_SHARED to the folder that holds it")
    return folder


@pytest.fixture(scope="session")
def published_state(shared_dir: Path) -> Callable[..., dict[str, torch.Tensor]]:
    """`published_state("vqkd_…")`: random tensors with the keys and types of a published file.

    Its shapes too, except that with `shrink` widths, code numbers and the teacher's dimension are 32 times
    smaller: the same file of a model that fits into a test.
    """
    import json

    import torch

    def make(inventory: str, *, shrink: bool = True, seed: int = 0) -> dict[str, torch.Tensor]:
        path = shared_dir / "reference" / f"keys_{inventory}.json"
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for key, entry in json.loads(path.read_text())["keys"].items():
            shape = entry["shape"]
            if shrink:
                shape = [size // 32 if size >= 512 and size % 32 == 0 else size for size in shape]
            if entry["dtype"] == "float32":
                tensors[key] = torch.rand(shape, generator=generator) + 0.1
            else:
                tensors[key] = torch.randint(0, 9, shape, generator=generator)
        return tensors

    return make


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """One moto server per test session, in a process of its own."""
    port = _free_port()
    endpoint = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _server(command, endpoint, dict(os.environ)), pytest.MonkeyPatch.context() as patch:
        for key, value in {**S3_CREDENTIALS, "AWS_ENDPOINT_URL": endpoint}.items():
            patch.setenv(key, value)
        yield S3Server(endpoint=endpoint)


@pytest.fixture
def s3_url(s3_server: S3Server, tmp_path: Path) -> str:
    """The URL of a bucket nobody used before."""
    # tmp_path numbers the test, so the name is unique in the session; buckets allow [a-z0-9-] only.
    return s3_server.new_bucket("test-" + "".join(c for c in tmp_path.name.lower() if c.isalnum())[-50:])


@pytest.fixture
def fault_proxy(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy that this test's requests to the S3 server go through, without faults until some are set.

    Storage has little patience meanwhile: 2 s for an answer, 20 s in all.
    """
    from pipeline import remote
    from tests.chaos.proxy import FaultProxy

    with FaultProxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        monkeypatch.setattr(remote, "_clients", {})
        patience = remote.RetryPolicy(
            connect_s=2, answer_s=2, request_s=10, retry_s=20, first_wait_s=0.02, longest_wait_s=0.2
        )
        monkeypatch.setattr(remote, "RETRIES", patience)
        yield proxy


@pytest.fixture(scope="session")
def ray_head(s3_server: S3Server) -> Iterator[RayHead]:
    """One Ray head with its job server per test session, on free ports and a temporary folder of its own.

    Workers inherit the environment of `ray start`: there, the interpreter of the tests comes first on PATH
    and the S3 server is known. SIGTERM to the one process ends the whole cluster.
    """
    gcs, dashboard, agent, client = (_free_port() for _ in range(4))
    binaries = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "PATH": f"{binaries}:{os.environ.get('PATH', '')}",
        # Ray's own actors outlive a training run, and SIGTERM would wait 30 s for them.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
    for key in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        environment.pop(key, None)
    # A short folder: sockets below it have 107 bytes for their whole path.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [
            f"{binaries}/ray", "start", "--head", "--block", "--disable-usage-stats",
            f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
            f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}",
            "--min-worker-port=0", "--max-worker-port=0",  # any free one: other clusters share the default
            f"--temp-dir={folder}", "--num-cpus=4", f"--object-store-memory={256 << 20}",
        ]  # fmt: skip
        job_server = f"http://127.0.0.1:{dashboard}"
        with _server(command, f"{job_server}/api/version", environment, cwd=folder):
            yield RayHead(address=f"127.0.0.1:{gcs}", job_server=job_server)
            # A driver that is still connected when its cluster goes is ended by Ray, and the tests with it.
            import ray

            ray.shutdown()


@pytest.fixture
def make_image_folder(tmp_path: Path) -> Callable[..., Path]:
    """`make_image_folder(name, classes=3, per_class=8, size=48)`: a folder of small pictures per class.

    Each class has its own colour and stripes, so that there is something to learn; `classes=0` puts
    `per_class` pictures into the folder itself, without labels. Formats alternate between JPEG and PNG.
    """
    import numpy as np
    from PIL import Image

    def make(name: str = "pictures", *, classes: int = 3, per_class: int = 8, size: int = 48) -> Path:
        root = tmp_path / name
        rng = np.random.default_rng(0)
        for label in range(max(classes, 1)):
            folder = root / f"class-{label}" if classes else root
            folder.mkdir(parents=True, exist_ok=True)
            y, x = np.mgrid[:size, :size]
            stripes = ((x * (1 + label) + y * (3 - label % 3)) // 6 % 2).astype(float)
            for i in range(per_class):
                colour = np.roll(np.array([200.0, 90.0, 40.0]), label) * rng.uniform(0.7, 1.2)
                pixels = stripes[..., None] * colour + rng.normal(40, 15, (size, size, 3))
                picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
                picture.save(folder / f"{i:03d}.{'jpg' if i % 2 else 'png'}")
        return root

    return make


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def _server(
    command: list[str], url: str, environment: dict[str, str], cwd: str | None = None
) -> Iterator[None]:
    """A process that answers at `url`; ended by SIGTERM, also when the tests are killed."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, env=environment, cwd=cwd, stdout=log, stderr=log, preexec_fn=_end_with_parent
        )
        try:
            deadline = time.monotonic() + 120
            while not _answers(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(
                        f"{url} does not answer:\n{log.read().decode(errors='replace')[-4000:]}"
                    )
                time.sleep(0.2)
            yield
        finally:
            offspring = _descendants(process.pid)
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            # A Ray Train controller outlives its cluster: whatever the process started ends with it.
            for pid, started in offspring.items():
                if started != "gone" and _started(pid) == started:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)


def _descendants(root: int) -> dict[int, str]:
    """Processes below `root` (Linux), each with its start time: numbers are used again."""
    parents = {}
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError):
            stat = Path("/proc", entry, "stat").read_text().rsplit(")", 1)[1].split()
            parents[int(entry)] = int(stat[1])
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: _started(pid) for pid in found - {root}}


def _started(pid: int) -> str:
    try:
        return Path("/proc", str(pid), "stat").read_text().rsplit(")", 1)[1].split()[19]
    except OSError:
        return "gone"


def _end_with_parent() -> None:
    """In a child: SIGTERM for it when its parent dies (Linux)."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError:
        return True  # such as 401: somebody is there
    except OSError:
        return False
    return True

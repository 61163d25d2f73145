"""Runs jobs on a Ray cluster through its job server, and follows them to their exit status."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import ray.exceptions
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package
from ray.job_submission import JobStatus, JobSubmissionClient

from jobs.stages.stage import Stage
from pipeline import artifacts, storage
from pipeline.errors import InputError

UPLOAD_LIMIT_BYTES = 100 << 20
"""What Ray's job server accepts as a working directory; it answers 413 to more."""
POLL_S = 1.0


class JobServer:
    """A cluster's job server, and the working directory that travels with every job submitted through it."""

    def __init__(self, client: JobSubmissionClient, package: Path) -> None:
        self._client = client
        self._package = package
        self._files = set(_file_sizes(package))

    @classmethod
    @contextlib.contextmanager
    def connect(cls, address: str, working_dir: str = ".") -> Iterator[JobServer]:
        """Reach the job server and pack the working directory; its size is printed before anything is sent.

        The package is what `ray job submit --working-dir .` would send: all but .git, .venv and what
        .gitignore and .rayignore name. InputError when it is over Ray's limit or nobody answers.
        """
        for variable in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
            if os.environ.get(variable, address) != address:
                raise InputError(
                    f"{variable} is set and Ray puts it before --address; unset it, or make them equal"
                )
        try:
            client = JobSubmissionClient(address)
        except ray.exceptions.AuthenticationError:
            raise InputError(
                f"the job server at {address} asks for a token; set RAY_AUTH_MODE=token, and the token in "
                "RAY_AUTH_TOKEN or ~/.ray/auth_token"
            ) from None
        except ConnectionError:
            raise InputError(
                f"no job server answers at {address}; check --address (http://host:8265)"
            ) from None
        logger = logging.getLogger(__name__)
        logger.setLevel(logging.WARNING)  # Ray's warnings, without a line for every ignore file
        with tempfile.TemporaryDirectory(prefix="working-dir-") as folder:
            package = Path(folder, "working_dir.zip")
            # Private, but the public interface packs and sends in one step, and the size is checked between.
            excludes = get_runtime_env_default_excludes()
            create_package(working_dir, package, include_gitignore=True, excludes=excludes, logger=logger)
            _check_size(working_dir, package)
            yield cls(client, package)

    def run(self, stage: Stage, argv: Sequence[str], on_line: Callable[[str], None]) -> int:
        """Run a stage's job on the cluster and return its exit status.

        A job of the same command line that still runs there, because its submitter went away, is followed
        instead of being started twice.
        """
        entrypoint = shlex.join(["python", "-m", f"jobs.{stage.job}", *argv])
        identity = f"{stage.job}-{artifacts.fingerprint(entrypoint)[:8]}"
        known = {job.submission_id: job.status for job in self._client.list_jobs()}
        attempt = 0
        while (status := known.get(job_id := f"{identity}-{attempt}")) is not None and status.is_terminal():
            attempt += 1
        if status is None:
            self._client.submit_job(
                entrypoint=entrypoint,
                submission_id=job_id,
                # No env_vars, and above all no credentials: dashboards show a job's runtime environment.
                runtime_env={"working_dir": str(self._package)},
                metadata={"stage": stage.job},
            )
            print(f"{job_id}: submitted", flush=True)
        else:
            print(f"{job_id}: still running, started by an earlier submission; following it", flush=True)
        try:
            return self._follow(job_id, _without_preamble(job_id, on_line))
        except (KeyboardInterrupt, SystemExit):
            print(
                f"{job_id}: goes on; the same command follows it again, `ray job stop {job_id}` ends it",
                flush=True,
            )
            raise

    def _follow(self, job_id: str, on_line: Callable[[str], None]) -> int:
        """Hand over what the job prints until it ends; its exit status."""
        num_lines = 0

        async def tail() -> None:
            nonlocal num_lines
            seen, rest = 0, ""
            # A new connection starts at the log's beginning: lines handed over before are passed by.
            async for chunk in self._client.tail_job_logs(job_id):
                *lines, rest = (rest + chunk).split("\n")
                for line in lines:
                    seen += 1
                    if seen > num_lines:
                        num_lines = seen
                        on_line(line)
            if rest and seen + 1 > num_lines:
                num_lines = seen + 1
                on_line(rest)

        while True:
            try:
                asyncio.run(tail())
            except (RuntimeError, OSError) as error:
                print(f"{job_id}: its log broke off ({error}); reading on", flush=True)
            info = self._client.get_job_info(job_id)
            if info.status.is_terminal():
                break
            time.sleep(POLL_S)
        # The message goes on with the end of the log, which was handed over already.
        print(f"{job_id}: {info.status.value}: {(info.message or 'no message').splitlines()[0]}", flush=True)
        return 0 if info.status == JobStatus.SUCCEEDED else info.driver_exit_code or 1

    def check_travels(self, config: str) -> None:
        """InputError for a configuration file that the jobs would not find."""
        if storage.is_local(config) and os.path.normpath(config) not in self._files:
            raise InputError(
                f"{config} does not travel with a job; name a URL, or a path relative to the working folder, "
                "below it, that neither .gitignore nor .rayignore covers"
            )


def _without_preamble(job_id: str, on_line: Callable[[str], None]) -> Callable[[str], None]:
    """Hands on the job's own lines; Ray's, before its entrypoint starts, are only printed."""
    started = False

    def line(text: str) -> None:
        nonlocal started
        if started:
            on_line(text)
        else:
            print(f"{job_id}: {text}", flush=True)
            started = text.startswith("Running entrypoint for job ")

    return line


def _check_size(working_dir: str, package: Path) -> None:
    """Print how large the package is; InputError, with its largest entries, when it is over Ray's limit."""
    size, limit = package.stat().st_size, f"{UPLOAD_LIMIT_BYTES >> 20} MiB"
    what = f"the working directory, {os.path.abspath(working_dir)}, is {size / 2**20:.1f} MiB to upload"
    if size <= UPLOAD_LIMIT_BYTES:
        print(f"{what} (Ray takes {limit})", flush=True)
        return
    sizes = Counter[str]()
    for name, num_bytes in _file_sizes(package).items():
        sizes[name.split("/", 1)[0]] += num_bytes
    largest = ", ".join(f"{top} ({num / 2**20:.1f} MiB)" for top, num in sizes.most_common(3))
    raise InputError(
        f"{what}, and Ray takes {limit}; name in .rayignore what the jobs do not need, first of all {largest}"
    )


def _file_sizes(package: Path) -> dict[str, int]:
    with zipfile.ZipFile(package) as archive:
        return {entry.filename: entry.file_size for entry in archive.infolist()}

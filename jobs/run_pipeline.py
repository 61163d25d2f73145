"""Runs every stage in order, on this machine or as jobs of a Ray cluster, and leaves out what is finished.

python -m jobs.run_pipeline --config jobs/configs/quickstart/pipeline.yaml [--images FOLDER]
python -m jobs.run_pipeline --config FILE --output s3://bucket/run --address http://head:8265
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline import artifacts, storage
from pipeline.config import run_job
from pipeline.errors import InputError
from pipeline.training import metrics

RECORD_FILE = "pipeline.json"
RECORD_FORMAT = 1
LOG_TAIL_LINES = 25


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage: the settings it runs with. Where it reads and writes is the pipeline's business."""

    config: str | None = None
    """YAML file or URL of the stage's job; null runs the job's defaults."""

    overrides: dict[str, Any] = field(default_factory=dict)
    """Keys of that job set on top of its file, such as {views.views_per_image: 2}."""


@dataclass(frozen=True, kw_only=True)
class ClusterOverride:
    """What every stage is told about the cluster, on top of its own file."""

    num_workers: int | None = None
    """Worker processes of every stage; 0 runs in process, without Ray; null leaves it to the stage's file."""


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """From a folder of images to a pretrained backbone and a report, stage by stage.

    A stage is skipped while its settings, its inputs and its artifact are those of its last run, as recorded
    in pipeline.json. A failed stage ends the run, and the same command goes on from there.
    """

    output: str
    """Folder or URL for everything: image_shards, tokenizer, token_shards, backbone, probe, report, logs."""

    images: str | None = None
    """Your own images, as prepare_images reads them; null draws a labelled set."""

    val_fraction: float = 0.0
    """Part of the images held out for validation and the probe; 0 keeps one dataset, without a probe."""

    online: bool = False
    """Pretrain from image shards and tokenizer, without writing token shards."""

    address: str | None = None
    """Job server of a Ray cluster (http://host:8265) to which stages are submitted; null runs them here."""

    cluster: ClusterOverride = field(default_factory=ClusterOverride)
    """Cluster settings of every stage."""

    draw_images: StageConfig = field(default_factory=StageConfig)
    """The pictures, where there are no images of your own."""

    prepare_images: StageConfig = field(default_factory=StageConfig)
    """Images to image shards."""

    train_tokenizer: StageConfig = field(default_factory=StageConfig)
    """Image shards to a tokenizer."""

    precompute_shards: StageConfig = field(default_factory=StageConfig)
    """Image shards and tokenizer to token shards."""

    pretrain_mim: StageConfig = field(default_factory=StageConfig)
    """Token shards to a backbone."""

    probe_linear: StageConfig = field(default_factory=StageConfig)
    """What a linear classifier makes of the backbone's features."""

    write_report: StageConfig = field(default_factory=StageConfig)
    """The page with curves, codes and predictions."""

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise InputError(
                f"val_fraction is {self.val_fraction}; give 0 for one dataset, or a part below 1"
            )
        if self.address is not None and not self.address.startswith(("http://", "https://")):
            raise InputError(f"address {self.address!r} is no job server; give http://host:8265")


# ------------------------------------------------------------------------------------------------ stages


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One job with its places filled in."""

    name: str
    """The job is `python -m jobs.<name>`."""
    flags: dict[str, str]
    """Where it reads and writes, and what else the pipeline decides."""
    reads: tuple[str, ...]
    """Headers of the artifacts it reads."""
    writes: tuple[str, ...]
    """Headers that exist when, and only when, it is finished."""
    settings: StageConfig
    uses_cluster: bool = True
    echoes: bool = True
    """False keeps its output for the end: the report's is the summary."""


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the artifacts of a run lie."""

    root: str
    images: str
    split: bool

    def at(self, *parts: str) -> str:
        """A place below the output."""
        return storage.join(self.root, *parts)

    @property
    def train(self) -> str:
        """Image shards to train on."""
        return self.at("image_shards", "train") if self.split else self.at("image_shards")

    @property
    def val(self) -> str:
        """Image shards held out; only there when the images are split."""
        return self.at("image_shards", "val")

    @property
    def image_manifests(self) -> tuple[str, ...]:
        """What prepare_images leaves behind."""
        folders = (self.train, self.val) if self.split else (self.train,)
        return tuple(storage.join(folder, "manifest.json") for folder in folders)

    @property
    def tokenizer_header(self) -> str:
        """What train_tokenizer leaves behind."""
        return self.at("tokenizer", "tokenizer.json")

    @property
    def token_manifest(self) -> str:
        """What precompute_shards leaves behind."""
        return self.at("token_shards", "manifest.json")

    @property
    def backbone_header(self) -> str:
        """What pretrain_mim leaves behind."""
        return self.at("backbone", "backbone.json")

    @property
    def report(self) -> str:
        """What write_report leaves behind."""
        return self.at("report.html")


def places_of(config: PipelineConfig) -> Places:
    """The places of a run, under names that hold in every process."""
    root = storage.absolute(config.output)
    images = storage.absolute(config.images) if config.images else storage.join(root, "images", "images")
    return Places(root=root, images=images, split=config.val_fraction > 0)


def stages(config: PipelineConfig) -> list[Stage]:
    """The stages of a run in order, without those that this configuration leaves out."""
    at = places_of(config)
    drawn = (at.at("images", "drawing.json"),) if config.images is None else ()
    train_manifest = storage.join(at.train, "manifest.json")
    draw = Stage(
        name="draw_images",
        flags={"output": at.at("images")},
        reads=(),
        writes=drawn,
        settings=config.draw_images,
        uses_cluster=False,
    )
    prepare = Stage(
        name="prepare_images",
        flags={
            "source": at.images,
            "output": at.at("image_shards"),
            # Said even when it is 0: the stage's own file may split.
            "val_fraction": str(config.val_fraction),
        },
        reads=drawn,
        writes=at.image_manifests,
        settings=config.prepare_images,
    )
    tokenizer = Stage(
        name="train_tokenizer",
        flags={"images": at.train, "output": at.at("tokenizer")}
        | ({"val_images": at.val} if at.split else {}),
        reads=at.image_manifests,
        writes=(at.tokenizer_header,),
        settings=config.train_tokenizer,
    )
    precompute = Stage(
        name="precompute_shards",
        flags={"images": at.train, "tokenizer": at.at("tokenizer"), "output": at.at("token_shards")},
        reads=(train_manifest, at.tokenizer_header),
        writes=(at.token_manifest,),
        settings=config.precompute_shards,
    )
    pretrain = Stage(
        name="pretrain_mim",
        flags={"output": at.at("backbone")}
        | (
            {"images": at.train, "tokenizer": at.at("tokenizer")}
            if config.online
            else {"shards": at.at("token_shards")}
        ),
        reads=(train_manifest, at.tokenizer_header) if config.online else (at.token_manifest,),
        writes=(at.backbone_header,),
        settings=config.pretrain_mim,
    )
    probe = Stage(
        name="probe_linear",
        flags={"backbone": at.at("backbone"), "train": at.train, "val": at.val, "output": at.at("probe")},
        reads=(at.backbone_header, *at.image_manifests),
        writes=(at.at("probe", "probe.json"),),
        settings=config.probe_linear,
    )
    left_out = left_out_stages(config)
    found = [draw, prepare, tokenizer, precompute, pretrain, probe]
    found = [stage for stage in found if stage.name not in left_out]
    shown = {
        "images": prepare,
        "tokenizer": tokenizer,
        "shards": precompute,
        "backbone": pretrain,
        "probe": probe,
    }
    report = Stage(
        name="write_report",
        flags={"output": at.report, "pipeline_summary": at.at(RECORD_FILE)}
        | {flag: stage.flags["output"] for flag, stage in shown.items() if stage in found},
        reads=tuple(url for stage in found for url in stage.writes),
        writes=(at.report,),
        settings=config.write_report,
        uses_cluster=False,
        echoes=False,
    )
    return [*found, report]


def left_out_stages(config: PipelineConfig) -> dict[str, str]:
    """Stages that this configuration leaves out, and why."""
    reasons: dict[str, str] = {}
    if config.images is not None:
        reasons["draw_images"] = f"the images are those of {config.images}"
    if config.online:
        reasons["precompute_shards"] = "pretraining tokenizes online"
    if config.val_fraction == 0:
        reasons["probe_linear"] = "no images are held out; give --val_fraction"
    return reasons


def command_line(stage: Stage, cluster: ClusterOverride) -> list[str]:
    """The arguments of a stage's job: its file, its places, and what overrides them, last."""
    argv = ["--config", stage.settings.config] if stage.settings.config else []
    for key, value in stage.flags.items():
        argv += [f"--{key}", value]
    if stage.uses_cluster and cluster.num_workers is not None:
        argv += ["--cluster.num_workers", str(cluster.num_workers)]
    return argv + [f"--{key}={value}" for key, value in _flat(stage.settings.overrides)]


def _flat(overrides: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """`key.inner` and its value as a YAML scalar or JSON, in order."""
    for key, value in overrides.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


# ------------------------------------------------------------------------------------------------ record


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """What is known of a stage's last run."""

    settings: str
    """Fingerprint of command line and configuration file."""
    inputs: str
    """Fingerprint of the headers it read."""
    artifact: str | None
    """Fingerprint of the headers it wrote; null when it failed."""
    finished: bool
    seconds: float
    """Wall time of all its attempts with these settings and inputs."""
    steps: int | None
    """The last step in its metrics, for a stage that trains."""


def read_record(output: str) -> dict[str, StageRecord]:
    """The stages' last runs by name; empty for a new output."""
    url = storage.join(output, RECORD_FILE)
    try:
        data = json.loads(storage.read(url))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise InputError(
            f"{url} is not JSON ({error}); remove it, and finished stages find that out themselves"
        ) from None
    if not isinstance(data, dict) or data.get("format") != RECORD_FORMAT:
        raise InputError(f"{url} is no record of a pipeline of this version; choose another --output")
    return {name: StageRecord(**entry) for name, entry in data["stages"].items()}


def write_record(output: str, record: Mapping[str, StageRecord], left_out: Mapping[str, str]) -> None:
    """Publish the record."""
    data = {
        "format": RECORD_FORMAT,
        "stages": {name: asdict(entry) for name, entry in record.items()},
        "left_out": dict(left_out),
    }
    storage.put(storage.join(output, RECORD_FILE), json.dumps(data, indent=2).encode() + b"\n")


def settings_fingerprint(stage: Stage, argv: list[str]) -> str:
    """Fingerprint of everything the stage is told: its command line, and what its configuration file says."""
    file_hash = None
    if stage.settings.config is not None:
        try:
            file_hash = artifacts.sha256_hex(storage.read(stage.settings.config))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise InputError(
                f"{stage.name}.config: there is no file {stage.settings.config}; name a YAML file or a URL"
            ) from None
    return artifacts.fingerprint({"argv": argv, "file": file_hash})


def artifact_fingerprint(urls: tuple[str, ...]) -> str | None:
    """Fingerprint of headers, which name all else by size and hash; None unless every one is there."""
    hashes = []
    for url in urls:
        try:
            hashes.append(artifacts.sha256_hex(storage.read(url)))
        except (FileNotFoundError, NotADirectoryError):
            return None
    return artifacts.fingerprint(hashes)


def inputs_fingerprint(stage: Stage, images: str) -> str:
    """Fingerprint of what the stage reads; of a local folder of images, the names, sizes and times.

    A remote folder of images counts by its URL alone, because listing millions of objects takes minutes:
    prepare_images froze its listing in the first run, and another one belongs into another output.
    """
    found: list[Any] = [artifact_fingerprint((url,)) for url in stage.reads]
    if stage.name == "prepare_images" and not stage.reads and storage.is_local(images):
        found += [[os.fsencode(file.url).hex(), file.bytes, file.version] for file in _local_files(images)]
    return artifacts.fingerprint(found)


def _local_files(images: str) -> list[storage.FileStat]:
    """The files of a folder, a single file, or, for a pattern of files, those of the folder it is in."""
    if (file := storage.stat(images)) is not None:
        return [file]
    folder = images if os.path.isdir(images) else os.path.dirname(re.split(r"[*?\[{]", images)[0])
    return list(storage.list_files(folder))


# ------------------------------------------------------------------------------------------------ running


def log_url(output: str, name: str) -> str:
    """Where a stage's output of its last attempt is kept."""
    return storage.join(output, "logs", f"{name}.log")


class StageLog:
    """The output of a stage: printed behind its name, kept in `<output>/logs/`, its end at hand."""

    def __init__(self, url: str, name: str, *, echo: bool = True) -> None:
        self.url = url
        self.tail: deque[str] = deque(maxlen=LOG_TAIL_LINES)
        self._name, self._echo = name, echo
        self._path = self.url
        if storage.is_local(self.url):
            os.makedirs(os.path.dirname(self.url), exist_ok=True)
        else:
            handle, self._path = tempfile.mkstemp(prefix=f"{name}-", suffix=".log")
            os.close(handle)
        self._file = open(self._path, "w", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed in close()

    def line(self, text: str) -> None:
        """Take one line of output."""
        self.tail.append(text)
        if self._echo:
            print(f"[{self._name}] {text}", flush=True)
        self._file.write(f"{text}\n")
        self._file.flush()

    def close(self) -> None:
        """Publish the log where it could not be written in place."""
        self._file.close()
        if self._path != self.url:
            with open(self._path, "rb") as file:
                storage.put(self.url, file.read())
            os.unlink(self._path)


RunStage = Callable[[Stage, list[str], Callable[[str], None]], int]
"""Runs a stage with these arguments, hands over its output line by line, and returns its exit status."""


def run_here(stage: Stage, argv: list[str], on_line: Callable[[str], None]) -> int:
    """Run a stage as a process of its own, so that its memory is gone when it ends."""
    # Ray colours the lines of its workers for terminals; here they go through a pipe into a log.
    environment = {"RAY_COLOR_PREFIX": "0", **os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", f"jobs.{stage.name}", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=environment,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            on_line(line.rstrip("\n"))
        return process.wait()
    except BaseException:
        # Ctrl-C reaches the stage by itself; a SIGTERM to this process only does not.
        process.terminate()
        process.wait()
        raise


def run_stages(config: PipelineConfig, run_stage: RunStage) -> None:
    """Run what is not finished, in order; SystemExit with the stage's status (1 or 2) where one fails."""
    at = places_of(config)
    record = read_record(at.root)
    left_out = left_out_stages(config)
    for name, reason in left_out.items():
        print(f"{name}: left out: {reason}", flush=True)
    planned = [(stage, command_line(stage, config.cluster)) for stage in stages(config)]
    # All files are read before the first stage starts: a misspelt one shows now, not in an hour.
    fingerprints = {stage.name: settings_fingerprint(stage, argv) for stage, argv in planned}

    for stage, argv in planned:
        settings, inputs = fingerprints[stage.name], inputs_fingerprint(stage, at.images)
        last = record.get(stage.name)
        unchanged = last is not None and (last.settings, last.inputs) == (settings, inputs)
        if (
            last is not None
            and unchanged
            and last.finished
            and last.artifact == artifact_fingerprint(stage.writes)
        ):
            print(f"{stage.name}: finished before, with the same settings and inputs; skipped", flush=True)
            continue

        print(f"{stage.name}: python -m jobs.{stage.name} {' '.join(argv)}", flush=True)
        log = StageLog(log_url(at.root, stage.name), stage.name, echo=stage.echoes)
        start = time.monotonic()
        try:
            status = run_stage(stage, argv, log.line)
        finally:
            log.close()
        seconds = time.monotonic() - start + (last.seconds if last is not None and unchanged else 0.0)
        after = artifact_fingerprint(stage.writes)
        finished = status == 0 and after is not None
        record[stage.name] = StageRecord(
            settings=settings,
            inputs=inputs,
            artifact=after,
            finished=finished,
            seconds=round(seconds, 1),
            steps=_last_step(stage),
        )
        write_record(at.root, record, left_out)
        if not finished:
            print(failure(stage, status, log), file=sys.stderr, flush=True)
            sys.exit(2 if status == 2 else 1)
        print(f"{stage.name}: finished in {metrics.duration(seconds)}", flush=True)
    print_summary(at.root)


def print_summary(output: str) -> None:
    """Print what the report's job said: the summary table and the page's place.

    It is read back from the log, because making it anew takes the models and ten seconds of imports.
    """
    with contextlib.suppress(FileNotFoundError):
        print(
            "\n" + storage.read(log_url(output, "write_report")).decode(errors="replace").strip(), flush=True
        )


def failure(stage: Stage, status: int, log: StageLog) -> str:
    """The end of a failed stage's log, and a line that says which one failed, and how."""
    if status == 0:
        what = f"ended without writing {' and '.join(stage.writes)}"
    elif status < 0:
        memory = ", as when memory runs out" if -status == signal.SIGKILL else ""
        what = f"was ended by signal {signal.Signals(-status).name}{memory}"
    else:
        what = f"failed with exit status {status}"
    tail = "\n".join(f"  | {line}" for line in log.tail)
    return (
        f"{tail}\nerror: stage {stage.name} {what}; above is the end of its log, {log.url}; once mended, the "
        "same command goes on from here"
    )


def _last_step(stage: Stage) -> int | None:
    """The last step in the stage's metrics."""
    steps = [int(entry["step"]) for entry in metrics.read_metrics(stage.flags["output"]) if "step" in entry]
    return max(steps, default=None)


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Turns SIGTERM into an exception, so that the running stage is ended too."""

    def end(signum: int, frame: object) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def stage_runner(
    address: str | None, configs: Iterable[str], places: Mapping[str, str]
) -> Iterator[RunStage]:
    """Runs stages here, or as jobs of the cluster whose job server is at `address`.

    configs: the stages' files, which must travel with a job; places: what the user named, by its flag.
    """
    if address is None:
        yield run_here
        return
    # Imported here: it brings Ray, which a run on this machine does not need in this process.
    from jobs.stages.submission import JobServer

    for what, url in places.items():
        if storage.is_local(url):
            print(f"note: {what} {url} is no URL: every node of the cluster has to see it there")
    with JobServer.connect(address) as server:
        for config in configs:
            server.check_travels(config)
        yield lambda stage, argv, on_line: server.run(stage.name, argv, on_line)


def main(config: PipelineConfig) -> None:
    """Run all stages and show what came out."""
    at = places_of(config)
    files = [stage.settings.config for stage in stages(config) if stage.settings.config is not None]
    places = {"output": at.root, "images": at.images}
    with ended_by_sigterm(), stage_runner(config.address, files, places) as run_stage:
        run_stages(config, run_stage)


if __name__ == "__main__":
    run_job(main, PipelineConfig)

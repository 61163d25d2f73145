"""The cluster files of the docs: against KubeRay's schema and Ray's, and against the project they run."""

from __future__ import annotations

import ast
import copy
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "docs" / "cluster"
SCHEMA = json.loads(Path(__file__).with_name("kuberay_schema.json").read_text())
KUBERAY_FILES = ["raycluster.yaml", "rayjob.yaml"]


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / name).read_text())


def errors(document: dict[str, Any]) -> list[str]:
    """What the schema of the document's kind says."""
    schema = {"$defs": SCHEMA["$defs"], **SCHEMA["$defs"][document["kind"]]}
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(document)]


def cluster_spec(document: dict[str, Any]) -> dict[str, Any]:
    return document["spec"] if document["kind"] == "RayCluster" else document["spec"]["rayClusterSpec"]


def groups(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Head and worker groups."""
    spec = cluster_spec(document)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


@pytest.mark.parametrize("name", KUBERAY_FILES)
def test_the_file_fits_its_schema(name: str) -> None:
    assert errors(load(name)) == []


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every mapping of a document lies."""
    if isinstance(value, dict):
        yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*at, key))


FREE_FORM = {"rayStartParams", "nodeSelector", "requests", "limits", "labels", "annotations"}


@pytest.mark.parametrize("name", KUBERAY_FILES)
def test_a_misspelt_key_anywhere_is_seen(name: str) -> None:
    """The schema leaves no hole: an unknown key is an error at every depth, but where keys are the user's."""
    document = load(name)
    for path in paths(document):
        if path and path[-1] in FREE_FORM:
            continue
        wrong = copy.deepcopy(document)
        place = wrong
        for key in path:
            place = place[key]
        place["mispelt"] = {}
        assert errors(wrong) != [], path


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "workerGroupSpecs", 0, "replicas"), "many"),
        (("spec", "workerGroupSpecs", 0, "rayStartParams", "object-store-memory"), 10**9),
        (
            ("spec", "headGroupSpec", "template", "spec", "containers", 0, "resources", "limits", "memory"),
            "16 GB",
        ),
        (("spec", "headGroupSpec", "template", "spec", "containers"), []),
        (("spec", "autoscalerOptions", "upscalingMode"), "Fast"),
        (("kind",), "RayJob"),
    ],
)
def test_a_wrong_value_is_seen(path: tuple[Any, ...], value: Any) -> None:
    document = load("raycluster.yaml")
    place: Any = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert errors(document) != []


@pytest.mark.parametrize("name", KUBERAY_FILES)
def test_volumes_are_there_and_large_enough(name: str) -> None:
    """What is mounted exists; /dev/shm, which counts as memory, holds the object store and fits the pod."""
    units = {"Gi": 2**30, "Mi": 2**20}
    for group in groups(load(name)):
        pod = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        (container,) = pod["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        shm = volumes[mounts["/dev/shm"]]["emptyDir"]
        assert shm["medium"] == "Memory"
        shm_bytes = int(shm["sizeLimit"][:-2]) * units[shm["sizeLimit"][-2:]]
        memory = container["resources"]["limits"]["memory"]
        assert int(group["rayStartParams"]["object-store-memory"]) < shm_bytes
        assert shm_bytes < int(memory[:-2]) * units[memory[-2:]] / 4
        assert "ephemeral-storage" in container["resources"]["requests"]


@pytest.mark.parametrize("name", KUBERAY_FILES)
def test_no_credentials_in_the_files(name: str) -> None:
    text = (CLUSTER / name).read_text()
    assert not re.search(r"secret|access_key|AWS_|password|runtimeEnv", text, re.IGNORECASE)
    assert all(group["template"]["spec"]["serviceAccountName"] for group in groups(load(name)))


@pytest.mark.parametrize("name", KUBERAY_FILES)
def test_versions_are_those_of_the_lock(name: str) -> None:
    locked = re.search(r"^ray\[?.*?==([\d.]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert locked is not None
    assert cluster_spec(load(name))["rayVersion"] == locked[1]


def test_the_job_runs_a_job_of_the_project() -> None:
    words = shlex.split(load("rayjob.yaml")["spec"]["entrypoint"])
    assert words[:2] == ["python", "-m"]
    assert (ROOT / (words[2].replace(".", "/") + ".py")).is_file()
    from jobs.stages.pipeline import PipelineConfig

    flags = [word.removeprefix("--") for word in words if word.startswith("--")]
    assert set(flags) <= {"config", *PipelineConfig.__dataclass_fields__}


def test_ray_up_file_fits_rays_schema() -> None:
    import ray.autoscaler

    schema = json.loads(Path(ray.autoscaler.__path__[0], "ray-schema.json").read_text())
    document = load("ray-up-aws.yaml")
    assert [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(document)] == []
    assert document["head_node_type"] in document["available_node_types"]


def test_the_image_holds_what_a_job_needs() -> None:
    """Every package is copied into the image, and every file it copies exists."""
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    assert {"pipeline", "shards", "tokenizer", "pretrain", "jobs", "requirements.lock"} <= copied
    assert [name for name in copied if not (ROOT / name).exists()] == []


def documented_jobs(*pages: str) -> list[tuple[str, list[str]]]:
    """Name and arguments of every job that the code blocks of these pages start."""
    found = []
    for page in pages:
        blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
        for line in "".join(blocks).replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "-m" in words and words[words.index("-m") + 1].startswith("jobs."):
                start = words.index("-m") + 1
                found.append((words[start].removeprefix("jobs."), words[start + 1 :]))
    return found


ALL_JOBS = documented_jobs("docs/cluster.md", "README.md")


def test_the_page_has_a_line_for_every_stage() -> None:
    from jobs.stages.pipeline import PipelineConfig, stages

    told = {
        name: {word for word in argv if word.startswith("--")}
        for name, argv in documented_jobs("docs/cluster.md")
    }
    for stage in stages(PipelineConfig(output="run", val_fraction=0.1)):
        if stage.name not in ("draw_images", "write_report"):
            assert {f"--{flag}" for flag in stage.flags} <= told[stage.name] | {"--val_images"}, stage.name
    assert {"inspect_shards", "run_pipeline"} <= told.keys()


def config_class(job: str) -> type[Any]:
    """The configuration that a job hands to `run_job`."""
    module = importlib.import_module(f"jobs.{job}")
    for node in ast.walk(ast.parse((ROOT / "jobs" / f"{job}.py").read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("run_job"):
            return getattr(module, ast.unparse(node.args[1]))
    raise AssertionError(f"jobs.{job} calls no run_job")


@pytest.mark.parametrize(("job", "argv"), ALL_JOBS, ids=[job for job, _ in ALL_JOBS])
def test_each_line_is_understood_by_its_job(
    job: str, argv: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flags, values and the configuration files named are those that the job has."""
    from pipeline.config import parse

    monkeypatch.chdir(ROOT)
    parse(config_class(job), argv)

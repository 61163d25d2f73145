"""Imports go one way, and each vendor has one door: read off the source, so that lazy imports count too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LAYERS = ("pipeline", "shards", "tokenizer", "pretrain", "jobs")
"""Each may import itself and what stands before it."""

DOORS: dict[str, tuple[str, ...]] = {
    "ray": ("pipeline.cluster.", "jobs."),
    "fsspec": ("pipeline.remote",),
    "s3fs": (),
    "boto3": (),
    "botocore": (),
    "webdataset": ("shards.",),
    "pyarrow": ("shards.",),
    "open_clip": ("tokenizer.model.teacher",),
}
"""Who may import a vendor: a module, or (with a dot at the end) everything in a package."""

ROOMS: dict[str, tuple[tuple[str, ...], ...]] = {
    "shards": (("pixels",), ("format",), ("sources", "dataset"), ("reader", "writer"), ("upkeep",)),
    "tokenizer": (("model",), ("precompute",)),
    "pretrain": (("model",), ("finetune",), ("evals", "segment")),
}
"""Folders of a layer: each may import itself and what stands before it, and none on a step with it."""

NOT_AT_ALL = {
    "shards": ("torch", "torchvision", "timm"),
    "pipeline": ("PIL", "simplejpeg", "timm", "torchvision"),
}
"""What a layer knows nothing of: shards are read without torch, and pipeline has never seen an image."""

PICKLERS = ("dill", "cloudpickle", "joblib", "shelve", "marshal")
"""No code from data; pickle itself may be imported for the name of its error."""


def modules() -> Iterator[tuple[str, Path]]:
    """Dotted name and file of every module of the layers."""
    for layer in LAYERS:
        for path in sorted((ROOT / layer).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(source: str, module: str) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of every import in a source, at the top or inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = module.split(".")[: -node.level]
                base = ".".join([*parent, *([base] if base else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "__import__",
            "importlib.import_module",
        ):
            argument = node.args[0] if node.args else None
            yield node.lineno, str(argument.value) if isinstance(argument, ast.Constant) else "<computed>"


def step_of(module: str) -> tuple[int, str] | None:
    """The step on which a module's folder stands among the rooms of its layer, and the folder's name."""
    layer, _, rest = module.partition(".")
    folder = rest.partition(".")[0]
    steps = ROOMS.get(layer, ())
    return next(((step, folder) for step, folders in enumerate(steps) if folder in folders), None)


def complaints(module: str, source: str) -> list[str]:
    """What the imports of one module break, one line each."""
    layer = module.split(".")[0]
    found = []
    for line, name in imports(source, module):
        top = name.split(".")[0]
        where = f"{module}:{line} imports {name}"
        if top in LAYERS and LAYERS.index(top) > LAYERS.index(layer):
            found.append(f"{where}: {layer} stands before {top}")
        here, there = step_of(module), step_of(name)
        if top == layer and here and there and here != there and there[0] >= here[0]:
            found.append(f"{where}: {layer}/{here[1]} does not stand above {layer}/{there[1]}")
        if top in DOORS and not any(
            module == door or (door.endswith(".") and f"{module}.".startswith(door)) for door in DOORS[top]
        ):
            found.append(f"{where}: the door to {top} is {' and '.join(DOORS[top]) or 'nowhere'}")
        if top in NOT_AT_ALL.get(layer, ()):
            found.append(f"{where}: {layer} knows nothing of {top}")
        if top in PICKLERS:
            found.append(f"{where}: no code from data")
        if name == "<computed>":
            found.append(f"{where}: nothing is selected by an import by string")
    return found


def unpickled(module: str, source: str) -> list[str]:
    """Calls of one module that could run code found in data."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if (
            called in ("pickle.load", "pickle.loads", "pickle.Unpickler", "eval", "exec")
            or (called == "torch.load" and keywords.get("weights_only") != "True")
            or (called in ("np.load", "numpy.load") and keywords.get("allow_pickle", "False") != "False")
        ):
            found.append(f"{module}:{node.lineno} calls {called}: no code from data")
    return found


MODULES = list(modules())


def test_every_layer_has_modules() -> None:
    """The rules below would hold for an empty folder as well."""
    assert {module.split(".")[0] for module, _ in MODULES} == set(LAYERS)


@pytest.mark.parametrize(("module", "path"), MODULES, ids=[module for module, _ in MODULES])
def test_imports_go_one_way_through_one_door(module: str, path: Path) -> None:
    assert complaints(module, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(("module", "path"), MODULES, ids=[module for module, _ in MODULES])
def test_nothing_is_unpickled(module: str, path: Path) -> None:
    assert unpickled(module, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "pickle.loads(data)",
        "eval(text)",
    ],
)
def test_unpickling_is_seen(source: str) -> None:
    assert unpickled("shards.reader", source) != []
    assert unpickled("shards.reader", "torch.load(path, weights_only=True)\nnp.load(path)") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pipeline.storage", "import shards.tar"),
        ("shards.reader", "from tokenizer.teacher import build_teacher"),
        ("shards.reader", "def read():\n    import torch"),
        ("tokenizer.train", "from pretrain import mim"),
        ("tokenizer.train", "def f():\n    import ray.train"),
        ("tokenizer.vqkd", "import open_clip"),
        ("pretrain.train", "import pyarrow.parquet as pq"),
        ("jobs.prepare_images", "import fsspec"),
        ("jobs.prepare_images", "from s3fs import S3FileSystem"),
        ("pipeline.cluster2", "import ray"),
        ("pipeline.artifacts", "from PIL import Image"),
        ("pretrain.evals.probe", "import joblib"),
        ("shards.format.build", "from shards.dataset.rows import read_rows"),
        ("shards.dataset.rows", "def f():\n    from shards.sources import listing"),
        ("shards.reader.reader", "from shards.writer.commit import start"),
        ("pretrain.finetune.train", "from pretrain.evals.features import read_labels"),
        ("tokenizer.model.vit", "from tokenizer.precompute import run"),
        ("shards.reader", "from ..tokenizer import vqkd"),
        ("shards.reader", "import importlib\nimportlib.import_module('torch')"),
        ("tokenizer.teacher", "import importlib\nimportlib.import_module(name)"),
    ],
)
def test_the_rules_can_fail(module: str, source: str) -> None:
    assert complaints(module, source) != []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pipeline.cluster.items", "def f():\n    import ray"),
        ("jobs.submission", "from ray.job_submission import JobSubmissionClient"),
        ("shards.format.index", "import pyarrow\nfrom pipeline import storage\nfrom . import tar"),
        ("shards.upkeep.repair", "from shards.writer.commit import finish\nfrom shards.reader import order"),
        ("tokenizer.model.teacher", "def f():\n    import open_clip"),
        ("pretrain.evals.probe", "from tokenizer import vit\nfrom ..backbone import Backbone"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert complaints(module, source) == []


def test_modules_import_each_other_without_cycles() -> None:
    """Among modules, too, imports have a direction: no module needs itself to be imported first."""
    names = {module for module, _ in MODULES}
    needs: dict[str, set[str]] = {}
    for module, path in MODULES:
        found = set()
        for _, name in imports(path.read_text(encoding="utf-8"), module):
            # `from shards import tar` names the module, `from shards.tar import x` a thing inside it.
            found |= {name, name.rsplit(".", 1)[0]} & names
        needs[module] = found - {module}
    remaining = dict(needs)
    while remaining:
        free = {module for module, found in remaining.items() if not found & remaining.keys()}
        assert free, f"these import each other in a circle: {sorted(remaining)}"
        remaining = {module: found for module, found in remaining.items() if module not in free}

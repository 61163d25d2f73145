"""The house keeps its size: rooms of few files, files of few screens, a door plate on every room."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pipeline", "shards", "tokenizer", "pretrain", "jobs", "benchmarks")
MOST_FILES, MOST_LINES, MOST_PARAMETERS = 9, 450, 8
COMMANDS = "jobs"
"""The one folder with more files: a file name there is a command."""


def sources(*tops: str) -> Iterator[Path]:
    for top in tops:
        yield from sorted((ROOT / top).rglob("*.py"))


def rooms() -> list[Path]:
    """Every folder with sources below the packages."""
    return sorted({path.parent for path in sources(*PACKAGES) if path.parent.parent != ROOT})


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many parameters a function has, without self and cls."""
    given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return sum(argument.arg not in ("self", "cls") for argument in given)


def crowded(source: str) -> list[str]:
    """Functions of a source with too many parameters."""
    functions = (
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return [function.name for function in functions if parameters(function) > MOST_PARAMETERS]


def plate_faults(source: str) -> list[str]:
    """What is wrong with the `__init__.py` of a room."""
    tree = ast.parse(source)
    text = ast.get_docstring(tree) or ""
    faults = [] if len(tree.body) <= 1 else ["it holds code"]
    lines = len(source.strip().splitlines())
    return (
        faults
        if text and lines <= 8
        else [*faults, f"its docstring has {lines} lines: say in a few what it is for"]
    )


@pytest.mark.parametrize("room", rooms(), ids=lambda room: str(room.relative_to(ROOT)))
def test_a_room_has_a_plate_and_few_files(room: Path) -> None:
    assert plate_faults((room / "__init__.py").read_text(encoding="utf-8")) == []
    files = [path.name for path in room.glob("*.py") if path.name != "__init__.py"]
    assert len(files) <= MOST_FILES, files


def test_packages_have_few_files_of_their_own() -> None:
    for package in PACKAGES:
        files = [path.name for path in (ROOT / package).glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= MOST_FILES or package == COMMANDS, (package, files)


def test_no_file_is_long() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources(*PACKAGES, "tests")}
    long = {str(path.relative_to(ROOT)): count for path, count in lines.items() if count > MOST_LINES}
    assert lines and long == {}


def test_no_function_has_many_parameters() -> None:
    for path in sources(*PACKAGES, "tests"):
        assert crowded(path.read_text(encoding="utf-8")) == [], path


def test_tests_mirror_the_packages() -> None:
    """A folder of tests has a folder of sources: whoever looks for a room's tests finds them."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        folder = path.parent.relative_to(ROOT / "tests")
        if folder.parts and folder.parts[0] in PACKAGES:
            assert (ROOT / folder).is_dir(), path


def test_the_rules_can_fail() -> None:
    many = ", ".join("abcdefghi")
    assert (
        crowded(f"def f({many}): ...") == ["f"] and crowded("class A:\n    def f(self, *, a, b): ...") == []
    )
    assert (
        plate_faults("")
        and plate_faults('"""A room."""\nX = 1\n')
        and not plate_faults('"""A room.\n\nFor this.\n"""\n')
    )

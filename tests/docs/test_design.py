"""What `docs/design.md` lists of the files to read is there, and each story stays short."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")

LIMITS = {
    "One pretraining step": (1210, 7),
    "One tokenizer step": (1610, 7),
    "One precompute item": (2390, 9),
    "One read batch": (1760, 7),
    "Verify and repair": (950, 4),
}
"""Lines and files at most."""


def stories() -> dict[str, tuple[int, dict[str, int]]]:
    """Name -> lines in all as the heading says, and file -> lines as the table says."""
    found = {}
    for match in re.finditer(r"^\*\*(.+?)\*\*: ([\d,]+) lines\n\n((?:\|.*\n)+)", DESIGN, re.MULTILINE):
        rows = re.findall(r"^\| `([\w/]+\.py)` \| ([\d,]+) \|", match[3], re.MULTILINE)
        files = {file: int(lines.replace(",", "")) for file, lines in rows}
        found[match[1]] = (int(match[2].replace(",", "")), files)
    return found


def test_every_story_is_told() -> None:
    assert stories().keys() == LIMITS.keys()


@pytest.mark.parametrize("name", LIMITS)
def test_a_story_is_short_and_its_figures_are_true(name: str) -> None:
    total, files = stories()[name]
    lines = {file: len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in files}
    most_lines, most_files = LIMITS[name]
    assert sum(lines.values()) <= most_lines and len(files) <= most_files
    assert total == sum(files.values())
    for file, count in lines.items():
        assert abs(files[file] - count) <= max(5, 0.05 * count), f"{file} has {count} lines"


def lines_of_code(source: str) -> int:
    """Lines that hold code: no docstring, comment or blank line."""
    held: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.string.strip() and token.type != tokenize.COMMENT:
            held |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and node.end_lineno:
            held -= set(range(node.lineno, node.end_lineno + 1))
    return len(held)


def test_the_paper_is_told_in_five_hundred_lines_of_code() -> None:
    """The three files that README names."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [sentence] = re.findall(r"The paper in five hundred lines of code: (.*)\.\n", readme)
    files = re.findall(r"`([\w/]+\.py)`", sentence)
    assert len(files) == 3
    assert sum(lines_of_code((ROOT / file).read_text(encoding="utf-8")) for file in files) <= 500
    assert lines_of_code('"""Doc."""\n\n# why\nx = 1  # a\ny = """\n"""\n') == 3


def test_files_that_the_documents_name_are_there() -> None:
    """Paths with a folder, in README and docs: a moved file is a broken sign."""
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        text = document.read_text(encoding="utf-8")
        for path in set(
            re.findall(
                r"\b((?:pipeline|shards|tokenizer|pretrain|jobs|benchmarks|tests)/[\w/]+\.(?:py|yaml))", text
            )
        ):
            assert (ROOT / path).is_file(), f"{document.name} names {path}"

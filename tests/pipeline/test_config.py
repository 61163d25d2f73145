from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.config import identity, parse, to_dict
from pipeline.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part."""

    size: tuple[float, float] = (0.2, 1.0)
    """How large."""
    name: str | None = None
    """What it is called."""


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A whole made of parts."""

    output: str
    """Where it goes."""
    part: Part = Part()
    """Its part."""
    count: int = 3
    """How many."""
    loud: bool = False
    """Whether it says so."""


def test_flags_files_and_defaults_meet(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("output: there\ncount: 5\npart:\n  size: [0.5, 0.75]\n")
    assert parse(Whole, ["--output", "x"]) == Whole(output="x")
    parsed = parse(Whole, ["--config", str(tmp_path / "c.yaml"), "--count", "7", "--part.name", "n"])
    assert parsed == Whole(output="there", count=7, part=Part(size=(0.5, 0.75), name="n"))


def test_a_boolean_flag_needs_no_value() -> None:
    assert parse(Whole, ["--loud", "--output", "x"]).loud and parse(Whole, ["--output", "x", "--loud"]).loud
    assert not parse(Whole, ["--output", "x", "--loud", "false"]).loud


def test_config_may_be_a_url(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("output: there\n")
    assert parse(Whole, ["--config", f"file://{tmp_path}/c.yaml"]).output == "there"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], "output"),
        (["--output", "x", "--cuont", "3"], "cuont"),
        (["--output", "x", "--part.siez", "3"], "siez"),
        (["--output", "x", "--count", "many"], "count"),
        (["--output", "x", "--coun", "3"], "coun"),
        (["--config", "/no/such/file.yaml"], "/no/such/file.yaml"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(argv: list[str], named: str) -> None:
    with pytest.raises(InputError) as error:
        parse(Whole, argv)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_mistyped_key_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("output: there\npart:\n  siez: 3\n")
    with pytest.raises(InputError, match="siez"):
        parse(Whole, ["--config", str(tmp_path / "c.yaml")])


def test_identity_leaves_places_out() -> None:
    config = Whole(output="x", part=Part(size=(0.1, 0.2)))
    assert to_dict(config) == {
        "output": "x",
        "part": {"size": [0.1, 0.2], "name": None},
        "count": 3,
        "loud": False,
    }
    assert identity(config, ("output",)) == {
        "part": {"size": [0.1, 0.2], "name": None},
        "count": 3,
        "loud": False,
    }


def test_exit_status(tmp_path: Path) -> None:
    job = tmp_path / "job.py"
    job.write_text(
        "from dataclasses import dataclass\n"
        "from pipeline.config import run_job\n"
        "from pipeline.errors import InputError\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class C:\n    '''C.'''\n    how: str = 'well'\n    '''How it ends.'''\n"
        "def main(c):\n"
        "    if c.how == 'bad': raise InputError('no such folder; give another')\n"
        "    if c.how == 'crash': raise ValueError('oops')\n"
        "    print('done')\n"
        "run_job(main, C)\n"
    )

    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        root = str(Path(__file__).resolve().parents[2])
        return subprocess.run(
            [sys.executable, str(job), *argv],
            capture_output=True,
            text=True,
            env={"PYTHONPATH": root, "PATH": ""},
        )

    well, bad, crash, typo = run(), run("--how", "bad"), run("--how", "crash"), run("--hwo", "x")
    assert (well.returncode, bad.returncode, crash.returncode, typo.returncode) == (0, 2, 1, 2)
    assert bad.stderr == "error: no such folder; give another\n"
    assert "ValueError: oops" in crash.stderr
    assert typo.stderr.startswith("error: ") and typo.stderr.count("\n") == 1
    assert "How it ends." in run("--help").stdout

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipeline.config import ASIDE, PLACE, PLACES, URL, absolute_places, identity, parse, to_dict
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

    output: str = field(metadata=PLACE)
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


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A part that names a file."""

    ids: str | None = field(default=None, metadata=URL)
    """Which."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """What several share."""

    output: str = field(metadata=PLACE)
    """Where it goes."""
    threads: int = field(default=2, metadata=ASIDE)
    """How many at once."""


@dataclass(frozen=True, kw_only=True)
class Placed(Base):
    """A job with places."""

    sources: str | None = field(default=None, metadata=PLACES)
    """Where it comes from."""
    threads: int = field(default=4, metadata=ASIDE)
    inner: Inner = Inner()
    """Which of it."""
    count: int = 1
    """How often."""


def test_identity_keeps_what_decides_the_result() -> None:
    config = Placed(output="x", sources="a,b", inner=Inner(ids="i"), count=2)
    assert identity(config) == {"inner": {"ids": "i"}, "count": 2}


def test_places_become_absolute_in_parts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = absolute_places(Placed(output="x", sources="a, s3://b/c/", inner=Inner(ids="i"), count=2))
    here = Placed(
        output=f"{tmp_path}/x", sources=f"{tmp_path}/a,s3://b/c", inner=Inner(ids=f"{tmp_path}/i"), count=2
    )
    assert config == here == absolute_places(here)
    assert absolute_places(Placed(output="s3://b/o")).sources is None


def test_an_inherited_field_keeps_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(Placed, ["--help"])
    text = capsys.readouterr().out
    assert "Where it goes." in text and "How many at once. (type: int, default: 4)" in text


def test_identity_leaves_places_out() -> None:
    config = Whole(output="x", part=Part(size=(0.1, 0.2)))
    assert to_dict(config) == {
        "output": "x",
        "part": {"size": [0.1, 0.2], "name": None},
        "count": 3,
        "loud": False,
    }
    assert identity(config) == {
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

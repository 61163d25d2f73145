"""Hold this code against runs of the reference implementation, and say how far each quantity is from it.

python -m jobs.check_reference --fixtures ../shared/reference/fixtures [--json]
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jobs.reference.fixtures import Check, Checks, find_fixtures, read_arrays
from jobs.reference.vit import check_finetune, check_mim, check_position_tables, check_schedules
from jobs.reference.vqkd import check_vqkd
from pipeline import storage
from pipeline.config import run_job
from pipeline.errors import InputError

MODELS = {"vqkd_tiny": check_vqkd, "mim_tiny": check_mim, "finetune_tiny": check_finetune}
TABLES = {"lr_schedules.npz": check_schedules, "relpos_interp.npz": check_position_tables}


@dataclass(frozen=True, kw_only=True)
class CheckReferenceConfig:
    """Compare VQ-KD, MIM, fine-tuning model, schedules and position tables with the reference's own numbers.

    fp32 on CPU; per tensor max|a - b| / max|b|: 1e-5 forward, 1e-4 gradients, 1e-3 weights after three
    optimizer steps; codes equal. Sizes are read off the fixtures. Ends with status 1 if anything differs.
    """

    fixtures: str
    """Folder or URL with vqkd_tiny_*, mim_tiny_*, finetune_tiny*, lr_schedules.npz, relpos_interp.npz."""
    json: bool = False
    """Print one JSON document instead of lines."""


def main(config: CheckReferenceConfig) -> None:
    """Check whatever is there; SystemExit 1 if a quantity differs, is missing, or cannot be read."""
    checks = check_folder(storage.absolute(config.fixtures))
    print(json.dumps(as_json(checks)) if config.json else as_text(checks))
    if not all(check.passed for check in checks.done):
        sys.exit(1)


def check_folder(folder: str) -> Checks:
    """Every fixture of a folder, in order of names. InputError when it holds none."""
    names = [file.url.removeprefix(folder).strip("/") for file in storage.list_files(folder)]
    fixtures, tables = find_fixtures(folder, names), sorted(TABLES.keys() & names)
    if not fixtures and not tables:
        raise InputError(
            f"{folder} holds no fixtures ({len(names)} files); give a folder with vqkd_tiny_*, mim_tiny_*, "
            f"finetune_tiny*, {' or '.join(TABLES)}"
        )
    checks, used = Checks(), set(tables)
    for fixture in fixtures:
        checks.group = fixture.stem
        missing = [name for name in fixture.files() if name not in names]
        for name in missing:
            checks.fail(name, "the file is missing")
        if not missing:
            _attempt(checks, "fixture", lambda fixture=fixture: MODELS[fixture.kind](fixture, checks))
        used.update(fixture.files())
    for name in tables:
        checks.group, url = name.removesuffix(".npz"), storage.join(folder, name)
        _attempt(checks, "file", lambda name=name, url=url: TABLES[name](read_arrays(url), checks))
    checks.group = ""
    checks.leave(set(names) - used)
    return checks


def _attempt(checks: Checks, what: str, compare: Callable[[], None]) -> None:
    """Compare; one failed line where the arrays do not fit together, or numbers are none."""
    try:
        compare()
    except InputError as error:
        checks.fail(f"the {what} as a whole", str(error))
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        text = " ".join(str(error).split())
        checks.fail(f"the {what} as a whole", f"{type(error).__name__}: {text}")


def as_text(checks: Checks) -> str:
    """One line per quantity, then what was left alone, then the count."""
    width = max(len(check.name) for check in checks.done)
    lines = [_line(check, width) for check in checks.done]
    lines += [f"left alone: {what}" for what in checks.left_alone]
    failed = sum(not check.passed for check in checks.done)
    lines.append(f"{len(checks.done) - failed} passed, {failed} failed")
    return "\n".join(lines)


def as_json(checks: Checks) -> dict[str, Any]:
    """The same as one JSON object; a difference that is no number is null."""
    return {
        "passed": all(check.passed for check in checks.done),
        "checks": [
            {
                **dataclasses.asdict(check),
                "difference": check.difference if math.isfinite(check.difference) else None,
                "passed": check.passed,
            }
            for check in checks.done
        ],
        "left_alone": checks.left_alone,
    }


def _line(check: Check, width: int) -> str:
    difference = f"{check.difference:.1e}" if math.isfinite(check.difference) else "-"
    verdict = "PASS" if check.passed else "FAIL"
    tolerance = f"{check.tolerance:.0e}" if check.tolerance else "0"
    note = f"  ({check.note})" if check.note else ""
    return f"{check.name:{width}}  {difference:>7}  tolerance {tolerance:5}  {verdict}{note}"


if __name__ == "__main__":
    run_job(main, CheckReferenceConfig)

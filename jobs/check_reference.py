"""Hold this code against runs of the reference implementation, and say how far each quantity is from it.

python -m jobs.check_reference --fixtures ../shared/reference/fixtures [--json]
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from typing import Any

from jobs.reference.fixtures import Check, Checks, find_fixtures
from jobs.reference.vit import check_finetune, check_mim, check_position_tables, check_schedules
from jobs.reference.vqkd import check_vqkd
from pipeline import storage
from pipeline.config import run_job
from pipeline.errors import InputError

COMPARISONS = {
    "vqkd_tiny": check_vqkd,
    "mim_tiny": check_mim,
    "finetune_tiny": check_finetune,
    "lr_schedules": check_schedules,
    "relpos_interp": check_position_tables,
}


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
    """Every fixture of a folder, models before tables. InputError when it holds none."""
    names = {file.url.removeprefix(folder).strip("/") for file in storage.list_files(folder)}
    fixtures = find_fixtures(folder, names)
    if not fixtures:
        raise InputError(
            f"{folder} holds no fixtures ({len(names)} files); give a folder with vqkd_tiny_*, mim_tiny_*, "
            "finetune_tiny*, lr_schedules.npz or relpos_interp.npz"
        )
    checks = Checks()
    for fixture in fixtures:
        checks.group = fixture.stem
        missing = [name for name in fixture.files() if name not in names]
        for name in missing:
            checks.fail(name, "the file is missing")
        whole = "the file as a whole" if len(fixture.files()) == 1 else "the fixture as a whole"
        try:
            if not missing:
                COMPARISONS[fixture.kind](fixture, checks)
        except InputError as error:
            checks.fail(whole, str(error))
        except (RuntimeError, ValueError, TypeError, LookupError) as error:
            # Arrays that do not fit together.
            checks.fail(whole, f"{type(error).__name__}: {' '.join(str(error).split())}")
    checks.group = ""
    checks.leave(names - {name for fixture in fixtures for name in fixture.files()})
    return checks


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
    rows = [{**dataclasses.asdict(check), "passed": check.passed} for check in checks.done]
    for row in rows:
        row["difference"] = row["difference"] if math.isfinite(row["difference"]) else None
    passed = all(check.passed for check in checks.done)
    return {"passed": passed, "checks": rows, "left_alone": checks.left_alone}


def _line(check: Check, width: int) -> str:
    difference = f"{check.difference:.1e}" if math.isfinite(check.difference) else "-"
    verdict = "PASS" if check.passed else "FAIL"
    tolerance = f"{check.tolerance:.0e}" if check.tolerance else "0"
    note = f"  ({check.note})" if check.note else ""
    return f"{check.name:{width}}  {difference:>7}  tolerance {tolerance:5}  {verdict}{note}"


if __name__ == "__main__":
    run_job(main, CheckReferenceConfig)

"""What the benchmarks share: the machine in words, loops that take turns, and one line of JSON per case."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any


def emit(case: str, **figures: Any) -> None:
    """Print a case as one line of JSON; floating point with five significant digits."""
    print(json.dumps({"case": case, **_rounded(figures)}), flush=True)


def machine(*distributions: str) -> dict[str, Any]:
    """Processor, cores, load and kernel of this machine, and the versions of some distributions."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in distributions},
    }


def take_turns(loops: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Rates of loops that run one after the other, `rounds` times: a machine's moods meet all of them."""
    rates: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, loop in loops.items():
            rates[name].append(loop())
    return rates


def medians(rates: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median rate of each loop."""
    return {name: statistics.median(values) for name, values in rates.items()}


def median_ratio(rates: Sequence[float], others: Sequence[float]) -> float:
    """The median of the ratios of two loops over the rounds in which they ran side by side."""
    return statistics.median(rate / other for rate, other in zip(rates, others, strict=True))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value

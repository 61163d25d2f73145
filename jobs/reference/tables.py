"""Learning-rate schedules and resized position tables, held against the reference's arrays."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from jobs.reference.fixtures import FORWARD, Checks, FixtureError, need
from pipeline.training.optim import cosine_schedule
from pretrain.model.positions import NUM_SPECIAL_ROWS, resize_position_table, spline_coordinates, table_grid

SCHEDULES_FILE = "lr_schedules.npz"
POSITIONS_FILE = "relpos_interp.npz"

SCHEDULE = 1e-6  # float32's resolution, should the reference have been stored so

_EPOCHS = re.compile(r"(?:^|_)(\d+)ep(?:_|$)")
_ITERATIONS = re.compile(r"(?:^|_)(\d+)it(?:_|$)")
_WARMUP = re.compile(r"(?:^|_)wu(steps|)_?(\d+)(?:_|$)")


def check_schedules(arrays: Mapping[str, Tensor], checks: Checks) -> None:
    """Every schedule whose name says epochs, steps per epoch and warm-up: `mim_30ep_10it_wu10`, `…_wusteps7`.

    Both learning rates are read off the array: the peak is its maximum, and the last step lies a known part
    of the way above the minimum.
    """
    for name, expected in arrays.items():
        epochs, iterations, warmup = (p.search(name) for p in (_EPOCHS, _ITERATIONS, _WARMUP))
        if epochs is None or iterations is None or warmup is None or expected.ndim != 1:
            checks.leave([name])
            continue
        steps_per_epoch, total = int(iterations[1]), int(epochs[1]) * int(iterations[1])
        if expected.numel() != total:
            checks.fail(name, f"the name says {total} steps, the array has {expected.numel()}")
            continue
        warmup_steps = int(warmup[2]) * (1 if warmup[1] else steps_per_epoch)
        expected = expected.double()
        peak = float(expected.max())
        lr = cosine_schedule(
            peak_lr=peak,
            min_lr=_min_lr(peak, float(expected[-1]), total - warmup_steps),
            warmup_steps=warmup_steps,
            total_steps=total,
        )
        ours = torch.tensor([lr(step) for step in range(total)], dtype=torch.float64)
        checks.close(
            name, ours, expected, SCHEDULE, f"{warmup_steps} of {total} steps warm up, to {peak:.3g}"
        )


def _min_lr(peak: float, last: float, steps: int) -> float:
    """The minimum of a half cosine of so many steps from `peak`, the last of which is at `last`."""
    if steps < 1:
        return last
    above = 0.5 * (1.0 + math.cos(math.pi * (steps - 1) / steps))
    return last if above == 1.0 else (last - peak * above) / (1.0 - above)


def check_position_tables(arrays: Mapping[str, Tensor], checks: Checks) -> None:
    """`interp2d_<grid>`: `src` resized to a grid; `coords_<grid>`: where the spline's points lie.

    Both have the layout [H, S, S] of heads and displacements, or [T, H] of a table, with or without the rows
    of [CLS].
    """
    source = _rows(need(arrays, "src"))
    side = math.isqrt(len(source))
    without_cls = side * side == len(source)
    # The rows of [CLS] must come through untouched, whatever they hold.
    cls_rows = torch.arange(1.0, NUM_SPECIAL_ROWS + 1)[:, None].expand(-1, source.shape[1])
    table = torch.cat([source, cls_rows.to(source)]) if without_cls else source
    grid_from = table_grid(len(table))
    for name, expected in arrays.items():
        kind, _, number = name.rpartition("_")
        if kind == "interp2d" and number.isdigit():
            target = _rows(expected)
            grid_to = table_grid(len(target) + (NUM_SPECIAL_ROWS if without_cls else 0))
            ours = resize_position_table(table, grid_from, grid_to)
            if not torch.equal(ours[-NUM_SPECIAL_ROWS:], table[-NUM_SPECIAL_ROWS:]):
                checks.fail(name, "the last three rows are not carried over")
            else:
                grids = f"{grid_from}x{grid_from} to {grid_to}x{grid_to}"
                checks.close(name, ours[: len(target)], target, FORWARD, grids)
        elif kind == "coords" and number.isdigit():
            coordinates = torch.tensor(spline_coordinates(grid_from, int(number)), dtype=torch.float64)
            checks.close(name, coordinates, expected.double(), FORWARD)
        elif name != "src":
            checks.leave([name])


def _rows(values: Tensor) -> Tensor:
    """Biases in either layout as rows [T, H]."""
    if values.ndim == 3 and values.shape[1] == values.shape[2]:
        return values.flatten(1).t()
    if values.ndim != 2:
        raise FixtureError(f"an array of shape {list(values.shape)} is no relative-position table")
    return values

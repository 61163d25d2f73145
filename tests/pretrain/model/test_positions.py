from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.errors import InputError
from pretrain.model.positions import (
    num_displacements,
    resize_absolute_positions,
    resize_position_table,
    spline_coordinates,
    table_grid,
)


def random_table(grid: int, heads: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_displacements((grid, grid)), heads, generator=generator)


@pytest.mark.parametrize(("grid_from", "grid_to"), [(5, 7), (14, 16), (6, 5), (14, 24)])
def test_a_cubic_surface_is_resized_exactly(grid_from: int, grid_to: int):
    """A spline through samples of a cubic is that cubic, so the result can be written down."""

    def surface(y: np.ndarray, x: np.ndarray) -> np.ndarray:
        y, x = y[:, None] / grid_to, x[None, :] / grid_to
        return np.stack([1 + y - 2 * x**3, y**3 * x**2 + x, 0.3 * y**2 - y * x + x**3], axis=-1)

    source = np.array(spline_coordinates(grid_from, grid_to))
    target = np.arange(1.0 - grid_to, grid_to)
    table = random_table(grid_from)
    table[:-3] = torch.from_numpy(surface(source, source).reshape(-1, 3))
    resized = resize_position_table(table, grid_from, grid_to)
    # The outermost source point may lie up to 1e-4 short of the edge, where the border holds.
    reached = np.clip(target, source[0], source[-1])
    expected = surface(reached, reached).reshape(-1, 3)
    np.testing.assert_allclose(resized[:-3].numpy(), expected, atol=2e-5)
    assert torch.equal(resized[-3:], table[-3:])


def test_what_lies_beyond_the_table_is_its_border():
    """At most a ratio of 1.5: from 4x4 to 12x12 the table ends at 4.75 of 11 displacements."""
    table = random_table(4, heads=2)
    assert spline_coordinates(4, 12)[-1] == pytest.approx(1 + 1.5 + 1.5**2, abs=1e-4)
    resized = resize_position_table(table, 4, 12)[:-3].view(23, 23, 2)
    old = table[:-3].view(7, 7, 2)
    for y, x in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        torch.testing.assert_close(resized[y, x], old[y, x], atol=1e-5, rtol=0)
    torch.testing.assert_close(resized[11, 11], old[3, 3], atol=1e-6, rtol=0)
    torch.testing.assert_close(resized[0], resized[5], atol=1e-6, rtol=0)
    assert not torch.allclose(resized[6], resized[7], atol=1e-2)


def test_small_grids_types_and_the_same_grid():
    assert resize_position_table(random_table(2), 2, 3).shape == (num_displacements((3, 3)), 3)
    table = random_table(5)
    assert resize_position_table(table, 5, 5) is table
    half = resize_position_table(table.bfloat16(), 5, 6)
    assert half.dtype == torch.bfloat16
    trained = table.clone().requires_grad_()
    assert not resize_position_table(trained, 5, 6).requires_grad


@pytest.mark.parametrize(("grid_from", "shape"), [(5, (83, 3)), (5, (84,)), (4, (84, 3)), (1, (4, 3))])
def test_tables_of_another_grid_are_refused(grid_from, shape):
    with pytest.raises(InputError, match="grid"):
        resize_position_table(torch.zeros(shape), grid_from, 7)


@pytest.mark.parametrize("grid", [1, 2, 3, 14, 24])
def test_the_grid_is_read_off_the_rows(grid: int):
    assert table_grid(num_displacements((grid, grid))) == grid
    with pytest.raises(InputError, match="no square grid"):
        table_grid(num_displacements((grid, grid)) + 1)


def slow_bicubic(values: np.ndarray, size: int) -> np.ndarray:
    """[G, G] -> [size, size]: 4 x 4 neighbours, cubic convolution kernel with a = -0.75, edges repeated."""

    def kernel(x: float) -> float:
        x = abs(x)
        if x <= 1:
            return 1.25 * x**3 - 2.25 * x**2 + 1
        return -0.75 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    grid = len(values)
    out = np.zeros((size, size))
    for row, column in np.ndindex(size, size):
        y, x = ((i + 0.5) * grid / size - 0.5 for i in (row, column))
        for i in range(int(np.floor(y)) - 1, int(np.floor(y)) + 3):
            for j in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
                value = values[np.clip(i, 0, grid - 1), np.clip(j, 0, grid - 1)]
                out[row, column] += kernel(y - i) * kernel(x - j) * value
    return out


@pytest.mark.parametrize("grid_to", [3, 7])
def test_absolute_positions_are_resized_bicubically(grid_to: int):
    positions = torch.randn(1, 26, 2, generator=torch.Generator().manual_seed(1))
    resized = resize_absolute_positions(positions, grid_to)
    assert resized.shape == (1, grid_to**2 + 1, 2)
    assert torch.equal(resized[:, 0], positions[:, 0])
    for channel in range(2):
        expected = slow_bicubic(positions[0, 1:, channel].view(5, 5).numpy(), grid_to)
        np.testing.assert_allclose(
            resized[0, 1:, channel].view(grid_to, grid_to).numpy(), expected, atol=1e-5
        )
    assert resize_absolute_positions(positions, 5) is positions
    with pytest.raises(InputError, match="square"):
        resize_absolute_positions(positions[:, :-1], 4)

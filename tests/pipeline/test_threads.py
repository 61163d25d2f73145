from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipeline.threads import in_order


def test_results_come_in_order_and_errors_at_their_place() -> None:
    def square(x: int) -> int:
        if x == 30:
            raise ValueError("thirty")
        return x * x

    results = in_order(square, range(40), 3)
    assert [next(results) for _ in range(30)] == [x * x for x in range(30)]
    with pytest.raises(ValueError, match="thirty"):
        next(results)


def test_no_more_items_are_taken_than_may_wait() -> None:
    taken = 0

    def endless() -> Iterator[int]:
        nonlocal taken
        while True:
            yield taken
            taken += 1

    results = in_order(lambda x: x, endless(), 2, ahead=5)
    assert next(results) == 0
    results.close()
    assert taken < 10

"""The plan of a pass: items that tile the ids, small on disk, and nothing impossible."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.format.manifest import Recipe
from shards.format.plan import Plan, items


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4000), min_size=1, max_size=30),
    first_id=st.integers(0, 10**9),
    views=st.integers(1, 3),
    gaps=st.none() | st.randoms(use_true_random=False),
)
def test_a_plan_survives_json_and_its_items_tile_the_ids(
    sizes: list[int], first_id: int, views: int, gaps: Any
) -> None:
    first_ids = tuple(int(i) for i in np.cumsum([first_id, *sizes]))
    samples = None if gaps is None else tuple(gaps.randint(0, size) for size in sizes)
    recipe = Recipe(other={"x": [1, 2.5]})
    plan = Plan(
        kind="images", inputs={"a": "b"}, recipe=recipe, first_ids=first_ids, views=views, samples=samples
    )

    again = Plan.from_bytes(plan.to_bytes())
    assert again == plan and again.plan_prefix == plan.plan_prefix
    planned = list(items(plan))
    assert len(planned) == plan.num_items == views * len(sizes)
    assert len({item.name for item in planned}) == len(planned)
    for view in range(views):
        mine = [item for item in planned if item.view == view]
        assert [item.first_id for item in mine] == list(first_ids[:-1])
        assert [item.end_id for item in mine] == list(first_ids[1:])
        assert [item.samples for item in mine] == list(sizes if samples is None else samples)


def test_a_plan_of_half_a_million_ranges_stays_small() -> None:
    plan = Plan(kind="images", inputs={}, first_ids=tuple(range(0, 2_000_000_001, 4000)), views=1)
    assert plan.num_ranges == 500_000
    assert len(plan.to_bytes()) < 1000
    assert Plan.from_bytes(plan.to_bytes()).first_ids == plan.first_ids


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first_ids": (0,)}, "first_ids"),
        ({"first_ids": (0, 5, 5)}, "first_ids"),
        ({"first_ids": (0, 4001)}, "at most 4000"),
        ({"first_ids": (0, 5), "samples": (6,)}, "samples"),
        ({"views": 0}, "views"),
        ({"views": 101}, "views"),
        ({"kind": "tokens"}, "tokenizer"),
    ],
)
def test_impossible_plans_are_refused(changes: dict[str, Any], message: str) -> None:
    possible: dict[str, Any] = {"kind": "images", "inputs": {}, "first_ids": (0, 5), "views": 1}
    Plan(**possible)
    with pytest.raises(ValueError, match=message):
        Plan(**{**possible, **changes})

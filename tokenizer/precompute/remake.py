"""A shard of crops or codes made again, for the repair of a dataset that lost it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.errors import InputError
from shards.format.build import BuiltShard
from shards.format.plan import Item, Plan
from tokenizer.precompute.items import CropEncoder, LayerMaker, item_maker


@dataclass(frozen=True, kw_only=True)
class RepairInputs:
    """What a repair has at hand to make shards of a finished dataset again: URLs, None where not given."""

    dataset: str
    images: str | None
    tokenizer: str | None

    def make(self, plan: Plan, item: Item, codes: Mapping[int, np.ndarray] | None) -> BuiltShard:
        """The shard of an item; InputError says what is missing."""
        encoder = None
        if codes is None and self.tokenizer is None:
            name = plan.inputs["tokenizer"]
            raise InputError(f"its codes are lost; give their tokenizer, {name}, with --tokenizer")
        if codes is None:
            encoder = CropEncoder(plan, str(self.tokenizer))
        maker = item_maker(plan, self.dataset, self.images, encoder, num_threads=2)
        return maker.make(item) if isinstance(maker, LayerMaker) else maker.make(item, codes)

"""What a dataset consists of: the pass that began it, views added later, code layers of other tokenizers.

Every part has a plan, receipts and a manifest of its own, so what is finished never changes when something is
added. Parts are found by name, and everything in them is relative: a copy made with any tool is sound.

    <root>/                     base: views 0 … K-1
    <root>/more/v02/            views 2, 3, … of the same images
    <root>/codes/1a2b3c4d/v00/  codes of tokenizer 1a2b3c4d… for the views of the base; v02/ for those added
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from pipeline import storage
from pipeline.errors import InputError
from shards.format.manifest import MANIFEST, Manifest, read_manifest
from shards.format.plan import Plan

PartKind = Literal["base", "views", "codes"]

PLAN = "plan.json"
_VIEWS = re.compile(r"v[0-9]{2,}")
_LAYER = re.compile(r"[0-9a-f]{8}")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a dataset. It is finished when it has a manifest; `plan` is None where none was made."""

    url: str
    kind: PartKind
    manifest: Manifest | None
    plan: Plan | None

    @property
    def finished(self) -> bool:
        return self.manifest is not None

    @property
    def first_view(self) -> int | None:
        """The first of the views it holds or describes; None where neither manifest nor plan say."""
        return None if self._described is None else self._described.first_view

    @property
    def num_views(self) -> int:
        """Views it holds or describes, 0 where neither manifest nor plan say."""
        if self.manifest is not None:
            return self.manifest.num_views
        return 0 if self.plan is None else self.plan.views

    @property
    def tokenizer(self) -> str | None:
        """Fingerprint of the tokenizer whose codes it has; None for images and where nothing says."""
        spec = None if self._described is None else self._described.tokenizer
        return None if spec is None else spec.fingerprint

    @property
    def _described(self) -> Manifest | Plan | None:
        return self.manifest or self.plan


def parts(root: str) -> list[Part]:
    """The base, every folder of added views, every code layer (by tokenizer, then by view), finished or not.

    Raises InputError where a manifest or plan is there that cannot be read.
    """
    return [
        Part(
            url=url,
            kind=kind,
            manifest=read_manifest(url) if storage.exists(storage.join(url, MANIFEST)) else None,
            plan=read_plan(url),
        )
        for url, kind in places(root).items()
    ]


def places(root: str) -> dict[str, PartKind]:
    """Where the parts of a dataset lie, the base first, whatever can be read of them."""
    root = storage.absolute(root)
    codes = storage.join(root, "codes")
    layers = [storage.join(codes, name) for name in storage.list_folders(codes) if _LAYER.fullmatch(name)]
    kinds: dict[str, PartKind] = {root: "base"}
    for folder in (storage.join(root, "more"), *layers):
        views = (name for name in storage.list_folders(folder) if _VIEWS.fullmatch(name))
        kinds |= {storage.join(folder, name): "codes" if folder in layers else "views" for name in views}
    return kinds


def views_in_words(first_view: int, num_views: int) -> str:
    """`view 2`, or `views 2 to 4`."""
    last = first_view + num_views - 1
    return f"view {last}" if num_views == 1 else f"views {first_view} to {last}"


def read_plan(url: str) -> Plan | None:
    """The plan of a dataset or part, or None; InputError where it cannot be read."""
    location = storage.join(url, PLAN)
    try:
        return Plan.from_bytes(storage.read(location))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{location} is not a plan of this format ({error!r}); bring back the plan that was there"
        ) from None

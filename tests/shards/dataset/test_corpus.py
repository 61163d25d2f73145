"""Several datasets and subsets, read as one: every sample once, told apart, refused where they do not fit."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pipeline.errors import InputError
from shards.dataset.corpus import Corpus, SubsetConfig, namespaced_key, open_corpus
from shards.dataset.dataset import Dataset, open_dataset
from shards.format.manifest import Recipe
from shards.format.records import MAX_SAMPLE_ID
from shards.pixels.crops import Crops, FreshCrops, StoredCrops
from shards.pixels.views import ViewPolicy, decode_crop
from shards.reader.reader import Batches, ShardReader
from shards.writer.commit import finish, pending, start

if TYPE_CHECKING:
    from tests.shards.conftest import SmallDataset, Written

Make = Callable[..., "SmallDataset"]


@pytest.fixture
def make_dataset(tmp_path: Path, small_dataset: Make) -> Callable[..., str]:
    """`make_dataset(name, tokenizer={…}, recipe={…}, …)`: a small token dataset, its plan changed."""

    def make(
        name: str,
        *,
        tokenizer: dict[str, Any] | None = None,
        recipe: Any = None,
        same: bool = False,
        **how: Any,
    ) -> str:
        small = small_dataset(**how)
        plan = small.plan
        spec = dataclasses.replace(plan.tokenizer, **(tokenizer or {}))
        asked = {"views": {"seed": len(name), "views_per_image": plan.views}, "jpeg_quality": 95}
        changed = Recipe.from_json({**asked, **(recipe or {})})
        inputs = {"images": "the same" if same else name}
        plan = dataclasses.replace(plan, tokenizer=spec, inputs=inputs, recipe=changed)
        small = dataclasses.replace(small, plan=plan)
        root = str(tmp_path / name)
        start(root, plan)
        for item in pending(root, plan):
            small.commit_item(root, item)
        finish(root, plan, decode_crop)
        return root

    return make


def read(dataset: Dataset, crops: Crops | None = None, **how: Any) -> dict[str, Any]:
    """Key -> (pixels, codes, label) of one epoch."""
    found: dict[str, Any] = {}
    batches = Batches(**{"size": 4, "drop_last": False, "num_threads": 0, "seed": 3, **how})
    with ShardReader(dataset, crops or StoredCrops(), batches) as reader:
        for batch in reader.batches(0):
            for place, key in enumerate(batch.keys):
                assert key not in found
                codes = None if batch.codes is None else batch.codes[place].tolist()
                found[key] = (batch.pixels[place].tobytes(), codes, int(batch.labels[place]))
    return found


def test_two_datasets_are_read_as_one(make_dataset: Callable[..., str]) -> None:
    a, b = make_dataset("a"), make_dataset("b", first_ids=(0, 3, 8), views=3, rejected={})
    one, other, both = open_corpus(a), open_corpus(b, views=2), open_corpus(f"{a}, {b}", "tokens")
    assert isinstance(both, Corpus) and not isinstance(one, Corpus)
    assert (both.num_views, both.num_shards) == (2, 5)
    assert both.num_samples() == one.num_samples() + other.num_samples() == 8 + 8
    alone, joined = {**read(one), **{f"1/{k}": v for k, v in read(other).items()}}, read(both)
    # Which of the two views an epoch reads is the same in all three.
    assert joined == alone
    assert both.fingerprint not in (one.fingerprint, other.fingerprint)
    assert both.fingerprint != open_corpus(f"{b},{a}", views=2).fingerprint
    assert pickle.loads(pickle.dumps(both)).fingerprint == both.fingerprint
    assert len(both.index_files()) == 2 * (3 + 2)
    with pytest.raises(IndexError):
        both.shard(0, 5)


def test_keys_and_ids_of_the_first_stay_as_they_were() -> None:
    assert namespaced_key(42, 1) == "0000000042-01"
    assert namespaced_key(2 * MAX_SAMPLE_ID + 42, 0) == "2/0000000042-00"


def test_a_batch_draws_from_both_and_ranks_share_it(make_dataset: Callable[..., str]) -> None:
    both = open_corpus(f"{make_dataset('a')},{make_dataset('b')}")
    seen: list[str] = []
    for rank in range(3):
        seen += read(both, rank=rank, world_size=3)
    assert sorted(seen) == sorted(read(both)) and len(set(seen)) == 16


def test_labels_mean_the_same_or_nothing(make_dataset: Callable[..., str], written_once: Written) -> None:
    del written_once
    a, b = make_dataset("a"), make_dataset("b")
    assert {label for _, _, label in read(open_corpus(f"{a},{b}")).values()} > {-1}
    renamed = open_dataset(b)
    renamed.manifest = dataclasses.replace(renamed.manifest, class_names=("cat", "bee", "ant"))
    mixed = Corpus([open_dataset(a), renamed])
    assert mixed.manifest.class_names is None
    assert {label for _, _, label in read(mixed).values()} == {-1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tokenizer": {"fingerprint": "e" * 64}},
            r"/a has codes of tokenizer f{64}, .*/b of e{64}; .*mixed",
        ),
        (
            {"recipe": {"jpeg_quality": 90}},
            r"/a and .*/b were made by different recipes: jpeg_quality: there 95",
        ),
        ({"same": True}, r"/b stands twice"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    make_dataset: Callable[..., str], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        open_corpus(f"{make_dataset('a', same='same' in change)},{make_dataset('b', **change)}")


def test_images_and_tokens_are_not_mixed(written_once: Written) -> None:
    with pytest.raises(InputError, match=r"holds images, .* tokens"):
        open_corpus(f"{written_once.images},{written_once.tokens}")


def test_online_crops_of_several_datasets_are_those_of_each(written_once: Written, tmp_path: Path) -> None:
    shutil.copytree(written_once.images, tmp_path / "copy")
    views = ViewPolicy(image_size=16, views_per_image=2)
    images = open_dataset(written_once.images)
    listed = tmp_path / "ids"
    listed.write_text("3\n5\n")
    part = open_corpus(str(tmp_path / "copy"), subset=SubsetConfig(ids=str(listed)))
    both = Corpus([images, part])  # the second is another dataset by its fingerprint
    alone, joined = read(images, FreshCrops(views)), read(both, FreshCrops(views))
    assert {key: joined[key] for key in alone} == alone
    assert joined["1/0000000003-00"][0] == alone["0000000003-00"][0]
    assert len(joined) == len(alone) + 2


# ------------------------------------------------------------------------------------------------ subsets


def test_a_subset_by_labels_is_those_samples(make_dataset: Callable[..., str]) -> None:
    root = make_dataset("a")
    whole = read(open_corpus(root))
    for labels, numbers in ((("bee",), {1}), (("ant", "2"), {0, 2})):
        subset = open_corpus(root, subset=SubsetConfig(labels=labels))
        found = read(subset, size=2)
        assert found == {key: value for key, value in whole.items() if value[2] in numbers}
        assert subset.num_samples() == len(found) == subset.manifest.written_per_view[0]
    with pytest.raises(InputError, match=r"no class wasp \(it has ant, bee, cat\)"):
        open_corpus(root, subset=SubsetConfig(labels=("wasp",)))


def test_a_subset_by_ids_is_frozen_by_its_hash(make_dataset: Callable[..., str], tmp_path: Path) -> None:
    a, b = make_dataset("a"), make_dataset("b")
    whole = read(open_corpus(f"{a},{b}"))
    listed = tmp_path / "ids.txt"

    def opened(text: str) -> Dataset:
        listed.write_text(text)
        return open_corpus(f"{a},{b}", subset=SubsetConfig(ids=str(listed)))

    subset = opened("8\n0000000002-00\n1/0000000003-01\n1/0\n")
    found = read(subset, size=2)
    keys = {key[:-3] for key in found}
    assert keys == {"0000000008", "0000000002", "1/0000000003", "1/0000000000"}
    assert found == {key: whole[key] for key in found}
    assert subset.shard_sizes(1).tolist() == [1, 0, 1, 2, 0, 0]
    same = pickle.loads(pickle.dumps(subset))
    assert read(same, size=2) == found and same.fingerprint == subset.fingerprint
    assert opened("8\n2\n").fingerprint != subset.fingerprint
    for text, message in (
        ("", "names no sample"),
        ("3\nfour\n", "is no list of ids"),
        ("3\n3\n", "names sample 3 twice"),
        ("3\n9\n", "names sample 9, which is not in"),
        ("2/0", "names sample 20000000000, which is not in"),
    ):
        with pytest.raises(InputError, match=message):
            opened(text)
    rejected = opened("4\n5\n")
    with pytest.raises(InputError, match=r"samples 0000000005-0\d of the subset are not in .*v0\d-00001"):
        read(rejected, size=2)
    with pytest.raises(InputError, match="not both"):
        SubsetConfig(labels=("a",), ids="b")
    with pytest.raises(InputError, match="no list of ids at /no/where"):
        open_corpus(a, subset=SubsetConfig(ids="/no/where"))

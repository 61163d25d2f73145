from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pretrain.evals.feature_cache import Extraction, FeatureSource, load_or_extract
from pretrain.evals.features import FeatureSet, center_crops
from shards.dataset.corpus import SubsetConfig, open_corpus

HOW = Extraction(
    image_size=16,
    interpolation="bicubic",
    images_per_batch=3,
    decode_threads=0,
    device=torch.device("cpu"),
)


class Eye:
    """A source that counts the images it was shown."""

    def __init__(self, name: str, weights: float = 2.0) -> None:
        self.name, self.weights, self.seen = name, weights, 0

    def __call__(self, images: Tensor) -> Mapping[str, Tensor]:
        self.seen += len(images)
        flat = images.flatten(1)
        return {f"{self.name}.a": flat.float() * self.weights, f"{self.name}.b": flat[:, :2]}

    @property
    def source(self) -> FeatureSource:
        names = (f"{self.name}.a", f"{self.name}.b")
        return FeatureSource(names=names, extract=self, identity={"weights": self.weights})


@pytest.fixture
def images(write_images) -> str:
    return write_images("images", [0, 1, None, 2, 0, None, 1, 2, 0, 1, 2, 0])


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


def load(
    images: str, cache: str | None, *eyes: Eye, how: Extraction = HOW, subset: SubsetConfig | None = None
) -> FeatureSet:
    dataset = open_corpus(images, "images", subset=subset)
    return load_or_extract(dataset, "images", [eye.source for eye in eyes], how, cache)


def files(cache: str) -> list[Path]:
    return sorted(path for path in Path(cache).rglob("*") if path.is_file())


def test_what_was_kept_is_what_is_extracted_and_nothing_runs_again(images, cache):
    first, second = Eye("one"), Eye("one")
    made, kept = load(images, cache, first), load(images, cache, second)
    assert (first.seen, second.seen) == (10, 0)
    reader = center_crops(
        open_corpus(images), image_size=16, interpolation="bicubic", batch_size=12, num_threads=0
    )
    [batch] = list(reader.batches(0))
    labelled = batch.labels != -1
    pixels = torch.from_numpy(batch.pixels[labelled]).permute(0, 3, 1, 2).flatten(1)
    for found in (made, kept):
        assert found.labels.tolist() == batch.labels[labelled].tolist()
        assert torch.equal(found.inputs["one.a"], pixels.float() * 2)
        assert (
            torch.equal(found.inputs["one.b"], pixels[:, :2]) and found.inputs["one.b"].dtype == torch.uint8
        )


def test_without_a_cache_nothing_is_kept(images, tmp_path):
    before = files(str(tmp_path))
    load(images, None, Eye("one"))
    assert files(str(tmp_path)) == before


def test_only_what_is_missing_runs(images, cache):
    load(images, cache, Eye("one"))
    one, two = Eye("one"), Eye("two")
    found = load(images, cache, one, two)
    assert (one.seen, two.seen) == (0, 10)
    assert list(found.inputs) == ["one.a", "one.b", "two.a", "two.b"]


@pytest.mark.parametrize("change", ["weights", "interpolation", "image_size", "subset", "dataset"])
def test_whatever_decides_features_is_part_of_their_key(images, cache, write_images, change):
    load(images, cache, Eye("one"))
    other, how, subset = Eye("one"), HOW, None
    match change:
        case "weights":
            other = Eye("one", weights=3.0)
        case "interpolation":
            how = dataclasses.replace(HOW, interpolation="bilinear")
        case "image_size":
            how = dataclasses.replace(HOW, image_size=8)
        case "subset":
            subset = SubsetConfig(labels=("0", "1"))
        case "dataset":
            images = write_images("others", [0, 1, 2, 0, 1])
    found = load(images, cache, other, how=how, subset=subset)
    assert other.seen == len(found.labels) > 0
    for name, value in load(images, None, Eye("one", other.weights), how=how, subset=subset).inputs.items():
        assert torch.equal(found.inputs[name], value)


def test_speed_is_not_part_of_the_key(images, cache):
    load(images, cache, Eye("one"))
    again = Eye("one")
    load(images, cache, again, how=dataclasses.replace(HOW, images_per_batch=5, decode_threads=1))
    assert again.seen == 0


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "header"])
def test_damage_is_said_aloud_and_made_good(images, cache, capsys, damage):
    intact = load(images, cache, Eye("one"))
    [path] = Path(cache).glob("one.a-*/features.safetensors")
    data = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(data[:-1])
        case "flipped":
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        case "gone":
            path.unlink()
        case "header":
            path.with_name("features.json").write_text("{")
    capsys.readouterr()
    eye = Eye("one")
    assert torch.equal(load(images, cache, eye).inputs["one.a"], intact.inputs["one.a"])
    assert eye.seen == 10
    said = capsys.readouterr().out
    assert "are made again" in said and str(path.parent) in said
    assert load(images, cache, last := Eye("one")) and last.seen == 0
    assert path.read_bytes() == data


def test_an_unfinished_input_is_no_input(images, cache):
    load(images, cache, Eye("one"))
    [header] = Path(cache).glob("one.b-*/features.json")
    header.unlink()  # a kill between the two
    eye = Eye("one")
    load(images, cache, eye)
    assert eye.seen == 10 and header.exists()

"""Labelled images are found, their classes matched by name, and what does not fit is named."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import timm.data
from PIL import Image

from pipeline.cluster.config import ClusterConfig
from pipeline.errors import InputError
from pretrain.evals.image_sets import ImageSet, Outputs, check_classes, look_at, prepare, wnids

IN_PROCESS = ClusterConfig(num_workers=0)


def folder(root: Path, names: Sequence[str], per_class: int = 1) -> str:
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(root / name / f"{i}.png")
    return str(root)


def outputs(names: Sequence[str] | None, num_classes: int = 3) -> Outputs:
    known = None if names is None else tuple(names)
    return Outputs(url="a-classifier", num_classes=num_classes, class_names=known)


def looked_at(name: str, url: str) -> ImageSet:
    return look_at(name, url, IN_PROCESS)


def test_the_published_classes() -> None:
    """200 each, 86 in common (reference.md §6.4), at those of the 1000 outputs that timm's tables name."""
    a, r, sketch = wnids("imagenet_a"), wnids("imagenet_r"), wnids("imagenet_sketch")
    assert (len(set(a)), len(set(r)), len(set(sketch))) == (200, 200, 1000)
    assert len(set(a) & set(r)) == 86 and set(a) | set(r) <= set(sketch)
    for names, file in ((a, "imagenet_a_indices.txt"), (r, "imagenet_r_indices.txt")):
        indices = (resources.files(timm.data) / "_info" / file).read_text().split()
        assert [sketch[int(index)] for index in indices] == list(names)
    assert a[0] == "n01498041" and r[0] == "n01443537"  # stingray, goldfish


def test_a_folder_is_looked_at_without_writing_and_then_prepared(tmp_path: Path) -> None:
    url = folder(tmp_path / "pictures", ["ant", "bee"], per_class=3)
    (tmp_path / "pictures" / "README.txt").write_text("what this is")
    (tmp_path / "pictures" / "bee" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    found = looked_at("mine", url)
    assert not found.is_shards and found.class_names == ("ant", "bee") and not (tmp_path / "out").exists()
    assert np.bincount(found.labels).tolist() == [3, 4]  # by name, broken.jpg looks like an image
    assert looked_at("mine", url).fingerprint == found.fingerprint

    shards = prepare(found, str(tmp_path / "out"), IN_PROCESS)
    assert shards.is_shards and shards.url == str(tmp_path / "out") and shards.name == "mine"
    assert np.bincount(shards.labels).tolist() == [3, 3]
    assert sum(shards.rejected.values()) == 2 and shards.rejected["not_an_image"] == 1
    assert prepare(shards, "unused", IN_PROCESS) is shards
    assert looked_at("mine", shards.url).fingerprint == shards.fingerprint

    folder(tmp_path / "pictures", ["cat"])
    assert looked_at("mine", url).fingerprint != found.fingerprint


@pytest.mark.parametrize(
    ("classes", "known", "message"),
    [
        (["ant", "dog", "eel"], ("ant", "bee", "cat"), "of dog, eel, which a-class"),
        (["ant"], None, "have numbers only"),
        ([""], ("ant", "bee", "cat"), "1 of the 1 images .* have no label"),
        (["ant", "bee", ""], ("ant", "bee", "cat"), "1 of the 3 images"),
    ],
)
def test_images_that_do_not_fit_are_named(
    tmp_path: Path, classes: Sequence[str], known: Sequence[str] | None, message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        check_classes(looked_at("clean", folder(tmp_path / "pictures", classes)), outputs(known))
    assert "\n" not in str(error.value)


def test_classes_are_known_by_name_or_by_number(tmp_path: Path) -> None:
    found = looked_at("clean", folder(tmp_path / "pictures", ["ant", "bee", "cat"]))
    for known in (("ant", "bee", "cat", "dog"), ("dog", "cat", "bee", "ant")):  # more than there are
        check_classes(found, outputs(known))
    numbered = ImageSet(**{**vars(found), "class_names": None})
    check_classes(numbered, outputs(None))
    with pytest.raises(InputError, match="label 2, but a-classifier tells 2 classes"):
        check_classes(numbered, outputs(None, num_classes=2))


def test_a_published_set_is_itself_and_the_classifier_knows_it(tmp_path: Path) -> None:
    known, expected = wnids("imagenet_sketch"), wnids("imagenet_a")
    url = folder(tmp_path / "a", expected)
    found = looked_at("imagenet_a", url)
    check_classes(found, outputs(known[::-1], 1000))
    with pytest.raises(InputError, match=r"have no names.*ImageNet-A.*--class_names"):
        check_classes(found, outputs(None, 1000))
    lacking = [name for name in known if name not in expected[:7]]
    with pytest.raises(InputError, match=f"does not know {', '.join(expected[:5])} and 2 more of the 200"):
        check_classes(found, outputs(lacking, 993))
    # The same folder is neither -R nor -Sketch.
    with pytest.raises(
        InputError, match=r"is not ImageNet-R: it lacks .* and 109 more .* has .* and 109 more"
    ):
        check_classes(looked_at("imagenet_r", url), outputs(known, 1000))
    with pytest.raises(InputError, match=r"is not ImageNet-Sketch: it lacks .* of its 1000 class folders; "):
        check_classes(looked_at("imagenet_sketch", url), outputs(known, 1000))

    (tmp_path / "a" / expected[3]).rename(tmp_path / "a" / "n99999999")
    with pytest.raises(InputError, match=f"lacks {expected[3]} of its 200 class folders and has n99999999"):
        check_classes(looked_at("imagenet_a", url), outputs(known, 1000))


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there are no files"):
        looked_at("clean", str(tmp_path / "nothing"))
    url = folder(tmp_path / "pictures", ["ant"])
    prepare(looked_at("clean", url), str(tmp_path / "split" / "val"), IN_PROCESS)
    with pytest.raises(InputError, match="holds val; name one of them"):
        looked_at("clean", str(tmp_path / "split"))
    (tmp_path / "broken" / "ant").mkdir(parents=True)
    (tmp_path / "broken" / "ant" / "0.jpg").write_bytes(b"no image")
    empty = prepare(looked_at("clean", str(tmp_path / "broken")), str(tmp_path / "empty"), IN_PROCESS)
    with pytest.raises(InputError, match="no readable image"):
        check_classes(empty, outputs(["ant", "bee"]))

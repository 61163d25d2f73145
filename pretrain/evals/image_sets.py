"""Labelled images for an evaluation: shards or class folders, and whether a classifier knows their classes.

Classes are matched by name. Two datasets number them separately, and so may a classifier: a position says
nothing where a class is missing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import timm.data
from timm.data.imagenet_info import ImageNetInfo

from pipeline import storage
from pipeline.artifacts import sha256_hex
from pipeline.cluster.config import ClusterConfig
from pipeline.errors import InputError
from pretrain.evals.corruptions import split_list
from pretrain.model.artifacts import classifier_config
from shards.dataset.dataset import open_dataset
from shards.dataset.labels import UNLABELLED, read_labels, translate_labels
from shards.format.manifest import MANIFEST
from shards.sources.listing import SourceConfig, list_sources
from shards.sources.table import Source, rows_of
from shards.sources.tars import IMAGE_EXTENSIONS
from shards.writer.commit import PLAN
from shards.writer.prepare import SPLITS, PrepareConfig, prepare_images

BENCHMARKS = {"imagenet_a": "ImageNet-A", "imagenet_r": "ImageNet-R", "imagenet_sketch": "ImageNet-Sketch"}
"""Titles of the published sets, by name."""
CLEAN = "clean"
"""Name of the set without a shift."""

Answers = tuple[int, ...] | None
"""Outputs whose logits compete, ascending; None: all."""


def wnids(benchmark: str) -> tuple[str, ...]:
    """The classes of a published set, sorted: 200 for ImageNet-A and -R (86 in common), 1000 for -Sketch."""
    if benchmark == "imagenet_sketch":
        return tuple(sorted(ImageNetInfo("imagenet-1k").label_names()))
    file = resources.files(timm.data) / "_info" / f"{benchmark}_synsets.txt"
    return tuple(sorted(file.read_text(encoding="utf-8").split()))


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """The classes a classifier tells apart, in the order of its logits."""

    url: str
    num_classes: int
    class_names: tuple[str, ...] | None
    """None where it knows them by number only."""


def outputs_of(url: str, header: Mapping[str, Any]) -> Outputs:
    """The classes of the classifier artifact at `url` with this header; InputError where it has no head."""
    num_classes, names = classifier_config(header["config"]).num_classes, header["class_names"]
    if num_classes == 0:
        raise InputError(f"{url} has no head and so tells no classes apart; give a fine-tuned classifier")
    return Outputs(url=url, num_classes=num_classes, class_names=None if names is None else tuple(names))


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSet:
    """Labelled images at a URL; in a folder not yet prepared, the files that are named like images."""

    name: str
    url: str
    is_shards: bool
    fingerprint: str
    """Fingerprint of the dataset, or of the listing with sizes and versions."""
    class_names: tuple[str, ...] | None
    labels: np.ndarray
    """int64 [N], -1 where there is none."""
    rejected: dict[str, int]
    """Files that could not be read, by reason; unknown, and so empty, of a folder not yet prepared."""


def parse_sets(text: str | None) -> dict[str, str]:
    """URLs of sets of one's own by name, from name=URL with commas between several; InputError for others."""
    sets: dict[str, str] = {}
    for part in split_list(text):
        name, _, url = part.partition("=")
        if not url or not re.fullmatch(r"\w[\w.-]*", name):
            raise InputError(f"shifted has {part!r}; give name=URL, the name of letters, digits, _ . -")
        if name in sets or name == CLEAN or name in BENCHMARKS:
            raise InputError(f"shifted uses the name {name} for a second set; choose another")
        sets[name] = url
    return sets


def look_at(name: str, url: str, cluster: ClusterConfig) -> ImageSet:
    """The images at a URL: image shards where there are some, else a folder, tars or Parquet files.

    Writes nothing. InputError where there is nothing, or nothing finished.
    """
    places = (MANIFEST, PLAN, *(storage.join(part, MANIFEST) for part in SPLITS))
    if any(storage.exists(storage.join(url, place)) for place in places):
        dataset = open_dataset(url, "images")
        return ImageSet(
            name=name,
            url=url,
            is_shards=True,
            fingerprint=dataset.fingerprint,
            class_names=dataset.manifest.class_names,
            labels=read_labels(dataset),
            rejected=dataset.manifest.samples_rejected,
        )
    sources = list_sources(SourceConfig(url=url), cluster)
    rows = rows_of(sources.table)
    # Where no file is named like an image, any may be one.
    likely = [row for row in rows if sources.kind != "folder" or _is_named_like_an_image(row)] or rows
    labels = [UNLABELLED if row.label is None else row.label for row in likely]
    return ImageSet(
        name=name,
        url=url,
        is_shards=False,
        fingerprint=sha256_hex(sources.to_bytes()),
        class_names=sources.class_names,
        labels=np.asarray(labels, dtype=np.int64),
        rejected={},
    )


def prepare(images: ImageSet, output: str, cluster: ClusterConfig) -> ImageSet:
    """The same images as shards, made at `output` if need be; what cannot be read is set aside there."""
    if images.is_shards:
        return images
    prepare_images(PrepareConfig(source=images.url, output=output, cluster=cluster))
    return look_at(images.name, output, cluster)


def check_classes(images: ImageSet, outputs: Outputs) -> None:
    """InputError, naming classes, where these images cannot be evaluated with this classifier.

    They must all have a label, and their classes must be among the classifier's. A published set must have
    its own classes, all of them, and the classifier must know them.
    """
    if not len(images.labels):
        raise InputError(
            f"{images.url} holds no readable image; give one that has some (what was rejected stands in "
            f"{storage.join(images.url, 'rejects')})"
        )
    if missing := int((images.labels == UNLABELLED).sum()):
        raise InputError(
            f"{missing:,} of the {len(images.labels):,} images of {images.url} have no label; put them into "
            "class folders, or leave them out"
        )
    if images.name in BENCHMARKS:
        _check_benchmark(images, BENCHMARKS[images.name], wnids(images.name), outputs)
    if (images.class_names is None) != (outputs.class_names is None):
        numbered, named = (
            (images.url, outputs.url) if images.class_names is None else (outputs.url, images.url)
        )
        raise InputError(
            f"the classes of {numbered} have numbers only, those of {named} names, and a number does not say "
            "which name it is; prepare images from class folders, import a classifier with --class_names"
        )
    if images.class_names is None:
        if (largest := int(images.labels.max())) >= outputs.num_classes:
            raise InputError(
                f"an image of {images.url} has label {largest}, but {outputs.url} tells "
                f"{outputs.num_classes} classes apart, from 0; give images with the labels of its fine-tuning"
            )
        return
    unknown = _seen(images) - set(outputs.class_names or ())
    if unknown:
        raise InputError(
            f"{images.url} has images of {_listed(unknown)}, which {outputs.url} does not know; give images "
            "of the classes it was fine-tuned on, in folders of these names"
        )


def answers_of(images: ImageSet, outputs: Outputs, *, restrict: bool) -> Answers:
    """The outputs whose logits compete on a set: on ImageNet-A and -R, those of its classes, else all.

    On a set of one's own, `restrict` lets only its classes compete; InputError where it has one class.
    """
    labels, names = images.labels, images.class_names
    if images.name in ("imagenet_a", "imagenet_r"):
        names = wnids(images.name)
        labels = np.arange(len(names))
    elif images.name in BENCHMARKS or not restrict:
        return None
    answers = tuple(np.unique(translate_labels(labels, names, outputs.class_names)).tolist())
    if len(answers) < 2:
        raise InputError(
            f"all images of {images.url} are of one class, and restrict_shifted lets no other compete; leave "
            "it out, or give images of more classes"
        )
    return answers


def _check_benchmark(images: ImageSet, title: str, expected: Sequence[str], outputs: Outputs) -> None:
    if outputs.class_names is None:
        raise InputError(
            f"the outputs of {outputs.url} have no names, so the classes of {title} cannot be found among "
            "them; import it with --class_names, a file with a wnid per line"
        )
    if lacking := set(expected) - set(outputs.class_names):
        raise InputError(
            f"{outputs.url} does not know {_listed(lacking)} of the {len(expected)} classes of {title}; give "
            "a classifier fine-tuned on ImageNet's class folders, which are named by wnid"
        )
    absent = set(expected) - set(images.class_names or ())
    strange = _seen(images) - set(expected)
    if absent or strange:
        faults = [f"lacks {_listed(absent)} of its {len(expected)} class folders"] if absent else []
        faults += [f"has {_listed(strange)} beside them"] if strange else []
        raise InputError(
            f"{images.url} is not {title}: it {' and '.join(faults)}; give the folder that holds its wnid "
            "folders, and nothing else"
        )


def _seen(images: ImageSet) -> set[str]:
    """Names of the classes that have an image."""
    names = images.class_names or ()
    return {names[int(label)] for label in np.unique(images.labels)}


def _listed(names: Collection[str], num: int = 5) -> str:
    shown = ", ".join(sorted(names)[:num])
    return f"{shown} and {len(names) - num:,} more" if len(names) > num else shown


def _is_named_like_an_image(source: Source) -> bool:
    name = storage.name(source.url)
    return not name.startswith(".") and name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS

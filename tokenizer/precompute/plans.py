"""The plans of a precompute pass: of a new dataset, of views added to one, of a code layer over one.

A plan holds everything that decides the bytes, and the id range of each shard. Nothing is written here.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from pipeline import storage
from pipeline.artifacts import canonical_json, differences
from pipeline.config import to_dict
from pipeline.errors import InputError
from shards.dataset.dataset import Dataset, layer_url, open_dataset, open_table, views_url
from shards.dataset.parts import read_plan, views_in_words
from shards.dataset.rows import read_shard_index
from shards.format.manifest import MANIFEST, EncodeRecipe, Recipe
from shards.format.plan import Plan
from shards.writer.layers import layer_plan
from tokenizer.model.artifact import describe, read_tokenizer
from tokenizer.precompute.config import PrecomputeConfig

CROP_BYTES_PER_PIXEL = 23_600 / 224**2
"""Measured on ImageNet crops at quality 95, 4:2:0."""


@dataclass(frozen=True, kw_only=True)
class WritePass:
    """A plan and the folder its shards go to."""

    root: str
    plan: Plan


def planned_passes(config: PrecomputeConfig, device: str) -> list[WritePass]:
    """The passes that a configuration asks for, in order of work; `device` is cpu or cuda.

    There is one, but for a code layer one for each part of the dataset that has pixels. Raises InputError,
    naming what differs, where the configuration does not fit what is at the output already.
    """
    if config.code_layer:
        return _layer_passes(config, device)
    assert config.images is not None
    images = open_dataset(config.images, "images")
    if config.extend:
        return [_extension_pass(config, images, device)]
    plan, stored = _crop_plan(config, images, device), read_plan(config.output)
    if stored is not None and plan.views > stored.views and not _recipe_differences(stored, plan):
        raise InputError(
            f"{config.output} has {stored.views} views of each image; to add "
            f"{views_in_words(stored.views, plan.views - stored.views)} without rewriting it give --extend"
        )
    return [WritePass(root=config.output, plan=plan)]


# ------------------------------------------------------------------------------------------------ crops


def _crop_plan(config: PrecomputeConfig, images: Dataset, device: str, base: Plan | None = None) -> Plan:
    """The plan of all views of a dataset, with the id ranges of `base` if there is one."""
    artifact = read_tokenizer(config.tokenizer)
    policy = config.views.resolve(artifact.config.image_size)
    if policy.views_per_image < 1:
        raise InputError(f"views.views_per_image is {policy.views_per_image}; store 1 view or more")
    encode = _encode_recipe(config, device)
    tokenizer = describe(artifact, encode.precision)
    if base is None:
        most = int(100e6 / (policy.side**2 * CROP_BYTES_PER_PIXEL))
        first_ids, samples = _ranges(images, max(1, min(config.samples_per_shard, most)))
    else:
        first_ids, samples = base.first_ids, base.samples
    return Plan(
        kind="tokens",
        inputs={"images": images.fingerprint, "tokenizer": tokenizer.fingerprint},
        recipe=Recipe(
            views=to_dict(policy),
            # Crop boxes are in the coordinates of the decoder that prepared the images: no setting here.
            decode=images.manifest.recipe.require_decode(),
            encode=encode,
            libraries=_libraries("numpy", "pillow", "simplejpeg", "torch"),
        ),
        first_ids=first_ids,
        samples=samples,
        views=policy.views_per_image,
        class_names=images.manifest.class_names,
        tokenizer=tokenizer,
    )


def _encode_recipe(config: PrecomputeConfig, device: str) -> EncodeRecipe:
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if device == "cuda" else "fp32"
    return EncodeRecipe(
        device=device,
        precision=precision,
        batch_size=config.batch_size,
        threads=config.encoder_threads,
    )


def _libraries(*names: str) -> dict[str, str]:
    return {name: metadata.version(name) for name in names}


def _ranges(images: Dataset, samples_per_shard: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Id ranges of at most `samples_per_shard` samples, and the number of samples in each.

    Small image shards are taken together, so that objects stay large; a shard with more samples is cut.
    """
    edges, sizes = images.id_ranges()
    first_ids: list[int] = []
    samples: list[int] = []
    for number, (first_id, size) in enumerate(zip(edges[:-1], sizes, strict=True)):
        if size > samples_per_shard:
            index = read_shard_index(images.shard(0, number), ("sample_id",))
            ids = index.column("sample_id").to_numpy()
            cuts = range(0, size, -(-size // -(-size // samples_per_shard)))
            first_ids += [first_id, *(int(ids[cut]) for cut in cuts[1:])]
            samples += [min(cuts.step, size - cut) for cut in cuts]
        elif samples and samples[-1] + size <= samples_per_shard:
            samples[-1] += size
        else:
            first_ids.append(first_id)
            samples.append(size)
    return (*first_ids, edges[-1]), tuple(samples)


# ------------------------------------------------------------------------------------------------ added views


def _extension_pass(config: PrecomputeConfig, images: Dataset, device: str) -> WritePass:
    """The pass that adds views to a finished dataset: the shards that a plan for all views would have given.

    Its id ranges are those of the base. An extension that is finished comes back as it is.
    """
    root, views = config.output, config.views.views_per_image
    dataset, base = open_dataset(root, "tokens"), read_plan(root)
    if base is None:
        raise InputError(f"{root} has no plan.json to go on with; copy the dataset again")
    plan = _crop_plan(config, images, device, base)
    if differing := _recipe_differences(base, plan):
        raise InputError(
            f"{root} cannot be extended with another recipe, which differs in {'; '.join(differing[:6])}; "
            "repeat the inputs and settings it was made with, or choose another output"
        )
    stored_views = dataset.num_views
    if views < stored_views or (views == stored_views and dataset.first_views == (0,)):
        raise InputError(
            f"{root} has {stored_views} views already; give views.views_per_image the number it shall have "
            "in all"
        )
    first_view = dataset.first_views[-1] if views == stored_views else stored_views
    place = views_url(root, first_view)
    started = read_plan(place)
    if started is not None and (end := started.first_view + started.views) != views:
        raise InputError(
            f"{place} is unfinished, with {views_in_words(first_view, end - first_view)}; finish it first: "
            f"--extend --views.views_per_image {end}"
        )
    if started is not None and views == stored_views:
        return WritePass(root=place, plan=started)
    if other := differences(base.recipe.libraries, plan.recipe.libraries):
        print(
            f"note: other library versions than the first views were made with ({'; '.join(other)}): each "
            "crop keeps its own codes, but resizing may differ slightly between views",
            flush=True,
        )
    inputs = {**plan.inputs, "base": open_table(root).manifest.fingerprint}
    plan = dataclasses.replace(plan, inputs=inputs, first_view=first_view, views=views - first_view)
    return WritePass(root=place, plan=plan)


def _recipe_differences(stored: Plan, asked: Plan) -> list[str]:
    """Inputs and settings in which two plans differ, but for the number of views and library versions."""

    def settings(plan: Plan) -> dict[str, Any]:
        stored = plan.to_json()
        value = json.loads(canonical_json({"inputs": plan.inputs, **stored["recipe"], **stored["header"]}))
        value.pop("libraries", None)
        value.get("views", {}).pop("views_per_image", None)
        return value

    return differences(settings(stored), settings(asked))


# ------------------------------------------------------------------------------------------------ code layers


def _layer_passes(config: PrecomputeConfig, device: str) -> list[WritePass]:
    """A pass for every part of the dataset that has crops; one that is finished comes back as it is."""
    dataset = open_dataset(config.output, "tokens")
    encode = _encode_recipe(config, device)
    tokenizer = describe(read_tokenizer(config.tokenizer), encode.precision)
    recipe = Recipe(encode=encode, libraries=_libraries("numpy", "simplejpeg", "torch"))
    passes: list[WritePass] = []
    for first_view in dataset.first_views:
        place = layer_url(config.output, tokenizer.fingerprint, first_view)
        plan = layer_plan(open_table(views_url(config.output, first_view)), tokenizer, recipe)
        if storage.exists(storage.join(place, MANIFEST)):
            plan = read_plan(place) or plan
        passes.append(WritePass(root=place, plan=plan))
    return passes

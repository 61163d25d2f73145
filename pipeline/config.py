"""From the command line to one frozen dataclass, and from an outcome to an exit status.

Every job is `run_job(main, Config)`: YAML through `--config` (a path or a URL), `--section.key value` on top
of it, `--print_config`, and `--help` made from the docstrings of the fields.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pipeline import storage
from pipeline.errors import InputError
from pipeline.training.interruption import InterruptedRunError

ConfigT = TypeVar("ConfigT")

# Metadata of a configuration's fields.
ASIDE = {"identity": False}
"""Decides nothing about the result (speed, bookkeeping), or is known by the fingerprints of the inputs."""
URL = {"url": "one"}
"""A file, folder or URL, which `absolute_places` makes valid in any process."""
PLACE = {**URL, **ASIDE}
PLACES = {"url": "several", **ASIDE}
"""Several, with commas between them."""


def parse(config_class: type[ConfigT], argv: Sequence[str] | None = None) -> ConfigT:
    """The configuration named by `argv`; InputError, in one line, for an unknown key or a wrong value."""
    import jsonargparse  # here: readers of shards import this module for the metadata of their fields

    jsonargparse.set_parsing_settings(
        docstring_parse_attribute_docstrings=True, config_read_mode_fsspec_enabled=True
    )
    parser = jsonargparse.ArgumentParser(
        prog=f"python -m {_module_name()}",
        description=(config_class.__doc__ or "").strip(),
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file or URL with any of the keys below")
    parser.add_class_arguments(config_class, as_group=False)
    try:
        parsed = parser.instantiate_classes(parser.parse_args(_explicit_flags(config_class, argv)))
    except jsonargparse.ArgumentError as error:
        raise InputError(f"{' '.join(str(error).split())}; `--help` lists every key") from None
    values = {field.name: parsed[field.name] for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    return config_class(**values)


def run_job(main: Callable[[ConfigT], object], config_class: type[ConfigT]) -> None:
    """Run a job from the command line: exit 0, 2 for bad input (one clear line), 1 for anything else.

    `ray job submit` itself returns 1 for both; the status stands in the job's message.
    """
    faulthandler.enable()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        main(parse(config_class))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except InterruptedRunError as error:
        print(f"interrupted: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as JSON-able values: tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def identity(config: Any) -> dict[str, Any]:
    """What decides a run's result: its settings as JSON-able values, without the fields that stand aside."""
    aside = {field.name for field in dataclasses.fields(config) if not field.metadata.get("identity", True)}
    return {key: value for key, value in to_dict(config).items() if key not in aside}


def absolute_places(config: ConfigT) -> ConfigT:
    """A configuration whose places (those that are set, in its parts too) are absolute URLs.

    Ray Train runs its workers in a folder of its own, where a relative path means something else.
    """
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value, kind = getattr(config, field.name), field.metadata.get("url")
        if dataclasses.is_dataclass(value):
            changes[field.name] = absolute_places(value)
        elif value is not None and kind is not None:
            urls = [value] if kind == "one" else [url.strip() for url in value.split(",")]
            changes[field.name] = ",".join(map(storage.absolute, urls))
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def _explicit_flags(config_class: type[Any], argv: Sequence[str] | None) -> list[str]:
    """The arguments with `--json` written out as `--json=true`, for the boolean fields."""
    words = list(sys.argv[1:] if argv is None else argv)
    flags = {f"--{field.name}" for field in dataclasses.fields(config_class) if field.type in ("bool", bool)}
    following = [*words[1:], "--"]
    return [
        f"{word}=true" if word in flags and after.startswith("--") else word
        for word, after in zip(words, following, strict=False)
    ]


def _module_name() -> str:
    main_module = sys.modules["__main__"]
    spec = getattr(main_module, "__spec__", None)
    return spec.name if spec is not None else os.path.basename(sys.argv[0])

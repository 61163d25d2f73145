"""A contact sheet of token shards: crops, their code maps in colours, and patches that share a code.

python -m jobs.preview_shards --dataset runs/tokens --output runs/preview [--samples 24] [--code 17]
"""

from __future__ import annotations

from dataclasses import dataclass

from jobs.report.preview_page import MAX_VIEWS, contact_sheet, html_page
from pipeline import storage
from pipeline.config import run_job
from pipeline.errors import InputError
from shards.dataset.preview import preview
from shards.format.manifest import open_dataset


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """Draw a contact sheet, preview.png, and the same as a self-contained page, preview.html."""

    dataset: str
    """Folder or URL of token shards."""
    output: str
    """Folder or URL where the two files go; what bears their names there is replaced."""
    samples: int = 24
    """Images that are shown, spread over the dataset."""
    views: int = 4
    """At most so many stored views of an image, side by side."""
    code: int | None = None
    """The code whose patches are shown; null shows several, from the most used to the rarest."""
    codes: str | None = None
    """A code layer, named by the first 8 digits of its tokenizer, in place of the stored codes."""

    def __post_init__(self) -> None:
        if self.samples < 1 or not 1 <= self.views <= MAX_VIEWS:
            raise InputError(
                f"samples {self.samples} and views {self.views} make no sheet; give 1 or more samples, 1 to "
                f"{MAX_VIEWS} views"
            )


def main(config: PreviewConfig) -> None:
    """Read a few hundred crops, draw, and say where."""
    config = storage.absolute_places(config, "dataset", "output")
    dataset = open_dataset(config.dataset, "tokens", codes=config.codes)
    shown = preview(
        dataset,
        samples=config.samples,
        views=config.views,
        code=config.code,
        codes=8,
        patches=16 if config.code is None else 64,
    )
    sheet, page = contact_sheet(dataset, shown), html_page(dataset, shown)
    for name, data in (("preview.png", sheet), ("preview.html", page)):
        storage.put(storage.join(config.output, name), data)
        print(f"{storage.join(config.output, name)}: {len(data):,} bytes")


if __name__ == "__main__":
    run_job(main, PreviewConfig)

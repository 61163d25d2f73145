"""Draws the quickstart's image set: a folder of labelled pictures, and a label map for each of them.

python -m jobs.draw_images --output drawn        # then: prepare_images --source drawn/images
"""

from __future__ import annotations

import io
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from PIL import Image

from jobs.report import drawing
from pipeline import artifacts, config, storage
from pipeline.errors import InputError
from pipeline.training import metrics

HEADER_NAME = "drawing"
WRITERS = 8
"""Threads that put files: each put waits for the disk or the network, not for the processor."""


@dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """Draws labelled pictures for trying the pipeline without any data of one's own."""

    output: str = field(metadata=config.PLACE)
    """Folder or URL: pictures go to images/<class>/, label maps (palette PNG) to label_maps/<class>/."""

    num_images: int = 2400
    """How many pictures; image i has class i modulo num_classes."""

    num_classes: int = 12
    """How many of the 36 combinations of texture and shape."""

    image_size: int = 128
    """Side of a picture in pixels."""

    jpeg_quality: int = 95
    """Quality of the JPEG files, 1 to 100."""

    seed: int = 0
    """Another seed draws other pictures of the same classes."""

    def __post_init__(self) -> None:
        limits = {
            "num_classes": (2, drawing.MAX_CLASSES),
            "num_images": (self.num_classes, 99_999),
            "image_size": (32, 4096),
            "jpeg_quality": (1, 100),
            "seed": (0, 2**63 - 1),
        }
        for key, (low, high) in limits.items():
            value = getattr(self, key)
            if not low <= value <= high:
                raise InputError(f"--{key} {value} is out of range; give {low} to {high}")


def draw_images(config_: DrawConfig) -> str:
    """Draw what is missing and return the URL of the finished image folder.

    A finished set of the same configuration is left alone; InputError when the output holds anything else.
    """
    output = storage.absolute(config_.output)
    images = storage.join(output, "images")
    identity = {
        "job": "draw_images",
        "version": drawing.DRAWING_VERSION,
        **config.identity(config_),
    }
    artifacts.claim(output, identity)
    header = artifacts.read_header(output, HEADER_NAME)
    if header is not None and _stored_bytes(output) == header["stored_bytes"]:
        print(f"{images}: {config_.num_images:,} images of {config_.num_classes} classes are already there")
        return images

    names = drawing.class_names(config_.num_classes)
    progress = metrics.Progress("drawing", config_.num_images, "images")
    stored_bytes = 0
    with ThreadPoolExecutor(WRITERS) as writers:
        puts: list[Future[None]] = []
        for index in range(config_.num_images):
            picture = drawing.draw(
                index, num_classes=config_.num_classes, image_size=config_.image_size, seed=config_.seed
            )
            folder = names[picture.label]
            for url, data in (
                (storage.join(images, folder, f"{index:05d}.jpg"), _jpeg(picture, config_.jpeg_quality)),
                (
                    storage.join(output, "label_maps", folder, f"{index:05d}.png"),
                    _png(picture, config_.num_classes),
                ),
            ):
                stored_bytes += len(data)
                puts.append(writers.submit(storage.put, url, data))
            if len(puts) >= 16 * WRITERS:  # bounds what waits in memory, and shows a failed put early
                _settle(puts)
            progress.update()
        _settle(puts)
    progress.close()
    header = {
        "config": identity,
        "classes": list(names),
        "label_map_values": list(drawing.label_names(config_.num_classes)),
        "stored_bytes": stored_bytes,
    }
    artifacts.publish(output, HEADER_NAME, {}, header)
    print(f"{images}: {config_.num_images:,} images of {len(names)} classes, {stored_bytes / 1e6:.0f} MB")
    return images


def _stored_bytes(output: str) -> int:
    """Bytes of all pictures and label maps found: a set somebody removed files from is drawn again."""
    folders = (storage.join(output, "images"), storage.join(output, "label_maps"))
    return sum(found.bytes for folder in folders for found in storage.list_files(folder))


def _settle(puts: list[Future[None]]) -> None:
    for put in puts:
        put.result()
    puts.clear()


def _jpeg(picture: drawing.Drawing, quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture.pixels).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def _png(picture: drawing.Drawing, num_classes: int) -> bytes:
    """The label map as a palette image: its values are the labels, its colours are for people."""
    image = Image.fromarray(picture.label_map)
    image.putpalette(drawing.label_palette(num_classes))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def main(config_: DrawConfig) -> None:
    """Entry point of the job."""
    draw_images(config_)


if __name__ == "__main__":
    config.run_job(main, DrawConfig)

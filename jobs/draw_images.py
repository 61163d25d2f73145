"""Draws the quickstart's image set: a folder of labelled pictures, and a label map for each of them.

python -m jobs.draw_images --output drawn        # then: prepare_images --source drawn/images
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field

from PIL import Image

from jobs.report import drawing
from pipeline import artifacts, config, storage
from pipeline.errors import InputError
from pipeline.threads import in_order
from pipeline.training.metrics import Progress

HEADER_NAME = "drawing"
WRITERS = 8
"""Threads that draw and put files: most of them wait for the disk or the network."""


@dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """Draws labelled pictures for trying the pipeline without any data of one's own."""

    output: str = field(metadata=config.PLACE)
    """Folder or URL: pictures go to images/<class>/, label maps (palette PNG) to label_maps/<class>/."""
    num_images: int = 2400
    """How many pictures; image i has class i modulo num_classes."""
    num_classes: int = drawing.MAX_CLASSES
    """How many of the 12 combinations of texture and shape."""
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
            if not low <= (value := getattr(self, key)) <= high:
                raise InputError(f"--{key} {value} is out of range; give {low} to {high}")


def draw_images(settings: DrawConfig) -> str:
    """Draw what is missing and return the URL of the finished image folder.

    A finished set of the same configuration is left alone; InputError when the output holds anything else.
    """
    output = storage.absolute(settings.output)
    folders = images, label_maps = storage.join(output, "images"), storage.join(output, "label_maps")
    identity = {"job": "draw_images", "version": drawing.DRAWING_VERSION, **config.identity(settings)}
    artifacts.claim(output, identity)
    names = drawing.class_names(settings.num_classes)
    set_of = f"{images}: {settings.num_images:,} images of {len(names)} classes"
    # A set somebody removed files from is drawn again.
    present_bytes = sum(file.bytes for folder in folders for file in storage.list_files(folder))
    header = artifacts.read_header(output, HEADER_NAME)
    if header is not None and present_bytes == header["stored_bytes"]:
        print(f"{set_of} are already there")
        return images

    def store(index: int) -> int:
        """Put one picture and its label map; returns their bytes."""
        picture = drawing.draw(
            index, num_classes=settings.num_classes, image_size=settings.image_size, seed=settings.seed
        )
        jpeg, png, label_map = io.BytesIO(), io.BytesIO(), Image.fromarray(picture.label_map)
        Image.fromarray(picture.pixels).save(jpeg, "JPEG", quality=settings.jpeg_quality, subsampling="4:2:0")
        # Its values are the labels, its colours are for people.
        label_map.putpalette(drawing.label_palette(settings.num_classes))
        label_map.save(png, "PNG", compress_level=3)
        folder = names[picture.label]
        storage.put(storage.join(images, folder, f"{index:05d}.jpg"), jpeg.getvalue())
        storage.put(storage.join(label_maps, folder, f"{index:05d}.png"), png.getvalue())
        return jpeg.tell() + png.tell()

    progress, stored_bytes = Progress("drawing", settings.num_images, "images"), 0
    for num_bytes in in_order(store, range(settings.num_images), WRITERS):
        stored_bytes += num_bytes
        progress.update()
    progress.close()
    header = {
        "config": identity,
        "classes": list(names),
        "label_map_values": list(drawing.label_names(settings.num_classes)),
        "stored_bytes": stored_bytes,
    }
    artifacts.publish(output, HEADER_NAME, {}, header)
    print(f"{set_of}, {stored_bytes / 1e6:.0f} MB")
    return images


if __name__ == "__main__":
    config.run_job(draw_images, DrawConfig)

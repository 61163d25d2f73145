"""The contact sheet shows what is stored: crops, their codes, and patches that really carry the code."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs.preview_shards import PreviewConfig, main
from jobs.report.preview_page import CROP, MARGIN
from pipeline.errors import InputError
from shards.dataset.preview import code_colors, preview
from shards.format.build import build_shard
from shards.format.manifest import Dataset, open_dataset
from shards.format.plan import Plan
from shards.format.records import StoredSample
from shards.pixels.views import CropBox, decode_crop, encode_crop
from shards.writer.commit import commit, finish, pending, start

SIDE, PATCH, CODEBOOK_SIZE = 16, 4, 40
GRID = (SIDE // PATCH, SIDE // PATCH)


def drawn(sample_id: int, view: int) -> tuple[np.ndarray, np.ndarray]:
    """A crop whose patches have flat colours, one for each code, and its codes: 39 never, 20 rarely."""
    rng = np.random.default_rng([sample_id, view])
    codes = rng.integers(0, 20, GRID).astype(np.uint16)
    if sample_id == 7:
        codes[0, 0] = 20
    colours = np.stack([codes * 12, 255 - codes * 12, codes * 5 + 20], axis=-1).astype(np.uint8)
    return colours.repeat(PATCH, axis=0).repeat(PATCH, axis=1), codes


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = str(tmp_path_factory.mktemp("preview") / "tokens")
    tokenizer = {"fingerprint": "a" * 64, "grid": GRID, "codebook_size": CODEBOOK_SIZE, "image_size": SIDE}
    header = {"tokenizer": tokenizer, "class_names": ["ant", "bee"]}
    plan = Plan(
        kind="tokens",
        inputs={},
        recipe={},
        first_ids=(0, 6, 7, 16),
        views=2,
        header=header,
        samples=(6, 1, 9),
    )
    start(root, plan)
    for item in pending(root, plan):
        samples = [
            StoredSample(
                sample_id=i,
                view=item.view,
                image=encode_crop(drawn(i, item.view)[0], 95),
                extension="jpg",
                source=f"pictures/{i}.jpg",
                source_width=SIDE,
                source_height=SIDE,
                label=i % 2,
                crop=CropBox(top=0, left=0, height=SIDE, width=SIDE),
                codes=drawn(i, item.view)[1],
            )
            for i in range(item.first_id, item.end_id)
        ]
        commit(root, plan, item, build_shard(samples, [], grid=GRID, codebook_size=CODEBOOK_SIZE))
    finish(root, plan, decode_crop)
    return root


def shown(dataset: Dataset, **changes: Any) -> Any:
    return preview(dataset, **{"samples": 5, "views": 4, "code": None, "codes": 4, "patches": 6, **changes})


def test_samples_are_the_stored_ones(tokens: str) -> None:
    found = shown(open_dataset(tokens))
    assert [sample.sample_id for sample in found.samples] == [0, 4, 8, 11, 15]
    for sample in found.samples:
        for view in range(2):
            pixels, codes = drawn(sample.sample_id, view)
            np.testing.assert_array_equal(sample.pixels[view], decode_crop(encode_crop(pixels, 95)))
            np.testing.assert_array_equal(sample.codes[view], codes)
        assert (sample.source, sample.label) == (f"pictures/{sample.sample_id}.jpg", sample.sample_id % 2)
    assert len(shown(open_dataset(tokens), samples=100).samples) == 16


def test_patches_carry_their_code(tokens: str) -> None:
    counts = np.bincount(np.concatenate([drawn(i, 0)[1].ravel() for i in range(16)]), minlength=CODEBOOK_SIZE)
    found = shown(open_dataset(tokens))
    assert (found.searched, found.patches) == (16, 256)
    codes = [one.code for one in found.codes]
    assert codes[0] == counts.argmax() and codes[-1] == 20
    assert [one.count for one in found.codes] == counts[codes].tolist()
    for one in found.codes:
        holders = [i for i in range(16) if one.code in drawn(i, 0)[1]]
        assert one.images == len(holders) and len(one.patches) == min(6, len(holders))
        assert {int(key[:10]) for key in one.keys} <= set(holders) and len(set(one.keys)) == len(one.keys)
        for key, patch in zip(one.keys, one.patches, strict=True):
            pixels = decode_crop(encode_crop(drawn(int(key[:10]), 0)[0], 95))
            middle = patch[PATCH : 2 * PATCH, PATCH : 2 * PATCH]
            assert patch.shape == (3 * PATCH, 3 * PATCH, 3)
            places = [tuple(place) for place in np.argwhere(drawn(int(key[:10]), 0)[1] == one.code)]
            cut = [pixels[r * PATCH : (r + 1) * PATCH, c * PATCH : (c + 1) * PATCH] for r, c in places]
            assert any(np.array_equal(middle, there) for there in cut)
    [chosen] = shown(open_dataset(tokens), code=3, patches=30).codes
    assert chosen.code == 3 and len(chosen.patches) == sum(3 in drawn(i, 0)[1] for i in range(16))


def test_colours_do_not_depend_on_the_codebook_and_neighbours_differ() -> None:
    colors = code_colors(8192)
    np.testing.assert_array_equal(colors[:100], code_colors(100))
    assert len(np.unique(colors[:256], axis=0)) == 256
    assert np.abs(np.diff(colors.astype(int), axis=0)).sum(axis=1).min() > 60


def test_the_job_writes_a_sheet_and_a_page(
    tokens: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(PreviewConfig(dataset=tokens, output=str(tmp_path), samples=3))
    assert "preview.png" in capsys.readouterr().out
    sheet = np.asarray(Image.open(io.BytesIO((tmp_path / "preview.png").read_bytes())).convert("RGB"))
    colors = code_colors(CODEBOOK_SIZE)
    for number, view in ((0, 0), (0, 1)):
        # the code map of the first image, wherever it lies on the sheet: its rows, nearest neighbour
        codes = drawn(number, view)[1]
        row = colors[codes[0].repeat(CROP // GRID[1])]
        column = MARGIN + view * (CROP + 4)
        block = sheet[:, column : column + CROP]
        assert (block == row[None]).all(axis=(1, 2)).any()
    page = (tmp_path / "preview.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert page.count("<img") == 3 * 4 + sum(
        len(one.patches) for one in shown(open_dataset(tokens), codes=8, patches=16).codes
    )
    assert "0  ant" in page and "Token shards" in page


def test_what_cannot_be_shown_is_one_clear_error(tokens: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="code 40 is not below the codebook's 40"):
        main(PreviewConfig(dataset=tokens, output=str(tmp_path / "out"), code=40))
    with pytest.raises(InputError, match="samples 0"):
        PreviewConfig(dataset=tokens, output=str(tmp_path / "out"), samples=0)
    assert not (tmp_path / "out").exists()
    main(PreviewConfig(dataset=tokens, output=str(tmp_path / "out"), code=39))  # dead: said, not refused
    assert "no patch carries it" in (tmp_path / "out" / "preview.html").read_text()

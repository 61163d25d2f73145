"""The codebook's page and figures show patches that carry the code, boxed in place, and nothing foreign."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.report.pictures import RED
from jobs.visualize_codebook import VisualizeConfig, read_codebook, visualize_codebook
from pipeline import storage
from pipeline.errors import InputError
from shards.dataset.codes import code_statistics
from shards.dataset.dataset import open_dataset
from shards.format.build import build_shard
from shards.format.manifest import TokenizerSpec
from shards.format.plan import Plan
from shards.format.records import StoredSample
from shards.pixels.views import CropBox, decode_crop, encode_crop
from shards.writer.commit import commit, finish, pending, start
from tokenizer.model.artifact import VisualTokenizer

SIDE, PATCH, CODEBOOK_SIZE, SAMPLES = 32, 8, 32, 40
GRID = (SIDE // PATCH, SIDE // PATCH)
RECORDED = Path(__file__).parents[1] / "recorded" / "data"
TOKENIZER = str(RECORDED / "tokenizer")
FILES = ("codebook.html", "codes.png", "usage.png", "places.png")


def drawn(sample_id: int, view: int) -> tuple[np.ndarray, np.ndarray]:
    """Code 1 is upright stripes, code 2 level ones and only in the top row, 3 to 9 noise, 0 flat."""
    rng = np.random.default_rng([sample_id, view])
    codes = rng.choice([0, 1, 3, 4, 5, 9], GRID)
    codes[0] = np.where(rng.random(GRID[1]) < 0.7, 2, codes[0])
    pixels = np.full((SIDE, SIDE, 3), 128, np.uint8)
    stripes = np.where(np.arange(PATCH) % 4 < 2, 30, 220)
    for row, column in np.ndindex(GRID):
        patch = pixels[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
        match int(codes[row, column]):
            case 0:
                patch[:] = 90
            case 1:
                patch[:] = stripes[None, :, None]
            case 2:
                patch[:] = stripes[:, None, None]
            case _:
                patch[:] = rng.integers(0, 256, patch.shape)
    return pixels, codes.astype(np.uint16)


def write_tokens(root: str, spec: TokenizerSpec, *, labels: bool = True) -> None:
    plan = Plan(
        kind="tokens",
        inputs={},
        first_ids=(0, 16, SAMPLES),
        views=2,
        tokenizer=spec,
        class_names=("ant", "bee <b>") if labels else None,
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
                label=i % 2 if labels else None,
                crop=CropBox(top=0, left=0, height=SIDE, width=SIDE),
                codes=drawn(i, item.view)[1],
            )
            for i in range(item.first_id, item.end_id)
        ]
        commit(root, plan, item, build_shard(samples, [], grid=GRID, codebook_size=CODEBOOK_SIZE))
    finish(root, plan, decode_crop)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = str(tmp_path_factory.mktemp("codebook") / "tokens")
    write_tokens(root, VisualTokenizer.load(TOKENIZER).spec)
    return root


@pytest.fixture(scope="module")
def shown(tokens: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("shown") / "out"
    visualize_codebook(
        VisualizeConfig(
            dataset=tokens, tokenizer=TOKENIZER, output=str(output), num_codes=5, patches_per_code=6
        )
    )
    return output


def result(output: Path) -> dict:
    return json.loads((output / "codebook.json").read_text())["result"]


# ------------------------------------------------------------------------------------------------ numbers


def test_numbers_are_those_of_the_stored_codes(shown: Path):
    numbers = result(shown)
    stored = np.stack([drawn(i, view)[1] for i in range(SAMPLES) for view in range(2)])
    counts = np.bincount(stored.ravel(), minlength=CODEBOOK_SIZE)
    assert numbers["counts"] == counts.tolist() and numbers["patches"] == counts.sum()
    assert numbers["codebook_usage"] == pytest.approx(7 / CODEBOOK_SIZE)
    assert numbers["perplexity"] == pytest.approx(code_statistics(counts).perplexity)
    labels = np.repeat(np.arange(SAMPLES) % 2, 2)
    for code in numbers["codes"]:
        assert code["share"] == pytest.approx(counts[code["code"]] / counts.sum())
        patches = np.array([(stored[labels == label] == code["code"]).sum() for label in (0, 1)])
        assert [share["label"] for share in code["classes"]] == np.argsort(-patches, kind="stable").tolist()
        for share in code["classes"]:
            assert share["share"] == pytest.approx(patches[share["label"]] / patches.sum())
            assert share["lift"] == pytest.approx(2 * patches[share["label"]] / patches.sum())


def test_alike_codes_come_first_and_the_flat_one_after_all_others(shown: Path):
    codes = [code["code"] for code in result(shown)["codes"]]
    # Seven codes occur; four of them have the contrast of the median or more.
    assert set(codes[:2]) == {1, 2} and 0 not in codes[:4]
    likeness = [code["consistency"] for code in result(shown)["codes"]]
    assert likeness[0] > 0.8 and likeness[:4] == sorted(likeness[:4], reverse=True)


def test_patches_carry_their_code_and_come_from_different_images(shown: Path):
    for code in result(shown)["codes"]:
        assert len({patch["key"] for patch in code["patches"]}) == 6 == len(code["patches"])
        for patch in code["patches"]:
            assert drawn(int(patch["key"][:10]), 0)[1].ravel()[patch["patch"]] == code["code"]


def test_the_code_of_the_top_row_is_the_one_bound_to_a_place(shown: Path):
    numbers = result(shown)
    [bound] = [code for code in numbers["codes"] if code["code"] == 2]
    assert bound["position_bits"] == pytest.approx(2, abs=0.1) and bound["position_bits_shifted"] < 0.5
    assert numbers["position_bits"] > 3 * numbers["position_bits_shifted"]


def test_neighbours_are_the_nearest_codes_of_the_tokenizer(shown: Path, tokens: str):
    vectors = read_codebook(TOKENIZER, open_dataset(tokens))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    for code in result(shown)["codes"]:
        cosines = [(float(vectors[code["code"]] @ other), number) for number, other in enumerate(vectors)]
        nearest = [number for _, number in sorted(cosines, reverse=True) if number != code["code"]][:3]
        assert [near["code"] for near in code["neighbours"]] == nearest


# ------------------------------------------------------------------------------------------------ pictures


def test_the_page_is_self_contained_and_shows_every_patch(shown: Path):
    page = (shown / "codebook.html").read_text()
    assert not re.findall(r'(?:src|href|srcset|action|poster)\s*=\s*"(?!data:image/)', page)
    assert "url(" not in page and "@import" not in page and "<script" not in page and "<link" not in page
    numbers = result(shown)
    for code in numbers["codes"]:
        assert f"<b>code {code['code']}</b>" in page and f"likeness {code['consistency']:.2f}" in page
        assert f'alt="places of code {code["code"]}"' in page
        for patch in code["patches"]:
            assert f'alt="{patch["key"]}, patch {patch["patch"]}"' in page
    assert page.count('alt="image"') == page.count('alt="codes"') == 6, "crops and their codes"
    assert "bee &lt;b&gt;" in page and "<b>)" not in page
    assert f"{numbers['position_bits']:.3f} of the {numbers['code_entropy_bits']:.2f} bits" in page


def test_figures_decode_and_the_header_names_them(shown: Path):
    header = json.loads((shown / "codebook.json").read_text())
    assert sorted(header["files"]) == sorted(FILES)
    for name in FILES[1:]:
        with Image.open(shown / name) as picture:
            assert picture.format == "PNG" and picture.size[0] > 800
            assert np.asarray(picture.convert("RGB")).std() > 10, "not an empty sheet"
    sheet = np.asarray(Image.open(shown / "codes.png").convert("RGB"))
    assert (sheet == RED).all(axis=2).sum() > 5 * 6 * 2 * 60, "two boxes for each patch"


def test_the_same_settings_give_the_same_bytes_at_any_url_and_a_finished_page_stays(
    tokens: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = VisualizeConfig(
        dataset=tokens, output=str(tmp_path / "a"), num_codes=2, patches_per_code=3, seed=4
    )
    visualize_codebook(config)
    visualize_codebook(dataclasses.replace(config, output="memory://codebooks/b"))
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == storage.read(f"memory://codebooks/b/{name}")
    (tmp_path / "a" / "usage.png").unlink()
    capsys.readouterr()
    visualize_codebook(config)
    assert "finished already" in capsys.readouterr().out and not (tmp_path / "a" / "usage.png").exists()


def test_without_labels_and_tokenizer_there_are_no_classes_and_neighbours(tmp_path: Path):
    spec = TokenizerSpec(fingerprint="a" * 64, grid=GRID, codebook_size=CODEBOOK_SIZE, image_size=SIDE)
    write_tokens(str(tmp_path / "tokens"), spec, labels=False)
    visualize_codebook(
        VisualizeConfig(
            dataset=str(tmp_path / "tokens"), output=str(tmp_path / "out"), num_codes=2, samples=20
        )
    )
    numbers = result(tmp_path / "out")
    assert numbers["searched_crops"] == 20
    assert all(code["classes"] == [] == code["neighbours"] for code in numbers["codes"])
    assert "nearest" not in (tmp_path / "out" / "codebook.html").read_text()


# ------------------------------------------------------------------------------------------------ bad input


def refused(config: VisualizeConfig, words: str) -> None:
    """One clear line, and nothing new below the output."""
    output = Path(config.output)
    before = sorted(output.rglob("*")) if output.exists() else None
    with pytest.raises(InputError, match=words) as caught:
        visualize_codebook(config)
    assert "\n" not in str(caught.value)
    assert (sorted(output.rglob("*")) if output.exists() else None) == before


def test_bad_input_is_one_clear_error_and_nothing_is_written(tokens: str, shown: Path, tmp_path: Path):
    config = VisualizeConfig(dataset=tokens, output=str(tmp_path / "out"))

    def changed(**values: object) -> VisualizeConfig:
        return dataclasses.replace(config, **values)  # type: ignore[arg-type]

    other = str(RECORDED / "tokenizer_2")
    refused(changed(tokenizer=other), "has codes of tokenizer .* give the tokenizer that the codes came from")
    refused(changed(output=str(shown)), "belongs to another run")
    refused(changed(dataset=str(tmp_path / "nowhere")), "there is no dataset at")
    refused(changed(codes="12345678"), "has no finished code layer 12345678")
    refused(changed(min_images=41), r"no code has 12 patches in 41 of the 40 crops.*raise --samples")
    refused(changed(tokenizer=str(tmp_path / "nowhere")), "no finished tokenizer at")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    refused(changed(output=str(tmp_path / "taken")), "already holds something else")

    unfinished = tmp_path / "unfinished"
    spec = TokenizerSpec(fingerprint="a" * 64, grid=GRID, codebook_size=CODEBOOK_SIZE, image_size=SIDE)
    write_tokens(str(unfinished), spec)
    (unfinished / "manifest.json").unlink()
    refused(changed(dataset=str(unfinished)), "is unfinished")
    for key in ("num_codes", "patches_per_code", "samples", "min_images"):
        with pytest.raises(InputError, match=f"--{key} is 0"):
            changed(**{key: 0})
    with pytest.raises(InputError, match="--seed is -1"):
        changed(seed=-1)

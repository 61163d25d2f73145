"""Codes are those of the stored pixels, or nearly: what differs is counted, by what it misses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.verify_shards import VerifyConfig, main
from pipeline.cluster.config import ClusterConfig
from pipeline.errors import InputError
from shards.dataset.dataset import ShardTable, open_dataset, open_table
from shards.dataset.parts import parts as parts_of
from shards.pixels.views import ViewPolicy
from tokenizer.model.artifact import VisualTokenizer, load_vqkd, read_tokenizer
from tokenizer.precompute import pairing as module
from tokenizer.precompute.config import PrecomputeConfig
from tokenizer.precompute.pairing import parts_of_tokenizer, retokenize
from tokenizer.precompute.run import precompute_shards


@pytest.fixture(scope="module")
def token_shards(
    image_shards: str, tokenizer_url: str, other_tokenizer_url: str, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """39 crops in two shards, with the codes of both tokenizers."""
    config = PrecomputeConfig(
        images=image_shards,
        tokenizer=tokenizer_url,
        output=str(tmp_path_factory.mktemp("tokens") / "out"),
        views=ViewPolicy(scale=(0.3, 1.0), seed=5),
        batch_size=8,
        samples_per_shard=20,
        encoder_threads=1,
        cluster=ClusterConfig(num_workers=0),
    )
    precompute_shards(config)
    precompute_shards(
        dataclasses.replace(config, images=None, tokenizer=other_tokenizer_url, code_layer=True)
    )
    return config.output


@pytest.fixture
def parts(token_shards: str) -> list[ShardTable]:
    return [open_table(part.url) for part in parts_of(token_shards)]


def test_codes_of_each_tokenizer_are_proven(
    parts: list[ShardTable], tokenizer_url: str, other_tokenizer_url: str
) -> None:
    for url, kind, area in ((tokenizer_url, "tokens", 16), (other_tokenizer_url, "codes", 4)):
        mine = parts_of_tokenizer(parts, url)
        assert {part.manifest.kind for part in mine} == {kind}
        found = retokenize(parts, url, 1.0)
        assert found.exact and found.sound
        assert (found.samples, found.compared, found.equal) == (39, 39 * area, 39 * area)
        assert f"{39 * area} codes compared, {39 * area} equal" in str(found)


def test_a_share_takes_some_of_every_shard(parts: list[ShardTable], tokenizer_url: str) -> None:
    mine = parts_of_tokenizer(parts, tokenizer_url)
    shards = mine[0].num_shards
    assert retokenize(parts, tokenizer_url, 1e-9).samples == shards > 1
    some = retokenize(parts, tokenizer_url, 0.3)
    assert shards <= some.samples < 39
    assert retokenize(parts, tokenizer_url, 1.0, skip=lambda *_: True).samples == 0


def test_one_other_code_is_wrong_unless_it_is_nearly_as_good(
    parts: list[ShardTable], tokenizer_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes_of = module.codes_of

    def one_changed(table: object) -> np.ndarray:
        codes = codes_of(table).copy()  # type: ignore[arg-type]
        codes[3, 7] = (codes[3, 7] + 1) % 16
        return codes

    monkeypatch.setattr(module, "codes_of", one_changed)
    mine = parts_of_tokenizer(parts, tokenizer_url)
    shards = mine[0].num_shards
    found = retokenize(parts, tokenizer_url, 1.0)
    assert (found.wrong, found.near_ties, found.sound) == (shards, 0, False)
    assert found.equal == found.compared - shards and len(found.differing) == shards
    assert module.NEAR_TIE < found.worst_gap <= 2
    assert found.differing[0] in str(found)

    monkeypatch.setattr(module, "NEAR_TIE", 2.0)
    near = retokenize(parts, tokenizer_url, 1.0)
    assert (near.wrong, near.near_ties, near.exact, near.sound) == (0, shards, True, False)
    monkeypatch.setattr(module, "computes_alike", lambda manifest, tokenizer: False)
    elsewhere = retokenize(parts, tokenizer_url, 1.0)
    assert (elsewhere.wrong, elsewhere.near_ties, elsewhere.sound) == (0, shards, True)
    assert elsewhere.differing == ()


def test_gaps_are_the_similarity_that_is_missed(tokenizer_url: str) -> None:
    """Against the obvious: all similarities of one image at a time."""
    tokenizer = VisualTokenizer.load(tokenizer_url, batch_size=4)
    model = load_vqkd(read_tokenizer(tokenizer_url))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8, generator=generator)
    codes = torch.randint(0, 16, (6, 16), generator=generator)
    gaps = tokenizer.code_gaps(pixels, codes)
    for image, given, found in zip(pixels, codes, gaps, strict=True):
        features = model.encode_features(image.permute(2, 0, 1)[None].float() / 127.5 - 1)[0]
        features = features / features.norm(dim=1, keepdim=True)
        similarity = features @ model.quantize.codebook.t()
        expected = similarity.max(dim=1).values - similarity[torch.arange(16), given]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert float(tokenizer.code_gaps(pixels, tokenizer.encode(pixels)).abs().max()) == 0


def test_another_tokenizer_url_is_refused_naming_both(
    token_shards: str, tokenizer_url: str, other_tokenizer_url: str, parts: list[ShardTable]
) -> None:
    base = [part for part in parts if part.manifest.kind == "tokens"]
    names = [read_tokenizer(url).fingerprint for url in (tokenizer_url, other_tokenizer_url)]
    with pytest.raises(InputError, match=names[0]) as refused:
        parts_of_tokenizer(base, other_tokenizer_url)
    assert names[1] in str(refused.value)
    with pytest.raises(InputError, match="no finished tokenizer"):
        main(VerifyConfig(dataset=token_shards, tokenizer=token_shards))


def test_the_job_says_so(token_shards: str, tokenizer_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(VerifyConfig(dataset=token_shards, tokenizer=tokenizer_url, retokenize=0.5, json=True))
    said = json.loads(capsys.readouterr().out)
    assert said["sound"] and said["retokenized"]["wrong"] == 0
    assert said["retokenized"]["samples"] < 39

    # tar and index of one shard, from the images that config.json names and the tokenizer
    shard = open_dataset(token_shards).shard(0, 0)
    before = Path(shard.tar).read_bytes(), Path(shard.index).read_bytes()
    Path(shard.tar).unlink()
    Path(shard.index).write_bytes(b"")
    main(VerifyConfig(dataset=token_shards, tokenizer=tokenizer_url, repair=True))
    assert (Path(shard.tar).read_bytes(), Path(shard.index).read_bytes()) == before
    assert "brought back" in (said := capsys.readouterr().out) and f"{token_shards}: sound" in said

"""What a dry run says is compared with what the pass then does; and a dry run leaves no trace."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from jobs.precompute_shards import main
from pipeline.cluster.config import ClusterConfig
from pipeline.errors import InputError
from shards.pixels.views import ViewPolicy
from tokenizer.precompute.config import PrecomputeConfig
from tokenizer.precompute.estimate import estimate_pass, in_words
from tokenizer.precompute.run import precompute_shards


@pytest.fixture
def config(image_shards: str, tokenizer_url: str, tmp_path: Path) -> PrecomputeConfig:
    return PrecomputeConfig(
        images=image_shards,
        tokenizer=tokenizer_url,
        output=str(tmp_path / "tokens"),
        views=ViewPolicy(scale=(0.3, 1.0), views_per_image=2, seed=5),
        batch_size=8,
        samples_per_shard=10,
        encoder_threads=1,
        cluster=ClusterConfig(num_workers=0),
    )


def stored(root: str, folder: str) -> int:
    return sum(path.stat().st_size for path in Path(root).glob(f"**/{folder}/*"))


def test_it_says_what_the_pass_then_does(config: PrecomputeConfig, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    estimate = estimate_pass(config)
    assert sorted(tmp_path.rglob("*")) == before
    manifest = precompute_shards(config)

    assert (estimate.crops, estimate.views, estimate.shards_done) == (manifest.samples_written, 2, 0)
    assert estimate.shards == 2 * manifest.shards_per_view
    assert estimate.tar_bytes == pytest.approx(stored(config.output, "shards"), rel=0.25)
    assert estimate.read_bytes == 2 * stored(config.images or "", "shards")
    assert estimate.epochs_per_crop == {"300": 150, "800": 400, "1600": 800}
    assert estimate.cache_bytes_all_views == 2 * estimate.cache_bytes_one_view
    assert estimate.core_hours > 0 and estimate.gpu_hours is None and estimate.hours is not None
    assert estimate.sampled == 12  # 4 of each of the three shards
    rest = estimate_pass(config)
    assert (rest.shards_done, rest.core_hours, rest.hours) == (estimate.shards, 0, 0)


def test_extensions_and_layers_are_estimated_too(
    config: PrecomputeConfig, other_tokenizer_url: str, tmp_path: Path
) -> None:
    precompute_shards(config)
    views = dataclasses.replace(config.views, views_per_image=5)
    more = dataclasses.replace(config, extend=True, views=views)
    layer = dataclasses.replace(config, images=None, code_layer=True, tokenizer=other_tokenizer_url)
    before = sorted(tmp_path.rglob("*"))
    added, codes = estimate_pass(more), estimate_pass(layer)
    assert sorted(tmp_path.rglob("*")) == before
    assert (added.views, added.views_in_all, added.crops) == (3, 5, 3 * 39)
    assert added.epochs_per_crop["300"] == 60
    assert "views 2 to 4 of 39 images, added to" in in_words(added)
    assert (codes.views, codes.views_in_all, codes.crops, codes.tar_bytes) == (2, 2, 78, 0)
    assert codes.read_bytes == pytest.approx(stored(config.output, "shards"), rel=0.01)
    assert "codes of tokenizer" in in_words(codes)


def test_what_the_pass_would_refuse_is_refused(config: PrecomputeConfig, tmp_path: Path) -> None:
    precompute_shards(config)
    with pytest.raises(InputError, match=r"was begun with another plan.*batch_size: there 8, asked 4"):
        estimate_pass(dataclasses.replace(config, batch_size=4))
    with pytest.raises(InputError, match="has 2 views already"):
        estimate_pass(dataclasses.replace(config, extend=True))
    with pytest.raises(InputError, match="/no/such/tokenizer"):
        estimate_pass(
            dataclasses.replace(config, output=str(tmp_path / "new"), tokenizer="/no/such/tokenizer")
        )
    assert not (tmp_path / "new").exists()


def test_the_job_prints_text_or_one_line_of_json(
    config: PrecomputeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    main(dataclasses.replace(config, dry_run=True))
    text = capsys.readouterr().out
    assert "crops        78 in 10 shards, 0 of them committed already" in text
    assert "is seen 150 times in 300 epochs" in text and "nothing: this was a dry run" in text
    main(dataclasses.replace(config, dry_run=True, json=True))
    [line] = capsys.readouterr().out.splitlines()
    assert json.loads(line)["crops"] == 78
    assert not Path(config.output).exists()

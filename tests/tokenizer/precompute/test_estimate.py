"""What a dry run says is compared with what the pass then does; and a dry run leaves no trace."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.precompute_shards import main
from pipeline import storage
from pipeline.cluster.config import ClusterConfig
from pipeline.errors import InputError
from shards.pixels.views import ViewPolicy
from tokenizer.precompute.estimate import as_text, dry_run
from tokenizer.precompute.run import PrecomputeConfig, precompute_shards


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


def test_it_says_what_the_pass_then_does(
    config: PrecomputeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(tmp_path.rglob("*"))
    found = dry_run(config)
    assert sorted(tmp_path.rglob("*")) == before
    calls: Counter[str] = Counter()
    for name in ("read", "stat", "put", "create"):
        call: Callable[..., Any] = getattr(storage, name)

        def counted(*arguments: Any, _name: str = name, _call: Callable[..., Any] = call) -> Any:
            # the tokenizer is loaded once per worker, whatever is written
            calls[_name] += "tokenizer" not in Path(arguments[0]).name
            return _call(*arguments)

        monkeypatch.setattr(storage, name, counted)
    manifest = precompute_shards(config)

    assert (found.crops, found.views, found.shards_done) == (manifest.samples_written, 2, 0)
    assert found.shards == 2 * manifest.shards_per_view
    assert found.tar_bytes == pytest.approx(stored(config.output, "shards"), rel=0.25)
    assert found.read_bytes == 2 * stored(config.images or "", "shards")
    assert found.write_requests == pytest.approx(calls["put"] + calls["create"], abs=4)
    assert found.read_requests == pytest.approx(calls["read"] + calls["stat"], rel=0.35)
    assert found.epochs_per_crop == {"300": 150, "800": 400, "1600": 800}
    assert found.cache_bytes_all_views == 2 * found.cache_bytes_one_view
    assert found.core_hours > 0 and found.gpu_hours is None and found.hours is not None
    assert found.sampled == 18  # 16 or more, evenly from all three shards
    rest = dry_run(config)
    assert (rest.shards_done, rest.core_hours, rest.hours) == (found.shards, 0, 0)


def test_extensions_and_layers_are_estimated_too(
    config: PrecomputeConfig, other_tokenizer_url: str, tmp_path: Path
) -> None:
    precompute_shards(config)
    more = dataclasses.replace(
        config, extend=True, views=dataclasses.replace(config.views, views_per_image=5)
    )
    layer = dataclasses.replace(config, images=None, code_layer=True, tokenizer=other_tokenizer_url)
    before = sorted(tmp_path.rglob("*"))
    added, codes = dry_run(more), dry_run(layer)
    assert sorted(tmp_path.rglob("*")) == before
    assert (added.views, added.views_in_all, added.crops) == (3, 5, 3 * 39)
    assert added.epochs_per_crop["300"] == 60
    assert "views 2 to 4 of 39 images, added to" in as_text(added)

    assert (codes.views, codes.views_in_all, codes.crops) == (2, 2, 78)
    assert (codes.tar_bytes, codes.read_bytes) == (
        0,
        pytest.approx(stored(config.output, "shards"), rel=0.01),
    )
    assert codes.cache_bytes_one_view == pytest.approx(stored(config.output, "shards") / 2, rel=0.01)
    assert 0 < codes.index_bytes < stored(config.output, "index")
    assert codes.write_requests < dry_run(config).write_requests
    assert "codes of tokenizer" in as_text(codes)


def test_what_the_pass_would_refuse_is_refused(config: PrecomputeConfig, tmp_path: Path) -> None:
    precompute_shards(config)
    with pytest.raises(InputError, match=r"was begun with another plan.*batch_size: there 8, asked 4"):
        dry_run(dataclasses.replace(config, batch_size=4))
    with pytest.raises(InputError, match="has 2 views already"):
        dry_run(dataclasses.replace(config, extend=True))
    with pytest.raises(InputError, match="/no/such/tokenizer"):
        dry_run(dataclasses.replace(config, output=str(tmp_path / "new"), tokenizer="/no/such/tokenizer"))
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

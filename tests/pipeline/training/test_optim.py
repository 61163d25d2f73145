from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.errors import InputError
from pipeline.training.optim import OptimConfig, build_optimizer, decays, resolve_precision


@pytest.mark.parametrize(
    ("name", "peak_lr", "warmup_steps", "total_steps"),
    [
        ("vqkd_100ep_25it_wu10", 2e-4, 250, 2500),
        ("mim_30ep_10it_wu10", 1.5e-3, 100, 300),
        ("mim_30ep_10it_wusteps7", 1.5e-3, 7, 300),
    ],
)
def test_schedule_equals_the_reference(
    shared_dir: Path, name: str, peak_lr: float, warmup_steps: int, total_steps: int
) -> None:
    expected = np.load(shared_dir / "reference/fixtures/lr_schedules.npz", allow_pickle=False)[name]
    optim = OptimConfig(peak_lr=peak_lr, min_lr=1e-5, warmup_epochs=warmup_steps / 10)
    lr = optim.schedule(batch_size=1, steps_per_epoch=10, epochs=total_steps // 10)
    np.testing.assert_allclose([lr(step) for step in range(total_steps)], expected, rtol=1e-12)


def test_schedule_without_warmup_starts_at_the_peak() -> None:
    lr = OptimConfig(peak_lr=1.0, min_lr=0.1, warmup_epochs=0).schedule(1, 1, epochs=10)
    assert lr(0) == 1.0 and lr(10) == pytest.approx(0.1)


def test_groups_equal_the_reference(shared_dir: Path) -> None:
    reference = json.loads((shared_dir / "reference/param_groups.json").read_text())
    keys = {
        "vqkd_base_3x768": "keys_vqkd_encoder_base_decoder_3x768x12_clip.json",
        "mim_base": "keys_beit_base_patch16_224_8k_vocab_cls_pt.json",
    }
    for model, inventory in keys.items():
        entries = json.loads((shared_dir / "reference" / inventory).read_text())["keys"]
        trained = {
            key: torch.empty(entry["shape"], device="meta")
            for key, entry in entries.items()
            if entry["requires_grad"]
        }
        decayed = [group for group in reference[model] if group["weight_decay"] > 0]
        assert {key for key, tensor in trained.items() if decays(key, tensor)} == set(decayed[0]["params"])


def test_optimizer_holds_every_trained_parameter_once() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[2].requires_grad_(False)
    optimizer = build_optimizer(model, OptimConfig(peak_lr=1e-3, lr_batch_size=128, weight_decay=0.1), 256)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == 4 and {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2e-3)


def test_precision() -> None:
    cpu = torch.device("cpu")
    assert resolve_precision("auto", cpu) == torch.float32
    assert resolve_precision("bf16", cpu) == torch.bfloat16
    with pytest.raises(InputError, match="fp16"):
        resolve_precision("fp16", cpu)


def test_wrong_rate_is_bad_input() -> None:
    with pytest.raises(InputError, match="peak_lr"):
        OptimConfig(peak_lr=-1.0)

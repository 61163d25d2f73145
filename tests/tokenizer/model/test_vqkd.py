from __future__ import annotations

import dataclasses
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.training.optim import OptimConfig, build_optimizer
from pipeline.training.worker import Worker
from tokenizer.model.vit import TransformerSize
from tokenizer.model.vqkd import (
    VQKD,
    CodebookStart,
    VQKDConfig,
    normalize_pixels,
    teacher_loss,
)

ROOT = Path(__file__).resolve().parents[3]
ALONE = Worker()

UNUSED_IN_REFERENCE = {"quantize.embedding.cluster_size", "quantize.embedding.embed_avg"}


def small_model(seed: int = 0, **settings: object) -> VQKD:
    torch.manual_seed(seed)
    config = VQKDConfig(
        image_size=16, patch_size=4, width=32, depth=1, heads=2, decoder_depth=1, codebook_size=16, code_dim=8
    )
    return VQKD(dataclasses.replace(config, **settings), 6)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ reference


@pytest.mark.parametrize(("depth", "teacher", "dim"), [(3, "clip", 512), (1, "clip", 512), (1, "dino", 768)])
def test_names_and_shapes_are_the_published_ones(shared_dir: Path, depth: int, teacher: str, dim: int):
    name = f"keys_vqkd_encoder_base_decoder_{depth}x768x12_{teacher}.json"
    published = json.loads((shared_dir / "reference" / name).read_text())["keys"]
    with torch.device("meta"):
        ours = VQKD(VQKDConfig(decoder_depth=depth), dim)
    found = {name: list(tensor.shape) for name, tensor in ours.state_dict().items()}
    assert published.keys() - found.keys() == UNUSED_IN_REFERENCE
    assert found == {name: published[name]["shape"] for name in found}
    trained = {name for name, key in published.items() if key["requires_grad"]}
    assert {name for name, _ in ours.named_parameters()} == trained


def test_parameter_groups_are_the_references(shared_dir: Path):
    groups = json.loads((shared_dir / "reference" / "param_groups.json").read_text())["vqkd_base_3x768"]
    with torch.device("meta"):
        model = VQKD(VQKDConfig(), 512)
    optimizer = build_optimizer(model, OptimConfig(weight_decay=1e-4), 128)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ours = {
        group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups
    }
    assert ours == {group["weight_decay"]: set(group["params"]) for group in groups}
    assert {decay: len(members) for decay, members in ours.items()} == {0.0: 149, 1e-4: 66}


# ------------------------------------------------------------------------------------------------ the model


def test_initial_weights_have_the_published_spread():
    torch.manual_seed(0)
    model = VQKD(VQKDConfig(depth=4, decoder_depth=2, width=192, heads=3, image_size=32), 64)
    for i, block in enumerate(model.encoder.blocks, start=1):
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):  # type: ignore[union-attr]
            assert weight.std().item() == pytest.approx(0.02 / (2 * i) ** 0.5, rel=0.03)
    for layer in (model.encode_task_layer, model.decode_task_layer):
        for linear in (layer[0], layer[2]):
            assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05) and not linear.bias.any()
    # Convolutions keep torch's uniform default, whose deviation is 1 / sqrt(3 fan_in).
    assert model.encoder.patch_embed.proj.weight.std().item() == pytest.approx((3 * 768) ** -0.5, rel=0.03)
    assert model.decoder.patch_embed.proj.weight.std().item() == pytest.approx((3 * 32) ** -0.5, rel=0.03)


@pytest.mark.parametrize("training", [True, False])
def test_forward_changes_no_state(training: bool):
    model = small_model(kmeans_init=False).train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    out = model(torch.rand(2, 3, 16, 16), torch.rand(2, 16, 6))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert (out.code_sums is not None) == training
    assert out.codes.shape == (2, 16) and out.features.shape == (2, 16, 8)


def test_autocast_keeps_features_losses_and_codes_in_float32():
    model = small_model(kmeans_init=False).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(torch.rand(2, 3, 16, 16), torch.rand(2, 16, 6).bfloat16())
    assert out.features.dtype == out.loss.dtype == out.rec_loss.dtype == out.emb_loss.dtype == torch.float32
    assert torch.equal(out.codes, model.quantize(out.features).codes)


def test_teacher_loss_is_one_minus_the_mean_cosine():
    predicted, target = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    rows = [
        1 - float(p @ t) / float(p.norm() * t.norm())
        for p, t in zip(predicted.flatten(0, 1), target.flatten(0, 1), strict=True)
    ]
    assert float(teacher_loss(predicted, target)) == pytest.approx(np.mean(rows), abs=1e-6)
    assert float(teacher_loss(7.0 * target, target)) == pytest.approx(0.0, abs=1e-6)


# ------------------------------------------------------------------------------------------------ start


def test_the_codebook_start_takes_as_many_batches_as_it_needs():
    model, seen = small_model(), []

    def batches(count: int, images: int):
        for i in range(count):
            seen.append(i)
            yield torch.rand(images, 3, 16, 16)

    # 4 x 16 codes = 64 tokens = 4 images of 16 patches.
    start = model.start_codebook_(batches(10, 3), ALONE, seed=0)
    assert start == CodebookStart(tokens=96, wanted=64, batches=2) and start.enough
    assert seen == [0, 1] and not model.quantize.needs_kmeans
    assert "96 tokens, gathered over 2 batches because one has too few" in str(start)


def test_a_start_from_too_few_tokens_is_said():
    few = small_model().start_codebook_([torch.rand(1, 3, 16, 16)], ALONE, seed=0)
    assert few == CodebookStart(tokens=16, wanted=64, batches=1) and not few.enough
    assert "16 tokens; 64 were wanted" in str(few)
    assert "wanted" not in str(CodebookStart(tokens=64, wanted=64, batches=1))


TWO_RANKS = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from pipeline.training.worker import Worker
from tokenizer.model.quantizer import CodeUsage
from tokenizer.model.vqkd import VQKD, VQKDConfig

rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
given = torch.load(f"{folder}/given.pt", weights_only=True)
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
worker = Worker(rank=rank, world_size=world)
model = VQKD(VQKDConfig(**given["config"]), 6).train()
model.load_state_dict(given["state"])
mine = slice(0, 7) if rank == 0 else slice(7, 12)  # unequal shares
if world == 1:
    mine = slice(0, 12)
first = given["pixels"][0, mine]
start = model.start_codebook_(iter([first]), worker, seed=5)
replica = DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
usage = CodeUsage(16)
codebooks = [model.quantize.codebook.clone()]
for pixels, target in zip(given["pixels"], given["target"]):
    out = replica(pixels[mine], target[mine])
    optimizer.zero_grad()
    (out.loss * len(pixels[mine]) * world / 12).backward()
    optimizer.step()
    model.quantize.update_(out.code_sums, worker)
    usage.add(out.codes)
    codebooks.append(model.quantize.codebook.clone())
model.quantize.check_equal_on_all_ranks(worker)
state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
moved = model.quantize.restart_dead_(out.features.flatten(0, 1), worker, steps=1, seed=1)
restarted = model.quantize.codebook.clone()
model.quantize.check_equal_on_all_ranks(worker)
complaint = ""
if world > 1:
    if rank == 1:
        model.quantize.codebook[3, 2] += 1e-6
    try:
        model.quantize.check_equal_on_all_ranks(worker)
    except RuntimeError as error:
        complaint = str(error)
torch.save(
    {"state": state, "tokens": start.tokens, "moved": moved, "restarted": restarted,
     "counts": usage.gather(worker).counts, "codebooks": torch.stack(codebooks), "complaint": complaint},
    f"{folder}/rank-{rank}-of-{world}.pt",
)
if world > 1:
    dist.destroy_process_group()
"""


def test_two_ranks_train_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Same codebook on both ranks bit for bit, and the same training as one process on the whole batch."""
    script = tmp_path / "ranks.py"
    script.write_text(TWO_RANKS)
    model = small_model()
    generator = torch.Generator().manual_seed(3)
    given = {
        "config": dataclasses.asdict(model.config),
        "state": model.state_dict(),
        "pixels": torch.rand(3, 12, 3, 16, 16, generator=generator) * 2 - 1,
        "target": torch.randn(3, 12, 16, 6, generator=generator),
    }
    torch.save(given, tmp_path / "given.pt")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, script, str(rank), str(world), tmp_path], env=environment)
        for rank, world in ((0, 2), (1, 2))
    ]
    try:
        monkeypatch.setattr(sys, "argv", ["ranks.py", "0", "1", str(tmp_path)])
        runpy.run_path(str(script))
        assert [process.wait(300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    names = ("0-of-2", "1-of-2", "0-of-1")
    zero, one, alone = (torch.load(tmp_path / f"rank-{name}.pt", weights_only=True) for name in names)
    assert zero["tokens"] == one["tokens"] == alone["tokens"] == 12 * 16
    assert len(zero["codebooks"]) == 4 and zero["codebooks"].isfinite().all()
    assert torch.equal(zero["codebooks"], one["codebooks"])  # from the start on, after every step
    for name, tensor in alone["state"].items():
        assert torch.equal(zero["state"][name], one["state"][name]), name
        torch.testing.assert_close(zero["state"][name], tensor, atol=1e-5, rtol=1e-4)
    assert torch.equal(zero["counts"], one["counts"]) and torch.equal(zero["counts"], alone["counts"])
    assert int(alone["counts"].sum()) == 3 * 12 * 16
    assert zero["moved"] == one["moved"] == alone["moved"]
    assert torch.equal(zero["restarted"], one["restarted"])
    assert "ranks [1]" in zero["complaint"] and zero["complaint"] == one["complaint"]


# ------------------------------------------------------------------------------------------------ pixels


def test_normalize_pixels_is_explicit_about_its_range():
    levels = torch.arange(256, dtype=torch.uint8)
    pixels = levels.repeat(3).view(1, 3, 16, 16)
    found = normalize_pixels(pixels)
    torch.testing.assert_close(found[0, 1].flatten(), levels.float() * 2 / 255 - 1)
    assert torch.equal(normalize_pixels(pixels.permute(0, 2, 3, 1).contiguous()), found)
    # The reference takes a batch of zeros and ones for [0, 1] and stretches it.
    assert float(normalize_pixels(torch.ones(1, 3, 8, 8, dtype=torch.uint8)).max()) < -0.99


@pytest.mark.parametrize(
    "pixels",
    [
        torch.rand(1, 3, 8, 8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        torch.zeros(1, 3, 8, 9, dtype=torch.uint8),
        torch.zeros(1, 1, 8, 8, dtype=torch.uint8),
    ],
)
def test_other_pixels_are_refused(pixels: Tensor):
    with pytest.raises(InputError):
        normalize_pixels(pixels)


# ------------------------------------------------------------------------------------------------ config


def test_presets_and_sizes_by_hand():
    assert VQKDConfig().encoder_size == TransformerSize(width=768, depth=12, heads=12)
    assert VQKDConfig(encoder="small").encoder_size == TransformerSize(width=384, depth=12, heads=6)
    config = VQKDConfig(encoder="small", depth=3, decoder_width=96)
    assert config.encoder_size == TransformerSize(width=384, depth=3, heads=6)
    assert config.decoder_size == TransformerSize(width=96, depth=3, heads=6)
    assert VQKDConfig(image_size=112, patch_size=8).grid == 14


def test_resolved_configs_stand_alone():
    config = VQKDConfig(encoder="small", depth=3)
    resolved = VQKDConfig(**json.loads(json.dumps(dataclasses.asdict(config.resolved()))))
    assert resolved == config.resolved() == resolved.resolved()
    assert (resolved.encoder_size, resolved.decoder_size) == (config.encoder_size, config.decoder_size)
    assert None not in dataclasses.asdict(resolved).values()


@pytest.mark.parametrize(
    "settings",
    [
        {"image_size": 225},
        {"patch_size": 0},
        {"heads": 7},
        {"decoder_depth": 0},
        {"decoder_width": 100},
        {"codebook_size": 65537},
        {"codebook_size": 1},
        {"code_dim": 0},
        {"ema_decay": 1.0},
        {"beta": -1.0},
        {"restart_every": 0},
    ],
)
def test_impossible_configs_are_refused_by_name(settings: dict[str, float]):
    with pytest.raises(InputError, match=next(iter(settings)).removeprefix("decoder_")):
        VQKDConfig(**settings)  # type: ignore[arg-type]

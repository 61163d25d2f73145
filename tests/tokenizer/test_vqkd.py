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
from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import InputError
from pipeline.optim import OptimConfig, build_optimizer, set_lr
from pipeline.worker import Worker
from tokenizer.quantizer import l2_normalize, sum_statistics
from tokenizer.vqkd import (
    VQKD,
    CodebookStart,
    TransformerSize,
    VQKDConfig,
    normalize_pixels,
    teacher_loss,
)

ROOT = Path(__file__).resolve().parents[2]
ALONE = Worker()
FORWARD = {"atol": 1e-5, "rtol": 1e-5}
GRADIENT = {"atol": 1e-4, "rtol": 1e-4}

TINY = VQKDConfig(
    image_size=64, patch_size=16, width=64, depth=2, heads=4, decoder_depth=1, codebook_size=64, code_dim=32
)
"""The fixtures' sizes."""

UNUSED_IN_REFERENCE = {"quantize.embedding.cluster_size", "quantize.embedding.embed_avg"}


def small_model(seed: int = 0, **settings: object) -> VQKD:
    torch.manual_seed(seed)
    config = VQKDConfig(
        image_size=16, patch_size=4, width=32, depth=1, heads=2, decoder_depth=1, codebook_size=16, code_dim=8
    )
    return VQKD(dataclasses.replace(config, **settings), 6)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ reference


@dataclasses.dataclass(frozen=True)
class Case:
    """One fixture of the reference implementation, run at tiny size."""

    io: dict[str, Tensor]
    evaluation: dict[str, Tensor]
    init: dict[str, Tensor]
    gradients: dict[str, Tensor]
    after: dict[str, Tensor]
    meta: dict

    def model(self) -> VQKD:
        """Our model in the fixture's initial state."""
        model = VQKD(TINY, 512)
        names = set(model.state_dict())
        assert names == {name for name in self.init if not name.startswith(("teacher", "scaling"))} - (
            UNUSED_IN_REFERENCE
        )
        model.load_state_dict({name: self.init[name] for name in names})
        return model.train()

    def start_codebook_(self, model: VQKD, pixels: Tensor) -> None:
        """K-means from the tokens that the reference drew at random; nothing if it has run."""
        if model.quantize.needs_kmeans:
            tokens = model.encode_features(pixels).detach().flatten(0, 1)
            start = l2_normalize(tokens)[self.meta["randperm_first"]]
            assert model.quantize.kmeans_init_(tokens, ALONE, start=start) == len(tokens)


@pytest.fixture(scope="module", params=["randcode", "kmeans"])
def case(request: pytest.FixtureRequest, shared_dir: Path) -> Case:
    stem = str(shared_dir / "reference" / "fixtures" / f"vqkd_tiny_{request.param}")

    def arrays(name: str) -> dict[str, Tensor]:
        with np.load(f"{stem}_{name}.npz") as found:
            return {key: torch.from_numpy(found[key]) for key in found.files}

    return Case(
        io=arrays("train_io"),
        evaluation=arrays("eval_io"),
        init=load_file(f"{stem}_init.safetensors"),
        gradients=load_file(f"{stem}_grads.safetensors"),
        after=load_file(f"{stem}_after3.safetensors"),
        meta=json.loads(Path(f"{stem}_meta.json").read_text()),
    )


def clip_target(case: Case, images: Tensor) -> Tensor:
    """The fixture's teacher, a CLIP tower of width 64 with one head, on images in [0, 1]."""
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from open_clip.transformer import QuickGELU, VisionTransformer

    from tokenizer.teacher import ClipTokens

    visual = VisionTransformer(64, 16, 64, 2, 1, 4.0, output_dim=512, act_layer=QuickGELU)
    prefix = "teacher_model.visual."
    visual.load_state_dict({n.removeprefix(prefix): t for n, t in case.init.items() if n.startswith(prefix)})
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    with torch.no_grad():
        return ClipTokens(visual.eval())((images - mean) / std)


def test_every_intermediate_value_of_the_reference(case: Case):
    model, io = case.model(), case.io
    pixels = io["preprocessed"]
    torch.testing.assert_close(io["images"] * 255.0 / 127.5 - 1.0, pixels, **FORWARD)
    torch.testing.assert_close(model.encoder(pixels), io["encoder_features"], **FORWARD)
    features = model.encode_features(pixels)
    torch.testing.assert_close(features, io["to_quantizer"], **FORWARD)
    torch.testing.assert_close(l2_normalize(features), io["z_l2"], **FORWARD)
    case.start_codebook_(model, pixels)
    quantized = model.quantize(features)
    assert torch.equal(quantized.codes, io["codes"])
    grid = quantized.quantized.transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(grid, io["quantized_bchw"], **FORWARD)
    torch.testing.assert_close(model.decode(quantized.quantized), io["rec"], **FORWARD)
    out = model(pixels, io["target"])
    torch.testing.assert_close(out.emb_loss, io["emb_loss"], **FORWARD)
    torch.testing.assert_close(out.rec_loss, io["rec_loss"], **FORWARD)
    torch.testing.assert_close(out.loss, io["total_loss"], **FORWARD)
    assert torch.equal(model.encode(pixels), out.codes)


def test_gradients_of_the_reference(case: Case):
    model = case.model()
    case.start_codebook_(model, case.io["preprocessed"])
    model(case.io["preprocessed"], case.io["target"]).loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert found.keys() == case.gradients.keys()
    for name, gradient in case.gradients.items():
        # Relative to each tensor's norm: many gradients are far below the absolute tolerance.
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm(), name
        torch.testing.assert_close(found[name], gradient, **GRADIENT)


def test_codebook_after_one_step_and_evaluation_after_it(case: Case):
    model, io = case.model(), case.io
    case.start_codebook_(model, io["preprocessed"])
    model.quantize.update_(sum_statistics([model(io["preprocessed"], io["target"]).statistics]), ALONE)
    torch.testing.assert_close(model.quantize.codebook, io["codebook_after"], **FORWARD)
    torch.testing.assert_close(model.quantize.cluster_size, io["usage_cluster_size_after"], **FORWARD)
    if "randperm_first" not in case.meta:
        model = case.model()  # there the reference evaluated its initial state
    out = model.eval()(io["preprocessed"], io["target"])
    assert torch.equal(out.codes, case.evaluation["codes"])
    for name, value in (("emb_loss", out.emb_loss), ("rec_loss", out.rec_loss), ("total_loss", out.loss)):
        torch.testing.assert_close(value, case.evaluation[name], **FORWARD)


def test_three_training_steps_of_the_reference(case: Case):
    model = case.model()
    optimizer = build_optimizer(model, OptimConfig(weight_decay=1e-4, betas=(0.9, 0.99)), 8)
    for step, lr in zip(case.meta["three_steps"], case.meta["lrs"], strict=True):
        images = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(step["image_seed"]))
        pixels = images * 2.0 - 1.0
        case.start_codebook_(model, pixels)
        out = model(pixels, clip_target(case, images))
        optimizer.zero_grad()
        out.loss.backward()
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        set_lr(optimizer, lr)
        optimizer.step()
        model.quantize.update_(sum_statistics([out.statistics]), ALONE)
        assert out.loss.item() == pytest.approx(step["total"], abs=1e-5)
        assert out.emb_loss.item() == pytest.approx(step["quant"], abs=1e-5)
        assert out.rec_loss.item() == pytest.approx(step["rec"], abs=1e-5)
        assert grad_norm.item() == pytest.approx(step["grad_norm"], rel=1e-4)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, case.after[name], **FORWARD)


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
    assert (out.statistics is not None) == training
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


def test_encode_needs_no_decoder():
    model = small_model(kmeans_init=False).eval()
    encoder = VQKD(model.config, None).eval()
    encoder.load_state_dict({n: t for n, t in model.state_dict().items() if not n.startswith("decode")})
    pixels = torch.rand(2, 3, 16, 16)
    assert torch.equal(encoder.encode(pixels), model.encode(pixels))


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    model = small_model().train()
    pixels, target = torch.rand(16, 3, 16, 16) * 2 - 1, torch.randn(16, 16, 6)
    model.start_codebook_([pixels], ALONE, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        out = model(pixels, target)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        model.quantize.update_(sum_statistics([out.statistics]), ALONE)
        losses.append(out.loss.item())
    assert losses[-1] < 0.8 * losses[0]


# ------------------------------------------------------------------------------------------------ start


def test_the_codebook_start_takes_as_many_batches_as_it_needs():
    model, seen = small_model(), []

    def batches(count: int, images: int):
        for i in range(count):
            seen.append(i)
            yield torch.rand(images, 3, 16, 16)

    # 4 x 16 codes = 64 tokens = 4 images of 16 patches.
    assert model.start_codebook_(batches(10, 3), ALONE, seed=0) == CodebookStart(tokens=96, wanted=64)
    assert seen == [0, 1] and not model.quantize.needs_kmeans


def test_a_start_from_too_few_tokens_is_said():
    few = small_model().start_codebook_([torch.rand(1, 3, 16, 16)], ALONE, seed=0)
    assert few == CodebookStart(tokens=16, wanted=64) and not few.enough
    assert "16 tokens; 64 were wanted" in str(few)
    assert "wanted" not in str(CodebookStart(tokens=64, wanted=64))


TWO_RANKS = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from pipeline.worker import Worker
from tokenizer.quantizer import CodeUsage, sum_statistics
from tokenizer.vqkd import VQKD, VQKDConfig

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
for pixels, target in zip(given["pixels"], given["target"]):
    out = replica(pixels[mine], target[mine])
    optimizer.zero_grad()
    (out.loss * len(pixels[mine]) * world / 12).backward()
    optimizer.step()
    model.quantize.update_(sum_statistics([out.statistics]), worker)
    usage.add(out.codes)
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
     "counts": usage.gather(worker).counts, "complaint": complaint},
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


def test_position_of_a_patch_in_the_grid_is_its_position_in_the_image():
    """Codes come row by row: with attention silenced, each code depends on its own patch only."""
    model = small_model(kmeans_init=False).eval()
    with torch.no_grad():
        for block in model.encoder.blocks:
            block.attn.proj.weight.zero_()  # type: ignore[union-attr]
        pixels = torch.rand(1, 3, 16, 16)
        changed = pixels.clone()
        changed[:, :, 4:8, 8:12] += 1.0  # row 1, column 2 of the 4 x 4 grid
        differs = (model.encode_features(pixels) - model.encode_features(changed)).abs().sum(-1)[0]
    assert differs.nonzero().flatten().tolist() == [1 * 4 + 2]

"""The reference check on fixtures of its own: other sizes, written by a slow and literal implementation."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jobs.check_reference import CheckReferenceConfig, check_folder, main
from jobs.reference.fixtures import Checks
from pipeline.errors import InputError
from pretrain.model.backbone import BackboneConfig
from pretrain.model.classifier import Classifier, ClassifierConfig
from pretrain.model.mim import MIM, MIMConfig, PatchAggregationConfig
from pretrain.model.official import official_finetuning
from tests.reference.shaken import shaken
from tests.reference.slow_models import ClipTower, State, slow_mim, slow_vqkd, unit
from tokenizer.model.vqkd import VQKD, VQKDConfig


def random_state(model: nn.Module, generator: torch.Generator) -> State:
    """Random weights with the names and shapes of a model's."""
    state = {}
    for name, tensor in model.state_dict().items():
        drawn = 0.25 * torch.randn(tensor.shape, generator=generator)
        state[name] = 1.0 + drawn if "norm" in name and name.endswith("weight") else drawn
    return state


def adamw(state: State, decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """Decay on matrices and tables, not on [CLS] and absolute positions."""
    groups = [
        {
            "params": [t],
            "weight_decay": 0.0 if t.ndim < 2 or name.endswith(("cls_token", "pos_embed")) else decay,
        }
        for name, t in state.items()
        if t.requires_grad
    ]
    return torch.optim.AdamW(groups, betas=betas)


def step(optimizer: torch.optim.AdamW, state: State, gradients: State, lr: float) -> None:
    for name, gradient in gradients.items():
        state[name].grad = gradient
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()


def gradients_of(loss: Tensor, state: State) -> State:
    names = [name for name, tensor in state.items() if tensor.requires_grad]
    return dict(zip(names, torch.autograd.grad(loss, [state[name] for name in names]), strict=True))


def total_norm(gradients: State) -> float:
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))


def load_arrays(path: Path) -> State:
    with np.load(path) as file:
        return {key: torch.from_numpy(file[key].copy()) for key in file.files}


def save_arrays(path: Path, arrays: State) -> None:
    np.savez(path, **{key: value.detach().numpy() for key, value in arrays.items()})


def save(folder: Path, stem: str, tensors: dict[str, State], arrays: dict[str, State], meta: dict) -> None:
    for name, state in tensors.items():
        contiguous = {key: value.detach().clone().contiguous() for key, value in state.items()}
        save_file(contiguous, folder / f"{stem}_{name}.safetensors")
    for name, values in arrays.items():
        save_arrays(folder / f"{stem}_{name}.npz", values)
    (folder / f"{stem}_meta.json").write_text(json.dumps(meta))


# ------------------------------------------------------------------------------------------------ VQ-KD


def write_vqkd(folder: Path, stem: str, *, kmeans: bool, codebook: int) -> None:
    """3 x 3 patches of 4; encoder 12 wide, 3 heads; decoder 8 wide, 2 heads; codes of 6 dimensions."""
    generator = torch.Generator().manual_seed(7)
    torch.manual_seed(3)
    config = VQKDConfig(
        image_size=12, patch_size=4, width=12, depth=2, heads=3, decoder_width=8, decoder_depth=2,
        decoder_heads=2, codebook_size=codebook, code_dim=6,
    )  # fmt: skip
    state = random_state(VQKD(config, 7), generator)
    trained = {key: tensor for key, tensor in state.items() if not key.startswith("quantize.")}
    weight = unit(torch.randn(codebook, 6, generator=generator))
    buffers = {
        "quantize.embedding.weight": 0.0 * weight if kmeans else weight,
        "quantize.embedding.cluster_size": torch.zeros(codebook),
        "quantize.embedding.embed_avg": weight.clone(),
        "quantize.embedding.initted": torch.tensor([0.0 if kmeans else 1.0]),
        "quantize.cluster_size": torch.zeros(codebook),
    }
    tower = ClipTower(12, 4, 16, 2, 7).eval().requires_grad_(False)
    shift, scale = torch.rand(2, 1, 3, 1, 1, generator=generator) + 0.2
    frozen = {"scaling_layer.shift": shift, "scaling_layer.scale": scale}
    frozen |= {f"teacher_model.visual.{key}": value for key, value in tower.state_dict().items()}
    drawn = torch.randperm(27, generator=generator)[:codebook].tolist()

    def fresh() -> State:
        return {k: t.clone().requires_grad_(k in trained) for k, t in (trained | buffers).items()}

    images = torch.rand(3, 3, 12, 12, generator=generator)
    target = tower((images - shift) / scale)
    state = fresh()
    values = slow_vqkd(state, images * 2 - 1, target, drawn, training=True)
    gradients = gradients_of(values["total_loss"], state)
    evaluated = slow_vqkd(state if kmeans else fresh(), images * 2 - 1, target, drawn, training=False)
    kept = ("codes", "emb_loss", "rec_loss", "total_loss", "quantized_bchw", "rec")

    state, steps, lrs = fresh(), [], [1e-3, 2e-3, 3e-3]
    optimizer = adamw(state, 1e-4, (0.9, 0.99))
    for seed, lr in zip((11, 12, 13), lrs, strict=True):
        drawn_images = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed))
        drawn_target = tower((drawn_images - shift) / scale)
        out = slow_vqkd(state, drawn_images * 2 - 1, drawn_target, drawn, training=True)
        step_gradients = gradients_of(out["total_loss"], state)
        step(optimizer, state, step_gradients, lr)
        figures = {"total": "total_loss", "quant": "emb_loss", "rec": "rec_loss"}
        steps.append({short: out[name].item() for short, name in figures.items()})
        steps[-1] |= {"grad_norm": total_norm(step_gradients), "image_seed": seed}
    save(
        folder,
        stem,
        {"init": trained | buffers | frozen, "grads": gradients, "after3": state | frozen},
        {
            "train_io": {"images": images, "preprocessed": images * 2 - 1, "target": target,
                         "teacher_input": (images - shift) / scale, **values},
            "eval_io": {name: evaluated[name] for name in (*kept, "usage_cluster_size_after")},
        },
        {"grad_norm": total_norm(gradients), "three_steps": steps, "lrs": lrs,
         **({"randperm_first": drawn} if kmeans else {})},
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ MIM


def write_mim(folder: Path, stem: str) -> None:
    """3 x 3 patches of 3, 12 wide, 2 heads, 3 blocks, second head of 3 blocks after block 2, of its own."""
    generator = torch.Generator().manual_seed(9)
    shape = BackboneConfig(image_size=9, patch_size=3, width=12, depth=3, heads=2)
    aggregation = PatchAggregationConfig(layer=2, head_depth=3, share_mim_head=False)
    model = MIM(shape, MIMConfig(patch_aggregation=aggregation), 11)
    initial = random_state(model, generator)
    images = torch.randn(4, 3, 9, 9, generator=generator)
    mask = torch.stack([torch.randperm(9, generator=generator) < 4 for _ in range(4)])
    codes = torch.randint(11, (4, 9), generator=generator)
    state = {key: tensor.clone().requires_grad_() for key, tensor in initial.items()}
    values = slow_mim(state, images, mask, codes, layer=2)
    gradients = gradients_of(values["total_loss"], state)

    optimizer, steps, lrs, clip = adamw(state, 0.05, (0.9, 0.999)), [], [1e-3, 2e-3, 3e-3], 0.5
    for lr in lrs:
        total = slow_mim(state, images, mask, codes, layer=2)["total_loss"]
        step_gradients = gradients_of(total, state)
        length = total_norm(step_gradients)
        steps.append({"total": total.item(), "grad_norm": length})
        factor = min(1.0, clip / (length + 1e-6))
        step(optimizer, state, {key: g * factor for key, g in step_gradients.items()}, lr)
    assert steps[0]["grad_norm"] > clip
    save(
        folder,
        stem,
        {"init": initial, "grads": gradients, "after3": state},
        {"io": {"images": images, "mask": mask, "tokens": codes, **values}},
        {"three_steps": steps, "lrs": lrs, "clip": clip, "same_batch_each_step": True},
    )


# ------------------------------------------------------------------------------------------------ the rest


@torch.no_grad()
def write_finetune(folder: Path, stem: str, *, cls: bool) -> None:
    """Per-block tables and mean pooling, or [CLS] and absolute positions alone: what no table tells."""
    config = ClassifierConfig(
        backbone=BackboneConfig(image_size=20, patch_size=4, width=24, depth=3, heads=3),
        num_classes=6,
        pooling="cls" if cls else "mean",
        absolute_positions=cls,
        relative_positions="none" if cls else "per_block",
    )
    model, images = shaken(Classifier(config)), torch.randn(2, 3, 20, 20)
    values = {"images": images, "logits": model(images), "pooled": model.pooled(images)}
    save_arrays(folder / f"{stem}_io.npz", {**values, "all_tokens": model.forward_tokens(images)})
    save_file(official_finetuning(model.state_dict(), config.backbone), folder / f"{stem}_init.safetensors")


@pytest.fixture(scope="module")
def fixtures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All kinds of fixtures, of sizes that the published ones do not have."""
    folder = tmp_path_factory.mktemp("fixtures")
    write_vqkd(folder, "vqkd_tiny_kmeans", kmeans=True, codebook=10)
    write_vqkd(folder, "vqkd_tiny_random", kmeans=False, codebook=17)
    write_mim(folder, "mim_tiny_own_head")
    write_finetune(folder, "finetune_tiny", cls=False)
    write_finetune(folder, "finetune_tiny_cls", cls=True)
    (folder / "notes.txt").write_text("nothing to compare")
    return folder


def only(fixtures: Path, tmp_path: Path, beginning: str) -> Path:
    """A copy of the files whose names begin so."""
    for path in fixtures.glob(f"{beginning}*"):
        shutil.copy(path, tmp_path)
    return tmp_path


def failures(checks: Checks) -> list[str]:
    return [check.name for check in checks.done if not check.passed]


# ------------------------------------------------------------------------------------------------ tests


def test_the_references_own_fixtures_pass(shared_dir: Path):
    checks = check_folder(str(shared_dir / "reference" / "fixtures"))
    assert failures(checks) == []
    names = {check.name for check in checks.done}
    for stem in ("vqkd_tiny_kmeans", "vqkd_tiny_randcode"):
        assert {f"{stem}: codes", f"{stem}: gradients", f"{stem}: three steps: weights and codebook"} <= names
    for stem in ("mim_tiny_plain", "mim_tiny_cls_shared"):
        assert {f"{stem}: logits1_masked", f"{stem}: gradients", f"{stem}: three steps: weights"} <= names
    assert "mim_tiny_cls_shared: logits2_masked" in names
    assert sum(name.startswith("lr_schedules") for name in names) == 3
    assert sum(name.startswith("relpos_interp: interp2d") for name in names) == 6
    # Every array of the fixtures is compared with something.
    assert checks.left_alone == []


def test_fixtures_of_other_sizes_pass(fixtures: Path, capsys: pytest.CaptureFixture[str]):
    main(CheckReferenceConfig(fixtures=str(fixtures)))
    lines = capsys.readouterr().out.splitlines()
    verdicts = [line for line in lines if " PASS" in line]
    assert lines[-1] == f"{len(verdicts)} passed, 0 failed" and len(verdicts) > 60
    text = "\n".join(lines)
    assert "encoder heads 3, decoder heads 2" in text
    assert "second head from layer 2" in text and "of its own" in text
    assert "3 heads, by trial" in text and "left alone: notes.txt" in lines


def test_json_is_one_document_with_the_same_verdicts(fixtures: Path, tmp_path: Path, capsys):
    folder = only(fixtures, tmp_path, "finetune_tiny_cls")
    main(CheckReferenceConfig(fixtures=str(folder), json=True))
    document = json.loads(capsys.readouterr().out)
    assert document["passed"] and [check["passed"] for check in document["checks"]] == [True] * 3
    assert all(check["difference"] <= check["tolerance"] == 1e-5 for check in document["checks"])
    (folder / "finetune_tiny_cls_io.npz").unlink()
    with pytest.raises(SystemExit) as ended:
        main(CheckReferenceConfig(fixtures=str(folder), json=True))
    document = json.loads(capsys.readouterr().out)
    assert ended.value.code == 1 and not document["passed"] and document["checks"][0]["difference"] is None


@pytest.mark.parametrize(
    ("file", "name", "by", "failing"),
    [
        ("vqkd_tiny_random_train_io.npz", "codes", -1, "codes"),
        ("vqkd_tiny_random_train_io.npz", "decoder_features", 1e-3, "decoder_features"),
        ("vqkd_tiny_random_eval_io.npz", "rec", 1e-3, "evaluation rec"),
        ("vqkd_tiny_kmeans_train_io.npz", "codebook_after", 1e-4, "codebook_after, one EMA update"),
        ("vqkd_tiny_kmeans_after3.safetensors", "quantize.embedding.weight", 0.1, "weights and codebook"),
        ("mim_tiny_own_head_io.npz", "patch_features1", 1e-3, "patch_features1"),
        ("mim_tiny_own_head_io.npz", "patch_features2", 1e-3, "patch_features2"),
        ("mim_tiny_own_head_io.npz", "logits2_masked", 1e-3, "logits2_masked"),
        ("mim_tiny_own_head_grads.safetensors", "cls_pt_norm.weight", 1e-3, "gradients"),
        ("mim_tiny_own_head_grads.safetensors", "blocks.0.gamma_1", math.nan, "gradients"),
        ("mim_tiny_own_head_after3.safetensors", "blocks.1.gamma_2", 0.1, "three steps: weights"),
        ("finetune_tiny_io.npz", "all_tokens", 1e-3, "all_tokens"),
        ("finetune_tiny_io.npz", "pooled", math.nan, "pooled"),
        ("lr_schedules.npz", "mim_30ep_10it_wu10", 1e-3, "mim_30ep_10it_wu10"),
        ("relpos_interp.npz", "interp2d_16", 1e-3, "interp2d_16"),
        ("relpos_interp.npz", "coords_16", 1e-3, "coords_16"),
    ],
)
def test_one_changed_number_fails_and_is_named(
    fixtures: Path, tmp_path: Path, request, capsys, file, name, by, failing
):
    beginning = re.split("_(train_io|eval_io|io|grads|after3)?[.]", file)[0].removesuffix(".npz")
    if file.startswith(("lr", "relpos")):
        fixtures = request.getfixturevalue("shared_dir") / "reference" / "fixtures"
    folder = only(fixtures, tmp_path, beginning)
    path = folder / file
    tensors = load_file(path) if path.suffix == ".safetensors" else load_arrays(path)
    flat = tensors[name].view(-1)
    flat[flat.abs().argmax()] += by
    save_file(tensors, path) if path.suffix == ".safetensors" else save_arrays(path, tensors)
    with pytest.raises(SystemExit) as ended:
        main(CheckReferenceConfig(fixtures=str(folder)))
    assert ended.value.code == 1
    [line] = [line for line in capsys.readouterr().out.splitlines() if "FAIL" in line]
    assert f"{failing} " in line and (path.suffix == ".npz" or name in line)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def _shrink_images(path: Path) -> None:
    arrays = load_arrays(path)
    save_arrays(path, {**arrays, "images": arrays["images"][:, :, :6, :6]})


def _add_tensor(path: Path) -> None:
    save_file(load_file(path) | {"decoder.weight": torch.zeros(2)}, path)


@pytest.mark.parametrize(
    ("file", "damage", "text"),
    [
        ("grads.safetensors", Path.unlink, "mim_tiny_own_head_grads.safetensors"),
        ("init.safetensors", _truncate, "mim_tiny_own_head_init.safetensors"),
        ("io.npz", _truncate, "mim_tiny_own_head_io.npz cannot be read"),
        ("meta.json", lambda path: path.write_text("{"), "_meta.json cannot be read"),
        ("meta.json", lambda path: path.write_text("{}"), "three_steps"),
        ("io.npz", lambda path: np.savez(path, a=np.zeros(1)), "no array 'images'"),
        ("io.npz", _shrink_images, "the fixture as a whole"),
        ("init.safetensors", _add_tensor, "decoder.weight has no place"),
    ],
)
def test_a_missing_damaged_or_foreign_file_is_a_failed_line(
    fixtures: Path, tmp_path: Path, file, damage, text
):
    folder = only(fixtures, tmp_path, "mim_tiny_own_head")
    damage(folder / f"mim_tiny_own_head_{file}")
    [wrong] = [check for check in check_folder(str(folder)).done if not check.passed]
    assert text in f"{wrong.name} {wrong.note}"


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_folder_without_fixtures_is_bad_input(tmp_path: Path, name: str):
    (tmp_path / "notes.txt").write_text("nothing to compare")
    with pytest.raises(InputError, match="holds no fixtures"):
        main(CheckReferenceConfig(fixtures=str(tmp_path / name)))

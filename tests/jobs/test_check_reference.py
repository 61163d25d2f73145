"""The reference check on fixtures of its own: other sizes, written by a slow and literal implementation."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jobs.check_reference import CheckReferenceConfig, check_folder, main
from jobs.reference.fixtures import Checks
from pipeline.errors import InputError

State = dict[str, Tensor]

# ------------------------------------------------------------------------------------------------ slow
# Plain functions of a state's tensors, one head, patch and code at a time (reference.md §1, §3, §4).


def norm(x: Tensor, state: State, name: str) -> Tensor:
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    return (x - mean) / (variance + 1e-6).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x: Tensor, state: State, name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def block(x: Tensor, state: State, name: str, heads: int, bias: Tensor | None = None) -> Tensor:
    width = x.shape[-1]
    depth = width // heads
    q, k, v = (norm(x, state, f"{name}.norm1") @ state[f"{name}.attn.qkv.weight"].T).split(width, dim=-1)
    q, v = q + state[f"{name}.attn.q_bias"], v + state[f"{name}.attn.v_bias"]
    mixed = []
    for head in range(heads):
        part = slice(head * depth, (head + 1) * depth)
        logits = (q[..., part] * depth**-0.5) @ k[..., part].transpose(1, 2)
        logits = logits if bias is None else logits + bias[head]
        mixed.append(logits.softmax(-1) @ v[..., part])
    x = x + state.get(f"{name}.gamma_1", 1.0) * linear(torch.cat(mixed, -1), state, f"{name}.attn.proj")
    hidden = linear(norm(x, state, f"{name}.norm2"), state, f"{name}.mlp.fc1")
    hidden = 0.5 * hidden * (1.0 + torch.erf(hidden / math.sqrt(2.0)))
    return x + state.get(f"{name}.gamma_2", 1.0) * linear(hidden, state, f"{name}.mlp.fc2")


def embed(images: Tensor, state: State, name: str) -> Tensor:
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    side = weight.shape[-1]
    tokens = []
    for y in range(0, images.shape[2], side):
        for x in range(0, images.shape[3], side):
            tokens.append(images[:, :, y : y + side, x : x + side].flatten(1) @ weight.flatten(1).T + bias)
    return torch.stack(tokens, dim=1)


def with_cls(x: Tensor, token: Tensor) -> Tensor:
    return torch.cat([token.expand(len(x), 1, -1), x], dim=1)


def position_bias(table: Tensor, grid: int) -> Tensor:
    """[H, T, T] by a loop over pairs of tokens."""
    index = torch.zeros(grid**2 + 1, grid**2 + 1, dtype=torch.int64)
    last = len(table) - 1
    for query in range(grid**2):
        index[0, query + 1], index[query + 1, 0] = last - 2, last - 1
        for key in range(grid**2):
            dy, dx = query // grid - key // grid, query % grid - key % grid
            index[query + 1, key + 1] = (dy + grid - 1) * (2 * grid - 1) + dx + grid - 1
    index[0, 0] = last
    return table[index].permute(2, 0, 1)


def random_state(shapes: dict[str, tuple[int, ...]], generator: torch.Generator) -> State:
    state = {}
    for name, shape in shapes.items():
        drawn = 0.25 * torch.randn(shape, generator=generator)
        state[name] = 1.0 + drawn if "norm" in name and name.endswith("weight") else drawn
    return state


def vit_shapes(prefix: str, depth: int, width: int, *, gamma: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(depth):
        block_shapes = {
            "norm1.weight": (width,), "norm1.bias": (width,),
            "norm2.weight": (width,), "norm2.bias": (width,),
            "attn.qkv.weight": (3 * width, width), "attn.q_bias": (width,), "attn.v_bias": (width,),
            "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
            "mlp.fc1.weight": (4 * width, width), "mlp.fc1.bias": (4 * width,),
            "mlp.fc2.weight": (width, 4 * width), "mlp.fc2.bias": (width,),
            **({"gamma_1": (width,), "gamma_2": (width,)} if gamma else {}),
        }  # fmt: skip
        shapes |= {f"{prefix}.{i}.{name}": shape for name, shape in block_shapes.items()}
    return shapes


class SlowAdamW:
    """AdamW written out; decay on matrices and tables, not on [CLS] and absolute positions."""

    def __init__(self, decay: float, betas: tuple[float, float]) -> None:
        self.decay, self.betas, self.step, self.moments = decay, betas, 0, {}

    @torch.no_grad()
    def update(self, state: State, gradients: State, lr: float) -> None:
        self.step += 1
        for name, gradient in gradients.items():
            decayed = state[name].ndim > 1 and name.split(".")[-1] not in ("cls_token", "pos_embed")
            state[name].mul_(1.0 - lr * self.decay * decayed)
            first, second = self.moments.get(name, (torch.zeros_like(gradient), torch.zeros_like(gradient)))
            first = self.betas[0] * first + (1 - self.betas[0]) * gradient
            second = self.betas[1] * second + (1 - self.betas[1]) * gradient**2
            self.moments[name] = first, second
            hat = first / (1 - self.betas[0] ** self.step)
            root = (second / (1 - self.betas[1] ** self.step)).sqrt()
            state[name].sub_(lr * hat / (root + 1e-8))


def gradients_of(loss: Tensor, state: State) -> State:
    names = [name for name, tensor in state.items() if tensor.requires_grad]
    return dict(zip(names, torch.autograd.grad(loss, [state[name] for name in names]), strict=True))


def total_norm(gradients: State) -> float:
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))


def save(folder: Path, stem: str, tensors: dict[str, State], arrays: dict[str, State], meta: dict) -> None:
    for name, state in tensors.items():
        contiguous = {key: value.detach().clone().contiguous() for key, value in state.items()}
        save_file(contiguous, folder / f"{stem}_{name}.safetensors")
    for name, values in arrays.items():
        np.savez(folder / f"{stem}_{name}.npz", **{k: v.detach().numpy() for k, v in values.items()})
    (folder / f"{stem}_meta.json").write_text(json.dumps(meta))


# ------------------------------------------------------------------------------------------------ VQ-KD


class ClipTower(nn.Module):
    """A CLIP image tower with its published names, over torch's own attention."""

    def __init__(self, size: int, patch: int, width: int, heads: int, out: int) -> None:
        super().__init__()
        self.heads = heads
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((size // patch) ** 2 + 1, width))
        self.proj = nn.Parameter(torch.randn(width, out))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        layer = nn.Module()
        layer.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        layer.ln_1, layer.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        layer.mlp = nn.Module()
        layer.mlp.c_fc, layer.mlp.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList([layer])

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = self.ln_pre(with_cls(x, self.class_embedding) + self.positional_embedding)
        for layer in self.transformer.resblocks:  # type: ignore[union-attr]
            y = layer.ln_1(x)
            x = x + layer.attn(y, y, y, need_weights=False)[0]
            y = layer.mlp.c_fc(layer.ln_2(x))
            x = x + layer.mlp.c_proj(y * (1.702 * y).sigmoid())
        return self.ln_post(x)[:, 1:] @ self.proj


class DinoTower(nn.Module):
    """timm's ViT, whose names are DINO's: the final norm, no projection."""

    def __init__(self) -> None:
        super().__init__()
        from timm.models.vision_transformer import VisionTransformer

        self.vit = VisionTransformer(12, 4, num_classes=0, embed_dim=16, depth=2, num_heads=4)

    def forward(self, images: Tensor) -> Tensor:
        return self.vit.forward_features(images)[:, 1:]


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def slow_kmeans(tokens: Tensor, drawn: list[int]) -> Tensor:
    means = tokens[drawn].clone()
    for _ in range(10):
        nearest = (tokens @ means.T).argmax(-1)
        for code in nearest.unique().tolist():
            means[code] = unit(tokens[nearest == code].mean(0))
    return means


def slow_vqkd(state: State, pixels: Tensor, target: Tensor, drawn: list[int], *, training: bool) -> State:
    """Every value the fixtures hold; in training the codebook of `state` moves."""
    x = with_cls(embed(pixels, state, "encoder.patch_embed.proj"), state["encoder.cls_token"][0])
    x = x + state["encoder.pos_embed"]
    for i in range(2):
        x = block(x, state, f"encoder.blocks.{i}", heads=3)
    values = {"encoder_features": norm(x[:, 1:], state, "encoder.fc_norm")}
    hidden = linear(values["encoder_features"], state, "encode_task_layer.0").tanh()
    features = values["to_quantizer"] = linear(hidden, state, "encode_task_layer.2")
    z = values["z_l2"] = unit(features)
    flat = z.detach().flatten(0, 1)
    values["codebook_before"] = state["quantize.embedding.weight"].clone()
    if not state["quantize.embedding.initted"]:
        state["quantize.embedding.weight"] = slow_kmeans(flat, drawn)
        state["quantize.embedding.initted"] = torch.ones(1)
    codebook = state["quantize.embedding.weight"]
    codes = ((flat[:, None] - codebook[None]) ** 2).sum(-1).argmin(-1)
    chosen = codebook[codes].view_as(z)
    quantized = z + (chosen - z).detach()
    counts = torch.bincount(codes, minlength=len(codebook)).float()
    state["quantize.cluster_size"] = 0.99 * state["quantize.cluster_size"] + 0.01 * counts
    if training:
        moved = codebook.clone()
        for code in counts.nonzero().flatten().tolist():
            moved[code] = unit(0.99 * codebook[code] + 0.01 * unit(flat[codes == code].mean(0)))
        state["quantize.embedding.weight"] = moved
    batch, patches, dim = z.shape
    image = values["quantized_bchw"] = quantized.transpose(1, 2).reshape(batch, dim, 3, patches // 3)
    x = with_cls(embed(image, state, "decoder.patch_embed.proj"), state["decoder.cls_token"][0])
    x = x + state["decoder.pos_embed"]
    for i in range(2):
        x = block(x, state, f"decoder.blocks.{i}", heads=2)
    decoded = values["decoder_features"] = norm(x[:, 1:], state, "decoder.fc_norm")
    rec = values["rec"] = linear(
        linear(decoded, state, "decode_task_layer.0").tanh(), state, "decode_task_layer.2"
    )
    values["emb_loss"] = ((chosen - z) ** 2).mean()
    values["rec_loss"] = (1.0 - (unit(rec) * unit(target)).sum(-1)).mean()
    values["total_loss"] = values["emb_loss"] + values["rec_loss"]
    values |= {
        "codes": codes.view(batch, patches),
        "codebook_after": state["quantize.embedding.weight"].clone(),
    }
    values["usage_cluster_size_after"] = state["quantize.cluster_size"].clone()
    return values


def write_vqkd(folder: Path, stem: str, *, kmeans: bool, codebook: int, teacher: str, dim: int) -> None:
    """3 x 3 patches of 4; encoder 12 wide, 3 heads; decoder 8 wide, 2 heads; codes of 6 dimensions."""
    generator = torch.Generator().manual_seed(7)
    torch.manual_seed(3)
    shapes = {
        "encoder.cls_token": (1, 1, 12), "encoder.pos_embed": (1, 10, 12),
        "encoder.patch_embed.proj.weight": (12, 3, 4, 4), "encoder.patch_embed.proj.bias": (12,),
        "encoder.fc_norm.weight": (12,), "encoder.fc_norm.bias": (12,),
        "decoder.cls_token": (1, 1, 8), "decoder.pos_embed": (1, 10, 8),
        "decoder.patch_embed.proj.weight": (8, 6, 1, 1), "decoder.patch_embed.proj.bias": (8,),
        "decoder.fc_norm.weight": (8,), "decoder.fc_norm.bias": (8,),
        "encode_task_layer.0.weight": (12, 12), "encode_task_layer.0.bias": (12,),
        "encode_task_layer.2.weight": (6, 12), "encode_task_layer.2.bias": (6,),
        "decode_task_layer.0.weight": (8, 8), "decode_task_layer.0.bias": (8,),
        "decode_task_layer.2.weight": (dim, 8), "decode_task_layer.2.bias": (dim,),
        **vit_shapes("encoder.blocks", 2, 12, gamma=False), **vit_shapes("decoder.blocks", 2, 8, gamma=False),
    }  # fmt: skip
    trained = random_state(shapes, generator)
    weight = unit(torch.randn(codebook, 6, generator=generator))
    buffers = {
        "quantize.embedding.weight": 0.0 * weight if kmeans else weight,
        "quantize.embedding.cluster_size": torch.zeros(codebook),
        "quantize.embedding.embed_avg": weight.clone(),
        "quantize.embedding.initted": torch.tensor([0.0 if kmeans else 1.0]),
        "quantize.cluster_size": torch.zeros(codebook),
    }
    tower = (ClipTower(12, 4, 16, 2, dim) if teacher == "clip" else DinoTower()).eval().requires_grad_(False)
    shift, scale = (
        torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1),
        torch.tensor([0.2, 0.3, 0.25]).view(1, 3, 1, 1),
    )
    frozen = {"scaling_layer.shift": shift, "scaling_layer.scale": scale}
    frozen |= {
        f"teacher_model.{'visual.' * (teacher == 'clip')}{key.removeprefix('vit.')}": value
        for key, value in tower.state_dict().items()
    }
    drawn = torch.randperm(27, generator=generator)[:codebook].tolist()

    def fresh() -> State:
        return {k: t.clone().requires_grad_() for k, t in trained.items()} | {
            k: t.clone() for k, t in buffers.items()
        }

    images = torch.rand(3, 3, 12, 12, generator=generator)
    target = tower((images - shift) / scale)
    state = fresh()
    values = slow_vqkd(state, images * 2 - 1, target, drawn, training=True)
    gradients = gradients_of(values["total_loss"], state)
    evaluated = slow_vqkd(state if kmeans else fresh(), images * 2 - 1, target, drawn, training=False)
    kept = (
        "codes",
        "emb_loss",
        "rec_loss",
        "total_loss",
        "quantized_bchw",
        "rec",
        "usage_cluster_size_after",
    )

    state, optimizer, steps, lrs = fresh(), SlowAdamW(1e-4, (0.9, 0.99)), [], [1e-3, 2e-3, 3e-3]
    for seed, lr in zip((11, 12, 13), lrs, strict=True):
        drawn_images = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed))
        found = slow_vqkd(
            state, drawn_images * 2 - 1, tower((drawn_images - shift) / scale), drawn, training=True
        )
        step_gradients = gradients_of(found["total_loss"], state)
        optimizer.update(state, step_gradients, lr)
        steps.append(
            {
                "total": found["total_loss"].item(),
                "quant": found["emb_loss"].item(),
                "rec": found["rec_loss"].item(),
                "grad_norm": total_norm(step_gradients),
                "image_seed": seed,
            }
        )
    save(
        folder,
        stem,
        {"init": trained | buffers | frozen, "grads": gradients, "after3": state | frozen},
        {
            "train_io": {"images": images, "preprocessed": images * 2 - 1, "target": target,
                         "teacher_input": (images - shift) / scale, **values},
            "eval_io": {name: evaluated[name] for name in kept},
        },
        {"grad_norm": total_norm(gradients), "three_steps": steps, "lrs": lrs,
         **({"randperm_first": drawn} if kmeans else {})},
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ MIM


def slow_mim(state: State, images: Tensor, mask: Tensor, codes: Tensor, layer: int) -> State:
    x = embed(images, state, "patch_embed.proj")
    x = torch.where(mask[:, :, None], state["mask_token"], x)
    x = with_cls(x, state["cls_token"][0])
    bias = position_bias(state["rel_pos_bias.relative_position_bias_table"], 3)
    early = x
    for i in range(3):
        x = block(x, state, f"blocks.{i}", 2, bias)
        early = x if i + 1 == layer else early
    aggregated = torch.cat([x[:, :1], early[:, 1:]], dim=1)
    for i in range(3):
        aggregated = block(aggregated, state, f"cls_pt_layers.{i}", 2, bias)
    values: State = {"labels": codes[mask], "total_loss": torch.zeros(())}
    for head, (tokens, prefix) in enumerate(((x, ""), (aggregated, "cls_pt_")), start=1):
        features = values[f"patch_features{head}"] = norm(tokens[:, 1:], state, f"{prefix}norm")
        logits = values[f"logits{head}_masked"] = linear(features[mask], state, f"{prefix}lm_head")
        loss = values[f"loss{head}"] = -logits.log_softmax(-1)[torch.arange(len(logits)), codes[mask]].mean()
        values[f"acc{head}"] = (logits.argmax(-1) == codes[mask]).float().mean()
        values["total_loss"] = values["total_loss"] + loss
    return values


def write_mim(folder: Path, stem: str) -> None:
    """3 x 3 patches of 3, 12 wide, 2 heads, 3 blocks, second head of 3 blocks after block 2, of its own."""
    generator = torch.Generator().manual_seed(9)
    shapes = {
        "cls_token": (1, 1, 12), "mask_token": (1, 1, 12), "norm.weight": (12,), "norm.bias": (12,),
        "patch_embed.proj.weight": (12, 3, 3, 3), "patch_embed.proj.bias": (12,),
        "rel_pos_bias.relative_position_bias_table": (28, 2),
        "lm_head.weight": (11, 12), "lm_head.bias": (11,),
        "cls_pt_norm.weight": (12,), "cls_pt_norm.bias": (12,),
        "cls_pt_lm_head.weight": (11, 12), "cls_pt_lm_head.bias": (11,),
        **vit_shapes("blocks", 3, 12, gamma=True), **vit_shapes("cls_pt_layers", 3, 12, gamma=True),
    }  # fmt: skip
    initial = random_state(shapes, generator)
    images = torch.randn(4, 3, 9, 9, generator=generator)
    mask = torch.stack([torch.randperm(9, generator=generator) < 4 for _ in range(4)])
    codes = torch.randint(11, (4, 9), generator=generator)
    state = {key: tensor.clone().requires_grad_() for key, tensor in initial.items()}
    values = slow_mim(state, images, mask, codes, layer=2)
    gradients = gradients_of(values["total_loss"], state)

    optimizer, steps, lrs, clip = SlowAdamW(0.05, (0.9, 0.999)), [], [1e-3, 2e-3, 3e-3], 0.5
    for lr in lrs:
        total = slow_mim(state, images, mask, codes, layer=2)["total_loss"]
        found = gradients_of(total, state)
        length = total_norm(found)
        steps.append({"total": total.item(), "grad_norm": length})
        factor = min(1.0, clip / (length + 1e-6))
        optimizer.update(state, {key: gradient * factor for key, gradient in found.items()}, lr)
    assert steps[0]["grad_norm"] > clip
    save(
        folder,
        stem,
        {"init": initial, "grads": gradients, "after3": state},
        {"io": {"images": images, "mask": mask, "tokens": codes, **values}},
        {"three_steps": steps, "lrs": lrs, "clip": clip, "same_batch_each_step": True},
    )


# ------------------------------------------------------------------------------------------------ the rest


def write_finetune(folder: Path, stem: str, *, cls: bool) -> None:
    """By timm's BEiT: per-block tables and mean pooling, or [CLS] and absolute positions alone."""
    from timm.models.beit import Beit

    model = Beit(
        img_size=20, patch_size=4, embed_dim=24, depth=3, num_heads=3, init_values=0.1, num_classes=6,
        use_abs_pos_emb=cls, use_rel_pos_bias=not cls, global_pool="token" if cls else "avg",
    ).eval()  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(2, 3, 20, 20, generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        tokens = model.forward_features(images)
        values = {
            "images": images,
            "logits": model(images),
            "pooled": model.forward_head(tokens, pre_logits=True),
            "all_tokens": model.fc_norm(tokens),
        }
    indices = {key: index for key, index in model.named_buffers() if key.endswith("relative_position_index")}
    state = model.state_dict() | {key: index.clone() for key, index in indices.items()}
    assert len(indices) == (0 if cls else 3)
    save_file(state, folder / f"{stem}_init.safetensors")
    np.savez(folder / f"{stem}_io.npz", **{key: value.numpy() for key, value in values.items()})


def write_schedules(folder: Path) -> None:
    def schedule(peak: float, low: float, warmup: int, total: int) -> np.ndarray:
        rest = [
            low + 0.5 * (peak - low) * (1 + math.cos(math.pi * i / (total - warmup)))
            for i in range(total - warmup)
        ]
        return np.concatenate([np.linspace(0, peak, warmup), rest])

    np.savez(
        folder / "lr_schedules.npz",
        mim_7ep_9it_wu2=schedule(3e-3, 1e-4, 18, 63),
        large_4ep_50it_wusteps33=schedule(2e-4, 0.0, 33, 200).astype(np.float32),
        flat_3ep_5it_wu0=schedule(1.0, 0.5, 0, 15),
        weight_decay=np.full(10, 0.05),
    )


def write_positions(folder: Path) -> None:
    """A table of 5 x 5 patches that is a cubic in the distance, so that its resized form is known exactly."""

    def coordinates(q: float) -> np.ndarray:
        side = np.cumsum(q ** np.arange(4))
        return np.concatenate([-side[::-1], [0.0], side])

    def surface(positions: np.ndarray) -> np.ndarray:
        y, x = positions[:, None] / 7, positions[None, :] / 7
        return np.stack([y**3 - x * y + 0.2, x**2 * y + 0.5 * x**3, 1 + x + y])

    low, high = 1.01, 1.5  # 1 + q + q^2 + q^3 = 7 for 8 x 8 patches
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if coordinates(middle)[-1] < 7 else (low, middle)
    np.savez(
        folder / "relpos_interp.npz",
        src=surface(coordinates(low)).astype(np.float32),
        interp2d_8=surface(np.arange(-7.0, 8.0)).astype(np.float32),
        coords_8=coordinates(low),
    )


@pytest.fixture(scope="module")
def fixtures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All kinds of fixtures, of sizes that the published ones do not have."""
    folder = tmp_path_factory.mktemp("fixtures")
    write_vqkd(folder, "vqkd_tiny_kmeans", kmeans=True, codebook=10, teacher="clip", dim=7)
    write_vqkd(folder, "vqkd_tiny_random", kmeans=False, codebook=17, teacher="dino", dim=16)
    write_mim(folder, "mim_tiny_own_head")
    write_finetune(folder, "finetune_tiny", cls=False)
    write_finetune(folder, "finetune_tiny_cls", cls=True)
    write_schedules(folder)
    write_positions(folder)
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
    found = "\n".join(lines)
    assert "encoder heads 3, decoder heads 2" in found
    assert "second head from layer 2" in found and "of its own" in found
    assert "8 heads" not in found and "3 heads, by trial" in found
    assert "left alone: notes.txt" in lines and "left alone: lr_schedules: weight_decay" in lines
    assert "5x5 to 8x8" in found


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


def change_array(path: Path, name: str, by: float) -> None:
    """Add to the largest entry of one array."""
    with np.load(path) as found:
        arrays = {key: found[key].copy() for key in found.files}
    flat = arrays[name].reshape(-1)
    flat[np.abs(flat.astype(float)).argmax()] += by
    np.savez(path, **arrays)


def change_tensor(path: Path, name: str, by: float) -> None:
    state = load_file(path)
    state[name].view(-1)[state[name].abs().argmax()] += by
    save_file(state, path)


@pytest.mark.parametrize(
    ("file", "name", "by", "failing"),
    [
        ("vqkd_tiny_random_train_io.npz", "codes", -1, ": codes"),
        ("vqkd_tiny_random_train_io.npz", "decoder_features", 1e-3, ": decoder_features"),
        ("vqkd_tiny_random_eval_io.npz", "rec", 1e-3, ": evaluation rec"),
        ("vqkd_tiny_kmeans_train_io.npz", "codebook_after", 1e-4, ": codebook_after, one EMA update"),
        ("mim_tiny_own_head_io.npz", "logits2_masked", 1e-3, ": logits2_masked"),
        ("finetune_tiny_io.npz", "all_tokens", 1e-3, ": all_tokens"),
        ("finetune_tiny_io.npz", "pooled", math.nan, ": pooled"),
        ("lr_schedules.npz", "flat_3ep_5it_wu0", 1e-3, ": flat_3ep_5it_wu0"),
        ("relpos_interp.npz", "interp2d_8", 1e-3, ": interp2d_8"),
        ("relpos_interp.npz", "coords_8", 1e-3, ": coords_8"),
    ],
)
def test_one_changed_number_fails_and_is_named(
    fixtures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    name: str,
    by: float,
    failing: str,
):
    beginning = file.split("_train_io")[0].split("_eval_io")[0].split("_io.")[0].removesuffix(".npz")
    folder = only(fixtures, tmp_path, beginning)
    change_array(folder / file, name, by)
    with pytest.raises(SystemExit) as ended:
        main(CheckReferenceConfig(fixtures=str(folder)))
    assert ended.value.code == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "FAIL" in line]
    assert len(lines) == 1 and failing in lines[0]


@pytest.mark.parametrize(
    ("file", "key", "by", "failing"),
    [
        ("mim_tiny_own_head_grads.safetensors", "cls_pt_norm.weight", 1e-3, "gradients"),
        ("mim_tiny_own_head_grads.safetensors", "blocks.0.gamma_1", math.nan, "gradients"),
        ("mim_tiny_own_head_after3.safetensors", "blocks.1.gamma_2", 0.1, "three steps: weights"),
        (
            "vqkd_tiny_kmeans_after3.safetensors",
            "quantize.embedding.weight",
            0.1,
            "three steps: weights and codebook",
        ),
    ],
)
def test_one_changed_weight_fails_and_is_named(fixtures: Path, tmp_path: Path, file, key, by, failing):
    folder = only(fixtures, tmp_path, file.rsplit("_", 1)[0])
    change_tensor(folder / file, key, by)
    [wrong] = [check for check in check_folder(str(folder)).done if not check.passed]
    assert wrong.name.endswith(f": {failing}") and key in wrong.note and wrong.difference > wrong.tolerance


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def _shrink_images(path: Path) -> None:
    with np.load(path) as found:
        arrays = {key: found[key] for key in found.files}
    np.savez(path, **{**arrays, "images": arrays["images"][:, :, :6, :6]})


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("mim_tiny_own_head_grads.safetensors", Path.unlink, "mim_tiny_own_head_grads.safetensors"),
        (
            "mim_tiny_own_head_init.safetensors",
            _truncate,
            "mim_tiny_own_head_init.safetensors cannot be read",
        ),
        ("mim_tiny_own_head_io.npz", _truncate, "mim_tiny_own_head_io.npz cannot be read"),
        ("mim_tiny_own_head_meta.json", lambda path: path.write_text("{"), "_meta.json cannot be read"),
        ("mim_tiny_own_head_meta.json", lambda path: path.write_text("{}"), "three_steps"),
        ("mim_tiny_own_head_io.npz", lambda path: np.savez(path, a=np.zeros(1)), "no array 'images'"),
        ("mim_tiny_own_head_io.npz", _shrink_images, "the fixture as a whole"),
    ],
)
def test_a_missing_or_damaged_file_is_a_failed_line(
    fixtures: Path, tmp_path: Path, file: str, damage: Callable[[Path], object], said: str
):
    folder = only(fixtures, tmp_path, "mim_tiny_own_head")
    damage(folder / file)
    [wrong] = [check for check in check_folder(str(folder)).done if not check.passed]
    assert said in f"{wrong.name} {wrong.note}"


def test_weights_of_another_model_are_a_failed_line(fixtures: Path, tmp_path: Path):
    folder = only(fixtures, tmp_path, "mim_tiny_own_head")
    path = folder / "mim_tiny_own_head_init.safetensors"
    save_file(load_file(path) | {"decoder.weight": torch.zeros(2)}, path)
    [wrong] = [check for check in check_folder(str(folder)).done if not check.passed]
    assert "decoder.weight is [2] in the fixture's weights and absent in our model" in wrong.note


def test_names_of_files_are_understood_liberally(fixtures: Path, tmp_path: Path):
    shutil.copy(fixtures / "finetune_tiny_io.npz", tmp_path / "finetune_tiny.npz")
    shutil.copy(fixtures / "finetune_tiny_init.safetensors", tmp_path / "finetune_tiny_state.safetensors")
    (tmp_path / "finetune_tiny_readme.json").write_text("{}")
    np.savez(tmp_path / "vqkd_tiny_extra.npz", a=np.zeros(1))
    checks = check_folder(str(tmp_path))
    assert failures(checks) == [] and len(checks.done) == 3 + 3  # three outputs, three indices of positions
    assert checks.left_alone == ["finetune_tiny_readme.json", "vqkd_tiny_extra.npz"]


def test_a_pretraining_state_is_fine_tuned_by_conversion(tmp_path: Path, fixtures: Path):
    """Pooled features and tokens are those of the blocks under a fresh norm; there is no head for logits."""
    state = load_file(fixtures / "mim_tiny_own_head_init.safetensors")
    save_file(state, tmp_path / "finetune_tiny_init.safetensors")
    images = torch.randn(2, 3, 9, 9)
    x = with_cls(embed(images, state, "patch_embed.proj"), state["cls_token"][0])
    bias = position_bias(state["rel_pos_bias.relative_position_bias_table"], 3)
    for i in range(3):
        x = block(x, state, f"blocks.{i}", 2, bias)
    values = {"images": images, "pooled": F.layer_norm(x[:, 1:].mean(1), (12,), eps=1e-6)}
    values["all_tokens"] = F.layer_norm(x, (12,), eps=1e-6)
    np.savez(tmp_path / "finetune_tiny_io.npz", **{key: value.numpy() for key, value in values.items()})
    checks = check_folder(str(tmp_path))
    assert failures(checks) == [] and len(checks.done) == 2
    values["logits"] = torch.zeros(2, 5)
    np.savez(tmp_path / "finetune_tiny_io.npz", **{key: value.numpy() for key, value in values.items()})
    assert failures(check_folder(str(tmp_path))) == ["finetune_tiny: logits"]


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_folder_without_fixtures_is_bad_input(tmp_path: Path, name: str):
    (tmp_path / "notes.txt").write_text("nothing to compare")
    with pytest.raises(InputError, match="holds no fixtures"):
        main(CheckReferenceConfig(fixtures=str(tmp_path / name)))

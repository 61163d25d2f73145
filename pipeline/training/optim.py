"""AdamW with the reference's parameter groups, its step-wise cosine schedule, and precision of a step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.errors import InputError

Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule. Defaults: masked image modelling, base size, 1600 epochs (Table 9)."""

    peak_lr: float = 1.5e-3
    """Learning rate after warm-up."""
    min_lr: float = 1e-5
    """Learning rate at the end."""
    warmup_epochs: float = 10.0
    """Epochs of linear warm-up from 0."""
    weight_decay: float = 0.05
    """Constant decay; not on biases, norms, scales, [CLS] and absolute positions."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    clip_grad_norm: float | None = 3.0
    """Largest gradient norm; null leaves gradients alone."""
    lr_batch_size: int | None = None
    """When set, peak_lr belongs to this batch size and is scaled linearly to the real one (VQ-KD: 128)."""

    def __post_init__(self) -> None:
        if self.peak_lr <= 0 or self.min_lr < 0:
            raise InputError(
                f"optim.peak_lr {self.peak_lr} must be positive and optim.min_lr {self.min_lr} not negative"
            )

    def effective_lr(self, batch_size: int) -> float:
        """The peak learning rate at this global batch size."""
        return self.peak_lr * batch_size / self.lr_batch_size if self.lr_batch_size else self.peak_lr

    def schedule(self, batch_size: int, steps_per_epoch: int, epochs: int) -> Callable[[float], float]:
        """Learning rate as a function of the step: 0 up to the peak, inclusive, then half a cosine down.

        The step is a place in the epochs, epoch + position / samples, in units of steps: a fraction where the
        batch size was changed on the way. The reference's numbers: the first step has rate 0, the peak occurs
        twice, the last step lies one step short of `min_lr`.
        """
        peak_lr, min_lr = self.effective_lr(batch_size), self.min_lr
        warmup_steps, total_steps = round(self.warmup_epochs * steps_per_epoch), epochs * steps_per_epoch

        def lr(step: float) -> float:
            if step < warmup_steps:
                return peak_lr * step / max(warmup_steps - 1, 1)
            progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
            return min_lr + 0.5 * (peak_lr - min_lr) * (1.0 + math.cos(math.pi * min(progress, 1.0)))

        return lr


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay acts on a parameter, by the reference's rule.

    Excluded: vectors, biases, [CLS] and absolute positions. The mask token and the relative position table
    are decayed, as in the reference and unlike in timm.
    """
    return (
        parameter.ndim > 1
        and not name.endswith(".bias")
        and name.rsplit(".", 1)[-1] not in ("cls_token", "pos_embed")
    )


def build_optimizer(model: nn.Module, config: OptimConfig, batch_size: int) -> torch.optim.AdamW:
    """AdamW over two groups, without and with decay, each in the model's own order."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
        {"params": [p for name, p in named if decays(name, p)], "weight_decay": config.weight_decay},
    ]
    return torch.optim.AdamW(groups, lr=config.effective_lr(batch_size), betas=config.betas, eps=config.eps)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """The compute dtype: on CUDA bf16 from sm80 and fp16 below; fp32 on CPU (bf16 was 3 x slower)."""
    if precision == "fp16" and device.type != "cuda":
        raise InputError("--precision fp16 needs a CUDA device; use fp32 or bf16 here")
    if precision == "auto" and device.type == "cuda":
        precision = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """Mixed precision for one forward pass; nothing when dtype is fp32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def grad_scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:  # type: ignore[name-defined]
    """Loss scaling, active for fp16 only; its state belongs into checkpoints."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # type: ignore[attr-defined]

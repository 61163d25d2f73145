"""Models for tests whose parameters are nowhere zero or one."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

ModelT = TypeVar("ModelT", bound=nn.Module)


def shaken(model: ModelT, seed: int = 0) -> ModelT:
    """The same model in evaluation mode with every parameter moved, so that no zero or one hides anything."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()

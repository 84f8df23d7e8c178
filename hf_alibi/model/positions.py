"""What stands where a model's positions were: nothing is added to embeddings, nothing is rotated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NoPositions", "NoRotation"]


class NoPositions(nn.Module):
    """Stands for a table of positions, learned or sinusoidal: zeros for any position, at any length."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Integer zeros (1, 1, 1), which broadcast over the embeddings and promote no dtype."""
        device = next(value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return torch.zeros(1, 1, 1, dtype=torch.int32, device=device)


class NoRotation(nn.Module):
    """Stands for rotary positions: every token has the rotation of position 0, which is none.

    The family's own module still says what form that has (cosines and sines, complex numbers, one for each kind of
    layer) and keeps the constant by which some scalings of rotary positions (YaRN, LongRoPE) sharpen all logits: that
    is a temperature the weights were trained with, and no position.

    Args:
        rotary: the family's module, called as `rotary(x, position_ids, ...)`.
    """

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def __getattr__(self, name: str) -> Any:
        # Some families ask their module which kinds of layers it serves.
        return super().__getattr__(name) if name in ("rotary", "_modules") else getattr(self.rotary, name)

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What `rotary` returns for `position_ids` (..., batch, tokens) that are all 0, of the same shape."""
        first = position_ids.new_zeros(()).expand(*position_ids.shape[:-2], 1, 1)
        rotations = self.rotary(x, first, *args, **kwargs)
        if isinstance(rotations, Tensor):
            return _for_tokens(rotations, position_ids)
        return tuple(_for_tokens(rotation, position_ids) for rotation in rotations)


def _for_tokens(rotation: Tensor, position_ids: Tensor) -> Tensor:
    """(..., 1, 1, width) as a view (..., batch, tokens, width)."""
    return rotation.expand(*rotation.shape[:-3], *position_ids.shape[-2:], rotation.shape[-1])

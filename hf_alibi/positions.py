"""What stands where a model's positions were: modules without parameters that add and rotate nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NoPositions", "NoRotation"]


class NoPositions(nn.Module):
    """Stands for a learned table of positions: zeros for any position, at any length."""

    def forward(self, position_ids: Tensor) -> Tensor:
        """Integer zeros (batch, length, 1), which broadcast over the width and promote no dtype."""
        return torch.zeros_like(position_ids, dtype=torch.int32)[..., None]


class NoRotation(nn.Module):
    """Stands for rotary positions: every angle is 0.

    Args:
        width: rotated dimensions a head.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor, position_ids: Tensor | None = None, **_: Any) -> tuple[Tensor, Tensor]:
        """Cosines of 1 and sines of 0, each (1, 1, width) in the type of `x`, which broadcast over the tokens."""
        return x.new_ones(1, 1, self.width), x.new_zeros(1, 1, self.width)

    def extra_repr(self) -> str:
        """The argument, for `print(model)`."""
        return f"width={self.width}"

"""What may be left out of a row of attention weights: less than its rounding takes, or than a tolerance given."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["exact_tolerance", "left_out"]


def exact_tolerance(dtype: torch.dtype) -> float:
    """Share of a row's weights below which leaving keys out is lost in the rounding of `dtype`."""
    return torch.finfo(dtype).eps / 8


def left_out(share: Tensor, tolerance: float) -> Tensor:
    """Bool like `share`: True where a block of keys is left out, the least first, while all of them fit the tolerance.

    Args:
        share: (..., key blocks), logarithms of upper bounds of the share of a row; infinity for what must be read.
        tolerance: share of a row that everything left out may have together.
    """
    ordered, order = share.sort(dim=-1)
    fits = ordered.exp().cumsum(dim=-1) <= tolerance
    return torch.zeros_like(fits).scatter(-1, order, fits)

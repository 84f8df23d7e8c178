"""What may be left out of a row of attention weights: less than its rounding takes, or than a tolerance given.

A key at distance d carries at most exp(bound of its logit - slope × d - log-sum-exp) of a row whose log-sum-exp over
some of its keys is known. Two bounds of the logit hold for any weights (Cauchy-Schwarz): |q| |k|, and for every key of
a block with centroid c and radius r, q·c + |q| r. What cannot be compared (NaN) is read.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["centroid_and_radius", "exact_tolerance", "left_out", "log_sum_of_bias"]


def exact_tolerance(dtype: torch.dtype) -> float:
    """Share of a row's weights below which leaving keys out is lost in the rounding of `dtype`."""
    return torch.finfo(dtype).eps / 8


def centroid_and_radius(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Of keys (..., keys, head_dim), the mean (..., head_dim) and the largest distance from it (...)."""
    centroid = keys.mean(dim=-2)
    return centroid, (keys - centroid[..., None, :]).norm(dim=-1).amax(dim=-1)


def log_sum_of_bias(slopes: Tensor, keys: float = math.inf) -> Tensor:
    """Logarithm of the sum of exp(-slope × distance) over `keys` tokens from distance 0 on, a geometric series.

    Args:
        slopes: more than 0, logits per token of distance; the result has their shape.
        keys: how many tokens.
    """
    return (torch.expm1(-slopes * keys) / torch.expm1(-slopes)).log()


def left_out(share: Tensor, tolerance: float) -> Tensor:
    """Bool like `share`: True where a block of keys is left out, the least first, while all of them fit the tolerance.

    Args:
        share: (..., key blocks), logarithms of upper bounds of the share of a row; infinity for what must be read.
        tolerance: share of a row that everything left out may have together.
    """
    ordered, order = share.sort(dim=-1)
    fits = ordered.exp().cumsum(dim=-1) <= tolerance
    return torch.zeros_like(fits).scatter(-1, order, fits)

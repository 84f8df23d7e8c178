"""Per-head slopes and their scaling for contexts beyond the training length: pure maths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["SCALING_TYPES", "alibi_slopes", "check_scaling", "dynamic_scale", "scale_slopes", "slopes_by_layer"]

SCALING_TYPES = ("linear", "ntk", "dynamic")


def alibi_slopes(num_heads: int) -> Tensor:
    """The paper's geometric slopes (Press et al. 2022, arXiv 2108.12409, section 3).

    For n heads, n a power of two, head i (from 1) has slope 2^(-8 i / n). Other head counts take all slopes of
    the closest power of two below and every other slope of the one above, from the steepest. Powers are taken in
    float32, so that every value equals transformers' BLOOM to the last bit.

    Returns a float32 tensor of shape (num_heads,), in logits per token of distance.

    Raises TypeError if `num_heads` is no integer, ValueError if it is below 1.

    >>> alibi_slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    """
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f"num_heads must be an int, got {num_heads!r}")
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {num_heads}")
    power_of_two = 2 ** math.floor(math.log2(num_heads))
    slopes = _geometric(power_of_two, torch.arange(1, power_of_two + 1))
    remaining = num_heads - power_of_two
    if remaining:
        slopes = torch.cat([slopes, _geometric(2 * power_of_two, torch.arange(1, 2 * remaining, 2))])
    return slopes


def _geometric(num_heads: int, exponents: Tensor) -> Tensor:
    ratio = torch.tensor(2.0 ** (-8.0 / num_heads), dtype=torch.float32)
    return ratio.pow(exponents.to(torch.int32))


def slopes_by_layer(slopes: Any) -> list[list[float]]:
    """The lists of slopes in `alibi_slopes` of a config: none if it is None, one for all layers, or one a layer."""
    if slopes is None:
        return []
    nested = bool(slopes) and isinstance(slopes[0], list)
    return slopes if nested else [slopes]


def check_scaling(scaling: Mapping[str, Any]) -> None:
    """Raise ValueError unless `scaling` reads {"type": one of SCALING_TYPES, "factor": a number >= 1}.

    `dynamic` may leave the factor out: it is then without a ceiling.
    """
    form = f'{{"type": one of {list(SCALING_TYPES)}, "factor": a number of at least 1}}'
    if unknown := sorted(set(scaling) - {"type", "factor"}):
        raise ValueError(f"alibi_scaling has unknown keys {unknown}; its form is {form}")
    if scaling.get("type") not in SCALING_TYPES:
        raise ValueError(f"alibi_scaling has type {scaling.get('type')!r}; its form is {form}")
    factor = scaling.get("factor")
    if factor is None and scaling["type"] == "dynamic":
        return
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 1 <= factor < math.inf:
        raise ValueError(f"alibi_scaling has factor {factor!r}; its form is {form}")


def scale_slopes(slopes: Tensor, scaling: Mapping[str, Any] | None) -> Tensor:
    """Slopes of shape (heads,) after `linear` or `ntk` scaling by a factor f; `dynamic` is left to `dynamic_scale`.

    - linear: every slope / f, which is position interpolation (Al-Khateeb et al. 2023, arXiv 2310.13017).
    - ntk: the steepest slope stays, the flattest is divided by f, those between by f to the power of their place
      on the logarithmic scale: near tokens are told apart as in training, only far reach is stretched. This is the
      idea of NTK-aware rotary scaling carried over to slopes. A slope of 0 stays 0.
    """
    if scaling is None or scaling["type"] == "dynamic":
        return slopes
    factor = float(scaling["factor"])
    if scaling["type"] == "linear":
        return slopes / factor
    logs = slopes.double().log2()
    finite = logs[logs.isfinite()]
    if finite.numel() == 0:
        return slopes
    span = finite.max() - finite.min()
    place = (finite.max() - logs) / span if span > 0 else torch.ones_like(logs)
    return torch.where(slopes > 0, slopes.double() / factor**place, 0.0).to(slopes.dtype)


def dynamic_scale(context: Tensor, train_length: int, ceiling: float | None) -> Tensor:
    """What `dynamic` scaling multiplies the slopes with: train_length / context if the context is longer, else 1.

    Args:
        context: any shape, the number of tokens that a query sees, itself included.
        train_length: tokens.
        ceiling: the scale never goes below 1 / ceiling; None for no limit.

    Each query has its own scale, by what it sees and nothing else. So logits are the same with and without a cache,
    under padding, and beside other sequences in a batch.
    """
    ratio = context.float().clamp(min=1) / train_length
    return 1 / ratio.clamp(min=1, max=ceiling)

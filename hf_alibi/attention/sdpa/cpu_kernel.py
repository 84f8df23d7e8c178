"""PyTorch's fused attention on the CPU with its log-sum-exp, which no public function gives.

Nor does any take a mask beside `is_causal`. The operators are private: they are looked up when they are first needed,
and `sdpa` takes another path if a version of PyTorch lacks them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["attend", "attend_backward", "is_available"]

_NAME = "_scaled_dot_product_flash_attention_for_cpu"


@cache
def _operator(name: str) -> Any:
    return getattr(torch.ops.aten, name, None)


def is_available() -> bool:
    """Whether this PyTorch has both operators."""
    return _operator(_NAME) is not None and _operator(f"{_NAME}_backward") is not None


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, bias: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """Output (batch, heads, queries, head_dim) and log-sum-exp (batch, heads, queries) of one call.

    Args:
        query: (batch, heads, queries, head_dim).
        key, value: (batch, heads, keys, head_dim).
        causal: hide the future; query i sees keys up to i.
        bias: added to the logits, broadcasts to (batch, heads, queries, keys).
        scaling: of the logits.
    """
    output, lse = _operator(_NAME)(query, key, value, 0.0, causal, attn_mask=bias, scale=scaling)
    return output, lse


def attend_backward(
    of_queries: tuple[Tensor, Tensor, Tensor, Tensor],
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    bias: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values; `of_queries`: gradient, query, output and log-sum-exp of the call."""
    grad, query, output, lse = of_queries
    gradients: tuple[Tensor, Tensor, Tensor] = _operator(f"{_NAME}_backward")(
        grad, query, key, value, output, lse, 0.0, causal, attn_mask=bias, scale=scaling
    )
    return gradients

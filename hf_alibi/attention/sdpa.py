"""ALiBi attention on PyTorch's scaled_dot_product_attention, with memory that grows linearly with length.

Without a mask there is no dense bias: a few dimensions are appended to queries and keys, whose product is
slope × key position. Softmax ignores a constant per row, so that equals -slope × distance. With a mask the bias is
built for a block of queries at a time. Blocks are recomputed in the backward pass, so that none of them is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from ..bias import alibi_bias, causal_rows
from .head_slopes import HeadSlopes, head_slopes
from .inputs import autocast, refuse_unsupported, visible_keys

__all__ = ["sdpa_alibi_attention"]

# Up to this many queries the plain causal kernel takes all of them at once. Beyond, queries are taken in blocks whose
# positions count from their own centre: near keys, the ones whose logits matter, then have small positions, and
# slope × position keeps its precision at any length.
_SINGLE_CALL = 2**14
_CAUSAL_ROWS = 256
# Entries of a dense (batch, heads, rows, keys) matrix that may stand in memory at a time: 64 MiB in float32.
_DENSE_ENTRIES = 2**24


def sdpa_alibi_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention with the ALiBi bias, exact in every floating-point type.

    Args:
        module: the self-attention layer; its config holds the slopes.
        query: (batch, heads, queries, head_dim).
        key, value: (batch, key-value heads, keys, head_dim); heads are grouped where there are fewer.
        attention_mask: see `visible_keys`; None with more keys than queries means that the keys past the queries are
            still empty (the first step with a static cache).
        scaling: of the logits; 1 / sqrt(head_dim) if None.
        dropout: probability, applied to the weights.

    Returns the output (batch, queries, heads, head_dim) and None: this backend has no weights to show.
    """
    refuse_unsupported("sdpa", module, kwargs)
    slopes = head_slopes(module.config, query.shape[1], query.device)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # The kernel's inputs would be rounded after the bias has been made part of them.
    query, key, value = autocast(query.device, query, key, value)
    queries = query.shape[2]
    dense_rows = max(1, _DENSE_ENTRIES // (query.shape[0] * query.shape[1] * key.shape[2]))
    if attention_mask is None and queries > 1:
        if key.shape[2] < queries:
            raise ValueError(f"causal attention of {queries} queries needs as many keys, got {key.shape[2]}")
        attend = partial(_causal_block, key=key, value=value, slopes=slopes, scaling=scaling, dropout=dropout)
        rows = _CAUSAL_ROWS if queries > _SINGLE_CALL else queries
        if dropout and query.device.type != "cuda":
            # Only CUDA has fused kernels with dropout; elsewhere the matrix of weights is built, and must fit.
            rows = min(rows, dense_rows)
    else:
        allowed, added = visible_keys(attention_mask, query, key)
        attend = partial(
            _masked_block,
            key=key,
            value=value,
            allowed=allowed,
            added=added,
            slopes=slopes,
            scaling=scaling,
            dropout=dropout,
        )
        # A graph with a block for every so many queries would be a new graph for every length.
        rows = queries if torch.compiler.is_compiling() else dense_rows
    with torch.autocast(query.device.type, enabled=False):
        output = _in_blocks(attend, query, rows, keep_rng=dropout > 0)
    return output.transpose(1, 2).contiguous(), None


def _in_blocks(attend: Callable[[Tensor, int], Tensor], query: Tensor, rows: int, keep_rng: bool) -> Tensor:
    """`attend(query block, index of its first query)` for blocks of `rows` queries, joined."""
    if rows >= query.shape[2]:
        return attend(query, 0)
    if torch.is_grad_enabled():
        attend = partial(checkpoint, attend, use_reentrant=False, preserve_rng_state=keep_rng)
    firsts = range(0, query.shape[2], rows)
    return torch.cat([attend(query[:, :, first : first + rows], first) for first in firsts], dim=2)


def _causal_block(
    query: Tensor,
    first: int,
    *,
    key: Tensor,
    value: Tensor,
    slopes: HeadSlopes,
    scaling: float,
    dropout: float,
) -> Tensor:
    """Queries `first`, `first` + 1, … over the keys up to the last of them, by the plain kernel."""
    rows = query.shape[2]
    end = first + rows
    key, value = key[:, :, :end], value[:, :, :end]
    device = query.device
    positions = torch.arange(end, device=device) - (first + end) // 2
    wide = torch.promote_types(query.dtype, torch.float32)
    weights = slopes.for_queries(lambda: torch.arange(first + 1, end + 1, device=device)[None, None]).to(wide) / scaling
    left, right = _bias_factors(weights, positions[first:], positions, query.dtype)
    extra = left.shape[-1]
    # Kernels on accelerators want widths that are multiples of 8.
    spare = 0 if device.type == "cpu" else -(query.shape[-1] + extra) % 8
    left = left.expand(*query.shape[:3], -1)
    right = right.expand(*key.shape[:3], -1)
    output = scaled_dot_product_attention(
        # The factors stand first: where a kernel sums in order, slope × distance is complete, and small for near
        # keys, before anything is added that large partial sums would round away.
        torch.cat([left, pad(query, (0, spare))], dim=-1),
        torch.cat([right, pad(key, (0, spare))], dim=-1),
        # The fused kernel on CPU needs values as wide as the keys.
        pad(value, (0, extra + spare)),
        attn_mask=causal_rows(first, rows, end, device) if first else None,
        is_causal=first == 0,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[..., : value.shape[-1]]


def _bias_factors(slopes: Tensor, queries: Tensor, keys: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factors (…, queries or 1, n) and (keys, n) in `dtype`; their product is the bias up to a constant per row.

    Args:
        slopes: float32 or wider (…, queries or 1, 1), already divided by the scaling of the logits.
        queries: integer positions of the queries.
        keys: integer positions of the keys; those of half types are written in digits to base 256.
        dtype: of queries and keys.

    Every product is exact. A slope is split into the 8 bits that a bfloat16 holds and the rest, so that in float32
    the product with a position has no more than 24 bits, and slope × query position can be taken off again in the
    same sum. Half types hold integers up to 256, so that there each digit of the position has its own factor.
    """
    if torch.finfo(dtype).bits >= 32:
        high = slopes.bfloat16().to(dtype)
        low = slopes.to(dtype) - high
        back = -queries[:, None].to(dtype)
        left = torch.cat(torch.broadcast_tensors(high, high * back, low, low * back), dim=-1)
        position = keys.to(dtype)
        one = torch.ones_like(position)
        return left, torch.stack([position, one, position, one], dim=-1)
    factors, digits, unit, rest = [], [], 1, keys
    while True:
        last = unit * 256 >= keys.shape[0]
        digit = rest if last else (rest + 128) % 256 - 128
        # float16 overflows only where the bias is far beyond what softmax can tell from minus infinity.
        weight = (slopes * unit).clamp(max=torch.finfo(dtype).max)
        high = weight.to(dtype)
        factors += [high, (weight - high.float()).to(dtype)]
        digits += [digit.to(dtype)] * 2
        if last:
            return torch.cat(factors, dim=-1), torch.stack(digits, dim=-1)
        rest = (rest - digit) // 256
        unit *= 256


def _masked_block(
    query: Tensor,
    first: int,
    *,
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
    added: Tensor | None,
    slopes: HeadSlopes,
    scaling: float,
    dropout: float,
) -> Tensor:
    """Queries from `first` on over all keys, with a dense bias for these queries."""
    rows = slice(first, first + query.shape[2])
    allowed = allowed[:, :, rows]
    bias = alibi_bias(slopes.for_queries(lambda: allowed.sum(dim=-1)), allowed)
    if added is not None:
        bias = bias + added[:, :, rows]
    # The queries of a group become rows of their common key head, so that keys and values are not repeated.
    grouped = (key.shape[1], -1)
    output = scaled_dot_product_attention(
        query.unflatten(1, grouped).flatten(2, 3),
        key,
        value,
        attn_mask=_mask_type(bias, query).unflatten(1, grouped).flatten(2, 3),
        dropout_p=dropout,
        scale=scaling,
    )
    heads: Tensor = output.unflatten(2, (-1, query.shape[2])).flatten(1, 2)
    return heads


def _mask_type(bias: Tensor, query: Tensor) -> Tensor:
    # The CPU kernels take a float32 mask beside half-type queries, which keeps the bias exact.
    keep = query.device.type == "cpu" and query.dtype != torch.float64
    return bias if keep else bias.to(query.dtype)

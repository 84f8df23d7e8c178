"""Causal ALiBi attention by the plain kernel of any device: the bias as a few more dimensions of queries and keys.

The product of what is appended is slope × key position. Softmax ignores a constant per row, so that equals
-slope × distance. A sink token, which has no bias, then has slope × query position.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from packaging.version import Version
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from ...bias import causal_rows
from ..blocks import dense_rows, in_blocks
from ..call import AttentionCall

__all__ = ["factored_attention"]

# Up to this many queries the plain causal kernel takes all of them at once. Beyond, queries are taken in blocks whose
# positions count from their own centre: near keys, the ones whose logits matter, then have small positions, and
# slope × position keeps its precision at any length.
_SINGLE_CALL = 2**14
_CAUSAL_ROWS = 256
# Older CPU kernels do not sum in order and lose precision in one call.
_CPU_SUMS_IN_ORDER = Version(torch.__version__) >= Version("2.13")
# FlashAttention takes heads of 256 dimensions, of which the factors are up to 16.
_FLASH_WIDTH = 240


def factored_attention(call: AttentionCall) -> Tensor:
    """Causal attention of queries with as many keys; returns (batch, heads, queries, head_dim)."""
    query = call.query
    single = _SINGLE_CALL if _CPU_SUMS_IN_ORDER or query.device.type != "cpu" else _CAUSAL_ROWS
    rows = _CAUSAL_ROWS if query.shape[2] > single else query.shape[2]
    if call.dropout and query.device.type != "cuda":
        # Only CUDA has fused kernels with dropout; elsewhere the matrix of weights is built, and must fit.
        rows = min(rows, dense_rows(query, call.key))
    if call.groups > 1 and not _kernel_shares_keys(query, masked=rows < query.shape[2]):
        key, value = (x.repeat_interleave(call.groups, dim=1) for x in (call.key, call.value))
        call = replace(call, key=key, value=value)
    return in_blocks(partial(_block, call), query, rows, keep_rng=call.dropout > 0)


def _kernel_shares_keys(query: Tensor, *, masked: bool) -> bool:
    """Whether a kernel with linear memory takes fewer key heads than query heads.

    Where none does, PyTorch silently builds the matrix of all logits. On CUDA only FlashAttention does: half types, no
    mask, heads of up to 256 dimensions.
    """
    return query.device.type == "cpu" or (query.dtype.itemsize == 2 and not masked and query.shape[-1] <= _FLASH_WIDTH)


def _block(call: AttentionCall, query: Tensor, first: int) -> Tensor:
    """Queries `first`, `first` + 1, … over the keys up to the last of them, by the plain kernel."""
    rows, device = query.shape[2], query.device
    end = first + rows
    key, value, slopes = call.key[:, :, :end], call.value[:, :, :end], call.slopes
    positions = torch.arange(end, device=device) - (first + end) // 2
    wide = torch.promote_types(query.dtype, torch.float32)
    weights = (
        slopes.for_queries(lambda: torch.arange(first + 1, end + 1, device=device)[None, None]).to(wide) / call.scaling
    )
    left, right = _bias_factors(weights, positions[first:], positions, query.dtype, slopes.sink_tokens)
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
        dropout_p=call.dropout,
        scale=call.scaling,
        enable_gqa=call.groups != 1,
    )
    return output[..., : value.shape[-1]]


def _bias_factors(
    slopes: Tensor, queries: Tensor, keys: Tensor, dtype: torch.dtype, sink_tokens: int = 0
) -> tuple[Tensor, Tensor]:
    """Factors (…, queries or 1, n) and (keys, n) in `dtype`; their product is the bias up to a constant per row.

    Args:
        slopes: float32 or wider (…, queries or 1, 1), already divided by the scaling of the logits.
        queries: integer positions of the queries.
        keys: integer positions of the keys; those of half types are written in digits to base 256.
        dtype: of queries and keys.
        sink_tokens: how many of the first keys have no bias.

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
        right = torch.stack([position, one, position, one], dim=-1)
        return left, right.masked_fill(_is_sink(keys, sink_tokens), 0.0) if sink_tokens else right
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
            break
        rest = (rest - digit) // 256
        unit *= 256
    left, right = torch.cat(factors, dim=-1), torch.stack(digits, dim=-1)
    return _with_sinks(left, right, queries.shape[0], sink_tokens) if sink_tokens else (left, right)


def _is_sink(keys: Tensor, sink_tokens: int) -> Tensor:
    """Bool (keys, 1)."""
    return torch.arange(keys.shape[0], device=keys.device)[:, None] < sink_tokens


def _with_sinks(left: Tensor, right: Tensor, queries: int, sink_tokens: int) -> tuple[Tensor, Tensor]:
    """Factors of a half type with three more, by which a sink has what the query's own key has, at distance 0 as well.

    Args:
        left: (…, queries or 1, n).
        right: (keys, n), of which the last are those of the queries.
        queries: how many.
        sink_tokens: how many of the first keys have no bias.
    """
    # Divided by what multiplies it again, so that float16 does not overflow.
    own = (left.float() * right[-queries:].float()).sum(dim=-1, keepdim=True) / 256
    is_sink = _is_sink(right, sink_tokens)
    pieces = []
    # Three pieces of 8 bits or more hold a float32.
    for _ in range(3):
        pieces.append(own.to(left.dtype))
        own = own - pieces[-1].float()
    left = torch.cat([left.expand(*pieces[0].shape[:-1], -1), *pieces], dim=-1)
    return left, torch.cat([right.masked_fill(is_sink, 0.0), is_sink.to(right.dtype).expand(-1, 3) * 256], dim=-1)

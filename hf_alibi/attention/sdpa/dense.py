"""ALiBi attention under any mask: the bias as a matrix, for a block of queries at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..blocks import dense_rows, in_blocks, is_exported
from ..call import AttentionCall
from ..eager import attend_eagerly
from ..inputs import visible_keys

__all__ = ["dense_attention"]


def dense_attention(call: AttentionCall) -> Tensor:
    """Attention under any mask; returns (batch, heads, queries, head_dim), zeros for a query that sees nothing."""
    visible = visible_keys(call.mask, call.query, call.key)

    def attend(query: Tensor, first: int) -> Tensor:
        seen = visible.part(slice(None), slice(first, first + query.shape[2]))
        if call.has_other_logits:
            # No kernel of PyTorch does these.
            return attend_eagerly(replace(call, query=query, mask=seen))[0]
        bias = call.slopes.bias(seen)
        return _with_bias(call, query, bias if seen.added is None else bias + seen.added)

    # A graph with a fixed number of queries a block would be a new graph for every length.
    is_graph = torch.compiler.is_compiling() or is_exported()
    rows = call.query.shape[2] if is_graph else dense_rows(call.query, call.key)
    return in_blocks(attend, call.query, rows, keep_rng=call.dropout > 0)


def _with_bias(call: AttentionCall, query: Tensor, bias: Tensor) -> Tensor:
    """Some queries of a call over all keys, with a dense bias (batch or 1, heads, queries, keys)."""
    key, value = call.key, call.value
    options: dict[str, Any] = {"dropout_p": call.dropout, "scale": call.scaling}
    if query.device.type != "cpu" or query.dtype == torch.float64:
        # The CPU kernels take a float32 mask beside half-type queries, which keeps the bias exact.
        bias = bias.to(query.dtype)
    if is_exported():
        # Elsewhere a row of nothing but -inf, of a query that sees nothing, may give NaN, and from there on everything.
        bias = bias.clamp(min=torch.finfo(bias.dtype).min / 2)
        # Joined with rows, as below, heads would restrict the lengths that the exported program takes.
        key, value = (x.repeat_interleave(call.groups, dim=1) if call.groups > 1 else x for x in (key, value))
        return scaled_dot_product_attention(query, key, value, bias, **options)
    # The queries of a group become rows of their common key head, so that keys and values are not repeated.
    grouped = (key.shape[1], -1)
    rows, bias = (x.unflatten(1, grouped).flatten(2, 3) for x in (query, bias))
    output = scaled_dot_product_attention(rows, key, value, attn_mask=bias, **options)
    heads: Tensor = output.unflatten(2, (-1, query.shape[2])).flatten(1, 2)
    return heads

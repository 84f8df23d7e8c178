"""ALiBi attention under any mask: the bias as a matrix, for a block of queries at a time."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ...bias import alibi_bias
from ..inputs import visible_keys
from ..layer_slopes import HeadSlopes
from ..query_blocks import dense_rows, in_blocks

__all__ = ["dense_attention"]


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    slopes: HeadSlopes,
    scaling: float,
    dropout: float,
) -> Tensor:
    """Attention of queries (batch, heads, queries, head_dim) under a mask; see `visible_keys` for its forms.

    Returns (batch, heads, queries, head_dim); a query that sees nothing gets zeros.
    """
    allowed, added = visible_keys(mask, query, key)
    attend = partial(
        _block,
        key=key,
        value=value,
        allowed=allowed,
        added=added,
        slopes=slopes,
        scaling=scaling,
        dropout=dropout,
    )
    # A graph with a block for every so many queries would be a new graph for every length.
    rows = query.shape[2] if torch.compiler.is_compiling() else dense_rows(query, key)
    return in_blocks(attend, query, rows, keep_rng=dropout > 0)


def _block(
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
    bias = alibi_bias(slopes.for_queries(lambda: allowed.sum(dim=-1)), allowed, slopes.sink_tokens)
    if added is not None:
        bias = bias + added[:, :, rows]
    if torch.compiler.is_exporting():
        # Joined with rows, as below, heads would restrict the lengths that the exported program takes.
        mask, shared = _mask_type(bias, query), query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(query, key, value, mask, dropout, scale=scaling, enable_gqa=shared)
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

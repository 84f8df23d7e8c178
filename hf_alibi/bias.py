"""The ALiBi bias: from a padding mask, and from a mask of what each query may see. Pure maths."""

from __future__ import annotations

import torch
from torch import Tensor

from .slopes import alibi_slopes

__all__ = ["alibi_bias", "build_alibi_tensor", "causal_rows", "distances"]


def build_alibi_tensor(attention_mask: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    """The bias of each key: slope × position, positions counted over the tokens that are not padding.

    Softmax ignores a constant per row, so adding this to causal attention logits equals subtracting
    slope × distance (Press et al. 2022, arXiv 2108.12409, section 3). Padding has position 0 and must be masked
    by the caller. The product is taken in float32 and cast last.

    Args:
        attention_mask: (batch, seq_length), 1 for tokens and 0 for padding; bool, integer or floating point.
        num_heads: at least 1; see `alibi_slopes` for counts that are not a power of two.
        dtype: floating-point type of the result.

    Returns a tensor of shape (batch * num_heads, 1, seq_length) on the mask's device; head h of sequence b is row
    b * num_heads + h.

    Raises TypeError for a mask that is not a tensor, a `num_heads` that is not an int or a dtype that is not floating
    point; ValueError for a mask of other rank or with other values than 0 and 1, or `num_heads` below 1.
    """
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor, got {type(attention_mask).__name__}")
    if attention_mask.ndim != 2:
        shape = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask must have shape (batch, seq_length), got {shape}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype}")
    # Reading values cannot be traced; a compiled caller has been checked when it ran eagerly.
    if not torch.compiler.is_compiling() and not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise ValueError("attention_mask must hold only 0 (padding) and 1 (token); for additive masks see distances")
    slopes = alibi_slopes(num_heads).to(attention_mask.device)
    mask = attention_mask.long()
    positions = (mask.cumsum(dim=-1) - 1) * mask
    bias = slopes[None, :, None] * positions[:, None, :]
    return bias.reshape(-1, 1, mask.shape[-1]).to(dtype)


def distances(allowed: Tensor, sink_tokens: int = 0, own: Tensor | None = None) -> Tensor:
    """How many tokens lie between each query and each key, counted over the keys that the query may see.

    The distance of key j is the number of allowed keys after it up to the query's own, which is right for left and
    right padding, holes, packed sequences, windows and caches alike, and needs no position ids. Keys ahead of the query
    (prefix-LM masks) are as far as those behind it.

    Args:
        allowed: bool (..., queries, keys), True where the query may see the key.
        sink_tokens: how many of the first keys that a query may see are at distance 0 from it.
        own: int64 (queries,), index of each query's own key; None if that is the last one that it may see.

    Returns float32 of the same shape, tokens; exact up to 2^24. Entries that are not allowed mean nothing.

    >>> distances(torch.tensor([[False, True, True, False, True, False]])).tolist()
    [[3.0, 2.0, 1.0, 1.0, 0.0, 0.0]]
    >>> distances(torch.tensor([[True, True, True, True]]), own=torch.tensor([2])).tolist()
    [[2.0, 1.0, 0.0, 1.0]]
    """
    seen = allowed.cumsum(dim=-1, dtype=torch.float32)
    if own is None:
        distance = seen[..., -1:] - seen
    else:
        distance = (seen.gather(-1, own[:, None].expand(*seen.shape[:-1], 1)) - seen).abs()
    return distance.masked_fill(seen <= sink_tokens, 0.0) if sink_tokens else distance


def causal_rows(first: int, rows: int, keys: int, device: torch.device) -> Tensor:
    """Bool (rows, keys): True where query `first` + r may see key j, that is j <= `first` + r."""
    query = torch.arange(first, first + rows, device=device)
    return torch.arange(keys, device=device)[None, :] <= query[:, None]


def alibi_bias(slopes: Tensor, allowed: Tensor, sink_tokens: int = 0, own: Tensor | None = None) -> Tensor:
    """The dense bias, -slope × distance, and -inf where a query may not see a key.

    Args:
        slopes: float32, broadcasts to (batch, heads, queries, 1), logits per token.
        allowed: bool, broadcasts to (batch, heads, queries, keys).
        sink_tokens: how many of the first keys that a query may see have no bias.
        own: see `distances`.

    Returns float32 (batch, heads, queries, keys), logits.
    """
    return (-slopes * distances(allowed, sink_tokens, own)).masked_fill(~allowed, float("-inf"))

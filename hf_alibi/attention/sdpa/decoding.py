"""ALiBi attention of a few new tokens over a cache: values that cannot matter are not read.

Logits of all keys are computed, so that what is left out is known, not bounded. Of the values only a window at the end
is read, and what lies outside of it and still counts, such as a first token that heads rest on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...bias import causal_rows
from ..call import AttentionCall
from ..inputs import Visible
from ..layer_slopes import HeadSlopes
from .far_keys import widest_window

__all__ = ["decode"]

# Values are read in blocks of this number of keys.
_BLOCK = 64


def decode(call: AttentionCall, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention of the last tokens over all keys, which are float32 or wider, or few.

    Args:
        call: of which the mask is not read.
        allowed: bool (batch or 1, heads or 1, queries, keys); None if the queries are the last of the keys.

    Returns the output (batch, heads, queries, head_dim) and the log-sum-exp of the logits (batch, heads, queries), both
    in float32 or wider.
    """
    query, key, value, slopes = call.query, call.key, call.value, call.slopes
    wide = torch.promote_types(query.dtype, torch.float32)
    if allowed is not None:
        key, value, allowed = _visible(key, value, allowed)
    key_heads, queries, keys = key.shape[1], query.shape[2], key.shape[2]
    # The queries of a group become rows of their common key head.
    rows = query.to(wide).unflatten(1, (key_heads, -1)).flatten(2, 3) * call.scaling
    bias = _bias(slopes, allowed, queries, keys, query.device).to(wide).expand(*query.shape[:3], -1)
    bias = bias.unflatten(1, (key_heads, -1)).flatten(2, 3)
    # For few queries, keys on the left are read at the speed of memory.
    logits = bias + (key.to(wide) @ rows.mT).mT
    most = _by_block(logits)
    # The largest logit is no more than the log-sum-exp, which is not worth another pass; NaN is kept.
    kept = ~((most - most.amax(dim=-1, keepdim=True)).amax(dim=(0, 1, 2)) <= math.log(call.tolerance / keys))
    output, lse = _read(logits, value, kept)
    shape = (query.shape[1] // key_heads, queries)
    return output.unflatten(2, shape).flatten(1, 2), lse.unflatten(2, shape).flatten(1, 2)


def _visible(key: Tensor, value: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Without the keys at both ends that no query sees, such as the empty end of a static cache."""
    seen = allowed.any(dim=(0, 1, 2)).nonzero()[:, 0]
    if not len(seen):
        return key, value, allowed
    visible = slice(int(seen[0]), int(seen[-1]) + 1)
    key, value, allowed = key[:, :, visible], value[:, :, visible], allowed[..., visible]
    return key, value, None if allowed.shape[2] == 1 and bool(allowed.all()) else allowed


def _bias(slopes: HeadSlopes, allowed: Tensor | None, queries: int, keys: int, device: torch.device) -> Tensor:
    """The bias, -inf where a query may not see a key; broadcasts to (batch, heads, queries, keys)."""
    if allowed is not None:
        return slopes.bias(Visible(allowed))
    if queries > 1:
        return _bias(slopes, causal_rows(keys - queries, queries, keys, device)[None, None], queries, keys, device)
    context = torch.tensor(keys, device=device)[None, None, None]
    minus_distance = torch.arange(1 - keys, 1, device=device)
    minus_distance[: slopes.sink_tokens] = 0
    return slopes.for_queries(lambda: context) * minus_distance


def _by_block(values: Tensor) -> Tensor:
    """Largest of each block of the last dimension; the first block may be shorter."""
    short = values.shape[-1] % _BLOCK
    blocks = values[..., short:].unflatten(-1, (-1, _BLOCK)).amax(dim=-1)
    return torch.cat([values[..., :short].amax(dim=-1, keepdim=True), blocks], dim=-1) if short else blocks


def _read(logits: Tensor, value: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of logits (…, rows, keys) times values (…, keys, head_dim) over the kept blocks of keys.

    Returns the output (…, rows, head_dim) and the log-sum-exp (…, rows).
    """
    keys = value.shape[-2]
    back = torch.arange(len(kept), 0, -1, device=kept.device)
    window = widest_window(kept, back)
    start = max(0, keys - window * _BLOCK)
    remote = (kept & (back > window)).nonzero()[:, 0]
    columns = (remote[:, None] * _BLOCK + torch.arange(_BLOCK, device=kept.device)).flatten() - (-keys % _BLOCK)
    columns = columns[columns >= 0]
    logits = torch.cat([logits[..., columns], logits[..., start:]], dim=-1) if len(columns) else logits[..., start:]
    lse = logits.logsumexp(dim=-1)
    # A query that sees nothing (padding) gets zeros.
    weights = (logits - lse[..., None]).exp().nan_to_num(nan=0.0) if bool(lse.isinf().any()) else logits.softmax(dim=-1)
    output = weights[..., len(columns) :] @ value[..., start:, :].to(weights.dtype)
    if len(columns):
        output = output + weights[..., : len(columns)] @ value[..., columns, :].to(weights.dtype)
    return output, lse

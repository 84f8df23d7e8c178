"""Attention over an `AlibiCache`, which holds for each key head as many of the last tokens as its heads can reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..cache import CachedStates
from ..call import AttentionCall, autocast
from ..inputs import visible_keys, visible_range
from .decoding import decode

__all__ = ["attend_cached"]

# Logits of one key head that may stand in memory at a time: 64 MiB in float32.
_ENTRIES = 2**24


def attend_cached(call: AttentionCall, attend: Callable[[AttentionCall], Tensor]) -> Tensor:
    """Attention over what an `AlibiCache` holds, checked against what it has dropped.

    Args:
        call: with `CachedStates` for key and value.
        attend: takes the call of a first step, whose keys and values are all there.
    """
    if call.has_other_logits:
        raise ValueError(
            "AlibiCache is for plain logits, and these are capped or share a row with learned sinks; use transformers' "
            "DynamicCache"
        )
    key: CachedStates = call.key
    # Half for what the cache has dropped, half for what is not read of the rest.
    call = replace(call, tolerance=call.tolerance / 2)
    lse = seen = None
    if key.whole is not None:
        output = attend(replace(call, key=key.whole, value=call.value.whole))
    else:
        (query,) = autocast(call.query.device, call.query)
        call = replace(call, query=query)
        if call.mask is not None:
            seen, added, own = visible_keys(call.mask, query, key)
            if added is not None:
                raise ValueError("AlibiCache takes masks of padding only, got an additive mask")
            if own is not None and bool((visible_range(seen)[1] > own).any()):
                raise ValueError(
                    "with an AlibiCache, queries after the first step may not see keys after their own; use "
                    "transformers' DynamicCache"
                )
        with torch.autocast(query.device.type, enabled=False):
            output, lse = _by_key_head(call, seen)
    with torch.autocast(call.query.device.type, enabled=False):
        key.layer.observe(call, lse, seen)
    return output


def _by_key_head(call: AttentionCall, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    """`decode` for each key head over the tokens that it kept."""
    query, groups, queries = call.query, call.groups, call.query.shape[2]
    outputs, lses = [], []
    for index, (k, v, sinks) in enumerate(zip(call.key.parts, call.value.parts, call.key.sinks, strict=True)):
        heads = slice(index * groups, (index + 1) * groups)
        own = replace(call, slopes=replace(call.slopes, per_head=call.slopes.per_head[heads]))
        seen = None if allowed is None else _of_kept(allowed, k.shape[1], sinks)
        size = max(1, _ENTRIES // (len(query) * groups * k.shape[1]))
        parts = []
        for first in range(0, queries, size):
            rows = slice(first, min(first + size, queries))
            # Without a mask these queries see nothing after them; masks have a column for each token seen so far.
            end = k.shape[1] - (queries - rows.stop if allowed is None else 0)
            some = replace(own, query=query[:, heads, rows], key=k[:, None, :end], value=v[:, None, :end])
            parts.append(decode(some, None if seen is None else seen[:, :, rows]))
        outputs.append(torch.cat([output for output, _ in parts], dim=2))
        lses.append(torch.cat([lse for _, lse in parts], dim=2))
    return torch.cat(outputs, dim=1).to(query.dtype), torch.cat(lses, dim=1)


def _of_kept(allowed: Tensor, kept: int, sinks: Tensor | None) -> Tensor:
    """What queries see of the tokens that a key head kept, bool (batch or 1, heads or 1, queries, kept).

    Args:
        allowed: bool (batch or 1, heads or 1, queries, tokens so far).
        kept: how many, sinks and last tokens.
        sinks: see `CachedStates`.
    """
    if sinks is None:
        return allowed[..., -kept:]
    allowed = allowed.expand(len(sinks), -1, -1, -1)
    index = sinks[:, None, None].expand(*allowed.shape[:3], -1)
    return torch.cat([allowed.gather(-1, index), allowed[..., sinks.shape[1] - kept :]], dim=-1)

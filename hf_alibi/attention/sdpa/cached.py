"""Attention over an `AlibiCache`, which holds for each key head as many of the last tokens as its heads can reach."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..cache import CachedStates
from ..layer_slopes import HeadSlopes
from .decoding import decode

__all__ = ["attend_cached"]

# Logits of one key head that may stand in memory at a time: 64 MiB in float32.
_ENTRIES = 2**24


def attend_cached(
    query: Tensor,
    key: CachedStates,
    value: CachedStates,
    allowed: Tensor | None,
    *,
    slopes: HeadSlopes,
    scaling: float,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """`decode` for each key head over the tokens that it kept; arguments and results are those of `decode`."""
    groups = query.shape[1] // len(key.parts)
    queries = query.shape[2]
    outputs, lses = [], []
    for index, (k, v, sinks) in enumerate(zip(key.parts, value.parts, key.sinks, strict=True)):
        heads = slice(index * groups, (index + 1) * groups)
        own = replace(slopes, per_head=slopes.per_head[heads])
        seen = None if allowed is None else _of_kept(allowed, k.shape[1], sinks)
        size = max(1, _ENTRIES // (len(query) * groups * k.shape[1]))
        parts = []
        for first in range(0, queries, size):
            rows = slice(first, min(first + size, queries))
            # Without a mask these queries see nothing after them; masks have a column for each token seen so far.
            end = k.shape[1] - (queries - rows.stop if allowed is None else 0)
            parts.append(
                decode(
                    query[:, heads, rows],
                    k[:, None, :end],
                    v[:, None, :end],
                    None if seen is None else seen[:, :, rows],
                    slopes=own,
                    scaling=scaling,
                    tolerance=tolerance,
                )
            )
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

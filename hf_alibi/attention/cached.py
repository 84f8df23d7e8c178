"""Attention over an `AlibiCache`, which holds for each key head as many of the last tokens as its heads can reach."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from .decoding import decode
from .head_slopes import HeadSlopes

__all__ = ["CachedStates", "attend_cached"]

# Logits of one key head that may stand in memory at a time: 64 MiB in float32.
_ENTRIES = 2**24


_NO_TENSOR = (
    "this attention needs keys and values as tensors, which AlibiCache does not have; it works with models converted "
    "by hf_alibi, attn_implementation='sdpa', not compiled, of families that give the attention what they cache as it "
    "is: use these, or transformers' DynamicCache"
)


class CacheLayer(Protocol):
    """What the attention tells a layer of the cache."""

    def observe(self, query: Tensor, lse: Tensor | None, *, slopes: HeadSlopes, scaling: float, default: float) -> None:
        """Learn how far queries reach, and raise where these may reach what was dropped."""


class CachedStates:
    """Keys or values of one layer, in place of a tensor (batch, key-value heads, tokens, head_dim).

    Args:
        layer: of the cache.
        parts: for each key-value head its last tokens, (batch, tokens kept, head_dim).
        tokens: seen so far, kept or not.
        whole: the tensor itself, where nothing was dropped.
    """

    def __init__(self, layer: CacheLayer, parts: list[Tensor], tokens: int, whole: Tensor | None) -> None:
        self.layer, self.parts, self.whole = layer, parts, whole
        self.shape = torch.Size((parts[0].shape[0], len(parts), tokens, parts[0].shape[-1]))

    def __getattr__(self, name: str) -> Any:
        raise TypeError(_NO_TENSOR)

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        """What any function of torch does with it."""
        raise TypeError(_NO_TENSOR)


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
    for index, (k, v) in enumerate(zip(key.parts, value.parts, strict=True)):
        heads = slice(index * groups, (index + 1) * groups)
        own = HeadSlopes(slopes.per_head[heads], slopes.dynamic)
        size = max(1, _ENTRIES // (len(query) * groups * k.shape[1]))
        parts = []
        for first in range(0, queries, size):
            rows = slice(first, min(first + size, queries))
            # Without a mask these queries see nothing after them; masks have a column for each token seen so far.
            end = k.shape[1] - (queries - rows.stop if allowed is None else 0)
            seen = None if allowed is None else allowed[:, :, rows, -k.shape[1] :]
            parts.append(
                decode(
                    query[:, heads, rows],
                    k[:, None, :end],
                    v[:, None, :end],
                    seen,
                    slopes=own,
                    scaling=scaling,
                    tolerance=tolerance,
                )
            )
        outputs.append(torch.cat([output for output, _ in parts], dim=2))
        lses.append(torch.cat([lse for _, lse in parts], dim=2))
    return torch.cat(outputs, dim=1).to(query.dtype), torch.cat(lses, dim=1)

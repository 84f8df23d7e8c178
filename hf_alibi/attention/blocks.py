"""Tokens in blocks; attention for a block of queries at a time, so that memory grows linearly with length."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

__all__ = ["by_block", "dense_rows", "in_blocks", "is_exported", "under_torch_func", "with_rows"]

# Entries of a dense (batch, heads, rows, keys) matrix that may stand in memory at a time: 64 MiB in float32.
_DENSE_ENTRIES = 2**24


def by_block(values: Tensor, block: int, fill: float, dim: int = -1) -> Tensor:
    """(..., tokens, ...) to (..., blocks, block, ...) along `dim`, the last block filled up."""
    spare = -values.shape[dim] % block
    after = [0] * (2 * (values.ndim - 1 - dim % values.ndim))
    blocks: Tensor = pad(values, (*after, 0, spare), value=fill).unflatten(dim, (-1, block))
    return blocks


def is_exported() -> bool:
    """Whether a graph is recorded for use elsewhere, by torch.export or torch.jit.trace; ONNX takes either."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def under_torch_func() -> bool:
    """Whether torch.func transforms what is computed: then no value can be read, and no block computed again."""
    return torch._C._are_functorch_transforms_active()


def with_rows(x: Tensor) -> Tensor:
    """`x`, copied if its last dimension is not dense: kernels step over all others."""
    return x if x.stride(-1) == 1 else x.contiguous()


def dense_rows(query: Tensor, key: Tensor) -> int:
    """How many queries may stand against all keys in one matrix."""
    return max(1, _DENSE_ENTRIES // (query.shape[0] * query.shape[1] * key.shape[2]))


def in_blocks(attend: Callable[[Tensor, int], Tensor], query: Tensor, rows: int, keep_rng: bool) -> Tensor:
    """`attend(query block, index of its first query)` for blocks of `rows` queries, joined.

    Blocks are computed again in the backward pass, so that none of them is kept (but under torch.func); `keep_rng`:
    with the same dropout.
    """
    if rows >= query.shape[2]:
        return attend(query, 0)
    if torch.is_grad_enabled() and not under_torch_func():
        attend = partial(checkpoint, attend, use_reentrant=False, preserve_rng_state=keep_rng)
    firsts = range(0, query.shape[2], rows)
    return torch.cat([attend(query[:, :, first : first + rows], first) for first in firsts], dim=2)

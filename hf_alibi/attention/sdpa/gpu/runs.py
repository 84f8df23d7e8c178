"""Which run of keys each query of a mask sees."""

from __future__ import annotations

import torch
from torch import Tensor

from ..remembered import remembered
from .kernels.mask_runs import runs_of_mask
from .launches import Runs

__all__ = ["runs_of"]


@remembered
def runs_of(allowed: Tensor, own: Tensor | None) -> Runs | None:
    """First and last key that each query sees, int32 (batch, queries); None if one sees no run, or keys after its own.

    Args:
        allowed: bool (batch, heads or 1, queries, keys), the same for all heads.
        own: see `Visible`.

    All layers of a model get the same mask: it is read, and waited for, once.
    """
    if allowed.shape[1] > 1 and allowed.stride(1):
        return None
    rows = allowed[:, 0] if allowed.stride(-1) == 1 else allowed[:, 0].contiguous()
    batch, queries, keys = rows.shape
    first, last, seen = (rows.new_empty(batch, queries, dtype=torch.int32) for _ in range(3))
    runs_of_mask[queries, batch](rows, first, last, seen, *rows.stride()[:2], queries, keys, CHUNK=1024)
    is_run = (seen == 0) | (last - first + 1 == seen)
    if own is not None:
        is_run &= last <= own
    return (first, last) if bool(is_run.all()) else None

"""Which run of keys each query of a mask sees."""

from __future__ import annotations

import torch
from torch import Tensor

from ...inputs import own_keys, visible_keys
from ...mask_by_rows import MaskByRows
from ..remembered import remembered
from .kernels.mask_runs import runs_of_mask
from .launches import Runs

__all__ = ["runs_of"]


def runs_of(mask: Tensor | MaskByRows, query: Tensor, key: Tensor) -> Runs | None:
    """First and last key that each query sees, int32 (batch, queries).

    None if a query sees anything else than a run of keys up to its own, if heads differ, or if the mask is additive.
    All layers of a model get the same mask: it is read, and waited for, once.
    """
    if isinstance(mask, MaskByRows):
        if mask.known is None:
            first, last, seen = (torch.cat(part, dim=1) for part in zip(*map(_seen, mask.parts()), strict=True))
            queries, keys = mask.shape[2:]
            own = own_keys(last[:, 0], last.max() + 1, queries, keys) if queries < keys else None
            mask.known = _checked(first, last, seen, own) or ()
        return mask.known or None
    visible = visible_keys(mask, query, key)
    if visible.added is not None or visible.differs_by_head:
        return None
    return _runs_of_matrix(visible.allowed, visible.own)


@remembered
def _runs_of_matrix(allowed: Tensor, own: Tensor | None) -> Runs | None:
    return _checked(*_seen(allowed), own)


def _seen(allowed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First and last key that each query sees, and how many, int32 (batch, queries)."""
    rows = allowed[:, 0] if allowed.stride(-1) == 1 else allowed[:, 0].contiguous()
    batch, queries, keys = rows.shape
    first, last, seen = (rows.new_empty(batch, queries, dtype=torch.int32) for _ in range(3))
    runs_of_mask[queries, batch](rows, first, last, seen, *rows.stride()[:2], queries, keys, CHUNK=1024)
    return first, last, seen


def _checked(first: Tensor, last: Tensor, seen: Tensor, own: Tensor | None) -> Runs | None:
    """`own`: see `Visible`; None if each query is in the place of its own key."""
    own = torch.arange(last.shape[1], device=last.device) if own is None else own
    is_run = (seen == 0) | ((last - first + 1 == seen) & (last <= own))
    return (first, last) if bool(is_run.all()) else None

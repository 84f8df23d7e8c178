"""Kernel: which run of keys each query of a mask sees, without a matrix beside the mask."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["runs_of_mask"]


@triton.jit(do_not_specialize=["queries", "keys"])
def runs_of_mask(ALLOWED, FIRST, LAST, SEEN, batch_stride, row_stride, queries, keys, CHUNK: tl.constexpr):
    """First and last key that a query sees, and how many it sees; one program a query and a sequence."""
    row, batch = tl.program_id(0), tl.program_id(1)
    ALLOWED += batch.to(tl.int64) * batch_stride + row.to(tl.int64) * row_stride
    first, last, seen = keys, -1, 0
    for chunk in range(0, keys, CHUNK):
        index = chunk + tl.arange(0, CHUNK)
        sees = tl.load(ALLOWED + index, mask=index < keys, other=0) != 0
        first = tl.minimum(first, tl.min(tl.where(sees, index, keys), 0))
        last = tl.maximum(last, tl.max(tl.where(sees, index, -1), 0))
        seen += tl.sum(sees.to(tl.int32), 0)
    offset = batch.to(tl.int64) * queries + row
    tl.store(FIRST + offset, first)
    tl.store(LAST + offset, last)
    tl.store(SEEN + offset, seen)

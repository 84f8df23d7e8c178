"""What all kernels share: how rows are loaded, which keys a query sees, and the logits of one tile."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["frame", "load_lse", "load_rows", "of_head", "runs_of_queries", "store_rows", "tanh_of", "tile_logits"]

_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
# A first key that no query sees.
_NONE: tl.constexpr = tl.constexpr(2**30)


@triton.jit
def of_head(pointer, batch, head, batch_stride, head_stride):
    """Where the rows of one head of one sequence begin."""
    return pointer + batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride


@triton.jit
def _row_mask(rows, columns, limit, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    inside = (rows < limit)[:, None]
    if WIDTH < COLUMNS:
        return inside & (columns < WIDTH)[None, :]
    else:
        return inside & (columns >= 0)[None, :]


@triton.jit
def load_rows(
    pointer, begin, stride, limit, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, CHECK: tl.constexpr
):
    """(ROWS, COLUMNS) of a matrix with rows of WIDTH numbers, from row `begin` on; zeros beyond WIDTH.

    CHECK: rows from `limit` on do not exist and are zeros; otherwise all are there.
    """
    rows = begin + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    pointers = pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    if CHECK:
        return tl.load(pointers, mask=_row_mask(rows, columns, limit, WIDTH, COLUMNS), other=0.0)
    elif WIDTH < COLUMNS:
        return tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_rows(pointer, values, begin, stride, limit, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """The reverse of `load_rows`, in the type of what `pointer` points to."""
    rows = begin + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    pointers = pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(pointers, values.to(pointer.dtype.element_ty), mask=_row_mask(rows, columns, limit, WIDTH, COLUMNS))


@triton.jit
def runs_of_queries(FIRST, LAST, batch, begin, queries, keys, ROWS: tl.constexpr, RUNS: tl.constexpr):
    """First and last key that each of ROWS queries sees, int32 (ROWS,); the last is -1 for a query that sees none."""
    rows = begin + tl.arange(0, ROWS)
    inside = rows < queries
    if RUNS:
        offset = batch.to(tl.int64) * queries
        first = tl.load(FIRST + offset + rows, mask=inside, other=_NONE)
        last = tl.load(LAST + offset + rows, mask=inside, other=-1)
        sees = first <= last
        return tl.where(sees, first, _NONE), tl.where(sees, last, -1)
    else:
        return tl.where(inside, 0, _NONE), tl.where(inside, rows + (keys - queries), -1)


@triton.jit
def frame(query, last, reference, slope):
    """What the kernels add to the logits of a query beyond the bias, -slope × (last - key).

    Softmax ignores a constant per query. For half types slope × (key - reference) serves all queries of a tile: one
    addition for each logit, rounded to a millionth of a hundred, less than such types can tell. For float32 it is 0.
    """
    if query.dtype == tl.float32:
        return tl.zeros_like(last).to(tl.float32)
    else:
        return slope * (last - reference).to(tl.float32)


@triton.jit
def tanh_of(logits, cap):
    """tanh(logits / cap), which times `cap` caps them."""
    return 1 - 2 / (tl.exp2(logits * (2 * _LOG2E / cap)) + 1)


@triton.jit
def tile_logits(
    query, key, begin, first, last, reference, slope, scaling, cap, KEYS: tl.constexpr, SINK_TOKENS: tl.constexpr,
    CAP: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Logits (queries, KEYS) of a tile of keys from `begin` on with their bias, and `frame` more than that.

    CHECK: keys that a query does not see get minus infinity. CAP: logits are capped before the bias is added.

    Returns the logits and, if capped, their derivative by what they were before (else 1).
    """
    position = begin + tl.arange(0, KEYS)
    logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scaling
    derivative = 1.0
    if CAP:
        tanh = tanh_of(logits, cap)
        logits = tanh * cap
        derivative = 1 - tanh * tanh
    if query.dtype == tl.float32:
        bias = slope * (position[None, :] - last[:, None]).to(tl.float32)
    else:
        bias = (slope * (position - reference).to(tl.float32))[None, :]
    if SINK_TOKENS > 0:
        is_sink = position[None, :] < first[:, None] + SINK_TOKENS
        bias = tl.where(is_sink, frame(query, last, reference, slope)[:, None], bias)
    logits += bias
    if CHECK:
        sees = (position[None, :] >= first[:, None]) & (position[None, :] <= last[:, None])
        logits = tl.where(sees, logits, float("-inf"))
    return logits, derivative


@triton.jit
def load_lse(LSE, rows, queries, query, last, reference, slope):
    """Log-sum-exp of `query` in its frame; huge for those that see nothing."""
    lse = tl.load(LSE + rows, mask=rows < queries, other=0.0)
    return tl.where(last >= 0, lse + frame(query, last, reference, slope), 1e30)

"""Kernel: attention with the ALiBi bias that reads no keys which cannot matter.

A block of queries reads its own keys and the block before them, and then knows a lower bound of each row's
log-sum-exp. One small product of its queries with the centroids of all earlier key blocks says which of them may hold
more than a tolerance of a row. From the first of these on, all are read; but the first keys of the sequence, on which
heads of pretrained models rest, are a part of their own, so that they do not open the whole window.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import _LOG2E, _NONE, frame, load_rows, of_head, runs_of_queries, store_rows, tanh_of, tile_logits

__all__ = ["attend"]

# Added to bounds, in powers of two: more than the rounding of their sums.
_SLACK: tl.constexpr = tl.constexpr(0.01)


@triton.jit
def _read(
    total, largest, weight, query, KEY, VALUE, key_row, value_row, begin, end, keys, first, last, reference, slope,
    scaling, cap, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    KEYS: tl.constexpr, SINK_TOKENS: tl.constexpr, CAP: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """After the keys from `begin` to `end`: weighted sum of values, largest logit, sum of weights relative to it."""
    for tile in range(begin, end, KEYS):
        key = load_rows(KEY, tile, key_row, keys, KEYS, WIDTH, COLUMNS, CHECK)
        logits, _ = tile_logits(
            query, key, tile, first, last, reference, slope, scaling, cap, KEYS, SINK_TOKENS, CAP, CHECK
        )
        larger = tl.maximum(largest, tl.max(logits, 1))
        weights = tl.exp2(logits - larger[:, None])
        shrink = tl.exp2(largest - larger)
        value = load_rows(VALUE, tile, value_row, keys, KEYS, VALUE_WIDTH, VALUE_COLUMNS, CHECK)
        total = tl.dot(weights.to(value.dtype), value, total * shrink[:, None], input_precision="ieee")
        weight = weight * shrink + tl.sum(weights, 1)
        largest = larger
    return total, largest, weight


@triton.jit
def _first_block_to_read(
    query, CENTROID, RADIUS, start, near, head_end, lse, last, sees, reference, slope, scaling, cap, threshold,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Which of the key blocks from `start` to before `near` must be read.

    Returns the first of them from `head_end` on (`near` if none is), and whether one before `head_end` is, 0 or 1.
    """
    lowest = near
    head = 0
    states = query.to(tl.float32)
    needed = threshold - _SLACK + lse + slope * (last - reference).to(tl.float32)
    norm = tl.sqrt(tl.sum(states * states, 1)) * tl.abs(scaling)
    for chunk in range(start, near, CHUNK):
        blocks = chunk + tl.arange(0, CHUNK)
        centroid = load_rows(CENTROID, chunk, WIDTH, near, CHUNK, WIDTH, COLUMNS, True)
        radius = tl.load(RADIUS + blocks, mask=blocks < near, other=0.0) * 1.001
        bound = tl.dot(query, tl.trans(centroid), input_precision="ieee") * scaling + norm[:, None] * radius[None, :]
        if CAP:
            bound = cap * tanh_of(bound, cap)
        bound += (slope * ((blocks + 1) * BLOCK - 1 - reference).to(tl.float32))[None, :]
        # What cannot be compared (NaN) is read.
        out = bound <= needed[:, None]
        read = (blocks < near) & (tl.max(tl.where(sees[:, None] & (out == 0), 1, 0), 0) > 0)
        lowest = tl.minimum(lowest, tl.min(tl.where(read & (blocks >= head_end), blocks, near), 0))
        head = tl.maximum(head, tl.max(tl.where(read & (blocks < head_end), 1, 0), 0))
    return lowest, head


@triton.jit
def _before_any_key(SINK, offset, ROWS: tl.constexpr, LEARNED_SINK: tl.constexpr):
    """Largest logit and sum of weights of ROWS queries, in their frames; a learned sink is there from the beginning."""
    if LEARNED_SINK:
        return tl.load(SINK).to(tl.float32) * _LOG2E + offset, tl.full([ROWS], 1.0, tl.float32)
    else:
        return tl.full([ROWS], -1e30, tl.float32), tl.zeros([ROWS], tl.float32)


@triton.jit
def _store_window(WINDOW, begin, end, low, high):
    tl.store(WINDOW, begin)
    tl.store(WINDOW + 1, end)
    tl.store(WINDOW + 2, low)
    tl.store(WINDOW + 3, high)


@triton.jit
def _blocks_of_keys(first, last, sees, BLOCK: tl.constexpr, SINK_TOKENS: tl.constexpr):
    """The lowest of the last keys that queries see; the first block of keys, the first near one, the end of first ones.

    If no query sees anything, these are -1 and 0.
    """
    reference = tl.max(last, 0)
    lowest_last = tl.minimum(tl.min(tl.where(sees, last, _NONE), 0), reference)
    start = tl.minimum(tl.min(first, 0), reference + 1) // BLOCK
    near = tl.maximum(lowest_last // BLOCK - 1, start)
    head_end = tl.minimum(start + 1, near)
    if SINK_TOKENS > 0:
        head_end = tl.minimum((tl.max(tl.where(sees, first, 0), 0) + SINK_TOKENS - 1) // BLOCK + 1, near)
    return lowest_last, start, near, head_end


@triton.jit(do_not_specialize=["queries", "keys"])
def attend(
    QUERY, KEY, VALUE, OUTPUT, LSE, WINDOW, CENTROID, RADIUS, FIRST, LAST, SLOPE, SINK,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    output_batch, output_head, output_row, queries, keys, heads, groups, scaling, cap, tolerance,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, SINK_TOKENS: tl.constexpr,
    RUNS: tl.constexpr, SKIP: tl.constexpr, CAP: tl.constexpr, LEARNED_SINK: tl.constexpr,
):  # fmt: skip
    """Fill OUTPUT, LSE and WINDOW; one program a block of queries and a head."""
    # The last queries see most: they begin first.
    block, pair = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head, own = pair // heads, pair % heads, pair % heads // groups
    of_keys = of_head(KEY, batch, own, key_batch, key_head)
    of_values = of_head(VALUE, batch, own, value_batch, value_head)
    begin, slope = block * ROWS, tl.load(SLOPE + head) * _LOG2E
    of_queries = of_head(QUERY, batch, head, query_batch, query_head)
    query = load_rows(of_queries, begin, query_row, queries, ROWS, WIDTH, COLUMNS, True)
    first, last = runs_of_queries(FIRST, LAST, batch, begin, queries, keys, ROWS, RUNS)
    sees, reference = last >= 0, tl.max(last, 0)
    lowest_last, start, near, head_end = _blocks_of_keys(first, last, sees, BLOCK, SINK_TOKENS)
    offset = frame(query, last, reference, slope)
    total = tl.zeros([ROWS, VALUE_COLUMNS], tl.float32)
    largest, weight = _before_any_key(SINK + head, offset, ROWS, LEARNED_SINK)
    # From here on not every query sees every key.
    checked = near if RUNS else lowest_last // BLOCK
    total, largest, weight = _read(
        total, largest, weight, query, of_keys, of_values, key_row, value_row, near * BLOCK, checked * BLOCK, keys,
        first, last, reference, slope, scaling, cap, WIDTH, VALUE_WIDTH, COLUMNS, VALUE_COLUMNS, KEYS, SINK_TOKENS,
        CAP, False,
    )  # fmt: skip
    total, largest, weight = _read(
        total, largest, weight, query, of_keys, of_values, key_row, value_row, checked * BLOCK, reference + 1, keys,
        first, last, reference, slope, scaling, cap, WIDTH, VALUE_WIDTH, COLUMNS, VALUE_COLUMNS, KEYS, SINK_TOKENS,
        CAP, True,
    )  # fmt: skip
    lowest, reads_head = head_end, 1
    if SKIP:
        index = (batch * (heads // groups) + own).to(tl.int64) * ((keys + BLOCK - 1) // BLOCK)
        lse = largest + tl.log2(weight) - offset
        lowest, reads_head = _first_block_to_read(
            query, CENTROID + index * WIDTH, RADIUS + index, start, near, head_end, lse, last, sees,
            reference, slope, scaling, cap, tolerance - tl.log2(keys.to(tl.float32)), WIDTH, COLUMNS, BLOCK, CHUNK, CAP,
        )  # fmt: skip
    head_end = tl.where((reads_head > 0) | (SINK_TOKENS > 0), head_end, start)
    total, largest, weight = _read(
        total, largest, weight, query, of_keys, of_values, key_row, value_row, start * BLOCK, head_end * BLOCK, keys,
        first, last, reference, slope, scaling, cap, WIDTH, VALUE_WIDTH, COLUMNS, VALUE_COLUMNS, KEYS, SINK_TOKENS,
        CAP, RUNS,
    )  # fmt: skip
    total, largest, weight = _read(
        total, largest, weight, query, of_keys, of_values, key_row, value_row, lowest * BLOCK, near * BLOCK, keys,
        first, last, reference, slope, scaling, cap, WIDTH, VALUE_WIDTH, COLUMNS, VALUE_COLUMNS, KEYS, 0, CAP, RUNS,
    )  # fmt: skip
    of_outputs = of_head(OUTPUT, batch, head, output_batch, output_head)
    output = total / tl.where(sees, weight, 1.0)[:, None]
    store_rows(of_outputs, output, begin, output_row, queries, ROWS, VALUE_WIDTH, VALUE_COLUMNS)
    lse = tl.where(sees, largest + tl.log2(tl.where(sees, weight, 1.0)) - offset, 0.0)
    tl.store(LSE + pair * queries + begin + tl.arange(0, ROWS), lse, mask=begin + tl.arange(0, ROWS) < queries)
    window = WINDOW + (pair * tl.num_programs(0) + block) * 4
    _store_window(window, start, head_end, lowest, (reference + BLOCK) // BLOCK)

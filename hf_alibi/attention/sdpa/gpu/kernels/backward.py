"""Kernels: gradients of `attend`, over the keys that it read, each sum in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import _LOG2E, _NONE, load_lse, load_rows, of_head, runs_of_queries, store_rows, tile_logits

__all__ = ["attend_backward_keys", "attend_backward_queries"]

# Query blocks whose windows are looked at together.
_SCAN: tl.constexpr = tl.constexpr(128)
_LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _add_to_queries(
    d_query, query, grad, KEY, VALUE, key_row, value_row, begin, end, keys, first, last, reference, lse, delta, slope,
    scaling, cap, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    KEYS: tl.constexpr, SINK_TOKENS: tl.constexpr, CAP: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """What keys from `begin` to `end` add to the gradient of the queries, without the scaling."""
    for tile in range(begin, end, KEYS):
        key = load_rows(KEY, tile, key_row, keys, KEYS, WIDTH, COLUMNS, CHECK)
        logits, derivative = tile_logits(
            query, key, tile, first, last, reference, slope, scaling, cap, KEYS, SINK_TOKENS, CAP, CHECK
        )
        weights = tl.exp2(logits - lse[:, None])
        value = load_rows(VALUE, tile, value_row, keys, KEYS, VALUE_WIDTH, VALUE_COLUMNS, CHECK)
        d_weights = tl.dot(grad, tl.trans(value), input_precision="ieee")
        d_logits = weights * (d_weights - delta[:, None]) * derivative
        d_query = tl.dot(d_logits.to(key.dtype), key, d_query, input_precision="ieee")
    return d_query


@triton.jit(do_not_specialize=["queries", "keys"])
def attend_backward_queries(
    QUERY, KEY, VALUE, OUTPUT, GRAD, D_QUERY, LSE, DELTA, WINDOW, FIRST, LAST, SLOPE,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    output_batch, output_head, output_row, grad_batch, grad_head, grad_row, d_batch, d_head, d_row,
    queries, keys, heads, groups, scaling, cap,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr, SINK_TOKENS: tl.constexpr, RUNS: tl.constexpr,
    CAP: tl.constexpr,
):  # fmt: skip
    """Fill D_QUERY and DELTA; one program a block of queries and a head."""
    block, pair = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    batch, head = pair // heads, pair % heads
    of_keys = of_head(KEY, batch, head // groups, key_batch, key_head)
    of_values = of_head(VALUE, batch, head // groups, value_batch, value_head)
    begin = block * ROWS
    slope = tl.load(SLOPE + head) * _LOG2E
    of_queries = of_head(QUERY, batch, head, query_batch, query_head)
    of_grads = of_head(GRAD, batch, head, grad_batch, grad_head)
    of_outputs = of_head(OUTPUT, batch, head, output_batch, output_head)
    query = load_rows(of_queries, begin, query_row, queries, ROWS, WIDTH, COLUMNS, True)
    grad = load_rows(of_grads, begin, grad_row, queries, ROWS, VALUE_WIDTH, VALUE_COLUMNS, True)
    output = load_rows(of_outputs, begin, output_row, queries, ROWS, VALUE_WIDTH, VALUE_COLUMNS, True)
    first, last = runs_of_queries(FIRST, LAST, batch, begin, queries, keys, ROWS, RUNS)
    reference = tl.max(last, 0)
    rows, offset = begin + tl.arange(0, ROWS), pair.to(tl.int64) * queries
    delta = tl.sum(output.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(DELTA + offset + rows, delta, mask=rows < queries)
    lse = load_lse(LSE + offset, rows, queries, query, last, reference, slope)
    window = WINDOW + (pair.to(tl.int64) * tl.num_programs(0) + block) * 4
    lowest = tl.load(window + 2)
    # From here on not every query sees every key.
    checked = lowest if RUNS else tl.min(tl.where(last >= 0, last, _NONE), 0) // BLOCK
    d_query = tl.zeros([ROWS, COLUMNS], tl.float32)
    d_query = _add_to_queries(
        d_query, query, grad, of_keys, of_values, key_row, value_row, tl.load(window) * BLOCK,
        tl.load(window + 1) * BLOCK, keys, first, last, reference, lse, delta, slope, scaling, cap, WIDTH, VALUE_WIDTH,
        COLUMNS, VALUE_COLUMNS, KEYS, SINK_TOKENS, CAP, RUNS,
    )  # fmt: skip
    d_query = _add_to_queries(
        d_query, query, grad, of_keys, of_values, key_row, value_row, lowest * BLOCK, checked * BLOCK, keys, first,
        last, reference, lse, delta, slope, scaling, cap, WIDTH, VALUE_WIDTH, COLUMNS, VALUE_COLUMNS, KEYS,
        SINK_TOKENS, CAP, False,
    )  # fmt: skip
    d_query = _add_to_queries(
        d_query, query, grad, of_keys, of_values, key_row, value_row, checked * BLOCK, reference + 1, keys, first,
        last, reference, lse, delta, slope, scaling, cap, WIDTH, VALUE_WIDTH, COLUMNS, VALUE_COLUMNS, KEYS,
        SINK_TOKENS, CAP, True,
    )  # fmt: skip
    of_gradients = of_head(D_QUERY, batch, head, d_batch, d_head)
    store_rows(of_gradients, d_query * (scaling * _LN2), begin, d_row, queries, ROWS, WIDTH, COLUMNS)


@triton.jit
def _queries_that_read(WINDOW, block, blocks):
    """First and last of the `blocks` query blocks of a head that read key block `block`; a last of -1 if none does."""
    lowest, highest = blocks, -1
    for chunk in range(0, blocks, _SCAN):
        index = chunk + tl.arange(0, _SCAN)
        inside = index < blocks
        head_begin = tl.load(WINDOW + index * 4, mask=inside, other=0)
        head_end = tl.load(WINDOW + index * 4 + 1, mask=inside, other=0)
        begin = tl.load(WINDOW + index * 4 + 2, mask=inside, other=0)
        end = tl.load(WINDOW + index * 4 + 3, mask=inside, other=0)
        reads = ((head_begin <= block) & (block < head_end)) | ((begin <= block) & (block < end))
        lowest = tl.minimum(lowest, tl.min(tl.where(reads, index, blocks), 0))
        highest = tl.maximum(highest, tl.max(tl.where(reads, index, -1), 0))
    return lowest, highest


@triton.jit
def _add_to_keys(
    d_key, d_value, key, value, QUERY, GRAD, LSE, DELTA, FIRST, LAST, batch, query_row, grad_row, start, stop, begin,
    queries, keys, slope, scaling, cap, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SINK_TOKENS: tl.constexpr, RUNS: tl.constexpr,
    CAP: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """What queries from `start` to `stop` add to the gradients of keys from `begin` on, without the scaling."""
    for row in range(start, stop, ROWS):
        query = load_rows(QUERY, row, query_row, queries, ROWS, WIDTH, COLUMNS, True)
        grad = load_rows(GRAD, row, grad_row, queries, ROWS, VALUE_WIDTH, VALUE_COLUMNS, True)
        first, last = runs_of_queries(FIRST, LAST, batch, row, queries, keys, ROWS, RUNS)
        reference = tl.max(last, 0)
        rows = row + tl.arange(0, ROWS)
        lse = load_lse(LSE, rows, queries, query, last, reference, slope)
        delta = tl.load(DELTA + rows, mask=rows < queries, other=0.0)
        logits, derivative = tile_logits(
            query, key, begin, first, last, reference, slope, scaling, cap, KEYS, SINK_TOKENS, CAP, CHECK
        )
        weights = tl.exp2(logits - lse[:, None])
        d_value = tl.dot(tl.trans(weights.to(grad.dtype)), grad, d_value, input_precision="ieee")
        d_weights = tl.dot(grad, tl.trans(value), input_precision="ieee")
        d_logits = weights * (d_weights - delta[:, None]) * derivative
        d_key = tl.dot(tl.trans(d_logits.to(query.dtype)), query, d_key, input_precision="ieee")
    return d_key, d_value


@triton.jit(do_not_specialize=["queries", "keys", "query_blocks"])
def attend_backward_keys(
    QUERY, KEY, VALUE, GRAD, D_KEY, D_VALUE, LSE, DELTA, WINDOW, FIRST, LAST, SLOPE,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    grad_batch, grad_head, grad_row, d_key_batch, d_key_head, d_key_row, d_value_batch, d_value_head, d_value_row,
    queries, keys, query_blocks, key_heads, groups, scaling, cap,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr, WINDOW_ROWS: tl.constexpr,
    SINK_TOKENS: tl.constexpr, RUNS: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Fill D_KEY and D_VALUE; one program a tile of keys and a key head, which sums over the heads of its group.

    WINDOW is for `query_blocks` blocks of WINDOW_ROWS queries.
    """
    begin, pair = tl.program_id(0) * KEYS, tl.program_id(1)
    batch, own = pair // key_heads, pair % key_heads
    key = load_rows(
        of_head(KEY, batch, own, key_batch, key_head), begin, key_row, keys, KEYS, WIDTH, COLUMNS, True
    )  # fmt: skip
    of_values = of_head(VALUE, batch, own, value_batch, value_head)
    value = load_rows(of_values, begin, value_row, keys, KEYS, VALUE_WIDTH, VALUE_COLUMNS, True)
    d_key, d_value = tl.zeros([KEYS, COLUMNS], tl.float32), tl.zeros([KEYS, VALUE_COLUMNS], tl.float32)
    for member in range(0, groups):
        head = own * groups + member
        index = batch.to(tl.int64) * (key_heads * groups) + head
        slope = tl.load(SLOPE + head) * _LOG2E
        lowest, highest = _queries_that_read(WINDOW + index * query_blocks * 4, begin // BLOCK, query_blocks)
        start, stop = lowest * WINDOW_ROWS, (highest + 1) * WINDOW_ROWS
        # From here on every query sees every key of the tile.
        unchecked = stop
        if not RUNS:
            unchecked = (begin + KEYS - 1 - (keys - queries) + ROWS - 1) // ROWS * ROWS
            unchecked = tl.minimum(tl.maximum(unchecked, start), stop)
        of_queries = of_head(QUERY, batch, head, query_batch, query_head)
        of_grads = of_head(GRAD, batch, head, grad_batch, grad_head)
        d_key, d_value = _add_to_keys(
            d_key, d_value, key, value, of_queries, of_grads, LSE + index * queries, DELTA + index * queries, FIRST,
            LAST, batch, query_row, grad_row, start, unchecked, begin, queries, keys, slope, scaling, cap, WIDTH,
            VALUE_WIDTH, COLUMNS, VALUE_COLUMNS, ROWS, KEYS, SINK_TOKENS, RUNS, CAP, True,
        )  # fmt: skip
        d_key, d_value = _add_to_keys(
            d_key, d_value, key, value, of_queries, of_grads, LSE + index * queries, DELTA + index * queries, FIRST,
            LAST, batch, query_row, grad_row, unchecked, stop, begin, queries, keys, slope, scaling, cap, WIDTH,
            VALUE_WIDTH, COLUMNS, VALUE_COLUMNS, ROWS, KEYS, SINK_TOKENS, RUNS, CAP, False,
        )  # fmt: skip
    of_d_keys = of_head(D_KEY, batch, own, d_key_batch, d_key_head)
    of_d_values = of_head(D_VALUE, batch, own, d_value_batch, d_value_head)
    store_rows(of_d_keys, d_key * (scaling * _LN2), begin, d_key_row, keys, KEYS, WIDTH, COLUMNS)
    store_rows(of_d_values, d_value, begin, d_value_row, keys, KEYS, VALUE_WIDTH, VALUE_COLUMNS)

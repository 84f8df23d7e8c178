"""Kernels: one new token over a long cache, split over the keys so that the whole GPU has work.

Logits of all keys are computed, so that what is left out is known, not bounded: values are read only where some head of
the group puts weight.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import _LOG2E, load_rows, of_head, tanh_of

__all__ = ["decode", "join_parts"]


@triton.jit
def _logits(
    query, KEY, key_row, SEEN, AFTER, begin, stop, keys, total, slope, scaling, cap, COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr, KEYS: tl.constexpr, SINK_TOKENS: tl.constexpr, CAP: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Logits (heads, KEYS) of keys from `begin` on with their bias; minus infinity for those that are not seen."""
    position = begin + tl.arange(0, KEYS)
    sees = position < stop
    after = keys - 1 - position
    if MASK:
        after = tl.load(AFTER + position, mask=sees, other=0)
        sees &= tl.load(SEEN + position, mask=sees, other=0) != 0
    if SINK_TOKENS > 0:
        after = tl.where(total - 1 - after < SINK_TOKENS, 0, after)
    key = load_rows(KEY, begin, key_row, stop, KEYS, WIDTH, COLUMNS, True)
    logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scaling
    if CAP:
        logits = cap * tanh_of(logits, cap)
    logits -= slope[:, None] * after.to(tl.float32)[None, :]
    return tl.where(sees[None, :], logits, float("-inf"))


@triton.jit(do_not_specialize=["keys"])
def decode(
    QUERY, KEY, VALUE, TOTAL, LARGEST, WEIGHT, SEEN, AFTER, RUN, SLOPE,
    query_batch, query_head, key_batch, key_head, key_row, value_batch, value_head, value_row,
    keys, key_heads, groups, scaling, cap, tolerance,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    HEADS: tl.constexpr, SPAN: tl.constexpr, KEYS: tl.constexpr, SINK_TOKENS: tl.constexpr, CAP: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """One program a part of SPAN keys and a key head, for the HEADS (or fewer) query heads that share it.

    TOTAL (batch, heads, parts, VALUE_WIDTH), LARGEST and WEIGHT (batch, heads, parts) are float32: the weighted sum of
    a part's values, its largest logit, and the sum of its weights relative to that. With a MASK: SEEN bool and AFTER
    int32, both (batch, keys), whether a key is seen and how many are after it; RUN int32 (batch, 3), the first key that
    is seen, the one after the last, and how many.
    """
    part, pair = tl.program_id(0), tl.program_id(1)
    batch, own = pair // key_heads, pair % key_heads
    begin, stop, total = 0, keys, keys
    if MASK:
        begin, stop, total = tl.load(RUN + batch * 3), tl.load(RUN + batch * 3 + 1), tl.load(RUN + batch * 3 + 2)
        SEEN += batch.to(tl.int64) * keys
        AFTER += batch.to(tl.int64) * keys
    member = tl.arange(0, HEADS)
    slope = tl.load(SLOPE + own * groups + member, mask=member < groups, other=0.0) * _LOG2E
    of_queries = of_head(QUERY, batch, own * groups, query_batch, query_head)
    query = load_rows(of_queries, 0, query_head, groups, HEADS, WIDTH, COLUMNS, True)
    of_keys = of_head(KEY, batch, own, key_batch, key_head)
    of_values = of_head(VALUE, batch, own, value_batch, value_head)
    # The last keys are a lower bound of each row's log-sum-exp.
    near = _logits(
        query, of_keys, key_row, SEEN, AFTER, tl.maximum(stop - KEYS, begin), stop, keys, total, slope, scaling, cap,
        COLUMNS, WIDTH, KEYS, SINK_TOKENS, CAP, MASK,
    )  # fmt: skip
    peak = tl.max(near, 1)
    needed = peak + tl.log2(tl.sum(tl.exp2(near - peak[:, None]), 1)) + tolerance - tl.log2(keys.to(tl.float32))

    result = tl.zeros([HEADS, VALUE_COLUMNS], tl.float32)
    largest, weight = tl.full([HEADS], -1e30, tl.float32), tl.zeros([HEADS], tl.float32)
    for tile in range(tl.maximum(part * SPAN, begin // KEYS * KEYS), tl.minimum((part + 1) * SPAN, stop), KEYS):
        logits = _logits(
            query, of_keys, key_row, SEEN, AFTER, tile, stop, keys, total, slope, scaling, cap, COLUMNS, WIDTH, KEYS,
            SINK_TOKENS, CAP, MASK,
        )  # fmt: skip
        # What cannot be compared (NaN) is read.
        out = (logits <= needed[:, None]) | (member >= groups)[:, None]
        if tl.max(tl.max(tl.where(out, 0, 1), 1), 0) > 0:
            larger = tl.maximum(largest, tl.max(logits, 1))
            weights = tl.exp2(logits - larger[:, None])
            shrink = tl.exp2(largest - larger)
            value = load_rows(of_values, tile, value_row, stop, KEYS, VALUE_WIDTH, VALUE_COLUMNS, True)
            result = tl.dot(weights.to(value.dtype), value, result * shrink[:, None], input_precision="ieee")
            weight = weight * shrink + tl.sum(weights, 1)
            largest = larger
    index = (pair.to(tl.int64) * groups + member) * tl.num_programs(0) + part
    columns = tl.arange(0, VALUE_COLUMNS)
    inside = (member < groups)[:, None] & (columns < VALUE_WIDTH)[None, :]
    tl.store(TOTAL + index[:, None] * VALUE_WIDTH + columns[None, :], result, mask=inside)
    tl.store(LARGEST + index, largest, mask=member < groups)
    tl.store(WEIGHT + index, weight, mask=member < groups)


@triton.jit(do_not_specialize=["parts"])
def join_parts(
    TOTAL, LARGEST, WEIGHT, SINK, OUTPUT, output_batch, output_head, parts, heads, VALUE_WIDTH: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr, PARTS: tl.constexpr, LEARNED_SINK: tl.constexpr,
):  # fmt: skip
    """Fill OUTPUT from what `decode` made of the parts, PARTS at a time; one program a head of a sequence."""
    pair = tl.program_id(0)
    largest, weight = -1e30, 0.0
    total = tl.zeros([VALUE_COLUMNS], tl.float32)
    offset = pair.to(tl.int64) * parts
    for begin in range(0, parts, PARTS):
        part = begin + tl.arange(0, PARTS)
        peaks = tl.load(LARGEST + offset + part, mask=part < parts, other=-1e30)
        weights = tl.load(WEIGHT + offset + part, mask=part < parts, other=0.0)
        of_parts = TOTAL + offset * VALUE_WIDTH
        totals = load_rows(of_parts, begin, VALUE_WIDTH, parts, PARTS, VALUE_WIDTH, VALUE_COLUMNS, True)
        larger = tl.maximum(largest, tl.max(peaks, 0))
        shrink, share = tl.exp2(largest - larger), tl.exp2(peaks - larger)
        total = total * shrink + tl.sum(totals * share[:, None], 0)
        weight = weight * shrink + tl.sum(share * weights, 0)
        largest = larger
    sees = weight > 0
    if LEARNED_SINK:
        sink = tl.load(SINK + pair % heads).to(tl.float32) * _LOG2E
        larger = tl.maximum(largest, sink)
        shrink = tl.exp2(largest - larger)
        total, weight = total * shrink, weight * shrink + tl.exp2(sink - larger)
    columns = tl.arange(0, VALUE_COLUMNS)
    pointers = of_head(OUTPUT, pair // heads, pair % heads, output_batch, output_head) + columns
    output = tl.where(sees, total / tl.where(sees, weight, 1.0), 0.0)
    tl.store(pointers, output.to(OUTPUT.dtype.element_ty), mask=columns < VALUE_WIDTH)

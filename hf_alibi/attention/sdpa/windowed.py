"""ALiBi attention on the CPU that reads no key which cannot matter: exact, and cheaper the longer the context.

Each head reads its near keys first, with the bias as a small dense matrix that all blocks of queries share. What it
must read beyond is decided by `reach` from the data. There the bias is one row, slope × key position, since softmax
ignores a constant per query. Parts are merged by their log-sum-exp, and the backward pass splits the same way. Sink
tokens are a part of their own, which every query reads without bias; the other parts never hold them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..tolerance import exact_tolerance
from .far_keys import Span, far_spans, kept_blocks
from .reads import recording, report_reads
from .segments import Segment

__all__ = ["windowed_attention"]

# PyTorch's fused kernel and its backward, which public functions give without log-sum-exp, and without a mask beside
# `is_causal`.
_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Nats that a key costs at the distance of a block. Most heads then need nothing beyond their near keys, and on short
# sequences calls are few; within limits set by the kernel's efficiency and by the memory of the dense bias.
_BLOCK_NATS = 64.0
_BLOCK_MIN, _BLOCK_MAX = 64, 512
# Where the bias differs by less over the whole sequence, leaving out the few keys that could be would cost more calls
# than it saves, and slope × position is small enough not to cost precision: one plain causal call serves the head.
_FLAT_NATS = 96.0


def windowed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    scaling: float,
    *,
    segments: Sequence[Segment],
    tolerance: float | None = None,
    sink_tokens: int = 0,
) -> Tensor:
    """Causal attention with the ALiBi bias inside each segment; queries of no segment get zeros.

    Args:
        query: (batch, heads, queries, head_dim), on the CPU.
        key, value: (batch, key-value heads, keys, head_dim).
        slopes: (heads,), logits per token of distance.
        scaling: of the logits.
        segments: see `Segment`; no query is in two of them.
        tolerance: share of a row's weights that may be left out; None for `exact_tolerance`.
        sink_tokens: so many of the first keys of each segment have no bias.

    Returns (batch, heads, queries, head_dim). What leaving keys out adds to the error is at most twice the tolerance
    times the largest value. There is no second derivative.
    """
    tolerance = exact_tolerance(query.dtype) if tolerance is None else tolerance
    output: Tensor = _Windowed.apply(query, key, value, slopes.tolist(), scaling, tolerance, segments, sink_tokens)
    return output


class _Windowed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        slopes: list[float],
        scaling: float,
        tolerance: float,
        segments: Sequence[Segment],
        sink_tokens: int,
    ) -> Tensor:
        query, key, value = (_with_rows(x) for x in (query, key, value))
        batch, heads, queries, width = query.shape
        # The layout that models ask for next: (batch, queries, heads, head_dim).
        everything = segments == [Segment.causal(queries, key.shape[2])]
        make = query.new_empty if everything else query.new_zeros
        output = make(batch, queries, heads, width).transpose(1, 2)
        # Half types are summed in float32.
        lse = make(batch, heads, queries, dtype=torch.promote_types(query.dtype, torch.float32))
        segments = [part for segment in segments for part in segment.split(sink_tokens)]
        far = [
            _forward(
                *(_of_queries(x, segment) for x in (query, output, lse)),
                *(_of_keys(x, segment) for x in (key, value)),
                sinks=_sinks_of((key, value), segment),
                slopes=_slopes_in(segment, slopes),
                scaling=scaling,
                tolerance=tolerance,
            )
            for segment in segments
        ]
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.settings = slopes, scaling, segments, far
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        slopes, scaling, segments, spans = ctx.settings
        grad = _with_rows(grad)
        gradients = [torch.zeros_like(x, dtype=lse.dtype) for x in (query, key, value)]
        for segment, far in zip(segments, spans, strict=True):
            _backward(
                *(_of_queries(x, segment) for x in (grad, query, output, lse, gradients[0])),
                *(_of_keys(x, segment) for x in (key, value, *gradients[1:])),
                sinks=_sinks_of((key, value, *gradients[1:]), segment),
                slopes=_slopes_in(segment, slopes),
                scaling=scaling,
                far=far,
            )
        return *(total.to(query.dtype) for total in gradients), None, None, None, None, None


def _with_rows(x: Tensor) -> Tensor:
    # The kernel steps over everything but the last dimension.
    return x if x.stride(-1) == 1 else x.contiguous()


def _of_queries(x: Tensor, segment: Segment) -> Tensor:
    return x[segment.batch, :, segment.queries]


def _of_keys(x: Tensor, segment: Segment) -> Tensor:
    return x[segment.batch, :, segment.keys]


def _sinks_of(tensors: Sequence[Tensor], segment: Segment) -> list[Tensor]:
    """Of each tensor (batch, key-value heads, keys, head_dim) the sinks of a segment, if it has any."""
    return [x[segment.batch, :, segment.sinks] for x in tensors if segment.sinks is not None]


def _slopes_in(segment: Segment, slopes: list[float]) -> list[float]:
    return slopes if segment.has_bias else [0.0] * len(slopes)


@dataclass(frozen=True)
class _Part:
    """What one call of the kernel does for one head."""

    span: Span
    bias: Tensor
    """Added to the logits, broadcasts to (batch, blocks, rows, keys); the true bias plus `shift`."""
    shift: Tensor | float
    """(blocks, rows), a constant per query, which the log-sum-exp of the call has too much."""
    causal: bool = False
    """Whether the kernel itself hides the future: keys from `rows` on never exist then."""


def _forward(
    query: Tensor,
    output: Tensor,
    lse: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    sinks: list[Tensor],
    slopes: list[float],
    scaling: float,
    tolerance: float,
) -> dict[int, list[Span]]:
    """Fill `output` and `lse` of one segment; returns what each head that is not flat reads beyond its near keys.

    `sinks` are the keys and values of sinks, if any.
    """
    queries, keys, groups = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    flat, others = _flat_runs(slopes, queries, keys, groups)
    for run in flat:
        bias = _flat_bias(slopes[run], queries, lse.dtype)
        k, v = _for_run(key, run, groups), _for_run(value, run, groups)
        total, part_lse = _attend(query[:, run], k, v, 0.0, True, attn_mask=bias, scale=scaling)
        row_lse = part_lse - bias[:, :, 0]
        if sinks:
            total = total.to(lse.dtype)
            k, v = (_for_run(x, run, groups) for x in sinks)
            _merge(total, row_lse, *_attend(query[:, run], k, v, 0.0, False, scale=scaling))
        output[:, run], lse[:, run] = total, row_lse
    same = output.dtype == lse.dtype
    far: dict[int, list[Span]] = {}
    if others:
        query_norms = torch.linalg.vector_norm(query, dim=-1, dtype=lse.dtype).float()
        key_norms = torch.linalg.vector_norm(key, dim=-1, dtype=lse.dtype).float().amax(dim=0)
    for head in others:
        slope, block = slopes[head], _block_size(slopes[head])
        q, k, v, row_lse = query[:, head], key[:, head // groups], value[:, head // groups], lse[:, head]
        total = output[:, head] if same else torch.empty_like(output[:, head], dtype=lse.dtype)
        for part in _near_parts(slope, block, queries, keys, lse.dtype):
            near, near_lse = _call(part, q, k, v, scaling)
            total[:, part.span.queries], row_lse[:, part.span.queries] = near, near_lse
        if sinks:
            sink_key, sink_value = (x[:, head // groups] for x in sinks)
            _merge(total, row_lse, *_call(_sink_part(sink_key, queries, lse.dtype), q, sink_key, sink_value, scaling))
        kept = kept_blocks(
            q,
            k,
            (query_norms[:, head], key_norms[head // groups]),
            row_lse,
            slope=slope,
            scaling=scaling,
            block=block,
            tolerance=tolerance,
        )
        far[head] = far_spans(kept, queries, keys, block)
        for part in _far_parts(far[head], slope, queries, keys, lse.dtype):
            _merge(total[:, part.span.queries], row_lse[:, part.span.queries], *_call(part, q, k, v, scaling))
        if not same:
            output[:, head] = total
    if recording():
        spans = {head: [*_near_spans(_block_size(slopes[head]), queries, keys), *far[head]] for head in others}
        read = sinks[0].shape[2] if sinks else 0
        report_reads(batch=len(query), heads=len(slopes), queries=queries, keys=keys, spans=spans, sinks=read)
    return far


def _backward(
    grad: Tensor,
    query: Tensor,
    output: Tensor,
    lse: Tensor,
    d_query: Tensor,
    key: Tensor,
    value: Tensor,
    d_key: Tensor,
    d_value: Tensor,
    *,
    sinks: list[Tensor],
    slopes: list[float],
    scaling: float,
    far: dict[int, list[Span]],
) -> None:
    """Add one segment's gradients; any part of a softmax has its own from the final output and log-sum-exp alone.

    `sinks` are the keys and values of sinks and their gradients, if any.
    """
    queries, keys, groups = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    everything, of_queries = [key, value, d_key, d_value], (grad, query, output, lse)
    for run in _flat_runs(slopes, queries, keys, groups)[0]:
        bias = _flat_bias(slopes[run], queries, lse.dtype)
        rows = [x[:, run] for x in of_queries]
        d_query[:, run] = _backward_of_run(rows, everything, run, groups, scaling, bias)
        if sinks:
            d_query[:, run] += _backward_of_run(rows, sinks, run, groups, scaling, None)
    for head, spans in far.items():
        slope, own = slopes[head], head // groups
        near = _near_parts(slope, _block_size(slope), queries, keys, lse.dtype)
        parts = [(part, everything) for part in (*near, *_far_parts(spans, slope, queries, keys, lse.dtype))]
        if sinks:
            parts.append((_sink_part(sinks[0][:, own], queries, lse.dtype), sinks))
        for part, of_keys in parts:
            part = _split_rows(part)
            d_query[:, head, part.span.queries] += _backward_of_part(
                part, [x[:, head] for x in of_queries], [x[:, own] for x in of_keys], scaling
            )


def _backward_of_run(
    of_queries: Sequence[Tensor],
    of_keys: Sequence[Tensor],
    run: slice,
    groups: int,
    scaling: float,
    bias: Tensor | None,
) -> Tensor:
    """Gradient of a run's queries; those of keys and values are added to what is there.

    Args:
        of_queries: gradient, queries, output and log-sum-exp of the run.
        of_keys: keys, values and their gradients of all heads.
        run: of flat heads.
        groups: query heads to a key head.
        scaling: of the logits.
        bias: of causal attention, see `_flat_bias`; None for keys that all queries see without.
    """
    grad, query, output, lse = of_queries
    key, value = (_for_run(x, run, groups) for x in of_keys[:2])
    row_lse = lse if bias is None else lse + bias[:, :, 0]
    dq: Tensor
    dq, *rest = _attend_backward(
        grad, query, key, value, output, row_lse, 0.0, bias is not None, attn_mask=bias, scale=scaling
    )
    for total, part in zip(of_keys[2:], rest, strict=True):
        into = _for_run(total, run, groups, expand=False)
        into += part if groups == 1 else part.sum(dim=1, keepdim=True)
    return dq


def _backward_of_part(part: _Part, of_queries: Sequence[Tensor], of_keys: Sequence[Tensor], scaling: float) -> Tensor:
    """As `_backward_of_run`, for one part of a head; `of_queries` and `of_keys` are of that head."""
    grad, query, output, lse = (_blocks(x, part.span) for x in of_queries)
    key, value = (_keys(x, part.span) for x in of_keys[:2])
    dq: Tensor
    dq, *rest = _attend_backward(
        grad, query, key, value, output, lse + part.shift, 0.0, part.causal, attn_mask=part.bias, scale=scaling
    )
    for total, gradient in zip(of_keys[2:], rest, strict=True):
        _add_to_keys(total, gradient, part.span)
    return dq.flatten(1, 2)


def _call(part: _Part, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Output (batch, queries, head_dim) and log-sum-exp (batch, queries) of one part of a head."""
    output, lse = _attend(
        _blocks(query, part.span),
        _keys(key, part.span),
        _keys(value, part.span),
        0.0,
        part.causal,
        attn_mask=part.bias,
        scale=scaling,
    )
    return output.flatten(1, 2), (lse - part.shift).flatten(1, 2)


def _merge(total: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add a part, with a softmax of its own, to what is there already."""
    both = torch.logaddexp(lse, part_lse)
    total.mul_((lse - both).exp()[..., None]).addcmul_(part.to(total.dtype), (part_lse - both).exp()[..., None])
    lse.copy_(both)


# Which heads are flat, and their single call


def _flat_runs(slopes: list[float], queries: int, keys: int, groups: int) -> tuple[list[slice], list[int]]:
    """Runs of flat heads that one call can take (under grouped heads, those of one key head), and all other heads."""
    runs: list[slice] = []
    others = []
    for head, slope in enumerate(slopes):
        if queries != keys or slope * queries > _FLAT_NATS:
            others.append(head)
        elif runs and runs[-1].stop == head and (groups == 1 or head % groups):
            runs[-1] = slice(runs[-1].start, head + 1)
        else:
            runs.append(slice(head, head + 1))
    return runs, others


def _flat_bias(slopes: list[float], keys: int, dtype: torch.dtype) -> Tensor:
    """Slope × position, (1, heads, 1, keys), positions counted from the middle."""
    position = torch.arange(keys, dtype=dtype) - keys // 2
    return torch.tensor(slopes, dtype=dtype)[None, :, None, None] * position


def _for_run(x: Tensor, run: slice, groups: int, expand: bool = True) -> Tensor:
    """The key heads of a run of query heads."""
    if groups == 1:
        return x[:, run]
    own = x[:, run.start // groups, None]
    return own.expand(-1, run.stop - run.start, -1, -1) if expand else own


# Near keys


def _block_size(slope: float) -> int:
    if slope * _BLOCK_MAX <= _BLOCK_NATS:
        return _BLOCK_MAX
    return int(max(2 ** math.ceil(math.log2(_BLOCK_NATS / slope)), _BLOCK_MIN))


def _near_spans(block: int, queries: int, keys: int) -> Iterator[Span]:
    """Blocks of queries with the keys from one block before them to their own."""
    offset, start = keys - queries, 0
    if offset < block:
        start = min(block, queries)
        yield Span(0, 1, start, 0, offset + start)
    if whole := (queries - start) // block:
        yield Span(start, whole, block, offset + start - block, 2 * block, block)
        start += whole * block
    if rows := queries - start:
        yield Span(start, 1, rows, offset + start - block, block + rows)


@lru_cache(maxsize=16)
def _near_distances(block: int, dtype: torch.dtype) -> Tensor:
    """Minus the distance of a block of queries to its near keys, (block, 2 × block); minus infinity in the future."""
    distance = block + torch.arange(block)[:, None] - torch.arange(2 * block)
    return (-distance.to(dtype)).masked_fill(distance < 0, -math.inf)


def _near_parts(slope: float, block: int, queries: int, keys: int, dtype: torch.dtype) -> Iterator[_Part]:
    bias = slope * _near_distances(block, dtype)[: min(block, queries), max(0, block - keys) :]
    if slope < torch.finfo(dtype).tiny:  # minus infinity times what rounds to zero
        bias = bias.nan_to_num(nan=-math.inf, neginf=-math.inf)
    for span in _near_spans(block, queries, keys):
        # The last key of a span is the own key of its last query.
        end = bias.shape[1] - block + span.rows
        yield _Part(span, bias[None, None, : span.rows, end - span.keys : end], 0.0, causal=span.keys == span.rows)


# Sinks


def _sink_part(key: Tensor, queries: int, dtype: torch.dtype) -> _Part:
    """All queries over the sinks (batch, sinks, head_dim) of a head, without bias."""
    sinks = key.shape[1]
    return _Part(Span(0, 1, queries, 0, sinks), torch.zeros(1, 1, 1, sinks, dtype=dtype), 0.0)


# Far keys


def _far_parts(spans: Iterable[Span], slope: float, queries: int, keys: int, dtype: torch.dtype) -> Iterator[_Part]:
    for span in spans:
        position = torch.arange(span.key, span.key + span.keys) if span.columns is None else span.columns
        nearest = position[-1]
        row = torch.arange(span.blocks * span.rows).unflatten(0, (span.blocks, span.rows))
        distance = keys - queries + span.query + row - nearest - span.step * torch.arange(span.blocks)[:, None]
        yield _Part(span, (slope * (position - nearest).to(dtype))[None, None, None], slope * distance.to(dtype))


def _split_rows(part: _Part) -> _Part:
    """A single block of queries as one for each thread, since the backward kernel gives a block to one thread."""
    span, threads = part.span, torch.get_num_threads()
    if span.blocks > 1 or part.causal or span.rows % threads:
        return part
    shape = (threads, span.rows // threads)
    split = Span(span.query, *shape, span.key, span.keys, columns=span.columns)
    bias = part.bias[0].unflatten(1, shape) if part.bias.shape[2] > 1 else part.bias
    return _Part(split, bias, part.shift.reshape(shape) if isinstance(part.shift, Tensor) else part.shift)


def _blocks(x: Tensor, span: Span) -> Tensor:
    """(batch, queries, …) to (batch, blocks, rows, …), a view."""
    blocks: Tensor = x[:, span.queries].unflatten(1, (span.blocks, span.rows))
    return blocks


def _keys(x: Tensor, span: Span) -> Tensor:
    """(batch, keys, head_dim) to what each block reads, (batch, blocks, keys, head_dim): an overlapping view."""
    if span.step:
        all_keys = x[:, span.key : span.key + span.keys + (span.blocks - 1) * span.step]
        blocks: Tensor = all_keys.unfold(1, span.keys, span.step).transpose(2, 3)
        return blocks
    shared: Tensor = x[:, None, span.read].expand(-1, span.blocks, -1, -1)
    return shared


def _add_to_keys(total: Tensor, part: Tensor, span: Span) -> None:
    """The reverse of `_keys`: add (batch, blocks, keys, head_dim) to (batch, keys, head_dim)."""
    if span.step == 0:
        total[:, span.read] += part.sum(dim=1)
        return
    for begin in range(0, span.keys, span.step):
        size = span.blocks * span.step
        into = total[:, span.key + begin : span.key + begin + size].unflatten(1, (span.blocks, span.step))
        into += part[:, :, begin : begin + span.step]

"""ALiBi attention on the CPU that reads no key which cannot matter: exact, and cheaper the longer the context.

Each head reads its near keys first, with the bias as a small dense matrix that all blocks of queries share. What it
must read beyond is decided by `far_keys` from the data. There the bias is one row, slope × key position, since softmax
ignores a constant per query. Parts are merged by their log-sum-exp, and the backward pass splits the same way. Sink
tokens are a part of their own, which every query reads without bias; the other parts never hold them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..tolerance import exact_tolerance
from .cpu_kernel import attend, attend_backward
from .far_keys import Span, far_spans, kept_blocks
from .parts import (
    Part,
    add_to_keys,
    block_size,
    blocks,
    far_parts,
    flat_bias,
    flat_runs,
    for_run,
    keys_read,
    near_parts,
    near_spans,
    sink_part,
    split_rows,
)
from .reads import recording, report_reads
from .segments import Segment

__all__ = ["windowed_attention"]


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
        sink_tokens: how many of the first keys of each segment have no bias.

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
        tensors = query, output, lse, key, value
        far = [_forward(_Share.of(segment, tensors, slopes, scaling), tolerance) for segment in segments]
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
            share = _Share.of(segment, (query, output, lse, key, value), slopes, scaling)
            of_sinks = [x[segment.batch, :, segment.sinks] for x in gradients[1:] if segment.sinks is not None]
            _backward(
                share,
                far,
                grad[segment.batch, :, segment.queries],
                gradients[0][segment.batch, :, segment.queries],
                [x[segment.batch, :, segment.keys] for x in gradients[1:]],
                of_sinks,
            )
        return *(total.to(query.dtype) for total in gradients), None, None, None, None, None


def _with_rows(x: Tensor) -> Tensor:
    # The kernel steps over everything but the last dimension.
    return x if x.stride(-1) == 1 else x.contiguous()


@dataclass(frozen=True)
class _Share:
    """What one segment has of a call, as views; `sinks` are the keys and values of sinks, if it has any."""

    query: Tensor
    output: Tensor
    lse: Tensor
    key: Tensor
    value: Tensor
    sinks: list[Tensor]
    slopes: list[float]
    scaling: float

    @classmethod
    def of(cls, segment: Segment, tensors: Sequence[Tensor], slopes: list[float], scaling: float) -> _Share:
        """`tensors`: query, output, log-sum-exp, key and value of the whole call."""
        query, output, lse = (x[segment.batch, :, segment.queries] for x in tensors[:3])
        key, value = (x[segment.batch, :, segment.keys] for x in tensors[3:])
        sinks = [x[segment.batch, :, segment.sinks] for x in tensors[3:] if segment.sinks is not None]
        slopes = slopes if segment.has_bias else [0.0] * len(slopes)
        return cls(query, output, lse, key, value, sinks, slopes, scaling)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Queries, keys, and query heads to a key head."""
        return self.query.shape[2], self.key.shape[2], self.query.shape[1] // self.key.shape[1]


def _forward(share: _Share, tolerance: float) -> dict[int, list[Span]]:
    """Fill output and log-sum-exp; returns what each head that is not flat reads beyond its near keys."""
    queries, keys, groups = share.sizes
    slopes, dtype = share.slopes, share.lse.dtype
    runs, others = flat_runs(slopes, queries, keys, groups)
    for run in runs:
        _forward_run(share, run)
    far: dict[int, list[Span]] = {}
    if others:
        query_norms = torch.linalg.vector_norm(share.query, dim=-1, dtype=dtype).float()
        key_norms = torch.linalg.vector_norm(share.key, dim=-1, dtype=dtype).float().amax(dim=0)
    for head in others:
        norms = query_norms[:, head], key_norms[head // groups]
        far[head] = _forward_head(share, head, norms, tolerance)
    if recording():
        spans = {head: [*near_spans(block_size(slopes[head]), queries, keys), *far[head]] for head in others}
        read = share.sinks[0].shape[2] if share.sinks else 0
        report_reads(batch=len(share.query), heads=len(slopes), queries=queries, keys=keys, spans=spans, sinks=read)
    return far


def _forward_run(share: _Share, run: slice) -> None:
    """Flat heads, in a single call."""
    queries, _, groups = share.sizes
    bias = flat_bias(share.slopes[run], queries, share.lse.dtype)
    query, scaling = share.query[:, run], share.scaling
    k, v = for_run(share.key, run, groups), for_run(share.value, run, groups)
    total, part_lse = attend(query, k, v, causal=True, bias=bias, scaling=scaling)
    row_lse = part_lse - bias[:, :, 0]
    if share.sinks:
        total = total.to(share.lse.dtype)
        k, v = (for_run(x, run, groups) for x in share.sinks)
        _merge(total, row_lse, *attend(query, k, v, causal=False, bias=None, scaling=scaling))
    share.output[:, run], share.lse[:, run] = total, row_lse


def _forward_head(share: _Share, head: int, norms: tuple[Tensor, Tensor], tolerance: float) -> list[Span]:
    """Near keys, sinks, and what the data says must be read beyond; returns the latter."""
    queries, keys, groups = share.sizes
    slope, dtype, own = share.slopes[head], share.lse.dtype, head // groups
    block, scaling = block_size(slope), share.scaling
    q, k, v, row_lse = share.query[:, head], share.key[:, own], share.value[:, own], share.lse[:, head]
    same = share.output.dtype == dtype
    total = share.output[:, head] if same else torch.empty_like(share.output[:, head], dtype=dtype)
    for part in near_parts(slope, block, queries, keys, dtype):
        total[:, part.span.queries], row_lse[:, part.span.queries] = _call(part, q, k, v, scaling)
    if share.sinks:
        sink_key, sink_value = (x[:, own] for x in share.sinks)
        _merge(total, row_lse, *_call(sink_part(sink_key, queries, dtype), q, sink_key, sink_value, scaling))
    bound = {"slope": slope, "scaling": scaling, "tolerance": tolerance}
    far = far_spans(kept_blocks(q, k, norms, row_lse, block=block, **bound), queries, keys, block)
    for part in far_parts(far, slope, queries, keys, dtype):
        _merge(total[:, part.span.queries], row_lse[:, part.span.queries], *_call(part, q, k, v, scaling))
    if not same:
        share.output[:, head] = total
    return far


def _backward(
    share: _Share,
    far: dict[int, list[Span]],
    grad: Tensor,
    d_query: Tensor,
    of_keys: list[Tensor],
    of_sinks: list[Tensor],
) -> None:
    """Add one segment's gradients; any part of a softmax has its own from the final output and log-sum-exp alone.

    Args:
        share: with output and log-sum-exp filled.
        far: what `_forward` returned.
        grad: of the output.
        d_query: gradient of the queries, to be filled.
        of_keys: gradients of keys and values, which are added to; `of_sinks` those of sinks, if any.
    """
    queries, keys, groups = share.sizes
    slopes, scaling, dtype = share.slopes, share.scaling, share.lse.dtype
    everything, sinks = [share.key, share.value, *of_keys], [*share.sinks, *of_sinks]
    of_queries = (grad, share.query, share.output, share.lse)
    for run in flat_runs(slopes, queries, keys, groups)[0]:
        bias = flat_bias(slopes[run], queries, dtype)
        rows = [x[:, run] for x in of_queries]
        d_query[:, run] = _backward_of_run(rows, everything, run, groups, scaling, bias)
        if sinks:
            d_query[:, run] += _backward_of_run(rows, sinks, run, groups, scaling, None)
    for head, spans in far.items():
        slope, own = slopes[head], head // groups
        near = near_parts(slope, block_size(slope), queries, keys, dtype)
        parts = [(part, everything) for part in (*near, *far_parts(spans, slope, queries, keys, dtype))]
        if sinks:
            parts.append((sink_part(sinks[0][:, own], queries, dtype), sinks))
        for part, tensors in parts:
            part = split_rows(part)
            d_query[:, head, part.span.queries] += _backward_of_part(
                part, [x[:, head] for x in of_queries], [x[:, own] for x in tensors], scaling
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
    key, value = (for_run(x, run, groups) for x in of_keys[:2])
    row_lse = lse if bias is None else lse + bias[:, :, 0]
    of_call = grad, query, output, row_lse
    dq, *rest = attend_backward(of_call, key, value, causal=bias is not None, bias=bias, scaling=scaling)
    for total, part in zip(of_keys[2:], rest, strict=True):
        into = for_run(total, run, groups, expand=False)
        into += part if groups == 1 else part.sum(dim=1, keepdim=True)
    return dq


def _backward_of_part(part: Part, of_queries: Sequence[Tensor], of_keys: Sequence[Tensor], scaling: float) -> Tensor:
    """As `_backward_of_run`, for one part of a head; `of_queries` and `of_keys` are of that head."""
    grad, query, output, lse = (blocks(x, part.span) for x in of_queries)
    key, value = (keys_read(x, part.span) for x in of_keys[:2])
    of_call = grad, query, output, lse + part.shift
    dq, *rest = attend_backward(of_call, key, value, causal=part.causal, bias=part.bias, scaling=scaling)
    for total, gradient in zip(of_keys[2:], rest, strict=True):
        add_to_keys(total, gradient, part.span)
    return dq.flatten(1, 2)


def _call(part: Part, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Output (batch, queries, head_dim) and log-sum-exp (batch, queries) of one part of a head."""
    states = blocks(query, part.span), keys_read(key, part.span), keys_read(value, part.span)
    output, lse = attend(*states, causal=part.causal, bias=part.bias, scaling=scaling)
    return output.flatten(1, 2), (lse - part.shift).flatten(1, 2)


def _merge(total: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add a part, with a softmax of its own, to what is there already."""
    both = torch.logaddexp(lse, part_lse)
    total.mul_((lse - both).exp()[..., None]).addcmul_(part.to(total.dtype), (part_lse - both).exp()[..., None])
    lse.copy_(both)

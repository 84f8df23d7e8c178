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

from ..blocks import with_rows
from ..call import AttentionCall
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


def windowed_attention(call: AttentionCall, segments: Sequence[Segment]) -> Tensor:
    """Causal attention with the ALiBi bias inside each segment; queries of no segment get zeros.

    Args:
        call: on the CPU, with slopes that depend on the head alone; its mask is not read.
        segments: see `Segment`; no query is in two of them, and the first keys of each are its sinks.

    Returns (batch, heads, queries, head_dim). What leaving keys out adds to the error is at most twice the tolerance
    times the largest value. There is no second derivative.
    """
    slopes, parts = call.slopes, [part for segment in segments for part in segment.split(call.slopes.sink_tokens)]
    everything = segments == [Segment.causal(call.query.shape[2], call.key.shape[2])]
    settings = slopes.per_head.tolist(), call.scaling, call.tolerance, parts, everything
    output: Tensor = _Windowed.apply(call.query, call.key, call.value, settings)
    return output


class _Windowed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, settings: tuple[Any, ...]) -> Tensor:
        slopes, scaling, tolerance, segments, everything = settings
        query, key, value = (with_rows(x) for x in (query, key, value))
        batch, heads, queries, width = query.shape
        # The layout that models ask for next: (batch, queries, heads, head_dim).
        make = query.new_empty if everything else query.new_zeros
        output = make(batch, queries, heads, width).transpose(1, 2)
        # Half types are summed in float32.
        lse = make(batch, heads, queries, dtype=torch.promote_types(query.dtype, torch.float32))
        of_queries, of_keys = (query, output, lse), (key, value)
        far = [_forward(_Share.of(segment, of_queries, of_keys, slopes, scaling), tolerance) for segment in segments]
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.settings = slopes, scaling, segments, far
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        slopes, scaling, segments, spans = ctx.settings
        gradients = [torch.zeros_like(x, dtype=lse.dtype) for x in (query, key, value)]
        of_queries = query, output, lse, with_rows(grad), gradients[0]
        of_keys = key, value, *gradients[1:]
        for segment, far in zip(segments, spans, strict=True):
            _backward(_Share.of(segment, of_queries, of_keys, slopes, scaling), far)
        return *(total.to(query.dtype) for total in gradients), None


@dataclass(frozen=True)
class _Share:
    """What one segment has of a call, as views that are filled in place."""

    of_queries: list[Tensor]
    """Query, output, log-sum-exp; in the backward pass also the gradients of the output and of the query."""
    of_keys: list[Tensor]
    """Key, value; in the backward pass also their gradients."""
    of_sinks: list[Tensor]
    """As `of_keys`; empty without sinks."""
    slopes: list[float]
    scaling: float

    @classmethod
    def of(
        cls,
        segment: Segment,
        of_queries: Sequence[Tensor],
        of_keys: Sequence[Tensor],
        slopes: list[float],
        scaling: float,
    ) -> _Share:
        """From the tensors of the whole call."""
        return cls(
            [x[segment.batch, :, segment.queries] for x in of_queries],
            [x[segment.batch, :, segment.keys] for x in of_keys],
            [] if segment.sinks is None else [x[segment.batch, :, segment.sinks] for x in of_keys],
            slopes if segment.has_bias else [0.0] * len(slopes),
            scaling,
        )

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Queries, keys, and query heads to a key head."""
        query, key = self.of_queries[0], self.of_keys[0]
        return query.shape[2], key.shape[2], query.shape[1] // key.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of sums."""
        return self.of_queries[2].dtype


def _forward(share: _Share, tolerance: float) -> dict[int, list[Span]]:
    """Fill output and log-sum-exp; returns what each head that is not flat reads beyond its near keys."""
    (queries, keys, groups), slopes = share.sizes, share.slopes
    runs, others = flat_runs(slopes, queries, keys, groups)
    for run in runs:
        _forward_run(share, run)
    far: dict[int, list[Span]] = {}
    if others:
        norms = (torch.linalg.vector_norm(x[0], dim=-1, dtype=share.dtype) for x in (share.of_queries, share.of_keys))
        query_norms, key_norms = (x.float() for x in norms)
        largest = key_norms.amax(dim=0)
    for head in others:
        far[head] = _forward_head(share, head, (query_norms[:, head], largest[head // groups]), tolerance)
    if recording():
        spans = {head: [*near_spans(block_size(slopes[head]), queries, keys), *far[head]] for head in others}
        batch, read = len(share.of_queries[0]), share.of_sinks[0].shape[2] if share.of_sinks else 0
        report_reads(batch=batch, heads=len(slopes), queries=queries, keys=keys, spans=spans, sinks=read)
    return far


def _forward_run(share: _Share, run: slice) -> None:
    """Flat heads, in a single call."""
    (queries, _, groups), scaling = share.sizes, share.scaling
    query, output, lse = (x[:, run] for x in share.of_queries)
    bias = flat_bias(share.slopes[run], queries, share.dtype)
    key, value = (for_run(x, run, groups) for x in share.of_keys)
    total, row_lse = attend(query, key, value, causal=True, bias=bias, scaling=scaling)
    row_lse = row_lse - bias[:, :, 0]
    if share.of_sinks:
        total = total.to(share.dtype)
        key, value = (for_run(x, run, groups) for x in share.of_sinks)
        _merge(total, row_lse, *attend(query, key, value, causal=False, bias=None, scaling=scaling))
    output.copy_(total)
    lse.copy_(row_lse)


def _forward_head(share: _Share, head: int, norms: tuple[Tensor, Tensor], tolerance: float) -> list[Span]:
    """Near keys, sinks, and what the data says must be read beyond; returns the latter."""
    queries, keys, groups = share.sizes
    slope, dtype, own, scaling = share.slopes[head], share.dtype, head // groups, share.scaling
    block = block_size(slope)
    query, output, lse = (x[:, head] for x in share.of_queries)
    key, value = (x[:, own] for x in share.of_keys)
    total = output if output.dtype == dtype else torch.empty_like(output, dtype=dtype)
    for part in near_parts(slope, block, queries, keys, dtype):
        total[:, part.span.queries], lse[:, part.span.queries] = _call(part, query, key, value, scaling)
    if share.of_sinks:
        sink_key, sink_value = (x[:, own] for x in share.of_sinks)
        _merge(total, lse, *_call(sink_part(sink_key, queries, dtype), query, sink_key, sink_value, scaling))
    bound = {"slope": slope, "scaling": scaling, "tolerance": tolerance}
    far = far_spans(kept_blocks(query, key, norms, lse, block=block, **bound), queries, keys, block)
    for part in far_parts(far, slope, queries, keys, dtype):
        _merge(total[:, part.span.queries], lse[:, part.span.queries], *_call(part, query, key, value, scaling))
    if total is not output:
        output.copy_(total)
    return far


def _backward(share: _Share, far: dict[int, list[Span]]) -> None:
    """Add one segment's gradients; any part of a softmax has its own from the final output and log-sum-exp alone.

    Args:
        share: with output and log-sum-exp filled.
        far: what `_forward` returned.
    """
    (queries, keys, groups), slopes, dtype = share.sizes, share.slopes, share.dtype
    for run in flat_runs(slopes, queries, keys, groups)[0]:
        _backward_of_run(share, share.of_keys, run, flat_bias(slopes[run], queries, dtype))
        if share.of_sinks:
            _backward_of_run(share, share.of_sinks, run, None)
    for head, spans in far.items():
        near = near_parts(slopes[head], block_size(slopes[head]), queries, keys, dtype)
        for part in (*near, *far_parts(spans, slopes[head], queries, keys, dtype)):
            _backward_of_part(share, share.of_keys, head, part)
        if share.of_sinks:
            sinks = share.of_sinks[0][:, head // groups]
            _backward_of_part(share, share.of_sinks, head, sink_part(sinks, queries, dtype))


def _backward_of_run(share: _Share, of_keys: Sequence[Tensor], run: slice, bias: Tensor | None) -> None:
    """Add the gradients that a run of flat heads has from some keys.

    Args:
        share: of the call.
        of_keys: of the segment or of its sinks.
        run: of flat heads.
        bias: of causal attention, see `flat_bias`; None for keys that all queries see without.
    """
    query, output, lse, grad, d_query = (x[:, run] for x in share.of_queries)
    groups = share.sizes[2]
    key, value = (for_run(x, run, groups) for x in of_keys[:2])
    of_call = grad, query, output, lse if bias is None else lse + bias[:, :, 0]
    dq, *rest = attend_backward(of_call, key, value, causal=bias is not None, bias=bias, scaling=share.scaling)
    d_query += dq
    for total, part in zip(of_keys[2:], rest, strict=True):
        into = for_run(total, run, groups, expand=False)
        into += part if groups == 1 else part.sum(dim=1, keepdim=True)


def _backward_of_part(share: _Share, of_keys: Sequence[Tensor], head: int, part: Part) -> None:
    """As `_backward_of_run`, for one part of a head."""
    part = split_rows(part)
    query, output, lse, grad, d_query = (blocks(x[:, head], part.span) for x in share.of_queries)
    own = [x[:, head // share.sizes[2]] for x in of_keys]
    key, value = (keys_read(x, part.span) for x in own[:2])
    of_call = grad, query, output, lse + part.shift
    dq, *rest = attend_backward(of_call, key, value, causal=part.causal, bias=part.bias, scaling=share.scaling)
    d_query += dq
    for total, gradient in zip(own[2:], rest, strict=True):
        add_to_keys(total, gradient, part.span)


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

"""Windowed attention in parts: what one call of the kernel does for one head, or for a run of flat heads.

A head reads its near keys with the bias as a small dense matrix that all blocks of queries share. Further away the bias
is one row, slope × key position, since softmax ignores a constant per query.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .far_keys import Span

__all__ = [
    "Part",
    "add_to_keys",
    "block_size",
    "blocks",
    "far_parts",
    "flat_bias",
    "flat_runs",
    "for_run",
    "keys_read",
    "near_parts",
    "near_spans",
    "sink_part",
    "split_rows",
]

# Nats that a key costs at the distance of a block. Most heads then need nothing beyond their near keys, and on short
# sequences calls are few; within limits set by the kernel's efficiency and by the memory of the dense bias.
_BLOCK_NATS = 64.0
_BLOCK_MIN, _BLOCK_MAX = 64, 512
# Where the bias differs by less over the whole sequence, leaving out the few keys that could be would cost more calls
# than it saves, and slope × position is small enough not to cost precision: one plain causal call serves the head.
_FLAT_NATS = 96.0


@dataclass(frozen=True)
class Part:
    """What one call of the kernel does for one head."""

    span: Span
    bias: Tensor
    """Added to the logits, broadcasts to (batch, blocks, rows, keys); the true bias plus `shift`."""
    shift: Tensor | float
    """(blocks, rows), a constant per query, which the log-sum-exp of the call has too much."""
    causal: bool = False
    """Whether the kernel itself hides the future: keys from `rows` on never exist then."""


def flat_runs(slopes: list[float], queries: int, keys: int, groups: int) -> tuple[list[slice], list[int]]:
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


def flat_bias(slopes: list[float], keys: int, dtype: torch.dtype) -> Tensor:
    """Slope × position, (1, heads, 1, keys), positions counted from the middle."""
    position = torch.arange(keys, dtype=dtype) - keys // 2
    return torch.tensor(slopes, dtype=dtype)[None, :, None, None] * position


def for_run(x: Tensor, run: slice, groups: int, expand: bool = True) -> Tensor:
    """The key heads of a run of query heads."""
    if groups == 1:
        return x[:, run]
    own = x[:, run.start // groups, None]
    return own.expand(-1, run.stop - run.start, -1, -1) if expand else own


def block_size(slope: float) -> int:
    """Queries, and keys, a block of a head."""
    if slope * _BLOCK_MAX <= _BLOCK_NATS:
        return _BLOCK_MAX
    return int(max(2 ** math.ceil(math.log2(_BLOCK_NATS / slope)), _BLOCK_MIN))


def near_spans(block: int, queries: int, keys: int) -> Iterator[Span]:
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


def near_parts(slope: float, block: int, queries: int, keys: int, dtype: torch.dtype) -> Iterator[Part]:
    """The near keys of a head that is not flat."""
    bias = slope * _near_distances(block, dtype)[: min(block, queries), max(0, block - keys) :]
    if slope < torch.finfo(dtype).tiny:  # minus infinity times what rounds to zero
        bias = bias.nan_to_num(nan=-math.inf, neginf=-math.inf)
    for span in near_spans(block, queries, keys):
        # The last key of a span is the own key of its last query.
        end = bias.shape[1] - block + span.rows
        yield Part(span, bias[None, None, : span.rows, end - span.keys : end], 0.0, causal=span.keys == span.rows)


def sink_part(key: Tensor, queries: int, dtype: torch.dtype) -> Part:
    """All queries over the sinks (batch, sinks, head_dim) of a head, without bias."""
    sinks = key.shape[1]
    return Part(Span(0, 1, queries, 0, sinks), torch.zeros(1, 1, 1, sinks, dtype=dtype), 0.0)


def far_parts(spans: Iterable[Span], slope: float, queries: int, keys: int, dtype: torch.dtype) -> Iterator[Part]:
    """The far keys that a head reads."""
    for span in spans:
        position = torch.arange(span.key, span.key + span.keys) if span.columns is None else span.columns
        nearest = position[-1]
        row = torch.arange(span.blocks * span.rows).unflatten(0, (span.blocks, span.rows))
        distance = keys - queries + span.query + row - nearest - span.step * torch.arange(span.blocks)[:, None]
        yield Part(span, (slope * (position - nearest).to(dtype))[None, None, None], slope * distance.to(dtype))


def split_rows(part: Part) -> Part:
    """A single block of queries as one for each thread, since the backward kernel gives a block to one thread."""
    span, threads = part.span, torch.get_num_threads()
    if span.blocks > 1 or part.causal or span.rows % threads:
        return part
    shape = (threads, span.rows // threads)
    split = Span(span.query, *shape, span.key, span.keys, columns=span.columns)
    bias = part.bias[0].unflatten(1, shape) if part.bias.shape[2] > 1 else part.bias
    return Part(split, bias, part.shift.reshape(shape) if isinstance(part.shift, Tensor) else part.shift)


def blocks(x: Tensor, span: Span) -> Tensor:
    """(batch, queries, …) to (batch, blocks, rows, …), a view."""
    view: Tensor = x[:, span.queries].unflatten(1, (span.blocks, span.rows))
    return view


def keys_read(x: Tensor, span: Span) -> Tensor:
    """(batch, keys, head_dim) to what each block reads, (batch, blocks, keys, head_dim): an overlapping view."""
    if span.step:
        all_keys = x[:, span.key : span.key + span.keys + (span.blocks - 1) * span.step]
        windows: Tensor = all_keys.unfold(1, span.keys, span.step).transpose(2, 3)
        return windows
    shared: Tensor = x[:, None, span.read].expand(-1, span.blocks, -1, -1)
    return shared


def add_to_keys(total: Tensor, part: Tensor, span: Span) -> None:
    """The reverse of `keys_read`: add (batch, blocks, keys, head_dim) to (batch, keys, head_dim)."""
    if span.step == 0:
        total[:, span.read] += part.sum(dim=1)
        return
    for begin in range(0, span.keys, span.step):
        size = span.blocks * span.step
        into = total[:, span.key + begin : span.key + begin + size].unflatten(1, (span.blocks, span.step))
        into += part[:, :, begin : begin + span.step]

"""Which keys a head must read: all others provably carry less of each row's weights than a tolerance.

A head has read its near keys and knows the log-sum-exp of their logits. Far keys are taken in blocks, and blocks are
left out as long as the bounds of all that is left out add up to less than the tolerance; see there for the bounds. From
some distance on, slope × distance outgrows |q| |k|, and a geometric series bounds the sum of all keys beyond.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..blocks import by_block
from ..tolerance import centroid_and_radius, left_out, log_sum_of_bias

__all__ = ["Kept", "Span", "far_spans", "kept_blocks", "widest_window"]

# Queries that share one window, for fewer and larger calls.
_GROUP = 2048
# Of the tolerance, for what the norms alone rule out; the rest is for the bound by centroid and radius.
_TAIL_SHARE = 0.5


def widest_window(kept: Tensor, behind: Tensor) -> int:
    """Blocks of the widest window in front of the near keys of which at least half is kept; the largest over the rows.

    Args:
        kept: bool (..., key blocks).
        behind: like `kept`, how many blocks a window must have to reach this one; falls by 1 with each.
    """
    return int((behind * (kept & (2 * kept.flip(-1).cumsum(-1).flip(-1) >= behind))).max())


@dataclass(frozen=True)
class Span:
    """What `blocks` blocks of `rows` queries each read: for block b, `keys` keys from `key` + b × `step` on.

    The blocks lie one behind the other from query `query`. Where `columns` is given, all read those keys instead.
    """

    query: int
    blocks: int
    rows: int
    key: int
    keys: int
    step: int = 0
    columns: Tensor | None = None

    @property
    def queries(self) -> slice:
        """All queries of the span."""
        return slice(self.query, self.query + self.blocks * self.rows)

    @property
    def read(self) -> slice | Tensor:
        """Index of the keys where all blocks read the same (`step` 0)."""
        return slice(self.key, self.key + self.keys) if self.columns is None else self.columns


@dataclass(frozen=True)
class Kept:
    """Which key blocks a group of query blocks must read beyond its near keys."""

    first: int
    """Index of the first query block."""
    start: int
    """Index of the first key block of `blocks`."""
    blocks: Tensor
    """(query blocks, key blocks) bool."""
    far: Tensor
    """(query blocks,), how many key blocks lie before the near keys of each."""


def kept_blocks(
    query: Tensor,
    key: Tensor,
    norms: tuple[Tensor, Tensor],
    lse: Tensor,
    *,
    slope: float,
    scaling: float,
    block: int,
    tolerance: float,
) -> Iterator[Kept]:
    """What one head must read beyond its near keys, which start `block` keys before each block of queries.

    Args:
        query, key: (batch, queries or keys, head_dim); queries are the last tokens of the keys.
        norms: of the queries, (batch, queries), and of the keys, (keys,) the largest in the batch; float32.
        lse: (batch, queries), log-sum-exp of the near logits with their bias, nats.
        slope, scaling, block: logits per token of distance; of the logits; queries, and keys, a block.
        tolerance: share of a row's weights that everything left out may have together.
    """
    queries, keys = query.shape[1], key.shape[1]
    count = -(-queries // block)
    # Key blocks end where near keys start, so the first may be short; this many lie before the near keys of each block.
    offset = keys - queries
    last_far = offset + (count - 2) * block
    if last_far <= 0:
        return
    slope = max(slope, 1e-30)
    # Of far keys only: what is read must not depend on the last tokens, which no earlier query may see.
    query_norm, key_norm = norms[0] * abs(scaling), float(norms[1][:last_far].max())
    largest = key_norm * float(query_norm.max())
    slack = 1e-3 + 1e-5 * largest
    beyond = slack + _series(slope, keys) - math.log(_TAIL_SHARE * tolerance)
    if (largest - float(lse.min()) + beyond) / slope <= block:
        return
    short = offset % block
    far = torch.arange(count) - 1 + offset // block + (short > 0)
    # A query that is not the first of its block is that much further from every far key.
    rest = lse.float() + slope * (torch.arange(queries) % block)
    peak = query_norm * key_norm - rest
    distance = ((by_block(peak, block, -math.inf).amax(dim=(0, 2)) + beyond) / slope / block).nan_to_num(nan=math.inf)
    ruled_out = (far - (distance - 1).ceil().clamp(min=0, max=count + keys).long()).clamp(min=0)
    groups = _groups(queries, block, ruled_out < far)
    if not groups:
        return
    centroid, radius, last = _summaries(key[:, :last_far].float(), short, block)
    left = torch.cat([query.float() * scaling, query_norm[..., None], -rest[..., None]], dim=-1)
    right = torch.cat([centroid, radius[..., None], torch.ones_like(radius)[..., None]], dim=-1)
    for first, end in groups:
        start, stop = int(ruled_out[first:end].min()), int(far[first:end].max())
        rows = slice(first * block, min(end * block, queries))
        bound = right[:, start:stop] @ left[:, rows].transpose(-1, -2)
        bound = by_block(bound, block, -math.inf).amax(dim=(0, 3)).T
        distance = offset + torch.arange(first, end)[:, None] * block - last[start:stop]
        share = bound - slope * distance + slack + _series(slope, block)
        is_far = torch.arange(start, stop) < far[first:end, None]
        out = left_out(share.masked_fill(~is_far, math.inf), (1 - _TAIL_SHARE) * tolerance)
        yield Kept(first, start, is_far & ~out, far[first:end])


def _groups(queries: int, block: int, open_: Tensor) -> list[tuple[int, int]]:
    """First and end of the blocks of queries that share a window and of which some are `open_`, bool (query blocks,).

    A last block that is not full is alone.
    """
    ends = [*range(0, queries // block, max(1, _GROUP // block)), queries // block]
    pairs = pairwise([*ends, -(-queries // block)])
    return [(first, end) for first, end in pairs if first < end and bool(open_[first:end].any())]


def far_spans(groups: Iterable[Kept], queries: int, keys: int, block: int) -> list[Span]:
    """The kept key blocks of each group as one window right behind the near keys, and the blocks further away."""
    spans = []
    for group in groups:
        rows = slice(group.first * block, min((group.first + len(group.far)) * block, queries))
        spans += _spans(group, rows, block, keys - queries)
    return spans


def _summaries(key: Tensor, short: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Centroid (batch, blocks, head_dim), radius (batch, blocks) and index of the last key (blocks,) of key blocks."""
    parts = [key[:, :short].unflatten(1, (-1, short))] if short else []
    parts.append(key[:, short:].unflatten(1, (-1, block)))
    centroids, radii = zip(*map(centroid_and_radius, parts), strict=True)
    last = torch.arange((short or block) - 1, key.shape[1], block)
    return torch.cat(centroids, dim=1), torch.cat(radii, dim=1), last


def _series(slope: float, keys: int) -> float:
    return float(log_sum_of_bias(torch.tensor(slope, dtype=torch.float64), keys))


def _spans(group: Kept, rows: slice, block: int, offset: int) -> list[Span]:
    """The spans of one group, whose queries are `rows`; `offset` is the index of query 0's own key."""
    kept, far = group.blocks, group.far
    column = group.start + torch.arange(kept.shape[1])
    behind = far[:, None] - column
    window = widest_window(kept, behind)
    # A block that only some queries keep as a far one must not lie in the window of others.
    while bool((late := kept & (behind > window) & (column >= far[0] - window)).any()):
        window = int((behind * late).max())
    spans = []
    if window:
        size = min(block, rows.stop - rows.start)
        # The near keys of each block of queries start here.
        ends = [offset + query - block for query in range(rows.start, rows.stop, block)]
        if ends[0] >= window * block:
            spans.append(Span(rows.start, len(ends), size, ends[0] - window * block, window * block, block))
        else:
            begins = [max(0, end - window * block) for end in ends]
            spans += [
                Span(rows.start + index * block, 1, size, begin, end - begin)
                for index, (begin, end) in enumerate(zip(begins, ends, strict=True))
                if end > begin
            ]
    remote = column[(kept & (behind > window)).any(dim=0)]
    if len(remote):
        keys = remote[:, None] * block + torch.arange(block) - (-offset % block)
        keys = keys[keys >= 0]
        spans.append(Span(rows.start, 1, rows.stop - rows.start, 0, len(keys), columns=keys))
    return spans

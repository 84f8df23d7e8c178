"""What windowed attention read: pairs of queries and keys, and how far back each head looked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .far_keys import Span

__all__ = ["Reads", "record_reads", "recording", "report_reads", "report_windows"]


@dataclass(frozen=True)
class Reads:
    """What one call of an attention layer read of one segment (a sequence without its padding).

    Where there are sink tokens, their own queries are a segment.
    """

    batch: int
    """Sequences in the segment."""
    queries: int
    keys: int
    pairs: tuple[int, ...]
    """Pairs of a query and a key that each head read, of `causal_pairs`; a block reads its pairs together."""
    windows: tuple[int, ...]
    """Tokens that the furthest key which each head read, sinks aside, lies behind its query."""

    @property
    def causal_pairs(self) -> int:
        """Pairs that plain causal attention reads for a head."""
        return self.batch * _triangle(self.queries, self.keys)

    @property
    def kept(self) -> tuple[float, ...]:
        """Share of the causal pairs that each head read."""
        return tuple(pairs / self.causal_pairs for pairs in self.pairs)


_open: list[list[Reads]] = []


@contextmanager
def record_reads() -> Iterator[list[Reads]]:
    """Inside, every segment that windowed attention works on is appended to the list, layer after layer.

    >>> with record_reads() as reads:
    ...     pass  # model(input_ids)
    >>> reads
    []
    """
    reads: list[Reads] = []
    _open.append(reads)
    try:
        yield reads
    finally:
        # By identity: records that are equal so far are others all the same.
        _open[:] = [other for other in _open if other is not reads]


def recording() -> bool:
    """Whether any record is open."""
    return bool(_open)


def report_reads(
    *, batch: int, heads: int, queries: int, keys: int, spans: Mapping[int, Sequence[Span]], sinks: int = 0
) -> None:
    """Tell all open records; heads without spans read everything, and all read `sinks` further keys before `keys`."""
    offset = keys - queries
    pairs, windows = [], []
    for head in range(heads):
        if head not in spans:
            pairs.append(batch * _triangle(queries, keys))
            windows.append(keys - 1)
            continue
        pairs.append(batch * sum(span.blocks * _pairs(span, offset) for span in spans[head]))
        windows.append(max(offset + span.query + span.rows - 1 - _first(span) for span in spans[head]))
    for reads in _open:
        reads.append(
            Reads(batch, queries, keys + sinks, tuple(n + batch * queries * sinks for n in pairs), tuple(windows))
        )


def report_windows(window: Tensor, first: Tensor, last: Tensor, *, rows: int, block: int, sink_tokens: int = 0) -> None:
    """Tell all open records what the kernels read, see `gpu.forward.attend`.

    Args:
        window: (batch, heads, query blocks, 4), from and to of the first keys and of the rest, in blocks of keys.
        first, last: key that each query sees, (batch, queries); the last is -1 for a query that sees none.
        rows, block: queries of a query block, and keys of a block.
        sink_tokens: see `HeadSlopes`.
    """
    first, last = first.cpu().long(), last.cpu().long()
    # For each query (batch, heads, queries, 4), in tokens.
    begin, end, low, high = (
        (window.cpu().long() * block).repeat_interleave(rows, dim=2)[:, :, : first.shape[1]].unbind(-1)
    )
    for index, (firsts, lasts) in enumerate(zip(first, last, strict=True)):
        stop = lasts + 1
        head = (end[index].minimum(stop) - begin[index].maximum(firsts)).clamp(min=0)
        rest = (high[index].minimum(stop) - low[index].maximum(firsts)).clamp(min=0)
        furthest = torch.where((head > 0) & (sink_tokens == 0), begin[index], low[index]).maximum(firsts)
        _, counts = torch.unique_consecutive(firsts.masked_fill(lasts < 0, -1), return_counts=True)
        for own in torch.arange(len(firsts)).split(counts.tolist()):
            if lasts[own[0]] >= 0:
                keys = int(lasts[own[-1]] - firsts[own[0]]) + 1
                pairs = (head + rest)[:, own].sum(dim=1).tolist()
                windows = (lasts - furthest)[:, own].amax(dim=1).tolist()
                for reads in _open:
                    reads.append(Reads(1, len(own), keys, tuple(pairs), tuple(windows)))


def _triangle(queries: int, keys: int) -> int:
    """Pairs of the last `queries` of `keys` tokens with all keys up to their own."""
    return queries * (2 * keys - queries + 1) // 2


def _first(span: Span) -> int:
    return span.key if span.columns is None else int(span.columns[0])


def _pairs(span: Span, offset: int) -> int:
    """Pairs of one block: near spans end at their queries' own keys, and have a triangle there."""
    near = span.columns is None and span.key + span.keys == offset + span.query + span.rows
    return span.rows * span.keys - (span.rows * (span.rows - 1) // 2 if near else 0)

"""Which runs of queries see a plain causal triangle: what a mask of padding or packed sequences comes down to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..inputs import Visible, visible_range
from .remembered import remembered

__all__ = ["OtherQueries", "Segment", "segments_of"]

# Entries of the mask that are looked at together.
_ENTRIES = 2**24
# Shorter segments are left to the dense path: a call for each would cost more.
_SHORT = 128


@dataclass(frozen=True)
class Segment:
    """Queries that each see all keys from the segment's first up to their own, which for the last query is its last."""

    batch: slice
    queries: slice
    keys: slice
    sinks: slice | None = None
    """Keys right before these, which every query sees as well, and without bias; None for no such keys."""
    has_bias: bool = True

    def split(self, sink_tokens: int) -> Iterator[Segment]:
        """The same with its first keys as `sinks`: queries up to the last sink, which see no bias, and those after."""
        if sink_tokens == 0:
            yield self
            return
        begin = min(self.keys.start + sink_tokens, self.keys.stop)
        after = self.queries.stop - min(self.keys.stop - begin, self.queries.stop - self.queries.start)
        if after > self.queries.start:
            own = slice(self.keys.start, self.keys.stop - (self.queries.stop - after))
            yield Segment(self.batch, slice(self.queries.start, after), own, has_bias=False)
        if after < self.queries.stop:
            rest = slice(begin, self.keys.stop)
            yield Segment(self.batch, slice(after, self.queries.stop), rest, slice(self.keys.start, begin))

    @classmethod
    def causal(cls, queries: int, keys: int) -> Segment:
        """All sequences whole: the queries are the last tokens of the keys."""
        return cls(slice(None), slice(0, queries), slice(0, keys))


@dataclass(frozen=True)
class OtherQueries:
    """Queries that see something else, such as right padding."""

    batch: slice
    queries: slice


@remembered
def segments_of(allowed: Tensor, own: Tensor | None) -> tuple[list[Segment], list[OtherQueries]] | None:
    """Segments of a mask, and the queries that are in none but see something; None if segments would not pay.

    Args:
        allowed: bool (batch, heads or 1, queries, keys), True where a query may see a key.
        own: see `Visible`.

    Queries that see nothing are in neither list. Every entry of the mask is checked.
    """
    if Visible(allowed).differs_by_head:
        return None
    return _find(allowed[:, 0], own)


def _find(allowed: Tensor, own: Tensor | None) -> tuple[list[Segment], list[OtherQueries]] | None:
    segments: list[Segment] = []
    others: list[OtherQueries] = []
    queries, keys = allowed.shape[1:]
    for index, rows in enumerate(allowed):
        # A single mask is that of all sequences.
        batch = slice(index, index + 1) if len(allowed) > 1 else slice(None)
        parts = [visible_range(part) for part in rows.split(max(1, _ENTRIES // keys))]
        first, last, seen = (torch.cat(values) for values in zip(*parts, strict=True))
        # A new segment starts where the first key changes, or the last is not the next one.
        row = torch.arange(queries)
        lag = last - row
        # Nothing, a run of keys up to its own, something else.
        is_run = (last - first + 1 == seen) & (last <= (keys - 1 if own is None else own))
        kind = torch.where(seen == 0, 0, torch.where(is_run, 1, 2))
        state = torch.stack([kind, torch.where(kind == 1, first, 0), torch.where(kind == 1, lag, 0)])
        _, counts = torch.unique_consecutive(state, dim=1, return_counts=True)
        begin = 0
        for count in counts.tolist():
            run = slice(begin, begin + count)
            if kind[begin] == 1 and count >= _SHORT:
                read = slice(int(first[begin]), int(last[begin + count - 1]) + 1)
                segments.append(Segment(batch, run, read))
            elif kind[begin]:
                if others and others[-1].batch == batch and others[-1].queries.stop == begin:
                    others[-1] = OtherQueries(batch, slice(others[-1].queries.start, begin + count))
                else:
                    others.append(OtherQueries(batch, run))
            begin += count
    return (segments, others) if segments else None

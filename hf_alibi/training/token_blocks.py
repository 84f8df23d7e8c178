"""A stream of tokens that stays on the disk, and the blocks of one length that training reads from it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError
from ..utils import Blocks

__all__ = ["TokenBlocks", "TokenStream", "interleave", "pack_blocks"]


class TokenStream:
    """Token ids one after another, in pieces that memory-mapped files may hold: only what is read takes memory.

    A slice of it (of step 1) is another stream; `read()` gives the tokens, int64 of shape (tokens,).
    """

    def __init__(self, pieces: Sequence[NDArray[np.integer]]) -> None:
        self._pieces = [piece for piece in pieces if len(piece)]
        self._ends = np.cumsum([len(piece) for piece in self._pieces], dtype=np.int64)

    @classmethod
    def joined(cls, streams: Sequence[TokenStream]) -> TokenStream:
        """One stream after the other."""
        return cls([piece for stream in streams for piece in stream._pieces])

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._pieces else 0

    def __getitem__(self, part: slice) -> TokenStream:
        start, stop, step = part.indices(len(self))
        if step != 1:
            raise ValueError(f"a stream of tokens is cut in steps of 1, and step {step} was given")
        if start >= stop:
            return TokenStream([])
        # Only the pieces from that of the first token to that of the last one.
        first, last = np.searchsorted(self._ends, [start, stop - 1], side="right").tolist()
        pieces = []
        for piece, end in zip(self._pieces[first : last + 1], self._ends[first : last + 1].tolist(), strict=True):
            begin = end - len(piece)
            pieces.append(piece[max(start - begin, 0) : stop - begin])
        return TokenStream(pieces)

    def read(self) -> Tensor:
        """All tokens, in memory."""
        parts = [torch.from_numpy(piece.astype(np.int64)) for piece in self._pieces]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def max(self) -> int:
        """The largest token id; raises ValueError if there is none."""
        return max(int(piece.max()) for piece in self._pieces)


class _StreamBlocks:
    """The first blocks of a stream, without overlap."""

    def __init__(self, stream: TokenStream, block_size: int, count: int) -> None:
        self._stream, self._block_size, self._count = stream, block_size, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        return self._stream[index * self._block_size : (index + 1) * self._block_size].read()


class _Interleaved:
    """The blocks of several texts, which alternate evenly."""

    def __init__(self, parts: Sequence[Blocks]) -> None:
        self._parts = parts
        self._first = np.cumsum([0, *map(len, parts)])
        # Block j of n stands at (j + 1/2) / n of the way.
        self._order = np.argsort(
            np.concatenate([(np.arange(len(part)) + 0.5) / len(part) for part in parts]), kind="stable"
        )

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Tensor:
        place = int(self._order[index])
        part = int(np.searchsorted(self._first, place, side="right")) - 1
        return self._parts[part][place - int(self._first[part])]


def interleave(parts: Sequence[Blocks]) -> Blocks:
    """All blocks of all parts; those of several parts alternate evenly."""
    return parts[0] if len(parts) == 1 else _Interleaved(parts)


class TokenBlocks(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Blocks of token ids, each int64 of shape (block size,), as `input_ids` and `labels`."""

    def __init__(self, input_ids: Blocks) -> None:
        self.input_ids = input_ids

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        input_ids = self.input_ids[index]
        labels = input_ids.clone()
        # Nothing predicts a block's first token. Models skip it, but Trainer would count it in its mean.
        labels[0] = -100
        return {"input_ids": input_ids, "labels": labels}


def pack_blocks(
    streams: Sequence[TokenStream],
    block_size: int,
    *,
    weights: Sequence[float] | None = None,
    name: str = "the text",
) -> TokenBlocks:
    """Cut streams of tokens into blocks of `block_size`.

    With `weights`, one of each stream, the blocks of the streams are in these proportions: the streams give as many as
    they can without that one of them gives a block twice. `name` says in errors which text it is.

    Raises InputError if a stream does not fill one block, or has none in these proportions.
    """
    for stream in streams:
        if len(stream) < block_size:
            raise InputError(
                f"{name} has {len(stream)} tokens, too few for one block of block_size {block_size}; "
                f"give more text or a block_size of at most {len(stream)}"
            )
    counts = [len(stream) // block_size for stream in streams]
    if weights is not None:
        blocks_a_weight = min(count / weight for count, weight in zip(counts, weights, strict=True))
        # The small number makes up for quotients that are rounded down.
        counts = [int(blocks_a_weight * weight + 1e-6) for weight in weights]
        if not all(counts):
            raise InputError(
                f"{name} has {counts} blocks of block_size {block_size} in the proportions {list(weights)}; give more "
                "text of what has the largest weight, or weights nearer to each other"
            )
    parts = [_StreamBlocks(stream, block_size, count) for stream, count in zip(streams, counts, strict=True)]
    return TokenBlocks(interleave(parts))

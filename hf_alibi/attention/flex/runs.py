"""What each query sees as a run of consecutive tokens: exact distances for flex_attention, whatever the mask.

A run is given by its first and its last token. Causal attention sees runs under padding anywhere, packing, windows and
caches; what is found to be none is refused, so that no mask can make the distances wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask
from torch.nn.functional import pad

from ..blocks import by_block
from ..inputs import own_keys, visible_keys, visible_range

__all__ = ["BLOCK", "Runs", "runs_of", "visible_blocks"]

BLOCK = 128
"""Queries, and keys, a block."""

_OTHERWISE = "or use attn_implementation='sdpa'"
# Blocks of a mask that are looked into at a time.
_LOOKS = 256


class Runs(NamedTuple):
    """What each query sees: all tokens from its first to its last one. Positions count tokens."""

    first: Tensor
    """(batch, queries), position of the first token that the query sees; past the end if there is none."""
    last: Tensor
    """(batch, queries), position of the last one; -1 if there is none."""
    seen: Tensor
    """(batch, queries), how many tokens the query sees."""
    position: Tensor | None
    """(batch, keys), position of each key, -1 for no token; None if it is the key's index."""
    table: Tensor
    """int32, the same for the kernel. (3, batch or more), where in each sequence `first` is one value, and `last` the
    lesser of another and the query's index plus a third; else (2, batch, queries), `first` and `last`; or (3, batch,
    queries or keys, whichever are more), with `position`."""
    consecutive: Tensor | None = None
    """Bool (batch, queries), False where the query sees no run and all this is wrong; None if all see one."""


# All layers of a forward pass have the same mask.
_known: WeakKeyDictionary[BlockMask, Runs] = WeakKeyDictionary()


def runs_of(mask: BlockMask | Tensor | None, query: Tensor, key: Tensor) -> Runs:
    """What each query sees under `mask`.

    Args:
        mask: a BlockMask, or bool (batch or 1, 1, queries, keys); None as in `visible_keys`.
        query: (batch, heads, queries, head_dim).
        key: (batch, key-value heads, keys, head_dim).

    Raises ValueError for a mask of other form, or under which a query sees no run; inside torch.compile, which cannot
    raise for what values say, `consecutive` tells.
    """
    batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    if mask is None:
        if keys < queries:
            raise ValueError(f"causal attention of {queries} queries needs as many keys, got {keys}")
        shift = keys - 1 if queries == 1 else 0
        last = torch.arange(shift, shift + queries, device=query.device).expand(batch, -1)
        sequence = torch.tensor([0, keys - 1, shift], device=query.device)[:, None].expand(-1, batch)
        return Runs(torch.zeros_like(last), last, last + 1, None, _sequence_table(sequence))
    if not isinstance(mask, BlockMask):
        allowed, added, _ = visible_keys(mask, query, key)
        if added is not None or allowed.shape[1] != 1:
            raise ValueError(
                f"flex_attention takes a bool mask ({batch}, 1, {queries}, {keys}), got {mask.dtype} "
                f"{tuple(mask.shape)}; give one, or a 2D padding mask, {_OTHERWISE}"
            )
        return _checked(*_look(allowed[:, 0].expand(batch, -1, -1)))
    if mask.shape[1:] != (1, queries, keys):
        raise ValueError(
            f"{queries} queries and {keys} keys need a BlockMask ({batch}, 1, {queries}, {keys}), the same for all "
            f"heads, got one of shape {mask.shape}; give one, or a 2D padding mask, {_OTHERWISE}"
        )
    if torch.compiler.is_compiling():
        return _checked(*_look(create_mask(mask.mask_mod, batch, 1, queries, keys, query.device)[:, 0]))
    runs = _known.get(mask)
    if runs is None or len(runs.first) != batch:
        runs = _known[mask] = _checked(*_look_into(mask, batch))
    return runs


def _look(visible: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`visible_range` of bool (..., queries, keys), and int32 (..., keys), how many queries see each key."""
    return *visible_range(visible), visible.sum(dim=-2, dtype=torch.int32)


def _look_into(mask: BlockMask, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_look`, (batch, queries) and (batch, keys), looking only into the blocks that are seen in part."""
    queries, keys = mask.shape[-2:]
    columns = mask.BLOCK_SIZE[1]
    partial = _dense(mask.kv_num_blocks, mask.kv_indices).expand(batch, -1, -1)
    full = torch.zeros_like(partial)
    if mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None:
        full = _dense(mask.full_kv_num_blocks, mask.full_kv_indices).expand(batch, -1, -1)
    rows = min(mask.BLOCK_SIZE[0], queries)
    begin = torch.arange(full.shape[-1], dtype=torch.int32, device=full.device) * columns
    found = [
        torch.where(full, begin, keys).amin(dim=-1),
        torch.where(full, begin + columns - 1, -1).amax(dim=-1),
        full.sum(dim=-1, dtype=torch.int32) * columns,
    ]
    first, last, seen = (values[..., None].repeat(1, 1, rows) for values in found)
    seeing = (full.sum(dim=-2, dtype=torch.int32) * rows)[..., None].repeat(1, 1, columns)
    for places in partial.nonzero().split(_LOOKS):
        parts = _look(create_mask(_in_blocks(mask, places), len(places), 1, rows, columns, full.device)[:, 0])
        start = places[:, 2:] * columns
        row = (places[:, 0] * partial.shape[1] + places[:, 1])[:, None].expand(-1, rows)
        none = parts[2] == 0
        for values, part, how in (
            (first, (parts[0] + start).masked_fill(none, keys), "amin"),
            (last, (parts[1] + start).masked_fill(none, -1), "amax"),
            (seen, parts[2], "sum"),
        ):
            values.flatten(0, 1).scatter_reduce_(0, row, part.int(), how)
        column = (places[:, 0] * partial.shape[2] + places[:, 2])[:, None].expand(-1, columns)
        seeing.flatten(0, 1).scatter_reduce_(0, column, parts[3], "sum")
    first, last, seen = (values.flatten(1)[:, :queries] for values in (first, last, seen))
    return first, last, seen, seeing.flatten(1)[:, :keys]


def _in_blocks(mask: BlockMask, places: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The `mask_mod` of some blocks of `mask`, (blocks, 3) batch, query block and key block, as if each was a batch."""
    queries, keys = mask.shape[-2:]
    batch, row, column = places.unbind(-1)
    rows, columns = mask.BLOCK_SIZE

    def mask_mod(n: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        q, k = q + row[n] * rows, k + column[n] * columns
        # The last blocks may reach beyond what the mask has values for.
        seen = mask.mask_mod(batch[n], h, q.clamp(max=queries - 1), k.clamp(max=keys - 1))
        return seen & (q < queries) & (k < keys)

    return mask_mod


def _dense(count: Tensor, indices: Tensor) -> Tensor:
    """Bool (batch, query blocks, key blocks), True for the first `count` (batch, 1, query blocks) of `indices`."""
    blocks = indices.shape[-1]
    given = torch.arange(blocks, device=count.device) < count[..., None]
    # What is not given is written behind the end.
    dense = given.new_zeros(*indices.shape[:-1], blocks + 1)
    return dense.scatter_(-1, torch.where(given, indices, blocks).long(), True)[:, 0, :, :blocks]


def _checked(first: Tensor, last: Tensor, seen: Tensor, seeing: Tensor) -> Runs:
    """The runs that these are, see `_look`. Tokens are the keys that any query sees. Raises ValueError for no run."""
    queries, keys = first.shape[-1], seeing.shape[-1]
    none = seen == 0
    token = seeing > 0
    position = token.cumsum(dim=-1, dtype=torch.int32) - 1
    start, end = (position.gather(-1, index.clamp(0, keys - 1).long()) for index in (first, last))
    filled = last.amax() + 1
    ahead = last > own_keys(last[:, 0], filled, queries, keys)
    consecutive = none | (seen == end - start + 1) & ~ahead
    if not torch.compiler.is_compiling():
        # What the simplest table would say, to be compared.
        query = torch.arange(queries, dtype=torch.int32, device=first.device)
        sequence = torch.stack([first.amin(dim=-1), last.amax(dim=-1), (last - query).amax(dim=-1)])
        lowest, highest = sequence[0, :, None], torch.minimum(sequence[1, :, None], query + sequence[2, :, None])
        simple = torch.where(none, highest < lowest, (first == lowest) & (last == highest))
        gapless = none | (seen == last - first + 1)
        right, indices_do, sequences_do = torch.stack([consecutive.all(), gapless.all(), simple.all()]).tolist()
        if not right:
            raise ValueError(
                "flex_attention needs a mask under which each query sees consecutive tokens up to its own (causal; "
                "padding, packing or a window), got one that hides some in between, or shows keys after a query's own; "
                f"give such a mask, {_OTHERWISE}"
            )
        if indices_do:
            table = _sequence_table(sequence) if sequences_do else torch.stack([first, last])
            return Runs(first, last, seen, None, table)
    start, end = start.masked_fill(none, keys), end.masked_fill(none, -1)
    position = position.masked_fill(~token, -1)
    table = torch.stack([pad(values, (0, max(queries, keys) - values.shape[-1])) for values in (start, end, position)])
    return Runs(start, end, seen, position, table, consecutive if torch.compiler.is_compiling() else None)


def _sequence_table(sequence: Tensor) -> Tensor:
    # PyTorch 2.13 writes C++ that does not compile where the size of a table may change, as that of the batch does.
    return pad(sequence.int(), (0, -sequence.shape[-1] % 64))


def visible_blocks(runs: Runs, keys: int) -> tuple[Tensor, Tensor]:
    """Bool (batch, 1, query blocks, key blocks): where some query sees some key, and where all see all; never both."""
    place = runs.position
    if place is None:
        place = torch.arange(keys, device=runs.first.device)[None]
    place = by_block(place, BLOCK, -1)[:, None]
    lowest, highest = place.amin(dim=-1), place.amax(dim=-1)
    first, last = by_block(runs.first, BLOCK, keys), by_block(runs.last, BLOCK, -1)
    full = (first.amax(dim=-1, keepdim=True) <= lowest) & (last.amin(dim=-1, keepdim=True) >= highest)
    nearest = torch.where(place < 0, keys, place).amin(dim=-1)
    some = (first.amin(dim=-1, keepdim=True) <= highest) & (last.amax(dim=-1, keepdim=True) >= nearest)
    return (some & ~full)[:, None], full[:, None]

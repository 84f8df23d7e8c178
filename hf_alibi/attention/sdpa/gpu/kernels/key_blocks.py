"""Kernel: what bounds the logits of a block of keys, its centroid and radius, see `tolerance`."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import load_rows, of_head

__all__ = ["summarize_keys"]


@triton.jit
def summarize_keys(
    KEY, CENTROID, RADIUS, key_batch, key_head, key_row, keys, key_heads, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program a block of keys and a key head.

    The radius is the largest distance from the centroid as it is stored, so that the bound holds for a rounded one.
    """
    block, pair = tl.program_id(0), tl.program_id(1)
    blocks = tl.num_programs(0)
    of_pair = of_head(KEY, pair // key_heads, pair % key_heads, key_batch, key_head)
    key = load_rows(of_pair, block * BLOCK, key_row, keys, BLOCK, WIDTH, COLUMNS, True).to(tl.float32)
    inside = block * BLOCK + tl.arange(0, BLOCK) < keys
    mean = tl.sum(key, 0) / tl.sum(inside.to(tl.float32), 0)
    centroid = mean.to(CENTROID.dtype.element_ty)
    difference = key - centroid.to(tl.float32)[None, :]
    squares = tl.where(inside, tl.sum(difference * difference, 1), 0.0)
    # If a key is NaN, the centroid is, and what cannot be compared is read.
    radius = tl.sqrt(tl.max(squares, 0))
    columns = tl.arange(0, COLUMNS)
    index = pair.to(tl.int64) * blocks + block
    tl.store(CENTROID + index * WIDTH + columns, centroid, mask=columns < WIDTH)
    tl.store(RADIUS + index, radius)

"""ALiBi attention on PyTorch's flex_attention (Dong et al. 2024, arXiv 2412.05496): the bias is part of the kernel.

The kernel gets slopes, and what each query sees, as tensors, so that one serves all masks and lengths. Each head leaves
out blocks of far keys that provably do not matter, by the bounds in `tolerance`. They are taken for all heads at once,
and nothing of them has to come back from the GPU.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from ..blocks import by_block
from ..call import AttentionCall, autocast, resolve
from ..tolerance import centroid_and_radius, left_out, log_sum_of_bias
from .runs import BLOCK, Runs, runs_of, visible_blocks

__all__ = ["flex_alibi_attention"]

_OTHERWISE = "or use attn_implementation='sdpa'"
# Heads narrower than this have no kernel on GPUs.
_NARROWEST = 16
# Graphs that may be compiled; each number of heads, head_dim and type that a process uses takes a few.
_GRAPHS = 64
# Entries of a matrix of some queries and their keys: what fits the cache of a CPU, and what fills a GPU.
_CPU_ENTRIES, _GPU_ENTRIES = 2**21, 2**25
# Error of a dot product as a share of |q| |k|: with factors rounded to bfloat16, the least that PyTorch's settings make
# of float32.
_ROUNDING = 2**-8


def flex_alibi_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention with the ALiBi bias, which is added in float32 whatever the type of the inputs.

    Arguments as in `resolve`, but:
        attention_mask: a BlockMask, of which the `mask_mod` counts, or a bool mask, the same for all heads; None as in
            `visible_keys`.
        dropout: must be 0.
        kwargs: `kernel_options`, see flex_attention.

    Returns the output (batch, queries, heads, head_dim) and None: this backend has no weights to show.

    Raises ValueError for dropout, gradients on the CPU, and a mask under which a query sees no run of tokens. In a
    model under torch.compile, which cannot raise for what values say, the output of such a query is NaN.
    """
    query, key, value = autocast(query.device, query, key, value)
    states = (query, key, value)
    call = resolve("flex_attention", module, states, attention_mask, scaling=scaling, dropout=dropout, kwargs=kwargs)
    if dropout:
        raise ValueError(f"flex_attention has no dropout, got {dropout}; set it to 0 in the config, {_OTHERWISE}")
    if query.device.type == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in states):
        raise ValueError(
            f"flex_attention has no backward pass on the CPU; use it under torch.no_grad(), {_OTHERWISE} to train"
        )
    runs = runs_of(attention_mask, query, key)
    # A tensor of this call: one that was cached in inference mode could not be kept for a backward pass.
    penalty = call.slopes.per_head.clone()
    if call.slopes.dynamic is not None:
        penalty = call.slopes.for_queries(lambda: runs.seen[:, None])[..., 0]
    with torch.autocast(query.device.type, enabled=False):
        blocks = _blocks(call, runs, penalty)
        output = _run(call, runs, penalty, blocks, kwargs.get("kernel_options"))
    if runs.consecutive is not None:
        output = output.masked_fill(~runs.consecutive[:, None, :, None], math.nan)
    return output.transpose(1, 2).contiguous(), None


def _blocks(call: AttentionCall, runs: Runs, penalty: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of keys that are read with the mask, and without; see `_attend`."""
    queries, keys = call.query.shape[2], call.key.shape[2]
    partial, full = visible_blocks(runs, keys)
    skips = not torch.compiler.is_compiling() and runs.position is None and call.slopes.dynamic is None
    if skips and 2 * BLOCK < queries == keys:
        kept = _kept_blocks(call.query.detach(), call.key.detach(), runs, penalty, call.scaling, call.tolerance)
        if call.slopes.sink_tokens:
            kept = kept | _sink_blocks(runs, call.slopes.sink_tokens)
        partial, full = partial & kept, full & kept
    return partial, full


def _run(call: AttentionCall, runs: Runs, penalty: Tensor, blocks: tuple[Tensor, Tensor], options: Any) -> Tensor:
    """Call the kernel; returns (batch, heads, queries, head_dim)."""
    device, width = call.query.device, call.value.shape[-1]
    spare = max(0, _NARROWEST - call.query.shape[-1])
    states = tuple(pad(x, (0, spare)) if spare else x for x in (call.query, call.key, call.value))
    if torch.compiler.is_compiling():
        # A region of its own, since the kernel on the CPU takes no tensors that its graph has yet to compute.
        attend = _region
    elif call.query.dtype == torch.float64:
        # No kernel takes it: unfused, for checks.
        attend = _attend
    else:
        # PyTorch 2.13 writes C++ that does not compile if the size of what the kernel looks up may change.
        per_query = penalty.ndim > 1 or runs.table.ndim > 2
        if not per_query:
            torch._dynamo.mark_static(penalty)
            torch._dynamo.mark_static(runs.table)
        attend = _compiled(dynamic=False if per_query and device.type == "cpu" else None)
    # Tensors, not numbers, for each value of which there would be a kernel of its own.
    scale = torch.full((1,), call.scaling, dtype=torch.float32, device=device)
    count = call.slopes.sink_tokens
    sinks = torch.full((1,), count, dtype=torch.int32, device=device) if count else None
    output: Tensor = attend(states, penalty, runs.table, blocks, scale, sinks, options)
    return output[..., :width]


@lru_cache(maxsize=2)
def _compiled(dynamic: bool | None) -> Any:
    # Made at the first call, since torch.compile is slow to import.
    return torch.compile(_attend, dynamic=dynamic, recompile_limit=_GRAPHS, isolate_recompiles=True)  # type: ignore[call-overload]


def _attend(
    states: tuple[Tensor, Tensor, Tensor],
    slopes: Tensor,
    table: Tensor,
    blocks: tuple[Tensor, Tensor],
    scaling: Tensor,
    sinks: Tensor | None,
    kernel_options: Any,
) -> Tensor:
    """flex_attention with the bias, over the keys that each query sees.

    Args:
        states: query (batch, heads, queries, head_dim), key and value (batch, key-value heads, keys, head_dim).
        slopes: float32 (heads,) or (batch, heads, queries), logits per token of distance.
        table: see `Runs`.
        blocks: bool (batch, 1 or heads, query blocks, key blocks), to be read with the mask, and without.
        scaling: float32 (1,), of the logits.
        sinks: int32 (1,), how many of the first tokens that a query sees have no bias; None for none.
        kernel_options: of flex_attention.
    """
    query, key, value = states

    def first(b: Tensor, q: Tensor) -> Tensor:
        return table[0, b] if table.ndim == 2 else table[0, b, q]

    def last(b: Tensor, q: Tensor) -> Tensor:
        return torch.minimum(table[1, b], q + table[2, b]) if table.ndim == 2 else table[1, b, q]

    def position(b: Tensor, k: Tensor) -> Tensor:
        return table[2, b, k] if table.ndim == 3 and table.shape[0] == 3 else k

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        slope = slopes[h] if slopes.ndim == 1 else slopes[b, h, q]
        # Distances stay integers until they meet the slope, and are small where they matter.
        distance = last(b, q) - position(b, k)
        if sinks is not None:
            distance = torch.where(position(b, k) - first(b, q) < sinks[0], 0, distance)
        return score * scaling[0] - slope * distance

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (first(b, q) <= position(b, k)) & (position(b, k) <= last(b, q))

    block_mask = BlockMask.from_kv_blocks(
        *_indices(blocks[0]),
        *_indices(blocks[1]),
        BLOCK,
        mask_mod,
        (query.shape[2], key.shape[2]),
        torch.is_grad_enabled(),
    )
    grouped = query.shape[1] != key.shape[1]
    output: Tensor = flex_attention(
        query, key, value, score_mod, block_mask, 1.0, enable_gqa=grouped, kernel_options=kernel_options
    )
    return output


_region = torch.compiler.nested_compile_region(_attend)


def _indices(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks each query block reads (int32), and their indices, which come first."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1, dtype=torch.int32), order.int()


def _kept_blocks(query: Tensor, key: Tensor, runs: Runs, slopes: Tensor, scaling: float, tolerance: float) -> Tensor:
    """Bool (batch, heads, query blocks, key blocks): False for blocks that carry less than `tolerance` of each row.

    Args:
        query: (batch, heads, tokens, head_dim).
        key: (batch, key-value heads, tokens, head_dim).
        runs: what each query sees; a key's position is its index.
        slopes: float32 (heads,), logits per token of distance.
        scaling: of the logits.
        tolerance: share of a row's weights that everything left out may have together.

    A block of queries reads its own and the previous block of keys, whose log-sum-exp is the measure.
    """
    heads, key_heads, device = query.shape[1], key.shape[1], query.device
    slope = slopes.view(key_heads, -1, 1, 1)
    row = torch.arange(BLOCK, device=device)
    query = by_block(query, BLOCK, 0.0, dim=2).unflatten(1, (key_heads, -1))
    first, last = by_block(runs.first, BLOCK, 0)[:, None, None], by_block(runs.last, BLOCK, -1)[:, None, None]
    count = query.shape[3]
    near_key = pad(by_block(key, BLOCK, 0.0, dim=2).flatten(2, 3), (0, 0, BLOCK, 0)).unfold(2, 2 * BLOCK, BLOCK)
    far_key = key[:, :, None, : (count - 1) * BLOCK].unflatten(3, (-1, BLOCK)).float()
    centroid, radius = centroid_and_radius(far_key)
    radius = (radius + _ROUNDING * far_key.norm(dim=-1).amax(dim=-1))[:, :, :, None]
    # What the bias leaves of a block of keys, over that of its nearest key.
    series = log_sum_of_bias(slope.clamp(min=1e-9), BLOCK) + 1e-3
    entries = _CPU_ENTRIES if device.type == "cpu" else _GPU_ENTRIES
    step = max(1, entries // (query.shape[0] * heads * BLOCK * (2 * BLOCK + count)))
    kept = []
    for part in (slice(begin, begin + step) for begin in range(0, count, step)):
        block = torch.arange(count, device=device)[part, None]
        index = (block - 1) * BLOCK + torch.arange(2 * BLOCK, device=device)
        seen = (first[..., part, :, None] <= index[:, None]) & (index[:, None] <= last[..., part, :, None])
        some, near = query[:, :, :, part].float() * scaling, near_key[:, :, None, part].float()
        distance = row[:, None] + BLOCK - torch.arange(2 * BLOCK, device=device)
        logits = (some @ near).sub_(slope[..., None] * distance).masked_fill_(~seen, -math.inf)
        # A query that sees nothing needs no further keys.
        lse = logits.logsumexp(dim=-1).masked_fill(last[..., part, :] < first[..., part, :], math.inf)
        norm = some.norm(dim=-1)
        rest = lse - _ROUNDING * norm * near.norm(dim=-2).amax(dim=-1)[..., None] + slope * row
        bound = some @ centroid[:, :, :, None].mT + norm[..., None] * radius[..., None, :] - rest[..., None]
        behind = block - torch.arange(count - 1, device=device)
        share = bound.amax(dim=-2) - slope * ((behind - 1) * BLOCK + 1) + series
        kept.append(~left_out(share.masked_fill(behind < 2, math.inf), tolerance))
    return pad(torch.cat(kept, dim=3).flatten(1, 2), (0, 1), value=True)


def _sink_blocks(runs: Runs, sink_tokens: int) -> Tensor:
    """Bool (batch, 1, query blocks, key blocks), True where a query block sees sinks; a key's position is its index."""
    first = by_block(runs.first, BLOCK, runs.first.shape[-1])
    begin = torch.arange(first.shape[1], device=first.device) * BLOCK
    sees = (first[..., None] < begin + BLOCK) & (first[..., None] + sink_tokens > begin)
    return sees.any(dim=-2)[:, None]

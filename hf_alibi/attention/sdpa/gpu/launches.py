"""The kernels on tensors: what is allocated, how large the tiles are, and the launches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...blocks import with_rows
from ...call import AttentionCall
from .kernels.backward import attend_backward_keys, attend_backward_queries
from .kernels.forward import attend
from .kernels.key_blocks import summarize_keys

__all__ = [
    "Runs",
    "Settings",
    "Sizes",
    "as_it_is",
    "by_tokens",
    "columns",
    "launch_backward",
    "launch_forward",
    "sizes_for",
    "sizes_of",
    "strides",
]

Runs = tuple[Tensor, Tensor]
"""First and last key that each query sees, int32 (batch, queries); the last is -1 for a query that sees none."""

# Up to this many keys all are read: what could be left out costs less than finding it.
_SHORT = 1024


class Settings(NamedTuple):
    """What is the same for every head of a call."""

    scaling: float
    """Of the logits."""
    tolerance: float
    """Share of a row's weights that may be left out; 0 for none."""
    sink_tokens: int = 0
    """See `HeadSlopes`."""
    softcap: float = 0.0
    """The logits are capped to plus or minus this before the bias is added; 0 for no cap."""

    @classmethod
    def of_call(cls, call: AttentionCall) -> Settings:
        """What a call asks for."""
        return cls(float(call.scaling), call.tolerance, call.slopes.sink_tokens, call.softcap or 0.0)

    @classmethod
    def of(cls, values: list[float]) -> Settings:
        """From a list, which is what operators of PyTorch take."""
        scaling, tolerance, sink_tokens, softcap = values
        return cls(scaling, tolerance, int(sink_tokens), softcap)


@dataclass(frozen=True)
class Sizes:
    """Of tiles, in tokens, and of programs."""

    block: int = 128
    """Keys that share a centroid, and the unit of windows."""
    chunk: int = 64
    """Centroids that are looked at together."""
    rows: int = 128
    """Queries of a program, of the forward pass and of the queries' gradient."""
    keys: int = 64
    """Keys that they read at a time."""
    key_tile: int = 128
    """Keys of a program of the keys' gradient; divides `block`."""
    query_tile: int = 64
    """Queries that they read at a time; divides `rows`."""
    warps: int = 4
    backward_warps: int = 8
    stages: int = 3
    backward_stages: int = 2


# By the bytes of a number and the columns of a tile: as large as leaves registers enough on an H100.
_SIZES = {
    (2, 64): Sizes(query_tile=32),
    (2, 128): Sizes(key_tile=64, query_tile=32, warps=8, stages=2),
    (2, 256): Sizes(rows=64, keys=32, key_tile=64, query_tile=16, warps=8, stages=2),
    (4, 64): Sizes(rows=64, keys=32, chunk=32, key_tile=32, query_tile=32, warps=8, stages=2),
    (4, 128): Sizes(rows=32, keys=32, chunk=32, key_tile=32, query_tile=16, warps=8, stages=2),
    (4, 256): Sizes(rows=16, keys=16, chunk=16, key_tile=16, query_tile=16, warps=8, stages=1, backward_stages=1),
}
# Bytes that a block of threads shares on data centre GPUs from the A100 on; others have 99 KiB, too few for two stages.
_SHARED = 160 * 2**10


@lru_cache(maxsize=64)
def sizes_for(width: int, value_width: int, itemsize: int, shared: int = _SHARED) -> Sizes:
    """Sizes for heads of these widths and numbers of `itemsize` bytes.

    Args:
        width, value_width: of a head's keys and values.
        itemsize: bytes of a number.
        shared: bytes of memory that a block of threads has.
    """
    wide = max(64, columns(max(width, value_width)))
    sizes = _SIZES[itemsize, wide]
    return sizes if shared >= _SHARED or wide == 64 else replace(sizes, stages=1, backward_stages=1)


def sizes_of(states: tuple[Tensor, Tensor, Tensor]) -> Sizes:
    """`sizes_for` query, key and value, where they are."""
    query, _, value = states
    shared = _SHARED
    if query.is_cuda and not torch.version.hip:
        properties: Any = torch.cuda.get_device_properties(query.device)
        shared = properties.shared_memory_per_block_optin
    # For compilers: widths are numbers, not symbols.
    return sizes_for(int(query.shape[-1]), int(value.shape[-1]), query.dtype.itemsize, shared)


def columns(width: int) -> int:
    """Columns of a tile for heads of `width`: a power of two."""
    return max(16, 1 << (width - 1).bit_length())


def strides(*tensors: Tensor) -> list[int]:
    """Of batch, heads and tokens."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def by_tokens(like: Tensor, width: int | None = None) -> Tensor:
    """Empty, of the shape of `like` (batch, heads, tokens, width), in the layout of models, tokens before heads."""
    batch, heads, tokens, own = like.shape
    return like.new_empty(batch, tokens, heads, own if width is None else width).transpose(1, 2)


def as_it_is(kernel: Any) -> Any:
    """What launches a kernel where no compiler needs to see it."""
    return kernel


def _common(query: Tensor, value: Tensor, runs: Runs | None, settings: Settings, sizes: Sizes) -> dict[str, Any]:
    """Arguments that all kernels take."""
    width, value_width = int(query.shape[-1]), int(value.shape[-1])
    return {
        "scaling": settings.scaling / math.log(2),
        "cap": settings.softcap / math.log(2),
        "WIDTH": width,
        "VALUE_WIDTH": value_width,
        "COLUMNS": columns(width),
        "VALUE_COLUMNS": columns(value_width),
        "BLOCK": sizes.block,
        "SINK_TOKENS": settings.sink_tokens,
        "RUNS": runs is not None,
        "CAP": settings.softcap > 0,
    }


def launch_forward(
    states: tuple[Tensor, Tensor, Tensor],
    runs: Runs | None,
    slopes: Tensor,
    sinks: Tensor | None,
    settings: Settings,
    sizes: Sizes | None = None,
    launcher: Callable[[Any], Any] = as_it_is,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (batch, heads, queries, value width), and log-sum-exp and windows as the kernel `attend` writes them.

    Args:
        states: query (batch, heads, queries, width), key and value (batch, key heads, keys, width), of which the last
            dimension is dense.
        runs: first and last key that each query sees, int32 (batch, queries); None if queries are the last tokens of
            the keys and see all keys up to their own.
        slopes: float32 (heads,), logits per token of distance.
        sinks: (heads,), logits that take a share of each query's weights; None for none.
        settings, sizes: see there; by default the sizes for these widths.
        launcher: makes of a kernel what is launched, as `torch.library.wrap_triton` does for compilers.
    """
    query, key, value = states
    sizes = sizes or sizes_of(states)
    (batch, heads, queries, width), (_, key_heads, keys, _) = query.shape, key.shape
    query_blocks, key_blocks = -(-queries // sizes.rows), -(-keys // sizes.block)
    output = by_tokens(query, value.shape[-1])
    lse = query.new_empty(batch, heads, queries, dtype=torch.float32)
    window = query.new_empty(batch, heads, query_blocks, 4, dtype=torch.int32)
    common = _common(query, value, runs, settings, sizes)
    # Compiled, one program serves all lengths.
    skip = settings.tolerance > 0 and (launcher is not as_it_is or keys > min(_SHORT, 8 * sizes.block))
    centroid = radius = lse
    if skip:
        centroid = key.new_empty(batch * key_heads, key_blocks, width)
        radius = key.new_empty(batch * key_heads, key_blocks, dtype=torch.float32)
        launcher(summarize_keys)[key_blocks, batch * key_heads](
            key, centroid, radius, *strides(key), keys, key_heads, sizes.block, common["WIDTH"], common["COLUMNS"]
        )
    first, last = runs or (window, window)
    launcher(attend)[query_blocks, batch * heads](
        query, key, value, output, lse, window, centroid, radius, first, last, slopes, lse if sinks is None else sinks,
        *strides(query, key, value, output), queries, keys, heads, heads // key_heads,
        tolerance=math.log2(settings.tolerance) if skip else 0.0, ROWS=sizes.rows, KEYS=sizes.keys, CHUNK=sizes.chunk,
        SKIP=skip, LEARNED_SINK=sinks is not None, num_warps=sizes.warps, num_stages=sizes.stages, **common,
    )  # fmt: skip
    return output, lse, window


def launch_backward(
    grad: Tensor,
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    runs: Runs | None,
    slopes: Tensor,
    settings: Settings,
    sizes: Sizes | None = None,
    launcher: Callable[[Any], Any] = as_it_is,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; and each output times its gradient, summed, float32 (batch, heads, queries).

    Args:
        grad: of the output.
        saved: query, key, value, and what `launch_forward` returned.
        runs, slopes, settings, sizes, launcher: as given there.
    """
    query, key, value, output, lse, window = saved
    sizes = sizes or sizes_of((query, key, value))
    (batch, heads, queries, _), (_, key_heads, keys, _) = query.shape, key.shape
    grad = with_rows(grad)
    d_query, d_key, d_value = (by_tokens(x) for x in (query, key, value))
    delta = torch.empty_like(lse)
    common = _common(query, value, runs, settings, sizes)
    first, last = runs or (window, window)
    query_blocks = window.shape[2]
    launcher(attend_backward_queries)[query_blocks, batch * heads](
        query, key, value, output, grad, d_query, lse, delta, window, first, last, slopes,
        *strides(query, key, value, output, grad, d_query), queries, keys, heads, heads // key_heads,
        ROWS=sizes.rows, KEYS=sizes.keys, num_warps=sizes.backward_warps, num_stages=sizes.backward_stages, **common,
    )  # fmt: skip
    launcher(attend_backward_keys)[-(-keys // sizes.key_tile), batch * key_heads](
        query, key, value, grad, d_key, d_value, lse, delta, window, first, last, slopes,
        *strides(query, key, value, grad, d_key, d_value), queries, keys, query_blocks, key_heads,
        heads // key_heads, ROWS=sizes.query_tile, KEYS=sizes.key_tile, WINDOW_ROWS=sizes.rows,
        num_warps=sizes.backward_warps, num_stages=sizes.backward_stages, **common,
    )  # fmt: skip
    return d_query, d_key, d_value, delta

"""One new token over a long cache, by kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from ...blocks import with_rows
from ...call import AttentionCall
from ...inputs import visible_keys
from ..remembered import remembered
from .kernels.decoding import decode, join_parts
from .launches import Settings, as_it_is, by_tokens, columns, strides

__all__ = ["attend_one"]

# Keys of a part, and of a tile.
_SPAN = 512
_KEYS = 64


def attend_one(call: AttentionCall) -> Tensor | None:
    """Output (batch, heads, 1, head_dim) of one query; None if its mask adds to logits, or if gradients are asked for.

    Keys and values are read where they lie, in any strides; the mask may have holes, and is not waited for.
    """
    query, key, value = (with_rows(x) for x in (call.query, call.key, call.value))
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return None
    positions: list[Tensor] = []
    if call.mask is not None:
        visible = visible_keys(call.mask, query, key)
        if visible.added is not None or visible.differs_by_head:
            return None
        positions = [x.expand(len(query), -1).contiguous() for x in _positions(visible.allowed, None)]
    settings = Settings.of_call(call)
    args = query, key, value, positions, call.slopes.per_head, call.learned_sinks
    if torch.compiler.is_compiling():
        output: Tensor = _operator(*args, list(map(float, settings)))
        return output
    return _launch(*args, settings)


@remembered
def _positions(allowed: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel asks of a mask, bool (batch, heads or 1, 1, keys): SEEN, AFTER and RUN, see there."""
    seen = allowed[:, 0, 0]
    until = seen.cumsum(dim=-1, dtype=torch.int32)
    count = until[:, -1:]
    index = torch.arange(seen.shape[-1], device=seen.device, dtype=torch.int32)
    stop = torch.where(seen, index + 1, 0).amax(dim=-1, keepdim=True)
    first = torch.where(seen, index, seen.shape[-1]).amin(dim=-1, keepdim=True)
    return seen, count - until, torch.cat([first, stop, count], dim=-1).int()


def _launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: list[Tensor],
    slopes: Tensor,
    sinks: Tensor | None,
    settings: Settings,
    launcher: Callable[[Any], Any] = as_it_is,
) -> Tensor:
    (batch, heads), (key_heads, keys) = query.shape[:2], key.shape[1:3]
    # For compilers: what tiles depend on is a number, not a symbol.
    width, value_width, groups = int(query.shape[-1]), int(value.shape[-1]), int(heads // key_heads)
    parts = -(-keys // _SPAN)
    total = query.new_empty(batch, heads, parts, value_width, dtype=torch.float32)
    largest = query.new_empty(batch, heads, parts, dtype=torch.float32)
    weight = torch.empty_like(largest)
    seen, after, run = positions or (query, query, query)
    tile = _KEYS if max(width, value_width) * query.dtype.itemsize <= 256 else 16
    launcher(decode)[parts, batch * key_heads](
        query, key, value, total, largest, weight, seen, after, run, slopes, *strides(query)[:2],
        *strides(key, value), keys, key_heads, groups, settings.scaling / math.log(2), settings.softcap / math.log(2),
        math.log2(settings.tolerance) if settings.tolerance else -math.inf, WIDTH=width, VALUE_WIDTH=value_width,
        COLUMNS=columns(width), VALUE_COLUMNS=columns(value_width), HEADS=columns(groups), SPAN=_SPAN, KEYS=tile,
        SINK_TOKENS=settings.sink_tokens, CAP=settings.softcap > 0, MASK=bool(positions), num_stages=2,
    )  # fmt: skip
    output = by_tokens(query, value_width)
    launcher(join_parts)[(batch * heads,)](
        total, largest, weight, largest if sinks is None else sinks, output, *strides(output)[:2], parts, heads,
        VALUE_WIDTH=value_width, VALUE_COLUMNS=columns(value_width), PARTS=_KEYS, LEARNED_SINK=sinks is not None,
    )  # fmt: skip
    return output


@triton_op("hf_alibi::attend_one", mutates_args=())
def _operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: list[Tensor],
    slopes: Tensor,
    sinks: Tensor | None,
    settings: list[float],
) -> Tensor:
    return _launch(query, key, value, positions, slopes, sinks, Settings.of(settings), wrap_triton)

"""One new token over a long cache, by kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...call import AttentionCall
from ...inputs import visible_keys
from ..remembered import remembered
from .kernels.decoding import decode, join_parts
from .launches import by_tokens, columns, strides

__all__ = ["attend_one"]

# Programs that keep a large GPU busy, and keys of a part at least.
_PROGRAMS = 512
_SPAN = 256
_KEYS = 64


def attend_one(call: AttentionCall) -> Tensor | None:
    """Output (batch, heads, 1, head_dim) of one query; None if its mask adds to logits, or if gradients are asked for.

    Keys and values are read where they lie, in any strides; the mask may have holes, and is not waited for.
    """
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (call.query, call.key, call.value))
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return None
    seen = after = run = query
    if call.mask is not None:
        visible = visible_keys(call.mask, query, key)
        if visible.added is not None or (visible.allowed.shape[1] > 1 and visible.allowed.stride(1)):
            return None
        seen, after, run = (x.expand(len(query), -1).contiguous() for x in _positions(visible.allowed, None))
    (batch, heads, _, width), (key_heads, keys), value_width = query.shape, key.shape[1:3], value.shape[-1]
    span = max(_SPAN, -(-keys * batch * key_heads // _PROGRAMS // _KEYS) * _KEYS)
    parts = -(-keys // span)
    total = query.new_empty(batch, heads, parts, value_width, dtype=torch.float32)
    largest, weight = query.new_empty(2, batch, heads, parts, dtype=torch.float32)
    tile = _KEYS if max(width, value_width) * query.dtype.itemsize <= 256 else 16
    decode[parts, batch * key_heads](
        query, key, value, total, largest, weight, seen, after, run, call.slopes.per_head, *strides(query)[:2],
        *strides(key, value), keys, span, key_heads, call.groups, call.scaling / math.log(2),
        (call.softcap or 0.0) / math.log(2), math.log2(call.tolerance) if call.tolerance else -math.inf, width,
        value_width, columns(width), columns(value_width), columns(call.groups), tile, call.slopes.sink_tokens,
        call.softcap is not None, call.mask is not None, num_stages=2,
    )  # fmt: skip
    output = by_tokens(query, value_width)
    sinks = largest if call.learned_sinks is None else call.learned_sinks
    join_parts[(batch * heads,)](
        total, largest, weight, sinks, output, *strides(output)[:2], parts, heads, value_width, columns(value_width),
        columns(parts), call.learned_sinks is not None,
    )  # fmt: skip
    return output


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

"""ALiBi attention under the name `sdpa`: each call by the cheapest exact way.

- Causal runs of queries on the CPU, also under padding or in packed sequences: `windowed`, which skips far keys.
- One token after a long cache on the CPU: `decoding`, which skips far values.
- Causal attention on accelerators, compiled, or with dropout: `factored`, the plain kernel without a dense bias.
- Capped logits and sinks, which no kernel has: `eager`.
- Everything else: `dense`, a matrix of the bias for a block of queries at a time.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..cache import CachedStates
from ..eager import eager_alibi_attention
from ..inputs import autocast, refuse_unsupported, visible_keys
from ..layer_slopes import HeadSlopes, head_slopes
from ..tolerance import exact_tolerance
from .cached import attend_cached
from .decoding import decode
from .dense import dense_attention
from .factored import factored_attention
from .segments import Rest, Segment, segments_of
from .windowed import windowed_attention

__all__ = ["sdpa_alibi_attention"]

# Keys from which one new token costs less by `decode`, which has more steps.
_DECODE_KEYS = 2**15


def sdpa_alibi_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | CachedStates,
    value: Tensor | CachedStates,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention with the ALiBi bias, exact in every floating-point type.

    Args:
        module: the self-attention layer; its config holds the slopes.
        query: (batch, heads, queries, head_dim).
        key, value: (batch, key-value heads, keys, head_dim), heads are grouped where there are fewer; or what an
            `AlibiCache` holds.
        attention_mask: see `visible_keys`; None with more keys than queries means that the keys past the queries are
            still empty (the first step with a static cache).
        scaling: of the logits; 1 / sqrt(head_dim) if None.
        dropout: probability, applied to the weights.

    Returns the output (batch, queries, heads, head_dim) and None: this backend has no weights to show.
    """
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        # No kernel of PyTorch does these.
        output, _ = eager_alibi_attention(
            module,
            query,
            cast(Tensor, key),
            cast(Tensor, value),
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            **kwargs,
        )
        return output, None
    refuse_unsupported("sdpa", module, kwargs)
    slopes = head_slopes(module, query, value, query.device)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    config: Any = module.config
    tolerance = exact_tolerance(query.dtype) if config.alibi_tolerance is None else config.alibi_tolerance
    layer = lse = seen = None
    if isinstance(key, CachedStates):
        layer, states = key.layer, cast(CachedStates, value)
        # Half for what the cache has dropped, half for what is not read of the rest.
        tolerance = tolerance / 2
        if key.whole is not None and states.whole is not None:
            key, value = key.whole, states.whole
    # The kernels' inputs would be rounded after the bias has been made part of them.
    if isinstance(key, CachedStates):
        (query,) = autocast(query.device, query)
    else:
        query, key, value = autocast(query.device, query, key, cast(Tensor, value))
    with torch.autocast(query.device.type, enabled=False):
        if isinstance(key, CachedStates):
            seen = _seen_in_cache(attention_mask, query, key)
            output, lse = attend_cached(query, key, states, seen, slopes=slopes, scaling=scaling, tolerance=tolerance)
        else:
            output = _attend(
                query,
                key,
                cast(Tensor, value),
                attention_mask,
                slopes=slopes,
                scaling=scaling,
                dropout=dropout,
                tolerance=tolerance,
            )
        if layer is not None:
            layer.observe(query, lse, seen, slopes=slopes, scaling=scaling, default=tolerance)
    return output.transpose(1, 2).contiguous(), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    slopes: HeadSlopes,
    scaling: float,
    dropout: float,
    tolerance: float,
) -> Tensor:
    queries = query.shape[2]
    if mask is None and queries > 1:
        if key.shape[2] < queries:
            raise ValueError(f"causal attention of {queries} queries needs as many keys, got {key.shape[2]}")
        key, value = key[:, :, :queries], value[:, :, :queries]
    if _can_skip(query, value, dropout):
        if queries == 1 and key.shape[2] >= _DECODE_KEYS and query.dtype.itemsize >= 4:
            allowed, added = visible_keys(mask, query, key)
            if added is None:
                seen = None if mask is None else allowed
                return decode(query, key, value, seen, slopes=slopes, scaling=scaling, tolerance=tolerance)[0]
        elif queries > 1 and slopes.dynamic is None:
            output = _windowed(query, key, value, mask, slopes=slopes, scaling=scaling, tolerance=tolerance)
            if output is not None:
                return output
    if mask is None and queries > 1:
        return factored_attention(query, key, value, slopes=slopes, scaling=scaling, dropout=dropout)
    return dense_attention(query, key, value, mask, slopes=slopes, scaling=scaling, dropout=dropout)


def _can_skip(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether keys may be left out by their values: on the CPU, run and not traced, without dropout."""
    return (
        query.device.type == "cpu"
        and value.shape[-1] == query.shape[-1]
        and not dropout
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
    )


def _windowed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    slopes: HeadSlopes,
    scaling: float,
    tolerance: float,
) -> Tensor | None:
    """Segments of the mask by `windowed_attention` and the rest by `dense_attention`; None where there are none."""
    rests: list[Rest] = []
    segments = [Segment.causal(query.shape[2], key.shape[2])]
    if mask is not None:
        allowed, added = visible_keys(mask, query, key)
        found = segments_of(allowed) if added is None else None
        if found is None:
            return None
        segments, rests = found
    output = windowed_attention(
        query,
        key,
        value,
        slopes.per_head,
        scaling,
        segments=segments,
        tolerance=tolerance,
        sink_tokens=slopes.sink_tokens,
    )
    # What the backward pass needs of it must stay as it is.
    output = output.clone() if rests else output
    for rest in rests:
        output[rest.batch, :, rest.queries] = dense_attention(
            query[rest.batch, :, rest.queries],
            key[rest.batch],
            value[rest.batch],
            allowed[rest.batch, :, rest.queries],
            slopes=slopes,
            scaling=scaling,
            dropout=0.0,
        )
    return output


def _seen_in_cache(mask: Tensor | None, query: Tensor, key: CachedStates) -> Tensor | None:
    """Which of all tokens so far each query may see, None for all before it."""
    if mask is None:
        return None
    seen, added = visible_keys(mask, query, key)
    if added is not None:
        raise ValueError("AlibiCache takes masks of padding only, got an additive mask")
    return seen

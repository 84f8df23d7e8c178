"""ALiBi attention under the name `sdpa`: each call by the cheapest exact way.

- Causal runs of queries on the CPU, also under padding or in packed sequences: `windowed`, which skips far keys.
- One token after a long cache on the CPU: `decoding`, which skips far values.
- The same on a GPU: Triton kernels (`gpu`), which skip far keys and take capped logits and learned sinks as well.
- Causal attention on other accelerators, compiled on a CPU, or with dropout: `factored`, the plain kernel of PyTorch
  without a dense bias.
- Everything else, and capped logits and learned sinks where there are no such kernels: `dense`, a matrix of the bias
  for a block of queries at a time.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import is_exported, under_torch_func
from ..cache import CachedStates
from ..call import AttentionCall, autocast, resolve
from ..inputs import visible_keys
from . import cpu_kernel
from .cached import attend_cached
from .decoding import decode
from .dense import dense_attention
from .factored import factored_attention
from .segments import OtherQueries, Segment, segments_of
from .windowed import windowed_attention

__all__ = ["sdpa_alibi_attention"]

# Of CUDA and ROCm.
_KERNEL_DEVICES = {"cuda"}
# The code beside a checkpoint is without them, see `code_export`.
_HAS_KERNELS = find_spec("triton") is not None and find_spec(f"{__package__}.gpu") is not None
# Keys from which one new token costs less by `decode`, which has more steps.
_DECODE_KEYS = 2**15


def sdpa_alibi_attention(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention with the ALiBi bias, exact in every floating-point type.

    Arguments as in `resolve`. Without a mask, keys past several queries are still empty (a static cache's first step).

    Returns the output (batch, queries, heads, head_dim) and None: this backend has no weights to show.
    """
    call = resolve(
        "sdpa",
        module,
        (query, key, value),
        attention_mask,
        scaling=scaling,
        dropout=dropout,
        kwargs=kwargs,
        supported=("softcap", "s_aux"),
    )
    output = attend_cached(call, _attend) if isinstance(key, CachedStates) else _attend(call)
    return output.transpose(1, 2).contiguous(), None


def _attend(call: AttentionCall) -> Tensor:
    """Output (batch, heads, queries, head_dim), in the types that autocast would give the inputs."""
    query, key, value = autocast(call.query.device, call.query, call.key, call.value)
    # Autocast would round the kernels' inputs after the bias has been made part of them.
    with torch.autocast(query.device.type, enabled=False):
        return _by_path(replace(call, query=query, key=key, value=value))


def _by_path(call: AttentionCall) -> Tensor:
    """By the first path that takes the call."""
    query, key, value = call.query, call.key, call.value
    queries = query.shape[2]
    if call.mask is None and queries > 1:
        if key.shape[2] < queries:
            raise ValueError(f"causal attention of {queries} queries needs as many keys, got {key.shape[2]}")
        key, value = key[:, :, :queries], value[:, :, :queries]
        call = replace(call, key=key, value=value)
    if query.device.type in _KERNEL_DEVICES and _HAS_KERNELS:
        from .gpu import path as kernels  # takes Triton, which CPUs do without

        output = None if kernels.refuses(call) else kernels.attend(call)
        if output is not None:
            return output
    if call.has_other_logits:
        return dense_attention(call)
    if _can_skip(call):
        if queries == 1 and key.shape[2] >= _DECODE_KEYS and query.dtype.itemsize >= 4:
            visible = visible_keys(call.mask, query, key)
            if visible.added is None:
                return decode(call, None if call.mask is None else visible.allowed)[0]
        elif queries > 1 and call.slopes.dynamic is None:
            output = _windowed(call)
            if output is not None:
                return output
    return factored_attention(call) if call.mask is None and queries > 1 else dense_attention(call)


def _can_skip(call: AttentionCall) -> bool:
    """Whether keys may be left out by their values: on the CPU, run and not traced or transformed, without dropout."""
    return (
        call.query.device.type == "cpu"
        and call.value.shape[-1] == call.query.shape[-1]
        and not call.dropout
        and cpu_kernel.is_available()
        and not torch.compiler.is_compiling()
        and not is_exported()
        and not under_torch_func()
    )


def _windowed(call: AttentionCall) -> Tensor | None:
    """Segments of the mask by `windowed_attention` and other queries by `dense_attention`; None without segments."""
    others: list[OtherQueries] = []
    segments = [Segment.causal(call.query.shape[2], call.key.shape[2])]
    if call.mask is not None:
        visible = visible_keys(call.mask, call.query, call.key)
        found = segments_of(visible.allowed, visible.own) if visible.added is None else None
        if found is None:
            return None
        segments, others = found
    output = windowed_attention(call, segments)
    # What the backward pass needs of it must stay as it is.
    output = output.clone() if others else output
    for other in others:
        output[other.batch, :, other.queries] = dense_attention(
            replace(
                call,
                query=call.query[other.batch, :, other.queries],
                key=call.key[other.batch],
                value=call.value[other.batch],
                mask=visible.part(other.batch, other.queries),
            )
        )
    return output

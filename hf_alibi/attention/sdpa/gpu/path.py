"""What the kernels take of the attention calls of a model."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ...blocks import under_torch_func, with_rows
from ...call import AttentionCall
from ..reads import recording, report_windows
from .decoding import attend_one
from .launches import Runs, Settings, Sizes, sizes_of
from .operator import alibi_attention
from .runs import runs_of

__all__ = ["attend", "refuses"]

_TYPES = {torch.float32, torch.float16, torch.bfloat16}
_WIDEST = 256
# Of NVIDIA's compute capabilities: Triton compiles no matrix products for older ones (V100, T4).
_OLDEST = 8
# Of the second dimension of a launch.
_MOST_HEADS = 2**16 - 1


def refuses(call: AttentionCall) -> str | None:
    """Why the kernels do not take the call; None if they do. Whether its mask is of runs is not asked here."""
    query, value = call.query, call.value
    capability = _capability(query.device)
    if capability is not None and capability < _OLDEST:
        return f"Triton needs compute capability {_OLDEST} or higher, and this GPU has {capability}"
    if query.dtype not in _TYPES:
        return f"the kernels compute in float32, float16 and bfloat16, got {query.dtype}"
    if max(query.shape[-1], value.shape[-1]) > _WIDEST:
        return f"the kernels take heads of at most {_WIDEST} dimensions"
    if query.shape[2] > call.key.shape[2]:
        return "the kernels take as many queries as keys at most"
    if query.shape[0] * query.shape[1] > _MOST_HEADS:
        return f"the kernels take at most {_MOST_HEADS} heads of all sequences together"
    if call.dropout:
        return "the kernels have no dropout"
    if call.slopes.dynamic is not None:
        return "the kernels take slopes that depend on the head alone"
    if call.mask is not None and query.shape[2] > 1 and torch.compiler.is_compiling():
        return "what a mask holds is not known while a model is compiled"
    if under_torch_func() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return "the kernels are not traced or transformed"
    return None


def _capability(device: torch.device) -> int | None:
    """The first number of an NVIDIA GPU's compute capability; None for other devices."""
    if device.type != "cuda" or torch.version.hip:
        return None
    properties: Any = torch.cuda.get_device_properties(device)
    major: int = properties.major
    return major


def attend(call: AttentionCall, sizes: Sizes | None = None) -> Tensor | None:
    """Output (batch, heads, queries, head_dim); None if the mask is more than a run of keys for each query."""
    # Triton launches on the current device, which of a model on several need not be that of the layer.
    may_be_elsewhere = call.query.is_cuda and not torch.compiler.is_compiling()
    with torch.cuda.device(call.query.device) if may_be_elsewhere else nullcontext():
        return attend_one(call) if call.query.shape[2] == 1 else _attend(call, sizes)


def _attend(call: AttentionCall, sizes: Sizes | None) -> Tensor | None:
    query = call.query
    runs: Runs | None = None
    if call.mask is not None:
        runs = _expanded(runs_of(call.mask, query, call.key), len(query))
        if runs is None:
            return None
    query, key, value = (with_rows(x) for x in (query, call.key, call.value))
    settings = Settings.of_call(call)
    output, window = alibi_attention(
        (query, key, value), runs, call.slopes.per_head, call.learned_sinks, settings, sizes
    )
    if recording():
        sizes = sizes or sizes_of((query, key, value))
        first, last = runs or _causal(len(query), query.shape[2], key.shape[2])
        report_windows(window, first, last, rows=sizes.rows, block=sizes.block, sink_tokens=settings.sink_tokens)
    return output


def _causal(batch: int, queries: int, keys: int) -> Runs:
    last = torch.arange(keys - queries, keys).expand(batch, -1)
    return torch.zeros_like(last), last


def _expanded(runs: Runs | None, batch: int) -> Runs | None:
    """A single mask is that of all sequences."""
    if runs is None or len(runs[0]) == batch:
        return runs
    first, last = (x.expand(batch, -1).contiguous() for x in runs)
    return first, last

"""The kernels as a differentiable operation: a function of autograd, and for compilers an operator of PyTorch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .launches import Runs, Settings, Sizes, launch_backward, launch_forward

__all__ = ["alibi_attention"]

_States = tuple[Tensor, Tensor, Tensor]


def alibi_attention(
    states: _States,
    runs: Runs | None,
    slopes: Tensor,
    sinks: Tensor | None,
    settings: Settings,
    sizes: Sizes | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (batch, heads, queries, value width), and windows as the kernel `attend` writes them.

    Arguments as those of `launch_forward`. There is no second derivative.
    """
    query, key, value = states
    if torch.compiler.is_compiling():
        first, last = runs or (None, None)
        output, _, window = _operator(query, key, value, first, last, slopes, sinks, *settings)
    else:
        output, window = _Attention.apply(query, key, value, sinks, (runs, slopes, settings, sizes))
    return output, window


def _sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor, runs: Runs | None) -> Tensor:
    """Gradient of logits whose value is zero: minus their weight times each output's product with its gradient."""
    weights = torch.exp2(sinks.float()[:, None] / math.log(2) - lse)
    if runs is not None:
        weights = weights.masked_fill((runs[1] < 0)[:, None], 0.0)
    return -(weights * delta).sum(dim=(0, 2)).to(sinks.dtype)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, rest: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor]:
        runs, slopes, settings, sizes = rest
        output, lse, window = launch_forward((query, key, value), runs, slopes, sinks, settings, sizes)
        ctx.save_for_backward(query, key, value, output, lse, window, slopes, sinks, *(runs or ()))
        ctx.settings = settings, sizes
        ctx.mark_non_differentiable(window)
        return output, window

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *saved, slopes, sinks = ctx.saved_tensors[:8]
        runs = ctx.saved_tensors[8:] or None
        settings, sizes = ctx.settings
        *gradients, delta = launch_backward(grad, tuple(saved), runs, slopes, settings, sizes)
        d_sinks = None if sinks is None else _sink_gradient(sinks, saved[4], delta, runs)
        return *gradients, d_sinks, None


@triton_op("hf_alibi::attention", mutates_args=())
def _operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor | None,
    last: Tensor | None,
    slopes: Tensor,
    sinks: Tensor | None,
    scaling: float,
    tolerance: float,
    sink_tokens: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    runs = None if first is None or last is None else (first, last)
    settings = Settings(scaling, tolerance, sink_tokens, softcap)
    return launch_forward((query, key, value), runs, slopes, sinks, settings, launcher=wrap_triton)


@triton_op("hf_alibi::attention_backward", mutates_args=())
def _operator_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    window: Tensor,
    first: Tensor | None,
    last: Tensor | None,
    slopes: Tensor,
    scaling: float,
    sink_tokens: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    runs = None if first is None or last is None else (first, last)
    saved = query, key, value, output, lse, window
    settings = Settings(scaling, 0.0, sink_tokens, softcap)
    return launch_backward(grad, saved, runs, slopes, settings, launcher=wrap_triton)


def _save(ctx: Any, inputs: tuple[Any, ...], output: _States) -> None:
    query, key, value, first, last, slopes, sinks, scaling, _, sink_tokens, softcap = inputs
    ctx.save_for_backward(query, key, value, *output, first, last, slopes, sinks)
    ctx.settings = scaling, sink_tokens, softcap
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *saved, slopes, sinks = ctx.saved_tensors
    d_query, d_key, d_value, delta = _operator_backward(grad, *saved, slopes, *ctx.settings)
    runs = None if saved[6] is None else (saved[6], saved[7])
    d_sinks = None if sinks is None else _sink_gradient(sinks, saved[4], delta, runs)
    return d_query, d_key, d_value, None, None, None, d_sinks, None, None, None, None


_operator.register_autograd(_backward, setup_context=_save)

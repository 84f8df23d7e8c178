"""The kernels as a differentiable operation: a function of autograd, and for compilers an operator of PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
        output, _, window = _operator(query, key, value, list(runs or ()), slopes, sinks, list(map(float, settings)))
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


# Operators of PyTorch take lists, where None is an empty one.
@triton_op("hf_alibi::attention", mutates_args=())
def _operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    runs: list[Tensor],
    slopes: Tensor,
    sinks: Tensor | None,
    settings: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    states = query, key, value
    return launch_forward(states, _runs(runs), slopes, sinks, Settings.of(settings), launcher=wrap_triton)


@triton_op("hf_alibi::attention_backward", mutates_args=())
def _operator_backward(
    grad: Tensor, saved: list[Tensor], runs: list[Tensor], slopes: Tensor, settings: list[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, key, value, output, lse, window = saved
    states = query, key, value, output, lse, window
    return launch_backward(grad, states, _runs(runs), slopes, Settings.of(settings), launcher=wrap_triton)


def _runs(runs: Sequence[Tensor]) -> Runs | None:
    return (runs[0], runs[1]) if runs else None


def _save(ctx: Any, inputs: tuple[Any, ...], output: _States) -> None:
    query, key, value, runs, slopes, sinks, settings = inputs
    ctx.save_for_backward(query, key, value, *output, slopes, sinks, *runs)
    ctx.settings = settings
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    *saved, slopes, sinks = ctx.saved_tensors[:8]
    runs = list(ctx.saved_tensors[8:])
    d_query, d_key, d_value, delta = _operator_backward(grad, saved, runs, slopes, ctx.settings)
    d_sinks = None if sinks is None else _sink_gradient(sinks, saved[4], delta, _runs(runs))
    return d_query, d_key, d_value, [None] * len(runs), None, d_sinks, None


_operator.register_autograd(_backward, setup_context=_save)

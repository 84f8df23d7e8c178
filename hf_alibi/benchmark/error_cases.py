"""Cases of exactness: outputs and gradients of attention against float64, in every type, beside plain causal SDPA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ..attention.backends import BACKENDS
from ..attention.blocks import dense_rows
from ..slopes import alibi_slopes
from .attention_cases import CAUSAL, SDPA, Layer, backend, causal_attention
from .settings import BenchmarkArguments, Case
from .timing import OK, Row, Stopwatch

__all__ = ["error_cases"]

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
# Heads to measure, of steep and of flat slopes: float64 costs length² for each.
_HEADS = 2
_WHAT = ("output", "query gradient", "key gradient", "value gradient")


def error_cases(args: BenchmarkArguments, device: torch.device) -> Iterator[Case]:
    """Root mean square of the difference to float64 over that of the truth; ratio to plain causal SDPA without bias."""

    def measure(dtype: torch.dtype, length: int, _: Stopwatch) -> list[Row]:
        torch.manual_seed(args.seed)
        shape = 1, _HEADS, length, args.head_dim
        states = [torch.randn(shape, dtype=dtype, device=device) for _ in range(3)]
        upstream = torch.randn(shape, dtype=dtype, device=device)
        slopes = alibi_slopes(args.heads)[:: max(1, args.heads - 1)][:_HEADS].to(device)
        layer = Layer(_HEADS, slopes.tolist()).eval()
        ways: dict[str, tuple[Callable[..., Tensor], Tensor]] = {
            CAUSAL: (causal_attention, torch.zeros_like(slopes)),
            SDPA: (partial(backend, BACKENDS[SDPA], layer), slopes),
        }
        errors = {name: _errors(attend, states, upstream, own) for name, (attend, own) in ways.items()}
        return [
            {"variant": name, "what": f"{what}, {dtype}".replace("torch.", ""), "status": OK, "error": own[what]}
            | {"ratio": own[what] / errors[CAUSAL][what]}
            for what in _WHAT
            for name, own in errors.items()
        ]

    for length in args.error_lengths:
        for dtype in _TYPES:
            yield Case("errors", "attention", "", length, length, partial(measure, dtype, length))


def _errors(attend: Callable[..., Tensor], states: list[Tensor], upstream: Tensor, slopes: Tensor) -> dict[str, float]:
    leaves = [x.detach().requires_grad_() for x in states]
    output = attend(*leaves).transpose(1, 2)
    found = (output.detach(), *torch.autograd.grad(output, leaves, upstream))
    query, key, value = (x.double() for x in states)
    true = _truth(query, key, value, upstream.double(), slopes.double())
    return {
        what: float((one.double() - other).square().mean().sqrt() / other.square().mean().sqrt())
        for what, one, other in zip(_WHAT, found, true, strict=True)
    }


def _truth(query: Tensor, key: Tensor, value: Tensor, upstream: Tensor, slopes: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients by the textbook, a block of queries at a time; all (1, heads, length, head_dim)."""
    scaling = query.shape[-1] ** -0.5
    results = [torch.zeros_like(x) for x in (query, query, key, value)]
    output, d_query, d_key, d_value = results
    position = torch.arange(query.shape[2], device=query.device)
    for rows in position.split(dense_rows(query, key)):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        distance = rows[:, None] - position
        logits = query[:, :, part] @ key.mT * scaling - slopes[:, None, None] * distance
        weights = logits.masked_fill_(distance < 0, -torch.inf).softmax(dim=-1)
        output[:, :, part] = weights @ value
        grad = upstream[:, :, part]
        d_value += weights.mT @ grad
        d_weights = grad @ value.mT
        d_logits = weights * (d_weights - (weights * d_weights).sum(dim=-1, keepdim=True)) * scaling
        d_query[:, :, part] = d_logits @ key
        d_key += d_logits.mT @ query[:, :, part]
    return tuple(results)

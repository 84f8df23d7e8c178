"""Cases of attention alone, each with all its variants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ..attention.backends import BACKENDS
from ..configuration import AlibiLlamaConfig
from ..errors import one_line
from ..slopes import alibi_slopes
from .settings import VARIANTS, BenchmarkArguments, Case
from .timing import OK, Row, Stopwatch, allocated_peak

__all__ = [
    "CAUSAL",
    "FORWARD",
    "FORWARD_BACKWARD",
    "SDPA",
    "Layer",
    "attention_cases",
    "backend",
    "causal_attention",
    "memory_cases",
]

CAUSAL, SDPA, DENSE, EAGER, FLEX = VARIANTS
FORWARD, FORWARD_BACKWARD = "forward", "forward_backward"

# (batch, heads, length, length) matrices in float32 that a variant holds at its peak, measured with allocated_peak;
# what else it holds is at most this many times the queries.
_SQUARES = {DENSE: 3.0, EAGER: 5.0}
_LINEAR = 16


class Layer(nn.Module):
    """What a backend sees of a self-attention layer."""

    def __init__(self, heads: int, slopes: list[float] | None = None) -> None:
        super().__init__()
        self.is_causal = True
        self.config = AlibiLlamaConfig(
            num_attention_heads=heads, num_key_value_heads=heads, hidden_size=heads, alibi_slopes=slopes
        )


class _Attention:
    """Random queries, keys and values of one length, and every variant that attends with them."""

    def __init__(self, args: BenchmarkArguments, length: int, device: torch.device, backward: bool = False) -> None:
        torch.manual_seed(args.seed)
        dtype = getattr(torch, args.dtype)
        key_heads = args.key_value_heads or args.heads
        self.inputs = tuple(
            torch.randn(
                args.sequences(length), heads, length, args.head_dim, dtype=dtype, device=device, requires_grad=backward
            )
            for heads in (args.heads, key_heads, key_heads)
        )
        query = self.inputs[0]
        self.gradient = torch.randn(query.transpose(1, 2).shape, dtype=dtype, device=device) if backward else None
        self.held = dict.fromkeys(args.variants or VARIANTS, 0)
        """Bytes of what exists before a variant is called, beside the inputs."""
        layer = Layer(args.heads).eval()
        self.variants: dict[str, Callable[[], object] | str] = {}
        for name in self.held:
            squares = _SQUARES.get(name, 0.0) * args.sequences(length) * args.heads * length**2 * 4
            reason = args.why_not(squares + _LINEAR * query.nbytes)
            if reason is None and name == FLEX:
                reason = self._why_no_flex()
            if reason is not None:
                self.variants[name] = reason
            elif name == CAUSAL:
                self.variants[name] = partial(self._run, causal_attention)
            elif name == DENSE:
                bias = _dense_bias(args.heads, length, query)
                self.held[name] = bias.nbytes
                self.variants[name] = partial(self._run, partial(_dense, bias))
            else:
                self.variants[name] = partial(self._run, partial(backend, BACKENDS[name], layer))
        flex = self.variants.get(FLEX, "")
        if not isinstance(flex, str):
            self.variants[FLEX] = _first_call_fails(flex) or flex

    def _why_no_flex(self) -> str | None:
        if FLEX not in BACKENDS:
            return f"no ALiBi backend {FLEX}"
        if self.gradient is not None and self.gradient.device.type == "cpu":
            return f"{FLEX} has no backward on CPU"
        return None

    def _run(self, attend: Callable[..., Tensor]) -> object:
        if self.gradient is None:
            with torch.no_grad():
                return attend(*self.inputs)
        return torch.autograd.grad(attend(*self.inputs), self.inputs, self.gradient)


# All give (batch, queries, heads, head_dim), contiguous, as the attention functions of transformers do.
def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float | None = None) -> Tensor:
    """What a model without ALiBi runs; shapes as in `BACKENDS`."""
    grouped = query.shape[1] != key.shape[1]
    output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
    return output.transpose(1, 2).contiguous()


def _dense(bias: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What transformers does with a `position_bias`: joined with the causal mask at each call, heads repeated."""
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    position = torch.arange(length, device=query.device)
    mask = torch.where(position[:, None] >= position[None, :], bias, torch.finfo(bias.dtype).min)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).contiguous()


def _dense_bias(heads: int, length: int, like: Tensor) -> Tensor:
    """(1, heads, length, length) in the type of `like`: -slope × distance."""
    position = torch.arange(length, device=like.device, dtype=like.dtype)
    return (alibi_slopes(heads).to(like)[:, None, None] * (position[None, :] - position[:, None]))[None]


def backend(
    attention: Callable[..., tuple[Tensor, Any]], layer: nn.Module, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """What a model with ALiBi runs."""
    return attention(layer, query, key, value, None)[0]


def _first_call_fails(run: Callable[[], object]) -> str | None:
    # Compilers fail in ways of their own if a machine lacks something; a variant that is extra must not end the run.
    try:
        run()
    except Exception as error:
        return f"failed: {one_line(error)[:200]}"
    return None


def attention_cases(args: BenchmarkArguments, device: torch.device) -> Iterator[Case]:
    """Attention of random normal queries, keys and values, forward alone and with backward."""

    def measure(length: int, backward: bool, stopwatch: Stopwatch) -> list[Row]:
        attention = _Attention(args, length, device, backward)
        return stopwatch.compare(attention.variants, baseline=CAUSAL)

    for what in (FORWARD, FORWARD_BACKWARD):
        for length in args.lengths:
            run = partial(measure, length, what == FORWARD_BACKWARD)
            yield Case("attention", "attention", what, length, args.sequences(length) * length, run)


def memory_cases(args: BenchmarkArguments, device: torch.device) -> Iterator[Case]:
    """Peak memory of one forward call: with its inputs and output, and how many times those that is."""

    def measure(length: int, stopwatch: Stopwatch) -> list[Row]:
        attention = _Attention(args, length, device)
        inputs = sum(tensor.nbytes for tensor in attention.inputs)
        peaks = {
            name: inputs + attention.held[name] + allocated_peak(run, device)
            for name, run in attention.variants.items()
            if not isinstance(run, str)
        }
        return [
            {
                "variant": name,
                "status": run if isinstance(run, str) else OK,
                "peak_bytes": peaks.get(name),
                "peak_over_inputs": peaks[name] / (inputs + attention.inputs[0].nbytes) if name in peaks else None,
                "ratio": peaks[name] / peaks[CAUSAL] if {name, CAUSAL} <= peaks.keys() else None,
            }
            for name, run in attention.variants.items()
        ]

    for length in args.lengths:
        yield Case("memory", "attention", FORWARD, length, args.sequences(length) * length, partial(measure, length))

"""What `hf-alibi benchmark` times: its settings, and the cases of attention alone, each with all its sides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .attention import BACKENDS
from .configuration import AlibiLlamaConfig
from .data import PYTHON_DOCS
from .errors import InputError
from .settings import one_line
from .slopes import alibi_slopes
from .timing import OK, Row, Stopwatch, allocated_peak

__all__ = [
    "CAUSAL",
    "FORWARD",
    "FORWARD_BACKWARD",
    "PARTS",
    "SDPA",
    "BenchmarkArguments",
    "Case",
    "attention_cases",
    "causal_attention",
    "memory_cases",
]

PARTS = ("attention", "memory", "model", "decode", "sequence", "activations")
CAUSAL, SDPA, DENSE, EAGER, FLEX = "causal", "sdpa", "dense_bias", "eager", "flex_attention"
FORWARD, FORWARD_BACKWARD = "forward", "forward_backward"

# (batch, heads, length, length) matrices in float32 that a side holds at its peak, measured with allocated_peak;
# what else it holds is at most so many times the queries.
_SQUARES = {DENSE: 3.0, EAGER: 5.0}
_LINEAR = 16


@dataclass(kw_only=True)
class BenchmarkArguments:
    """What is timed, in which shapes, how often."""

    output_dir: str = field(metadata={"help": "New or empty folder for results and picture."})
    parts: list[str] | None = field(
        default=None,
        metadata={"help": f"Of {' '.join(PARTS)}. Default: all that the settings allow."},
    )
    lengths: list[int] = field(
        default_factory=lambda: [2**power for power in range(9, 17)],
        metadata={"help": "Tokens, for attention and memory."},
    )
    batch_size: int = field(default=1, metadata={"help": "Sequences at a time."})
    heads: int = field(default=12, metadata={"help": "Query heads."})
    key_value_heads: int | None = field(
        default=None, metadata={"help": "Key-value heads for attention and memory. Default: as many as heads."}
    )
    head_dim: int = field(default=64, metadata={"help": "Width of a head."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Type of weights, queries, keys and values."}
    )
    repeats: int = field(default=5, metadata={"help": "Rounds at least, after one that does not count."})
    seconds: float = field(default=1.0, metadata={"help": "Rounds go on until they took this long together."})
    memory_limit: float = field(
        default=8.0, metadata={"help": "GiB; a side that needs more at a length is not run there, and says so."}
    )
    model_lengths: list[int] = field(
        default_factory=lambda: [512, 2048], metadata={"help": "Tokens, for model: forward and training step."}
    )
    model_layers: int = field(default=12, metadata={"help": "Layers, for model and decode."})
    model_key_value_heads: int = field(default=4, metadata={"help": "Of the LLaMA shape, for model and decode."})
    vocab_size: int = field(default=50257, metadata={"help": "Vocabulary, for model and decode."})
    contexts: list[int] = field(
        default_factory=lambda: [2048, 32768], metadata={"help": "Tokens in the cache, for decode."}
    )
    sequence_lengths: list[int] = field(
        default_factory=lambda: [10_000, 1_000_000],
        metadata={"help": "Tokens of one sequence, for sequence: the perplexity of a small model."},
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint for activations; converted here if it has no ALiBi yet."}
    )
    text: str = field(default=PYTHON_DOCS, metadata={"help": f"For activations: a text file, or {PYTHON_DOCS}."})
    activation_lengths: list[int] = field(
        default_factory=lambda: [2048, 8192], metadata={"help": "Tokens of text, for activations."}
    )
    seed: int = field(default=0, metadata={"help": "Of random weights and inputs."})

    def __post_init__(self) -> None:
        if self.parts is None:
            self.parts = [part for part in PARTS if part != "activations" or self.model_name_or_path]
        if unknown := set(self.parts) - set(PARTS):
            raise InputError(f"parts names {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
        if "activations" in self.parts and self.model_name_or_path is None:
            raise InputError("activations are those of a model; set model_name_or_path, or leave that part out")
        for name in ("lengths", "model_lengths", "contexts", "sequence_lengths", "activation_lengths"):
            values = sorted(set(getattr(self, name)))
            setattr(self, name, values)
            if values[0] < 2:
                raise InputError(f"{name} is {values}; each must be at least 2 tokens")
        for name in ("batch_size", "heads", "head_dim", "repeats", "memory_limit", "model_layers", "vocab_size"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be above 0")
        builds_models = {"model", "decode"} & set(self.parts)
        for name in ("key_value_heads", "model_key_value_heads") if builds_models else ("key_value_heads",):
            count = getattr(self, name)
            if count is not None and (count < 1 or self.heads % count):
                raise InputError(f"{name} is {count}; it must divide the {self.heads} heads")

    def why_not(self, needed: float) -> str | None:
        """The reason not to run what takes `needed` bytes, None where it fits."""
        if needed <= self.memory_limit * 2**30:
            return None
        return f"needs about {needed / 2**30:.3g} GiB, memory_limit is {self.memory_limit:g}"


@dataclass(frozen=True)
class Case:
    """One comparison. Its rows have these fields, and those that `measure` gives."""

    part: str
    subject: str
    what: str
    length: int
    tokens: int
    """That one call reads or makes, for the cost per token."""
    measure: Callable[[Stopwatch], list[Row]]

    def rows(self, stopwatch: Stopwatch) -> list[Row]:
        """Measure; one row a side."""
        labels = {"part": self.part, "subject": self.subject, "what": self.what, "length": self.length}
        rows = [{**labels, **row} for row in self.measure(stopwatch)]
        for row in rows:
            if row.get("seconds") is not None and "microseconds_per_token" not in row:
                row["microseconds_per_token"] = row["seconds"] / self.tokens * 1e6
        return rows


class _Layer(nn.Module):
    """What a backend sees of a self-attention layer."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.is_causal = True
        self.config = AlibiLlamaConfig(num_attention_heads=heads, num_key_value_heads=heads, hidden_size=heads)


class _Attention:
    """Random queries, keys and values of one length, and every side that attends with them."""

    def __init__(self, args: BenchmarkArguments, length: int, device: torch.device, backward: bool = False) -> None:
        torch.manual_seed(args.seed)
        dtype = getattr(torch, args.dtype)
        key_heads = args.key_value_heads or args.heads
        self.inputs = tuple(
            torch.randn(
                args.batch_size, heads, length, args.head_dim, dtype=dtype, device=device, requires_grad=backward
            )
            for heads in (args.heads, key_heads, key_heads)
        )
        query = self.inputs[0]
        self.gradient = torch.randn(query.transpose(1, 2).shape, dtype=dtype, device=device) if backward else None
        self.held = dict.fromkeys((CAUSAL, SDPA, DENSE, EAGER, FLEX), 0)
        """Bytes of what exists before a side is called, beside the inputs."""
        layer = _Layer(args.heads).eval()
        self.sides: dict[str, Callable[[], object] | str] = {}
        for name in self.held:
            squares = _SQUARES.get(name, 0.0) * args.batch_size * args.heads * length**2 * 4
            reason = args.why_not(squares + _LINEAR * query.nbytes)
            if reason is None and name == FLEX:
                reason = self._why_no_flex()
            if reason is not None:
                self.sides[name] = reason
            elif name == CAUSAL:
                self.sides[name] = partial(self._run, causal_attention)
            elif name == DENSE:
                bias = _dense_bias(args.heads, length, query)
                self.held[name] = bias.nbytes
                self.sides[name] = partial(self._run, partial(_dense, bias))
            else:
                self.sides[name] = partial(self._run, partial(_backend, BACKENDS[name], layer))
        flex = self.sides[FLEX]
        if not isinstance(flex, str):
            self.sides[FLEX] = _first_call_fails(flex) or flex

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


def _backend(
    attention: Callable[..., tuple[Tensor, Any]], layer: nn.Module, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    return attention(layer, query, key, value, None)[0]


def _first_call_fails(run: Callable[[], object]) -> str | None:
    # Compilers fail in ways of their own where a machine lacks something; a side that is extra must not end the run.
    try:
        run()
    except Exception as error:
        return f"failed: {one_line(error)[:200]}"
    return None


def attention_cases(args: BenchmarkArguments, device: torch.device) -> Iterator[Case]:
    """Attention of random normal queries, keys and values, forward alone and with backward."""

    def measure(length: int, backward: bool, stopwatch: Stopwatch) -> list[Row]:
        attention = _Attention(args, length, device, backward)
        return stopwatch.compare(attention.sides, baseline=CAUSAL)

    for what in (FORWARD, FORWARD_BACKWARD):
        for length in args.lengths:
            run = partial(measure, length, what == FORWARD_BACKWARD)
            yield Case("attention", "attention", what, length, args.batch_size * length, run)


def memory_cases(args: BenchmarkArguments, device: torch.device) -> Iterator[Case]:
    """Peak memory of one forward call: with its inputs and output, and how many times those that is."""

    def measure(length: int, stopwatch: Stopwatch) -> list[Row]:
        attention = _Attention(args, length, device)
        inputs = sum(tensor.nbytes for tensor in attention.inputs)
        peaks = {
            name: inputs + attention.held[name] + allocated_peak(run, device)
            for name, run in attention.sides.items()
            if not isinstance(run, str)
        }
        return [
            {
                "side": name,
                "status": run if isinstance(run, str) else OK,
                "peak_bytes": peaks.get(name),
                "peak_over_inputs": peaks[name] / (inputs + attention.inputs[0].nbytes) if name in peaks else None,
                "ratio": peaks[name] / peaks[CAUSAL] if {name, CAUSAL} <= peaks.keys() else None,
            }
            for name, run in attention.sides.items()
        ]

    for length in args.lengths:
        yield Case("memory", "attention", FORWARD, length, args.batch_size * length, partial(measure, length))

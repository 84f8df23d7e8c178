"""What a benchmark is told, and what one of its comparisons is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ..errors import InputError
from ..training.settings import PYTHON_DOCS

if TYPE_CHECKING:
    from collections.abc import Callable

    from .timing import Row, Stopwatch

__all__ = ["PARTS", "VARIANTS", "BenchmarkArguments", "Case"]

PARTS = ("attention", "memory", "model", "decode", "sequence", "activations", "errors")

VARIANTS = ("causal", "sdpa", "dense_bias", "eager", "flex_attention")
"""Of attention, the first is what ratios are to."""


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
    error_lengths: list[int] = field(
        default_factory=lambda: [1024, 4096], metadata={"help": "Tokens, for errors: outputs and gradients to float64."}
    )
    variants: list[str] | None = field(
        default=None, metadata={"help": f"Of {' '.join(VARIANTS)}, for attention and memory. Default: all."}
    )
    batch_size: int = field(default=1, metadata={"help": "Sequences at a time."})
    batch_tokens: int = field(
        default=0, metadata={"help": "For attention and memory: more sequences, up to this many tokens at a time."}
    )
    heads: int = field(default=12, metadata={"help": "Query heads."})
    key_value_heads: int | None = field(
        default=None, metadata={"help": "Key-value heads for attention and memory. Default: as many as heads."}
    )
    head_dim: int = field(default=64, metadata={"help": "Width of a head."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Type of weights, queries, keys and values."}
    )
    repeats: int = field(default=5, metadata={"help": "Rounds at least, after one that does not count."})
    seconds: float = field(default=1.0, metadata={"help": "Rounds are added until they took this long together."})
    memory_limit: float = field(
        default=8.0, metadata={"help": "GiB; a variant that needs more at a length is not run there, and says so."}
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
        if self.variants is not None and (set(self.variants) - set(VARIANTS) or VARIANTS[0] not in self.variants):
            raise InputError(f"variants is {self.variants}; give {VARIANTS[0]} and others of {', '.join(VARIANTS)}")
        for name in ("lengths", "error_lengths", "model_lengths", "contexts", "sequence_lengths", "activation_lengths"):
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

    def sequences(self, length: int) -> int:
        """Of this length at a time, for attention and memory."""
        return max(self.batch_size, self.batch_tokens // length)

    def why_not(self, needed: float) -> str | None:
        """The reason not to run what takes `needed` bytes, None if it fits."""
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
        """Measure; one row a variant."""
        labels = {"part": self.part, "subject": self.subject, "what": self.what, "length": self.length}
        rows = [{**labels, **row} for row in self.measure(stopwatch)]
        for row in rows:
            if row.get("seconds") is not None and "microseconds_per_token" not in row:
                row["microseconds_per_token"] = row["seconds"] / self.tokens * 1e6
        return rows

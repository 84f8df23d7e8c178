"""The settings of a comparison."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..errors import InputError
from ..utils import read_mapping
from .probe_tasks import TASKS
from .protocol import Protocol

if TYPE_CHECKING:
    from .probe_prompts import Probe

__all__ = ["NO_MODEL", "ComparisonArguments", "ControlArguments", "ExtrapolateArguments"]

_MULTIPLES = (1, 2, 4, 8, 16)
_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_DEFAULT_TASKS = ("passkey",)
_CASES_OF_A_CONVERSION = 4
NO_MODEL = "none"


@dataclass(kw_only=True)
class ComparisonArguments:
    """How models are compared, also in a conversion."""

    lengths: list[int] | None = field(
        default=None, metadata={"help": "Evaluation lengths in tokens. Default: the training length x 1 2 4 8 16."}
    )
    scored_tokens: int | None = field(
        default=None,
        metadata={"help": "Held-out tokens scored, a multiple of every length. Default: 4 x the longest length."},
    )
    stride: int | None = field(
        default=None,
        metadata={
            "help": "Stride of the sliding window at every length, at most an eighth of the shortest length. Default: "
            "an eighth of each length."
        },
    )
    window_bos: bool | None = field(
        default=None,
        metadata={
            "help": "Begin each window with the tokenizer's beginning-of-sequence token, in place of its oldest token. "
            "Default: if documents begin with it."
        },
    )
    baselines: list[str] | None = field(
        default=None,
        metadata={
            "help": "What models are also compared with: rope_linear rope_dynamic rope_yarn sliding_window "
            "alibi_linear alibi_ntk; all: those that fit each model. Default: none."
        },
    )
    probes: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Tasks of retrieval that models are asked, of {' '.join(TASKS)}. Default: passkey; in a "
            "conversion all, each only of models that can do it at the shortest length."
        },
    )
    probe_cases: int | None = field(
        default=None,
        metadata={
            "help": "Cases of each task, length and depth; 0: no probes. Default: none, "
            f"and {_CASES_OF_A_CONVERSION} in a conversion."
        },
    )
    probe_depths: list[float] | None = field(
        default=None, metadata={"help": "Where the answer stands, from 0 to 1. Default: 0 0.25 0.5 0.75 1."}
    )
    probe_lengths: list[int] | None = field(
        default=None, metadata={"help": "Lengths of the prompts in tokens, answer included. Default: lengths."}
    )

    def __post_init__(self) -> None:
        if self.probe_cases is not None and self.probe_cases < 0:
            raise InputError(f"probe_cases is {self.probe_cases}; give a number of cases, or 0 for no probes")
        for name, values, allowed, what in (
            ("probe_depths", self.probe_depths, lambda depth: 0 <= depth <= 1, "different numbers from 0 to 1"),
            ("probe_lengths", self.probe_lengths, lambda length: length >= 1, "different numbers of at least 1 token"),
            ("probes", self.probes, lambda task: task in TASKS, f"different ones of {', '.join(TASKS)}"),
        ):
            if len(set(values or ())) != len(values or ()) or not all(map(allowed, values or ())):
                raise InputError(f"{name} is {values}; give {what}")


@dataclass(kw_only=True)
class ExtrapolateArguments(ComparisonArguments):
    """Which models are compared, at which lengths."""

    # Only beside None does HfArgumentParser take a mapping as a string, which is then JSON.
    models: dict[str, str] | str | None = field(
        default=None,
        metadata={"help": 'Name to folder or hub name, e.g. {"alibi": "runs/alibi", "original": "gpt2"}.'},
    )
    train_length: int = field(metadata={"help": "Length in tokens that the models were trained at."})
    output_dir: str = field(metadata={"help": "New or empty folder for results, report and plots."})
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention backend, such as eager or sdpa. Default: the library's choice."},
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32", metadata={"help": "Type of the weights; auto: as saved."}
    )
    probe_if_known: bool = field(
        default=False,
        metadata={"help": "Ask models only the tasks that they can do at the shortest length, as a conversion does."},
    )
    cropped: list[str] | None = field(
        default=None,
        metadata={
            "help": "Models also shown with their context cropped to train_length. Default: those without "
            f"ALiBi; {NO_MODEL}: no model."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.models = self.sources()
        for name in self.cropped or ():
            if name not in self.sources() and self.cropped != [NO_MODEL]:
                raise InputError(
                    f"cropped names {name!r}; the models are {', '.join(self.sources())} ({NO_MODEL}: no model)"
                )
        if self.train_length < 1 or min(self.lengths or [1]) < 1:
            raise InputError(f"train_length {self.train_length}, lengths {self.lengths}: each must be at least 1 token")

    @classmethod
    def of(cls, comparison: ComparisonArguments, **fields: Any) -> ExtrapolateArguments:
        """The settings of `comparison`, with `fields` for the others."""
        shared = {one.name: getattr(comparison, one.name) for one in dataclasses.fields(ComparisonArguments)}
        return cls(**shared, **fields)

    def sources(self) -> dict[str, str]:
        """Return the models: name to folder or hub name."""
        models = read_mapping(self.models, "models", "{name: folder or hub name, ...}")
        if not all(isinstance(source, str) for source in models.values()):
            raise InputError(f"models is {models!r}; it must be a mapping, {{name: folder or hub name, ...}}")
        return models

    def probe(self) -> Probe | None:
        """Return what is asked with the defaults filled in, None if nothing is."""
        from .probe_prompts import Probe  # takes torch, and these settings are read before it is imported

        if not self.probe_cases:
            return None
        return Probe(
            lengths=sorted(self.probe_lengths or self.protocol().lengths),
            depths=sorted(self.probe_depths or _DEPTHS),
            cases=self.probe_cases,
            tasks=self.probes or _DEFAULT_TASKS,
            if_known=self.probe_if_known,
        )

    def protocol(self) -> Protocol:
        """Return lengths and scored tokens with the defaults filled in."""
        lengths = sorted(self.lengths or [self.train_length * multiple for multiple in _MULTIPLES])
        return Protocol(
            lengths=lengths,
            train_length=self.train_length,
            scored_tokens=4 * math.lcm(*lengths) if self.scored_tokens is None else self.scored_tokens,
            stride=self.stride,
        )


@dataclass(kw_only=True)
class ControlArguments(ComparisonArguments):
    """What a converted model is compared with, and how."""

    control: bool = field(
        default=False,
        metadata={"help": "Also train the unconverted model on the same text, and compare with that."},
    )
    control_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Its learning rate, the same for all weights. Default: that of the converted model."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.probe_cases is None:
            self.probe_cases = _CASES_OF_A_CONVERSION
        self.probes = self.probes or list(TASKS)

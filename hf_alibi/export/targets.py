"""What each engine can hold of a converted model: data, and the refusal of everything else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..configuration import partial_layers, slopes_of_layer
from ..slopes import alibi_slopes, scale_slopes
from .names import GGUF_TYPES

__all__ = ["TARGETS", "Target", "layer_slopes", "support_table"]


@dataclass(frozen=True)
class Target:
    """What an engine computes with ALiBi."""

    engine: str
    """Its name, as its users write it."""
    families: tuple[str, ...]
    """Model types, as they were before the conversion; those that were tested."""
    any_slopes: bool = True
    """Whether slopes may differ from the paper's and from layer to layer. Then heads may be global."""
    sink_tokens: bool = False
    dynamic_scaling: bool = False
    windows: bool = False
    """Whether layers may see a sliding window only."""
    temperature: bool = False
    """Whether logits may be sharpened by what YaRN and LongRoPE did, which a conversion keeps: see `NoRotation`."""
    weights: str = "float32"
    """Types of the weights."""
    tensor_parallel: str = "no"

    def refusal(self, config: Any) -> str | None:
        """Why the engine cannot run a model of this config; None if it can."""
        kind = str(config.model_type)
        if not kind.startswith("alibi_"):
            return f"it is a plain {kind!r} model; convert it first, by `hf-alibi convert` or hf_alibi.apply_alibi"
        family, scaling = kind.removeprefix("alibi_"), config.alibi_scaling or {}
        if family not in self.families:
            return f"no model of type {family!r}; {self.engine} is given {', '.join(self.families)}"
        if config.alibi_sink_tokens and not self.sink_tokens:
            return f"no sink tokens, and the model has {config.alibi_sink_tokens}: convert with sink_tokens 0"
        if scaling.get("type") == "dynamic" and not self.dynamic_scaling:
            return "no slopes that change with the length: set alibi_scaling to null, linear or ntk in config.json"
        if (partial := partial_layers(config)) and not self.windows:
            return f"no layers that see a part of the sequence ({', '.join(partial)}) beside ALiBi"
        rotary = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
        if rotary in _SHARPENING and not self.temperature:
            return f"no temperature, which the conversion kept of {rotary!r}: convert the model without that scaling"
        if not self.any_slopes:
            papers = alibi_slopes(config.num_attention_heads).tolist()
            others = [layer for layer in layer_slopes(config) if layer != papers]
            if others:
                what = "global heads" if any(0 in layer for layer in others) else "other slopes than the paper's"
                return f"no {what}, in {len(others)} of {config.num_hidden_layers} layers: its format has none"
        return None


# Scalings of rotary positions that also multiply all logits.
_SHARPENING = ("yarn", "longrope")
# Families with transformers' plain attention, on plain caches.
_DECODERS = (
    *("gpt2", "llama", "mistral", "qwen2", "qwen3", "olmo", "olmo2", "smollm3", "granite", "phi3", "starcoder2"),
    *("stablelm", "helium", "gpt_neox", "cohere", "gemma", "seed_oss", "opt"),
)
_LLAMA_SHAPED = ("llama", "mistral", "qwen2")

TARGETS = {
    "vllm": Target(
        engine="vLLM",
        families=tuple(family for family in _DECODERS if family != "helium"),  # vLLM has no class for it
        weights="those of vLLM; float32 was compared",
        tensor_parallel="yes",
    ),
    "gguf": Target(
        engine="llama.cpp",
        families=("gpt2", *_LLAMA_SHAPED),
        any_slopes=False,
        weights=", ".join(GGUF_TYPES),
    ),
    "onnx": Target(
        engine="ONNX Runtime",
        families=_DECODERS,
        sink_tokens=True,
        dynamic_scaling=True,
        temperature=True,
    ),
}
"""By the name that `hf-alibi export` and `hf-alibi verify` take; see `TARGET_NAMES`."""


def layer_slopes(config: Any) -> list[list[float]]:
    """Slopes of every layer with self-attention, one for each of its heads, after scaling by a constant."""
    plain = alibi_slopes(config.num_attention_heads).tolist()
    rows = [slopes_of_layer(config.alibi_slopes, layer) or plain for layer in range(config.num_hidden_layers)]
    scaled = [scale_slopes(torch.tensor(row, dtype=torch.float32), config.alibi_scaling) for row in rows]
    return [row.tolist() for row in scaled]


def support_table() -> str:
    """The table of docs/export.md."""

    def said(allowed: bool) -> str:
        return "yes" if allowed else "refused"

    targets = TARGETS.values()
    rows = {
        "": [target.engine for target in targets],
        "families": [", ".join(target.families) for target in targets],
        "the paper's slopes": ["yes" for _ in targets],
        "other slopes, `linear` and `ntk` scaling, global heads": [said(target.any_slopes) for target in targets],
        "`dynamic` scaling": [said(target.dynamic_scaling) for target in targets],
        "sink tokens": [said(target.sink_tokens) for target in targets],
        "the temperature of YaRN or LongRoPE": [said(target.temperature) for target in targets],
        "layers with a sliding window": [said(target.windows) for target in targets],
        "weights": [target.weights for target in targets],
        "tensor parallel": [target.tensor_parallel for target in targets],
    }
    lines = [f"| {' | '.join([name, *cells])} |" for name, cells in rows.items()]
    return "\n".join([lines[0], "| --- " * (len(TARGETS) + 1) + "|", *lines[1:]])

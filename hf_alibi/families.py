"""The model families that ALiBi converts, as data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "FAMILIES",
    "ModelFamily",
    "family_of",
    "has_no_positions",
    "is_alibi",
    "position_limit",
    "self_attentions",
    "supported_families",
]


@dataclass(frozen=True)
class ModelFamily:
    """Where a family keeps its positions and its self-attention."""

    model_type: str
    """`config.model_type` of the unconverted model."""
    positions: str
    """Module of the base model that makes positions."""
    kind: Literal["learned", "rotary"]
    """A table that is added to the embeddings, or rotations of queries and keys."""
    attention: str
    """Class name of the self-attention layers."""


FAMILIES = {
    family.model_type: family
    for family in (
        ModelFamily("gpt2", positions="wpe", kind="learned", attention="GPT2Attention"),
        ModelFamily("llama", positions="rotary_emb", kind="rotary", attention="LlamaAttention"),
    )
}


def supported_families() -> tuple[str, ...]:
    """Model types that `apply_alibi` converts.

    >>> supported_families()
    ('gpt2', 'llama')
    """
    return tuple(FAMILIES)


def is_alibi(config: PreTrainedConfig) -> bool:
    """Whether `config` is of a converted model."""
    return str(config.model_type).startswith("alibi_")


def has_no_positions(config: PreTrainedConfig) -> bool:
    """Whether `config` is of a converted model whose slopes are all 0, which leaves it without any positions."""
    return is_alibi(config) and config.alibi_slopes is not None and not any(config.alibi_slopes)


def family_of(config: PreTrainedConfig) -> ModelFamily:
    """The family of a model, converted or not. Raises ValueError, with what is supported, where there is none."""
    model_type = str(config.model_type).removeprefix("alibi_")
    if model_type not in FAMILIES:
        raise ValueError(
            f"no ALiBi family for model_type {model_type!r}; supported: {', '.join(FAMILIES)}; "
            "see hf_alibi.supported_families()"
        )
    return FAMILIES[model_type]


def self_attentions(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of each self-attention layer, in order; cross-attention is left out."""
    attention = family_of(model.config).attention
    for name, module in model.named_modules():
        if type(module).__name__ == attention and not getattr(module, "is_cross_attention", False):
            yield name, module


def position_limit(model: PreTrainedModel) -> int | None:
    """Tokens that the model can read at most: the rows of its learned positions; None where nothing limits it."""
    if str(model.config.model_type).removeprefix("alibi_") not in FAMILIES:
        return None
    positions = getattr(model.base_model, family_of(model.config).positions)
    return positions.num_embeddings if isinstance(positions, nn.Embedding) else None

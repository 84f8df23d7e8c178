"""Where a model keeps its text decoder, its causal self-attention and its positions: read off the model itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..configuration import text_config
from .compat import asks_for_a_backend
from .own_attention import is_own_attention
from .positions import NoPositions, NoRotation

__all__ = [
    "has_no_positions",
    "is_alibi",
    "is_rotary",
    "position_limit",
    "position_modules",
    "self_attentions",
    "text_decoder",
]

# What transformers calls a table of positions, learned or sinusoidal, that is added to the embeddings.
_TABLE_NAMES = {"wpe", "embed_positions", "position_embeddings"}
# Attention that may stand inside a text decoder and does not read the text so far.
_OTHER_ATTENTION = ("CrossAttention", "Vision", "Audio")


def is_alibi(config: PreTrainedConfig) -> bool:
    """Whether `config` is of a converted model."""
    return str(config.model_type).startswith("alibi_")


def has_no_positions(config: PreTrainedConfig) -> bool:
    """Whether `config` is of a converted model whose slopes are all 0, which leaves it without any positions."""
    slopes = text_config(config).alibi_slopes if is_alibi(config) else None
    return slopes is not None and not any(slopes)


def text_decoder(model: PreTrainedModel) -> nn.Module:
    """The part of `model` that reads and writes text from left to right; `model` itself if it is nothing else."""
    decoder = model
    while True:
        inner: Any = decoder.get_decoder()
        # Some families call the projection to the vocabulary their decoder.
        if inner is decoder or not isinstance(inner, PreTrainedModel):
            base: nn.Module = decoder.base_model
            return base
        decoder = inner


def self_attentions(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of each causal self-attention layer of the text decoder, in order, without cross-attention."""
    inside = {id(module) for module in text_decoder(model).modules()}
    for name, module in model.named_modules():
        if id(module) in inside and _is_self_attention(module):
            yield name, module


def _is_self_attention(module: nn.Module) -> bool:
    name = type(module).__name__
    other = getattr(module, "is_cross_attention", False) or any(kind in name for kind in _OTHER_ATTENTION)
    causal = getattr(module, "is_causal", True) is not False
    return causal and not other and (is_own_attention(module) or asks_for_a_backend(type(module).forward))


def position_modules(model: PreTrainedModel) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Parent, name and module of everything that makes positions for the text decoder, or stands for what did.

    Encoders that stand inside the decoder keep theirs: a model inside it without causal self-attention is passed over.
    """
    layers = {id(layer) for _, layer in self_attentions(model)}

    def inside(parent: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
        for name, module in parent.named_children():
            if isinstance(module, (NoPositions, NoRotation)) or name in _TABLE_NAMES or is_rotary(module):
                yield parent, name, module
            elif not isinstance(module, PreTrainedModel) or any(id(part) in layers for part in module.modules()):
                yield from inside(module)

    yield from inside(text_decoder(model))


def is_rotary(module: nn.Module) -> bool:
    """Whether a module makes the rotations of queries and keys."""
    buffers = module.named_buffers(recurse=False)
    return "Rotary" in type(module).__name__ and any(name.endswith("inv_freq") for name, _ in buffers)


def position_limit(model: PreTrainedModel) -> int | None:
    """Tokens that the model can read at most: what its table of positions has room for; None if nothing limits it."""
    for _, _, module in position_modules(model):
        if isinstance(module, nn.Embedding):
            # Tables that keep rows for padding begin after them.
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - skipped - int(getattr(module, "offset", 0))
    return None

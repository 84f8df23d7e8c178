"""Where a model keeps its text decoder, its causal self-attention and its positions: read off the model itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..configuration import text_config
from ..slopes import slopes_by_layer
from .compat import asks_for_a_backend
from .own_attention import is_own_attention
from .positions import NoPositions, NoRotation

__all__ = ["TextDecoder", "has_no_positions", "is_alibi", "is_rotary", "text_decoder"]

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
    return slopes is not None and not any(map(any, slopes_by_layer(slopes)))


@dataclass(frozen=True)
class TextDecoder:
    """The part of a model that reads and writes text from left to right, and what is in it that ALiBi concerns."""

    module: nn.Module
    config: Any
    """That of the language model; its own copy in some families."""
    self_attentions: tuple[tuple[str, nn.Module], ...]
    """Name in the model and module of each causal self-attention layer, in order, without cross-attention."""
    positions: tuple[tuple[nn.Module, str, nn.Module], ...]
    """Parent, name and module of everything that makes positions, or stands for what did.

    Encoders that stand inside the decoder keep theirs: a model inside it without causal self-attention is passed over.
    """

    @property
    def limit(self) -> int | None:
        """Tokens that can be read at most: what a table of positions has room for; None if nothing limits it."""
        for _, _, module in self.positions:
            if isinstance(module, nn.Embedding):
                # Tables that keep rows for padding begin after them.
                skipped = 0 if module.padding_idx is None else module.padding_idx + 1
                return module.num_embeddings - skipped - int(getattr(module, "offset", 0))
        return None


def text_decoder(model: PreTrainedModel) -> TextDecoder:
    """Find the text decoder of `model`, which is all of it if it does nothing else."""
    module = _find(model)
    inside = {id(part) for part in module.modules()}
    attentions = [
        (name, part) for name, part in model.named_modules() if id(part) in inside and _is_self_attention(part)
    ]
    positions = _positions(module, {id(part) for _, part in attentions})
    config = getattr(module, "config", None) or text_config(model.config)
    return TextDecoder(module, config, tuple(attentions), tuple(positions))


def _find(model: PreTrainedModel) -> nn.Module:
    decoder = model
    while True:
        inner: Any = decoder.get_decoder()
        # Some families call the projection to the vocabulary their decoder.
        if inner is decoder or not isinstance(inner, PreTrainedModel):
            base: nn.Module = decoder.base_model
            return base
        decoder = inner


def _is_self_attention(module: nn.Module) -> bool:
    name = type(module).__name__
    other = getattr(module, "is_cross_attention", False) or any(kind in name for kind in _OTHER_ATTENTION)
    causal = getattr(module, "is_causal", True) is not False
    return causal and not other and (is_own_attention(module) or asks_for_a_backend(type(module).forward))


def _positions(parent: nn.Module, attentions: set[int]) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for name, module in parent.named_children():
        if isinstance(module, (NoPositions, NoRotation)) or name in _TABLE_NAMES or is_rotary(module):
            yield parent, name, module
        elif not isinstance(module, PreTrainedModel) or any(id(part) in attentions for part in module.modules()):
            yield from _positions(module, attentions)


def is_rotary(module: nn.Module) -> bool:
    """Whether a module makes the rotations of queries and keys."""
    buffers = module.named_buffers(recurse=False)
    return "Rotary" in type(module).__name__ and any(name.endswith("inv_freq") for name, _ in buffers)

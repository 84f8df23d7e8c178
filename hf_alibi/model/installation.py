"""Putting ALiBi into a model whose config is already an ALiBi config: positions out, backends in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..attention.backends import alibi_name
from ..configuration import Converted, check_slopes, num_heads, slopes_of_layer, text_config
from .anatomy import TextDecoder, is_rotary
from .compat import record_outputs_by_class
from .families import counts_other_layers, refusal, stock_type
from .own_attention import convert_own_attention
from .positions import NoPositions, NoRotation

__all__ = ["LayerConfig", "check_attention", "check_family", "install_alibi", "replace_positions", "undone_on_error"]


class LayerConfig:
    """A self-attention layer's view of its config, whose attention implementation is the ALiBi form.

    The `alibi_*` fields are read from the config of the whole language model, everything else is read from, and set
    on, the layer's own (some decoders have a copy). So mask builders, `generate` and every other part of transformers
    see the standard name, and switching it later still gives ALiBi, or an error if a name has no ALiBi form.

    `layer` is the number of the layer among those with self-attention.
    """

    def __init__(self, config: Any, alibi: Any, layer: int) -> None:
        self.__dict__.update(_config=config, _alibi=alibi, _layer=layer)

    @property
    def alibi_slopes(self) -> Any:
        """Those of this layer."""
        return slopes_of_layer(self.__dict__["_alibi"].alibi_slopes, self.__dict__["_layer"])

    @property
    def _attn_implementation(self) -> str:
        return alibi_name(self.__dict__["_config"]._attn_implementation)

    def __getattr__(self, name: str) -> Any:
        # Python asks for special methods when it copies and pickles; the config's must not answer for the view.
        if name.startswith("__") or "_config" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["_alibi" if name.startswith("alibi_") else "_config"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_alibi" if name.startswith("alibi_") else "_config"], name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def check_family(config: Any) -> None:
    """Raise ValueError, with the reason, for a config, or the ALiBi form of one, whose family is refused."""
    reason = refusal(text_config(config)) or refusal(config)
    if reason is not None:
        raise ValueError(f"no ALiBi for model_type {stock_type(config)!r}: {reason}; see hf_alibi.supported_families()")


def check_attention(model: PreTrainedModel, decoder: TextDecoder) -> None:
    """Raise ValueError for a model in which ALiBi finds no self-attention, or less than its config says there is."""
    found, expected = len(decoder.self_attentions), _attention_layers(decoder.config)
    if not found:
        raise ValueError(f"{type(model).__name__} has no causal self-attention that ALiBi could be added to")
    if found < expected:
        raise ValueError(
            f"{type(model).__name__} has {expected} layers with self-attention by its config, but ALiBi finds {found}, "
            "so that some would run without the bias; use a version of transformers that hf_alibi was tested "
            "with, or set num_hidden_layers if layers were removed"
        )


def _attention_layers(config: Any) -> int:
    """How many layers of a text decoder have self-attention, by its config."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return sum(kind == "hybrid" or ("attention" in kind and "linear" not in kind) for kind in kinds)
    # Beside no layer_types, which older versions of transformers do not have for hybrids.
    if counts_other_layers(config):
        return 1
    layers = getattr(config, "decoder_layers", None) or getattr(config, "num_hidden_layers", None) or 1
    return int(layers) - len(getattr(config, "cross_attention_layers", None) or ())


def install_alibi(
    model: PreTrainedModel,
    decoder: TextDecoder,
    model_class: Callable[[type[PreTrainedModel]], type[PreTrainedModel] | None],
) -> None:
    """Turn `model`, whose config is already the ALiBi one, and the models inside it into their ALiBi form, in place.

    Args:
        model: freshly built, or unconverted with its config replaced.
        decoder: its text decoder.
        model_class: gives the ALiBi form of a class of transformers, None if there is none.

    Installing twice changes nothing, so a model may be built of parts that did it already.
    """
    for part in model.modules():
        if not (isinstance(part, PreTrainedModel) and isinstance(part.config, Converted)):
            continue
        made = model_class(type(part))
        if made is not None:
            part.__class__ = made
            record_outputs_by_class(part)
        if part.loss_type is None:
            # What transformers falls back to, but with a warning on the way that torch.compile cannot trace.
            part.loss_type = "ForCausalLM"
    # A plain checkpoint brings its table along; that it is not loaded is the point.
    ignored = {rf"(^|\.){re.escape(name)}\." for name in replace_positions(decoder)}
    known = model._keys_to_ignore_on_load_unexpected
    merged = {*(known or ()), *ignored}
    # A set, or before transformers 5.18 a list.
    model._keys_to_ignore_on_load_unexpected = merged if isinstance(known, set) else sorted(merged)
    alibi = text_config(model.config)
    own = getattr(decoder.module, "config", alibi)
    check_slopes(alibi.alibi_slopes, num_heads(alibi), len(decoder.self_attentions))
    for layer, (_, attention) in enumerate(decoder.self_attentions):
        convert_own_attention(attention)
        config = vars(attention).get("config", own)
        if not isinstance(config, LayerConfig):
            # Past torch's own attributes: a config is neither a tensor nor a module.
            attention.__dict__["config"] = LayerConfig(config, alibi, layer)


def replace_positions(decoder: TextDecoder) -> set[str]:
    """Put what makes no positions in the place of everything that makes them; returns the names of tables."""
    tables = set()
    for parent, name, positions in decoder.positions:
        if not isinstance(positions, (NoPositions, NoRotation)):
            stand_in = NoRotation(positions) if is_rotary(positions) else NoPositions()
            positions = stand_in.train(positions.training)
            setattr(parent, name, positions)
            if "token_type_ids" in parent._buffers:
                parent.register_forward_pre_hook(_of_any_length, with_kwargs=True)
        if isinstance(positions, NoPositions):
            tables.add(name)
    return tables


def _of_any_length(embeddings: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Give BERT-like embeddings what they would cut from tables that are as long as the table of positions was."""
    tokens = kwargs.get("input_ids")
    shape = kwargs["inputs_embeds"].shape[:2] if tokens is None else tokens.shape
    zeros = torch.zeros(shape, dtype=torch.long, device=embeddings.token_type_ids.device)
    given = {name: kwargs.get(name) for name in ("position_ids", "token_type_ids")}
    return args, {**kwargs, **{name: zeros if value is None else value for name, value in given.items()}}


@contextmanager
def undone_on_error(model: PreTrainedModel) -> Iterator[None]:
    """If the body raises, every module of `model` gets its class, attributes and parts back."""
    before = [(module, type(module), _attributes(module)) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, module_class, attributes in before:
            module.__class__ = module_class
            module.__dict__.clear()
            module.__dict__.update(attributes)
            if isinstance(module, PreTrainedModel):
                record_outputs_by_class(module)
        raise


def _attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module, with the dicts in which torch keeps parts and parameters copied."""
    return {key: copy(value) if isinstance(value, dict) else value for key, value in vars(module).items()}

"""`apply_alibi`: a pretrained model becomes an ALiBi model, in place."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cache
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..attention.backends import check_backend
from ..configuration import (
    alibi_config,
    check_sink_tokens,
    check_slopes,
    name_until_saved,
    num_heads,
    num_key_heads,
    text_config,
)
from ..global_heads import GlobalHeads
from .anatomy import TextDecoder, is_alibi, text_decoder
from .families import is_listed
from .installation import check_attention, check_family, install_alibi, undone_on_error
from .modeling import model_class
from .verification import verify_alibi

__all__ = ["apply_alibi", "checked_config"]

Model = TypeVar("Model", bound=PreTrainedModel)
_NO_GLOBAL_HEADS = GlobalHeads()


def apply_alibi(
    model: Model,
    *,
    slopes: Sequence[float] | Sequence[Sequence[float]] | None = None,
    sink_tokens: int = 0,
    global_heads: int = 0,
    global_every: int = 1,
) -> Model:
    """Replace the position embeddings of `model` by ALiBi (Press et al. 2022, arXiv 2108.12409), in place.

    The class becomes its ALiBi form (`GPT2LMHeadModel` → `AlibiGPT2LMHeadModel`), so that `save_pretrained` writes a
    checkpoint which the Auto classes load with ALiBi. No parameter is copied or changed; a table of positions goes.
    The model then needs some training: it has never seen this bias.

    Args:
        model: of a family in `supported_families()`, with any head. Wrap it (PEFT, compile) afterwards.
        slopes: one for each head, logits per token of distance; None for the paper's. All zeros mean no positions. Or
            one such sequence for each layer with self-attention.
        sink_tokens: how many tokens at the beginning of each sequence carry no bias as keys, for any query and head:
            pretrained models rest much of their attention there (Xiao et al. 2023, arXiv 2309.17453). Distances of all
            other keys stay what they are. 0 is the paper's ALiBi.
        global_heads: how many heads of a layer get slope 0, in as few key groups as possible, so that they can see what
            is far; the others keep the paper's slopes. See `match_heads` for which heads of the model come there.
        global_every: every n-th layer has them, counted from the first; 1 for all layers.

    Returns `model`.

    Raises TypeError for anything but a `PreTrainedModel`, and for sink tokens or global heads that are not an int;
    ValueError for a family, class or attention implementation without ALiBi form, a model that is converted already,
    slopes that do not fit the heads or stand beside global heads, more global heads than heads, and sink tokens that
    are negative, in a model whose layers see a window or a chunk only, or beside `flash_attention_2`; ImportError for
    `flash_attention_2` without flash-attn. After an error the model is as it was.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"apply_alibi takes a transformers PreTrainedModel, got {type(model).__name__}; {_remedy(model)}"
        )
    stock: Any = model.config
    decoder = text_decoder(model)
    config = checked_config(
        model,
        slopes=slopes,
        sink_tokens=sink_tokens,
        global_heads=GlobalHeads(global_heads, global_every),
        decoder=decoder,
    )
    with undone_on_error(model):
        _replace_configs(model, {id(stock): config, id(text_config(stock)): text_config(config)})
        for named in (model, config):
            named.name_or_path = name_until_saved(stock)
        install_alibi(model, decoder, model_class)
        if not is_listed(stock.model_type) or any(getattr(part, "alibi_stock_class", None) for part in model.modules()):
            _prove(model, stock.model_type)
    _say_once(type(model).__name__)
    return model


def _remedy(given: Any) -> str:
    """What to give to `apply_alibi` in place of something that is no model."""
    if isinstance(given, (str, os.PathLike)):
        return f"load it first: AutoModelForCausalLM.from_pretrained({str(given)!r})"
    if isinstance(getattr(given, "model", None), PreTrainedModel) and not isinstance(given, nn.Module):
        return f"give the model that the {type(given).__name__} holds, its .model"
    return "wrappers such as PEFT's or torch.compile's come after it"


@cache
def _say_once(name: str) -> None:
    logging.getLogger(__name__).warning(
        "%s now has ALiBi, which its weights have never seen: train it before you use it, or convert it by "
        "`hf-alibi convert`",
        name,
    )


def _replace_configs(model: PreTrainedModel, replaced: dict[int, PreTrainedConfig]) -> None:
    """Put a config in the place of each that is there by its `id`, wherever a module holds it."""
    for module in model.modules():
        for key, value in vars(module).items():
            if isinstance(value, PreTrainedConfig) and id(value) in replaced:
                vars(module)[key] = replaced[id(value)]


def _prove(model: PreTrainedModel, model_type: str) -> None:
    """Raise ValueError if a model of a type, or with code, that was never tested does not verify."""
    try:
        verify_alibi(model)
    except Exception as error:
        why = "classes of its own" if is_listed(model_type) else "not in hf_alibi.supported_families()"
        raise ValueError(f"no ALiBi for model_type {model_type!r}: {why}, and trying it gave: {error}") from error


def checked_config(
    model: PreTrainedModel,
    *,
    slopes: Sequence[float] | Sequence[Sequence[float]] | None = None,
    sink_tokens: int = 0,
    global_heads: GlobalHeads = _NO_GLOBAL_HEADS,
    decoder: TextDecoder | None = None,
) -> Any:
    """The config that `apply_alibi` gives `model`; raises what it does, as far as nothing has to be changed for it.

    `decoder` is the text decoder, if it is known already.
    """
    check_sink_tokens(sink_tokens)
    stock: Any = model.config
    if is_alibi(stock):
        raise ValueError(f"{type(model).__name__} already has ALiBi; change config.alibi_slopes to change its slopes")
    check_family(stock)
    if model_class(type(model)) is None:
        raise ValueError(
            f"no ALiBi form of {type(model).__module__}.{type(model).__name__}: it is not a model of its own"
        )
    decoder = decoder or text_decoder(model)
    check_attention(model, decoder)
    text = text_config(stock)
    check_backend(text._attn_implementation, sink_tokens)
    heads, layers = num_heads(text), len(decoder.self_attentions)
    if slopes is None:
        given = global_heads.slopes(heads, num_key_heads(text), layers)
    elif global_heads.heads:
        raise ValueError("both slopes and global_heads given; a head of slope 0 is global, so give one of them")
    else:
        given = torch.as_tensor(slopes, dtype=torch.float64).tolist()
    check_slopes(given, heads, layers)
    return alibi_config(stock, alibi_slopes=given, alibi_sink_tokens=sink_tokens)

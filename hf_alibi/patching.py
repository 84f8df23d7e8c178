"""`apply_alibi`: a pretrained model becomes an ALiBi model, in place."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

from transformers import PreTrainedModel

from .attention import check_backend
from .configuration import CONFIG_CLASSES, AlibiConfig, check_slopes
from .families import family_of, is_alibi
from .installation import install_alibi
from .modeling import MODEL_CLASSES

__all__ = ["apply_alibi"]

Model = TypeVar("Model", bound=PreTrainedModel)


def apply_alibi(model: Model, *, slopes: Sequence[float] | None = None) -> Model:
    """Replace the position embeddings of `model` by ALiBi (Press et al. 2022, arXiv 2108.12409), in place.

    The class becomes its ALiBi form (`GPT2LMHeadModel` → `AlibiGPT2LMHeadModel`), so that `save_pretrained` writes a
    checkpoint which the Auto classes load with ALiBi. No parameter is copied or changed; a table of positions goes.
    The model then needs some training: it has never seen this bias.

    Args:
        model: of a family in `supported_families()`, with any head. Wrap it (PEFT, compile) afterwards.
        slopes: one for each head, logits per token of distance; None for the paper's. All zeros mean no positions.

    Returns `model`.

    Raises TypeError for what is no `PreTrainedModel`; ValueError for a family or class that has no ALiBi form, a
    model that is converted already, an attention implementation without ALiBi form, and slopes that do not fit the
    heads; ImportError for `flash_attention_2` without flash-attn. After an error the model is as it was.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"apply_alibi takes a transformers PreTrainedModel, got {type(model).__name__}; "
            "wrappers such as PEFT's or torch.compile's come after it"
        )
    config = _alibi_config(model, None if slopes is None else [float(slope) for slope in slopes])
    stock = model.config
    for module in model.modules():
        if getattr(module, "config", None) is stock:
            module.config = config
    install_alibi(model, MODEL_CLASSES)
    return model


def _alibi_config(model: PreTrainedModel, slopes: list[float] | None) -> AlibiConfig:
    """The ALiBi form of the model's config, after every check that could fail."""
    stock: Any = model.config
    if is_alibi(stock):
        raise ValueError(f"{type(model).__name__} already has ALiBi; change config.alibi_slopes to change its slopes")
    family_of(stock)
    if type(model) not in MODEL_CLASSES or type(stock) not in CONFIG_CLASSES:
        known = ", ".join(sorted(known.__name__ for known in MODEL_CLASSES))
        raise ValueError(
            f"no ALiBi form of {type(model).__name__} with {type(stock).__name__}; there is one of {known}"
        )
    check_backend(stock._attn_implementation)
    check_slopes(slopes, stock.num_attention_heads)
    # Of another class but with every value, private ones too, of the original, which stays as it was.
    config: Any = copy.deepcopy(stock)
    config.__class__ = CONFIG_CLASSES[type(stock)]
    # A config that was read from a file carries its model type itself, which would hide that of the class.
    vars(config).pop("model_type", None)
    config.alibi_slopes = slopes
    config.alibi_train_length = config.alibi_scaling = config.alibi_tolerance = None
    config.validate_alibi()
    alibi_config: AlibiConfig = config
    return alibi_config

"""The model that a training starts from, and its teacher: loaded or built, and checked before work begins."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..configuration import num_heads, text_config
from ..conversion.settings import ConversionArguments
from ..errors import InputError, one_line
from ..model.anatomy import has_no_positions, is_alibi, text_decoder
from ..model.loading import check_source, load_complete
from .data import TokenSplit
from .settings import FinetuneArguments

__all__ = ["Teacher", "check_length", "check_sources", "check_vocabulary", "load_model", "load_teacher"]


def check_sources(args: FinetuneArguments) -> None:
    """Raise InputError at once if there is no such model, or no such teacher."""
    for field in ("model_name_or_path", "teacher_name_or_path"):
        check_source(getattr(args, field), field)


def load_model(
    args: FinetuneArguments,
    recipe: ConversionArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    checkpoint: Path | None = None,
) -> PreTrainedModel:
    """Load or build the model of a run, as it is before `args.attention` is given to it.

    A fresh model takes vocabulary size and special tokens from `tokenizer`; `checkpoint` is one of this run, to be
    taken instead of the model it started from. Raises InputError if the model cannot be loaded or built, or
    contradicts `args.attention` or the recipe.
    """
    if checkpoint is not None or args.model_name_or_path is not None:
        model = _load_pretrained(str(checkpoint or args.model_name_or_path), args)
    else:
        model = _build_fresh(args, tokenizer)
    if is_alibi(model.config):
        # A recipe may make all heads global; its checkpoints are resumed.
        attention = "nope" if has_no_positions(model.config) and not recipe.global_heads else "alibi"
        source = checkpoint or args.model_name_or_path or "model_config"
        if args.attention != attention:
            raise InputError(
                f"attention is {args.attention}, but {source} is already converted; "
                f"set attention: {attention}, or give the model as it was before"
            )
        if checkpoint is None and recipe.steps():
            raise InputError(
                f"{', '.join(recipe.steps())} given, but {source} is already converted; "
                "leave them out, or give the model as it was before"
            )
    elif args.attention == "nope" and recipe.steps():
        raise InputError(
            f"{', '.join(recipe.steps())} given with attention: nope, which takes no recipe; for a model without "
            "positions by the recipe set attention: alibi and global_heads: "
            f"{num_heads(text_config(model.config))}, all heads"
        )
    return model


class Teacher(NamedTuple):
    """A model whose predictions another one learns, with what share of the loss; the rest is that of the text."""

    model: PreTrainedModel
    share: float


def load_teacher(args: FinetuneArguments, model: PreTrainedModel) -> Teacher | None:
    """Load the model whose predictions `model` learns; raises InputError if it has other tokens or is too short."""
    source = args.teacher_name_or_path
    if source is None:
        return None
    teacher = _load_pretrained(source, args)
    predicted, learned = (text_config(of.config).vocab_size for of in (teacher, model))
    if predicted != learned:
        raise InputError(
            f"the teacher {source!r} predicts {predicted} tokens and the model {learned}; give a teacher with the "
            "model's own vocabulary"
        )
    limit = text_decoder(teacher).limit
    if limit is not None and args.block_size > limit:
        raise InputError(
            f"block_size {args.block_size} is beyond the {limit} learned positions of the teacher {source!r}; "
            f"set block_size to at most {limit}, or give another teacher"
        )
    return Teacher(teacher, args.teacher_share)


def check_vocabulary(model: PreTrainedModel, tokens: TokenSplit) -> None:
    """Raise InputError if the model does not embed all `tokens`."""
    vocabulary = model.get_input_embeddings().num_embeddings
    largest = max(stream.max() for stream in (*tokens.train, tokens.held_out) if len(stream))
    if largest >= vocabulary:
        raise InputError(
            f"the tokenizer gives the token id {largest}, but the model embeds only {vocabulary} tokens; "
            "set tokenizer_name to the model's own tokenizer, or vocab_size in model_config"
        )


def check_length(model: PreTrainedModel, args: FinetuneArguments) -> None:
    """Raise InputError if blocks are longer than the model's table of positions."""
    limit = text_decoder(model).limit
    if limit is not None and args.block_size > limit:
        raise InputError(
            f"block_size {args.block_size} is beyond the model's {limit} learned positions; "
            f"set block_size to at most {limit}, or attention: alibi, which has no limit"
        )


def _load_pretrained(source: str, args: FinetuneArguments) -> PreTrainedModel:
    return load_complete(
        source, dtype=args.dtype, attn_implementation=args.attn_implementation, name=f"the model {source!r}"
    )


def _build_fresh(args: FinetuneArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    given = dict(args.model_config) if isinstance(args.model_config, dict) else {}
    model_type = given.pop("model_type", None)
    # The config's own defaults are those of somebody else's vocabulary.
    from_tokenizer = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        _check_config_fields(AutoConfig.for_model(model_type), given)
        config = AutoConfig.for_model(model_type, **{**from_tokenizer, **given})
        dtype = torch.float32 if args.dtype == "auto" else getattr(torch, args.dtype)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=args.attn_implementation)
    except InputError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"cannot build a model from model_config {args.model_config}: {one_line(error)}") from error


def _check_config_fields(defaults: PretrainedConfig, given: dict[str, Any]) -> None:
    """Refuse fields that a config class would keep without ever reading them."""
    unknown = [name for name in given if not hasattr(defaults, name)]
    if unknown:
        raise InputError(
            f"model_config has the unknown field {unknown[0]!r}; "
            f"{defaults.model_type} takes {', '.join(sorted(defaults.to_dict()))}"
        )

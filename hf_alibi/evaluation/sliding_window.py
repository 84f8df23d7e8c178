"""Attention in which every layer sees the last tokens only: a baseline for unconverted models of full attention."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from ..attention.blocks import in_blocks

__all__ = ["sliding_window_attention"]

# Queries that stand against their keys in one matrix of (rows, window + rows - 1) entries.
_ROWS = 256
# What attention functions are handed beside queries, keys and values that would change the result.
_UNKNOWN_HERE = ("softcap", "s_aux", "position_bias", "cache", "sliding_window", "output_attentions")


def sliding_window_attention(window: int) -> str:
    """Register causal attention over the last `window` tokens, the query's own included; returns its name.

    The name is an `attn_implementation` for any model that asks transformers' `AttentionInterface` and whose layers all
    have full attention. Memory grows linearly with length. It is for whole sequences without a cache: a padding mask,
    packed sequences, a cache and whatever else is not plain causal attention raise ValueError.
    """
    name = f"last_{window}_tokens"
    AttentionInterface.register(name, partial(_attend, window=window))
    AttentionMaskInterface.register(name, _no_mask)
    return name


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    window: int,
    **options: Any,
) -> tuple[Tensor, None]:
    """As transformers' attention functions: query (batch, heads, length, dim), key and value with grouped heads.

    Returns (batch, length, heads, dim) and no weights.
    """
    given = [name for name in _UNKNOWN_HERE if options.get(name) is not None and options[name] is not False]
    causal = options.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        given.append("attention that is not causal")
    if attention_mask is not None:
        given.append("a mask")
    if query.shape[2] != key.shape[2]:
        given.append("keys of a cache")
    if given:
        raise ValueError(
            f"attention over the last {window} tokens was given {', '.join(given)}; it knows whole sequences of plain "
            "causal attention only, so leave this baseline out for this model"
        )
    groups, dropout = query.shape[1] // key.shape[1], options.get("dropout", 0.0)

    def attend(rows: Tensor, first: int) -> Tensor:
        end = first + rows.shape[2]
        start = max(0, first - window + 1)
        near = slice(start, end)
        distance = torch.arange(first, end, device=rows.device)[:, None] - torch.arange(start, end, device=rows.device)
        return F.scaled_dot_product_attention(
            rows,
            repeat_kv(key[:, :, near], groups),
            repeat_kv(value[:, :, near], groups),
            attn_mask=(distance >= 0) & (distance < window),
            dropout_p=dropout,
            scale=options.get("scaling"),
        )

    return in_blocks(attend, query, _ROWS, keep_rng=dropout > 0).transpose(1, 2).contiguous(), None


def _no_mask(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> None:
    """As transformers' mask functions: the attention makes its own mask, and here every other one is refused."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError("attention over the last tokens knows no padding; give sequences without it")
    if mask_function is not causal_mask_function or q_length != kv_length:
        raise ValueError(
            "attention over the last tokens is for whole sequences of plain causal attention; a cache, packed "
            "sequences and windows of a model's own are not"
        )

"""Reordering the heads of a self-attention layer in its weights; the model stays the same function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..configuration import num_heads, num_key_heads

__all__ = ["head_counts", "head_parameters", "permute_heads"]

# Where heads stand in the parameters of a layer: along which dimension, and whether query heads or key heads. Biases of
# output projections belong to no head.
_QUERY_HEADS = {"q_proj.weight": 0, "q_proj.bias": 0, "o_proj.weight": 1, "out_proj.weight": 1, "dense.weight": 1}
_QUERY_HEADS |= {"sinks": 0}
_KEY_HEADS = {f"{projection}.{kind}": 0 for projection in ("k_proj", "v_proj") for kind in ("weight", "bias")}
_NO_HEADS = {"o_proj.bias", "out_proj.bias", "dense.bias", "c_proj.bias"}
# Norms of queries and keys: of all heads together, or one that all heads share.
_QUERY_NORMS = {f"{norm}.{kind}" for norm in ("q_norm", "q_layernorm") for kind in ("weight", "bias")}
_KEY_NORMS = {name.replace("q_", "k_") for name in _QUERY_NORMS}
# GPT-2: queries, keys and values side by side, as columns.
_THREE_IN_ONE = {"c_attn.weight": 1, "c_attn.bias": 0}
_QUERY_HEADS |= {"c_proj.weight": 0}


def head_counts(attention: nn.Module) -> tuple[int, int]:
    """Query heads of a self-attention layer, and the key heads that they share."""
    return num_heads(attention.config), num_key_heads(attention.config)


@torch.no_grad()
def permute_heads(attention: nn.Module, order: Sequence[int]) -> None:
    """Put head `order[i]` at place i, in place. Heads that share a key head must stay together, in one of its places.

    Args:
        attention: a self-attention layer with q_proj, k_proj, v_proj and an output projection, or GPT-2's.
        order: each query head once.

    Raises ValueError for an order that tears groups apart, and for a layer with parameters that are not known.
    """
    heads, key_heads = head_counts(attention)
    group = heads // key_heads
    if sorted(order) != list(range(heads)):
        raise ValueError(f"order must name each of {heads} heads once, got {list(order)}")
    key_order = [order[place] // group for place in range(0, heads, group)]
    if any(order[place] // group != key_order[place // group] for place in range(heads)):
        raise ValueError(f"order tears apart heads that share a key head ({group} each): {list(order)}")
    width: Any = attention.head_dim
    query_rows, key_rows = torch.tensor(order), torch.tensor(key_order)
    for name, parameter in head_parameters(attention).items():
        if name in _THREE_IN_ONE:
            parts = parameter.unflatten(_THREE_IN_ONE[name], (3, -1)).unbind(_THREE_IN_ONE[name])
            moved = [_moved(part, _THREE_IN_ONE[name], query_rows) for part in parts]
            parameter.copy_(torch.cat(moved, dim=_THREE_IN_ONE[name]))
        elif name in _QUERY_HEADS:
            parameter.copy_(_moved(parameter, _QUERY_HEADS[name], query_rows))
        elif name in _KEY_HEADS:
            parameter.copy_(_moved(parameter, _KEY_HEADS[name], key_rows))
        elif name in _QUERY_NORMS and parameter.numel() > width:
            parameter.copy_(_moved(parameter, 0, query_rows))
        elif name in _KEY_NORMS and parameter.numel() > width:
            parameter.copy_(_moved(parameter, 0, key_rows))


def head_parameters(attention: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a self-attention layer by name. Raises ValueError if it has others than are known here."""
    known = {*_QUERY_HEADS, *_KEY_HEADS, *_NO_HEADS, *_QUERY_NORMS, *_KEY_NORMS, *_THREE_IN_ONE}
    parameters = dict(attention.named_parameters())
    unknown = sorted(parameters.keys() - known)
    if unknown or not parameters.keys() & {"q_proj.weight", "c_attn.weight"}:
        raise ValueError(
            f"the heads of {type(attention).__name__} cannot be reordered, since it is not known where they stand in "
            f"{', '.join(unknown or parameters)}; known are {', '.join(sorted(known))}"
        )
    return parameters


def _moved(parameter: Tensor, dim: int, order: Tensor) -> Tensor:
    """A parameter whose dimension `dim` is one block a head, with the blocks in another order."""
    heads: Any = parameter.unflatten(dim, (len(order), -1))
    moved: Tensor = heads.index_select(dim, order.to(parameter.device)).flatten(dim, dim + 1)
    return moved

"""What every backend does with its inputs: which keys each query sees, and refusing what it cannot honour."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..bias import causal_rows
from .mask_by_rows import MaskByRows

__all__ = ["HasShape", "Visible", "own_keys", "refuse_unsupported", "visible_keys", "visible_range"]

# An additive entry at or under this is a mask: after softmax it leaves nothing in any floating-point type.
_MASKED = -1e4

# Arguments that change the attention in ways that a backend must carry out or refuse, and what they stand for.
_SPECIAL = {
    "softcap": "capped logits",
    "s_aux": "attention sinks",
    "position_bias": "another position bias",
    "indices": "sparse attention to chosen keys",
    "block_indices": "sparse attention to chosen blocks",
    "cache": "the paged cache of continuous batching",
}


class HasShape(Protocol):
    """A tensor, or what stands for one."""

    shape: torch.Size


def refuse_unsupported(
    name: str, module: torch.nn.Module, kwargs: Mapping[str, Any], *, supported: Container[str] = ()
) -> None:
    """Raise ValueError for an argument of the attention call that backend `name` would otherwise ignore."""
    for argument, meaning in _SPECIAL.items():
        if kwargs.get(argument) is not None and argument not in supported:
            raise ValueError(
                f"ALiBi attention '{name}' of {type(module).__name__} does not support {meaning} ({argument}=...)"
            )
    window = kwargs.get("sliding_window")
    config: Any = module.config
    if window is not None and config.alibi_sink_tokens:
        raise ValueError(
            f"alibi_sink_tokens needs layers that see the whole sequence, but {type(module).__name__} was called with "
            f"sliding_window={window}; set alibi_sink_tokens to 0"
        )
    if kwargs.get("is_causal", getattr(module, "is_causal", True)) is False:
        raise ValueError(f"ALiBi is for causal attention; {type(module).__name__} was called with is_causal=False")


class Visible(NamedTuple):
    """What each query may see, and what is added to the logits."""

    allowed: Tensor
    """Bool (batch or 1, heads or 1, queries, keys)."""
    added: Tensor | None = None
    """The mask itself if it is additive: what it adds to allowed entries comes on top of the bias."""
    own: Tensor | None = None
    """int64 (queries,), index of each query's own key; None if no query sees keys after its own."""

    @property
    def differs_by_head(self) -> bool:
        """Whether heads may see different keys."""
        return self.allowed.shape[1] > 1 and self.allowed.stride(1) != 0

    def part(self, batch: slice, queries: slice) -> Visible:
        """Of some sequences and queries."""
        allowed, added, own = self
        return Visible(
            allowed[batch, :, queries],
            None if added is None else added[batch, :, queries],
            None if own is None else own[queries],
        )


def visible_keys(attention_mask: Tensor | MaskByRows | Visible | None, query: Tensor, key: HasShape) -> Visible:
    """What each query may see under `attention_mask`.

    Args:
        attention_mask: (batch or 1, heads or 1, queries, keys), bool (True: may be seen) or additive. None means
            causal, the first query at the first key; a single query sees all keys. Or what this returned.
        query: (batch, heads, queries, head_dim).
        key: (batch, key-value heads, keys, head_dim).
    """
    queries, keys = query.shape[2], key.shape[2]
    if isinstance(attention_mask, Visible):
        return attention_mask
    if attention_mask is None:
        first = keys - 1 if queries == 1 else 0
        return Visible(causal_rows(first, queries, keys, query.device)[None, None])
    if isinstance(attention_mask, MaskByRows):
        attention_mask = attention_mask.whole()
    if attention_mask.ndim != 4:
        raise ValueError(
            "ALiBi attention needs a 4D mask (batch, heads, queries, keys), or a 2D padding mask given to the model; "
            f"got shape {tuple(attention_mask.shape)}"
        )
    if attention_mask.shape[-2:] != (queries, keys):
        got = tuple(attention_mask.shape[-2:])
        raise ValueError(f"the attention mask is for {got} queries and keys, but there are {(queries, keys)}")
    if attention_mask.dtype != torch.bool and not attention_mask.is_floating_point():
        raise ValueError(f"a 4D attention mask must be bool or floating point, got {attention_mask.dtype}")
    is_bool = attention_mask.dtype == torch.bool
    allowed = attention_mask if is_bool else attention_mask > _MASKED
    own = None
    if queries == keys > 1:
        own = torch.arange(queries, device=allowed.device)
    elif queries > 1:
        first_sees, any_sees = (visible_range(part)[1] for part in (allowed[:, :, 0], allowed.any(dim=2)))
        own = own_keys(first_sees, any_sees.max() + 1, queries, keys)
    return Visible(allowed, None if is_bool else attention_mask, own)


def own_keys(first_sees: Tensor, filled: Tensor, queries: int, keys: int) -> Tensor:
    """Index of each query's own key, int64 (queries,).

    Queries are the last tokens of the keys, unless keys that nobody sees follow: the end of a static cache that is
    still empty. Padding after all sequences looks the same, but there the first query sees up to its own key.

    Args:
        first_sees: index of the last key that the first query of each sequence sees.
        filled: how many keys there are up to the last one that any query sees.
        queries, keys: how many.
    """
    empty_end = (filled < keys) & ~(first_sees == keys - queries).any()
    offset = torch.where(empty_end, (filled - queries).clamp(min=0), keys - queries)
    return torch.arange(queries, device=filled.device) + offset


def visible_range(visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From which to which key each query sees, and how many, each int32 (..., queries).

    Args:
        visible: bool (..., queries, keys).

    Where a query sees nothing, the first key is the number of keys and the last is -1.
    """
    keys = visible.shape[-1]
    index = torch.arange(keys, dtype=torch.int32, device=visible.device)
    first = torch.where(visible, index, keys).amin(dim=-1)
    last = torch.where(visible, index, -1).amax(dim=-1)
    return first, last, visible.sum(dim=-1, dtype=torch.int32)

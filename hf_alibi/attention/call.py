"""One attention call: resolved once from what a module of transformers hands over, and passed on whole."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .inputs import HasShape, refuse_unsupported
from .layer_slopes import HeadSlopes, head_slopes
from .tolerance import exact_tolerance

__all__ = ["AttentionCall", "autocast", "resolve"]


@dataclass(frozen=True)
class AttentionCall:
    """What every backend computes from."""

    query: Tensor
    """(batch, heads, queries, head_dim)."""
    key: Any
    """(batch, key-value heads, keys, head_dim), heads are grouped if there are fewer; or what an `AlibiCache` holds."""
    value: Any
    mask: Any
    """None, or what each query may see; see `visible_keys`."""
    slopes: HeadSlopes
    scaling: float
    """Of the logits."""
    tolerance: float
    """Share of a row's weights that may be left out."""
    dropout: float = 0.0
    """Probability, applied to the weights."""
    softcap: float | None = None
    """Bound of the logits, before the bias is added (Gemma 2)."""
    learned_sinks: Tensor | None = None
    """(heads,), logits that take a share of each query's weights (gpt-oss)."""

    @property
    def has_other_logits(self) -> bool:
        """Whether logits are capped, or sinks were learned."""
        return self.softcap is not None or self.learned_sinks is not None

    @property
    def groups(self) -> int:
        """Query heads to a key head."""
        return int(self.query.shape[1]) // int(self.key.shape[1])


def resolve(
    backend: str,
    module: nn.Module,
    states: tuple[Tensor, HasShape, HasShape],
    mask: Any,
    *,
    scaling: float | None,
    dropout: float = 0.0,
    kwargs: Mapping[str, Any],
    supported: Container[str] = (),
) -> AttentionCall:
    """Resolve a call of `module`, whose config holds slopes and tolerance.

    Args:
        backend: its name, for messages.
        module: the self-attention layer.
        states: query, key and value.
        mask: see `AttentionCall`.
        scaling: of the logits; 1 / sqrt(head_dim) if None.
        dropout: see `AttentionCall`.
        kwargs: further arguments of the call.
        supported: those of `kwargs` that change the attention and that the backend honours.

    Raises ValueError for an argument that the backend would ignore, and for slopes that do not fit the heads.
    """
    refuse_unsupported(backend, module, kwargs, supported=supported)
    query, key, value = states
    config: Any = module.config
    tolerance = exact_tolerance(query.dtype) if config.alibi_tolerance is None else config.alibi_tolerance
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    slopes = head_slopes(module, query, value, query.device)
    learned = kwargs.get("softcap"), kwargs.get("s_aux")
    return AttentionCall(query, key, value, mask, slopes, scaling, tolerance, dropout, *learned)


def autocast(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """`tensors` in the type that autocast would give them, if it is on: float32 becomes its half type.

    A backend that calls this first can turn autocast off for what follows, in which float32 must stay float32.
    """
    if not torch.is_autocast_enabled(device.type):
        return list(tensors)
    half = torch.get_autocast_dtype(device.type)
    return [tensor if tensor.dtype == torch.float64 else tensor.to(half) for tensor in tensors]

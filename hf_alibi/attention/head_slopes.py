"""Which slopes and sink tokens a self-attention layer uses: read from its config, slopes in float32 per device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..slopes import alibi_slopes, dynamic_scale, scale_slopes
from .inputs import HasShape
from .own_heads import own_heads

__all__ = ["HeadSlopes", "head_slopes"]


@dataclass(frozen=True)
class HeadSlopes:
    """Slopes of one layer's heads; under `dynamic` scaling they also depend on how much a query sees."""

    per_head: Tensor
    """(heads,) float32, logits per token of distance."""
    dynamic: tuple[int, float | None] | None = None
    """Training length in tokens and ceiling, see `dynamic_scale`; None for slopes that depend on the head alone."""
    sink_tokens: int = 0
    """How many of the first keys that a query sees it meets with slope 0 (Xiao et al. 2023, arXiv 2309.17453)."""

    def for_queries(self, count_context: Callable[[], Tensor]) -> Tensor:
        """Slopes that broadcast to (batch, heads, queries, 1).

        Args:
            count_context: gives how many tokens each query sees, (batch or 1, heads or 1, queries); called only where
                the slopes depend on it.
        """
        slopes = self.per_head[:, None, None]
        if self.dynamic is None:
            return slopes
        return slopes * dynamic_scale(count_context(), *self.dynamic)[..., None]


def head_slopes(module: nn.Module, query: HasShape, value: HasShape, device: torch.device) -> HeadSlopes:
    """The slopes of the heads of one attention call, which under tensor parallelism are some of the layer's.

    Args:
        module: the self-attention layer; its config is an ALiBi config.
        query: (batch, heads, queries, head_dim).
        value: (batch, key-value heads, keys, head_dim).
        device: where the slopes are needed.

    Raises ValueError where the layer has another number of heads than there are slopes, or where it is open which of
    its heads these are: taking the first few would be wrong.
    """
    config: Any = module.config
    slopes = config.alibi_slopes
    heads = query.shape[1]
    total, first = own_heads(module, heads, value.shape[-1])
    if slopes is not None and total != len(slopes):
        if any(slopes):
            raise ValueError(f"attention with {total} heads got {len(slopes)} ALiBi slopes")
        # No positions at all, in a family whose layers have different numbers of heads.
        slopes = [0.0] * total
    scaling = config.alibi_scaling
    # Scaling looks at all heads of the layer, wherever they are.
    per_head = _per_head(
        total if slopes is None else tuple(slopes),
        None if scaling is None else tuple(scaling.items()),
        device,
    )
    if heads != total:
        per_head = per_head[first : first + heads]
    if scaling is None or scaling["type"] != "dynamic":
        return HeadSlopes(per_head, sink_tokens=config.alibi_sink_tokens)
    if config.alibi_train_length is None:
        raise ValueError("alibi_scaling of type 'dynamic' needs alibi_train_length, the tokens trained on")
    return HeadSlopes(per_head, (config.alibi_train_length, scaling.get("factor")), config.alibi_sink_tokens)


def _build(
    slopes: int | tuple[float, ...], scaling: tuple[tuple[str, Any], ...] | None, device: torch.device
) -> Tensor:
    values = alibi_slopes(slopes) if isinstance(slopes, int) else torch.tensor(slopes, dtype=torch.float32)
    return scale_slopes(values, None if scaling is None else dict(scaling)).to(device)


_cached = lru_cache(maxsize=256)(_build)


def _per_head(*args: Any) -> Tensor:
    # While tracing, the slopes become constants of the graph; a traced tensor must not enter the cache.
    return _build(*args) if torch.compiler.is_compiling() else _cached(*args)

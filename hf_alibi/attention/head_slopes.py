"""Which slopes a self-attention layer uses: read from its config, kept in float32 per device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..slopes import alibi_slopes, dynamic_scale, scale_slopes

__all__ = ["HeadSlopes", "head_slopes"]


@dataclass(frozen=True)
class HeadSlopes:
    """Slopes of one layer's heads; under `dynamic` scaling they also depend on how much a query sees."""

    per_head: Tensor
    """(heads,) float32, logits per token of distance."""
    dynamic: tuple[int, float | None] | None = None
    """Training length in tokens and ceiling, see `dynamic_scale`; None for slopes that depend on the head alone."""

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


def head_slopes(config: Any, num_heads: int, device: torch.device) -> HeadSlopes:
    """The slopes of a layer with `num_heads` query heads under `config` (an ALiBi config).

    Raises ValueError where the layer has another number of heads than there are slopes: taking the first few would
    be wrong.
    """
    slopes = config.alibi_slopes
    count = num_heads if slopes is None else len(slopes)
    if num_heads != count:
        raise ValueError(
            f"attention with {num_heads} heads got {count} ALiBi slopes; heads that are split over devices are not "
            "supported, load the model without a tensor-parallel plan"
        )
    scaling = config.alibi_scaling
    per_head = _per_head(
        count if slopes is None else tuple(slopes),
        None if scaling is None else tuple(scaling.items()),
        device,
    )
    if scaling is None or scaling["type"] != "dynamic":
        return HeadSlopes(per_head)
    if config.alibi_train_length is None:
        raise ValueError("alibi_scaling of type 'dynamic' needs alibi_train_length, the tokens trained on")
    return HeadSlopes(per_head, (config.alibi_train_length, scaling.get("factor")))


def _build(
    slopes: int | tuple[float, ...], scaling: tuple[tuple[str, Any], ...] | None, device: torch.device
) -> Tensor:
    values = alibi_slopes(slopes) if isinstance(slopes, int) else torch.tensor(slopes, dtype=torch.float32)
    return scale_slopes(values, None if scaling is None else dict(scaling)).to(device)


_cached = lru_cache(maxsize=256)(_build)


def _per_head(*args: Any) -> Tensor:
    # While tracing, the slopes become constants of the graph; a traced tensor must not enter the cache.
    return _build(*args) if torch.compiler.is_compiling() else _cached(*args)

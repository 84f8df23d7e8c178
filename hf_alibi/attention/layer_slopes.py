"""Which slopes and sink tokens a self-attention layer uses: read from its config, slopes in float32 per device.

If tensor parallelism shards a layer, a rank sees its own heads only, under the numbers from 0 on, and a plan may as
well gather all heads on every rank. What tells them apart is the output projection: it takes what the heads give, so
the part of its input that a rank holds is the part of the heads that the rank computes. Sharded weights are DTensors,
whose layout says which part that is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..bias import alibi_bias
from ..configuration import num_heads
from ..slopes import alibi_slopes, dynamic_scale, scale_slopes
from .inputs import HasShape, Visible

__all__ = ["HeadSlopes", "head_slopes", "own_heads"]


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
            count_context: gives how many tokens each query sees, (batch or 1, heads or 1, queries); called only if
                the slopes depend on it.
        """
        slopes = self.per_head[:, None, None]
        if self.dynamic is None:
            return slopes
        return slopes * dynamic_scale(count_context(), *self.dynamic)[..., None]

    def bias(self, visible: Visible) -> Tensor:
        """The dense bias, float32 (batch or 1, heads, queries, keys), -inf where a query may not see a key."""
        allowed, _, own = visible
        return alibi_bias(self.for_queries(lambda: allowed.sum(dim=-1)), allowed, self.sink_tokens, own)


def head_slopes(module: nn.Module, query: HasShape, value: HasShape, device: torch.device) -> HeadSlopes:
    """The slopes of the heads of one attention call, which under tensor parallelism are some of the layer's.

    Args:
        module: the self-attention layer; its config is an ALiBi config.
        query: (batch, heads, queries, head_dim).
        value: (batch, key-value heads, keys, head_dim).
        device: where the slopes are needed.

    Raises ValueError if the layer has another number of heads than there are slopes; or if it is open which of
    its heads these are: taking the first few would be wrong.
    """
    config: Any = module.config
    slopes = config.alibi_slopes
    heads = int(query.shape[1])  # torch.jit.trace has tensors for sizes
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


def own_heads(module: nn.Module, heads: int, value_dim: int) -> tuple[int, int]:
    """Where the heads of one attention call stand among those of the layer.

    Args:
        module: the self-attention layer.
        heads: query heads that the call computes.
        value_dim: width of a head's output.

    Returns how many heads the layer has on all ranks together, and the number of the call's first one.

    Raises ValueError if weights are sharded in a way that leaves this open.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return heads, 0
    # Loaded here, since it takes long and is of no use to a single process.
    from torch.distributed.tensor import DTensor

    config: Any = module.config
    weights = [weight for weight in module.parameters() if weight.ndim == 2]
    by_input = [weight for weight in weights if isinstance(weight, DTensor) and _is_sharded(weight, 1)]
    if by_input:
        found = (_from_output_projection(weight, heads, value_dim) for weight in by_input)
        answers = {answer for answer in found if answer is not None}
        # Without the config, heads that are wider than their part of the projection would pass for all of them.
        if len(answers) == 1 and (answers != {(heads, 0)} or _are_all(heads, config)):
            return answers.pop()
    else:
        # An output projection that is whole takes all heads. One that is not part of this layer may be sharded.
        whole = any(weight.shape[1] == heads * value_dim for weight in weights)
        sharded = any(isinstance(weight, DTensor) and _is_sharded(weight, 0) for weight in weights)
        if (whole or not sharded) and _are_all(heads, config):
            return heads, 0
    raise ValueError(
        f"{type(module).__name__} attends with {heads} heads on this rank, its config says {num_heads(config)}, and "
        "its weights do not tell which of them these are, so that their ALiBi slopes are unknown; load the model with "
        "a tensor-parallel plan of transformers that shards the output projection by its input, or with none"
    )


def _are_all(heads: int, config: Any) -> bool:
    """Whether a layer under `config` may have this number of heads in all; some families have fewer in some layers."""
    if heads >= num_heads(config):
        return True
    fields = config.to_dict().items()
    counts = (count for name, count in fields if "attention_heads" in name and "encoder" not in name)
    return any(heads in count if isinstance(count, list) else heads == count for count in counts)


def _is_sharded(weight: Any, dim: int) -> bool:
    return any(getattr(placement, "dim", None) == dim for placement in weight.placements)


def _from_output_projection(weight: Any, heads: int, value_dim: int) -> tuple[int, int] | None:
    """What `own_heads` returns, by a DTensor (outputs, inputs) whose inputs are sharded; None if it does not fit."""
    from torch.distributed.tensor import Shard

    width = weight.shape[1]
    if width == heads * value_dim:
        return heads, 0
    mesh_dims = [i for i, placement in enumerate(weight.placements) if getattr(placement, "dim", None) == 1]
    if len(mesh_dims) > 1 or not isinstance(weight.placements[mesh_dims[0]], Shard):
        return None
    # Parts are cut as by torch.chunk: the last ones may be smaller.
    size = -(-width // weight.device_mesh.size(mesh_dims[0]))
    begin = min(width, size * weight.device_mesh.get_local_rank(mesh_dims[0]))
    fits = min(width, begin + size) - begin == heads * value_dim and begin % value_dim == width % value_dim == 0
    return (width // value_dim, begin // value_dim) if fits else None

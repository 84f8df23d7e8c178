"""Continuous batching: the tokens of many requests in one row, their keys and values in a paged cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor, nn
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from .inputs import visible_keys

__all__ = ["WITHOUT_PAGED_CACHE", "Attention", "takes_paged_cache"]

Attention = Callable[..., tuple[Tensor, Any]]

WITHOUT_PAGED_CACHE = frozenset(
    ["bart", "blenderbot", "blenderbot-small", "diffllama", "hrm_text", "marian", "mbart", "pegasus", "plbart"]
)
"""Model types whose layers do not hand the paged cache on, or hand it to several attentions at once. Converted or
not, they give other tokens there than `generate`, without an error."""


def takes_paged_cache(attention: Attention, *, only: bool = False) -> Attention:
    """`attention` that also takes the cache of continuous batching (`generate_batch`).

    New keys and values go into the cache, and the keys of all requests come back in the order of their tokens, also
    from the ring in which layers with a window keep them. The mask lets each query see its own request alone, so
    distances, which are counted over visible keys, are right.

    Args:
        attention: an ALiBi attention function.
        only: refuse calls without the cache. transformers makes no mask for `paged|eager` then, and a query would
            see what comes after it.

    Raises ValueError, as `attention` does, for another kind of cache in the same argument.
    """

    @wraps(attention)
    def attend(
        module: nn.Module, query: Tensor, key: Any, value: Any, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        cache = kwargs.get("cache")
        if isinstance(cache, PagedAttentionCache):
            del kwargs["cache"]
            # By the mask; transformers says is_causal=False because its kernels need no rule beside that.
            kwargs.pop("is_causal", None)
            layer: Any = module
            key, value = cache.update(key_states=key, value_states=value, layer_idx=layer.layer_idx, kwargs=kwargs)
            # Queries of several requests stand in a row: each one's own key is the last that it sees.
            mask = visible_keys(attention_mask, query, key)._replace(own=None)
            return attention(module, query, key, value, mask, **kwargs)
        if only:
            raise ValueError(
                f"ALiBi attention 'paged|eager' of {type(module).__name__} was called without the paged cache of "
                "continuous batching; it is for generate_batch, use attn_implementation='eager' for anything else"
            )
        return attention(module, query, key, value, attention_mask, **kwargs)

    return attend

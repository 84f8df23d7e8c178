"""`AlibiCache`: a cache of keys and values that stops growing, because ALiBi makes far tokens negligible."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .call import AttentionCall
from .tolerance import log_sum_of_bias

__all__ = ["AlibiCache", "AlibiLayer", "CachedStates"]

# Queries that must have been seen before anything is dropped, so that their norms and log-sum-exps are known.
_SETTLE = 32
# Tokens, and share of those kept, by which a head's store may outgrow its reach before it is cut: cutting costs a copy.
_SPARE_TOKENS, _SPARE_SHARE = 256, 0.25

_NO_TENSOR = (
    "this attention needs keys and values as tensors, which AlibiCache does not have; it works with models converted "
    "by hf_alibi, attn_implementation='sdpa', not compiled, of families that give the attention what they cache as it "
    "is: use these, or transformers' DynamicCache"
)


class AlibiCache(Cache):
    """Keeps for each key head only the tokens that its query heads can reach: memory in long generation stops growing.

    Sink tokens (`alibi_sink_tokens`), which every query can reach, are kept for ever.

    `model.generate(..., past_key_values=AlibiCache())`. What a head can reach follows from the largest norms of queries
    and keys seen so far, with a margin for the queries to come. Every query is then checked against what was dropped
    before it: the result is exact to rounding, or within the tolerance, or an error is raised.

    Args:
        tolerance: share of a query's weights that the dropped tokens may have; None for the model's
            `alibi_tolerance`, which by default is less than rounding takes.
        margin: how much larger than all before it the product of a query's and a key's norm may become.

    Works with attn_implementation 'sdpa' of converted models, without `torch.compile`, for inference.
    """

    def __init__(self, *, tolerance: float | None = None, margin: float = 1.25) -> None:
        if tolerance is not None and not 0 < tolerance < 1:
            raise ValueError(f"tolerance must be a share of a row's weights between 0 and 1, or None, got {tolerance}")
        if not margin >= 1:
            raise ValueError(f"margin must be at least 1, got {margin}")
        super().__init__(layer_class_to_replicate=lambda: AlibiLayer(tolerance, margin))

    @property
    def kept_tokens(self) -> list[list[int]]:
        """Tokens that each layer keeps for each of its key heads."""
        return [[store.front + store.length for store in layer.stores] for layer in self.layers]


@dataclass
class _Store:
    """Keys and values of one key head: buffers with room to grow, of which `front` and `length` tokens are filled."""

    keys: Tensor
    """(batch, capacity, head_dim)."""
    values: Tensor
    length: int
    """Last tokens."""
    norm: Tensor
    """Largest norm of a key seen, (batch,) float32."""
    dropped: int = 0
    reach: float = math.inf
    """Tokens that a query may need, itself included."""
    front: int = 0
    """Sinks that stand before the last tokens, once these were cut off from them."""

    def append(self, keys: Tensor, values: Tensor, sinks: Tensor | None) -> None:
        """Add tokens at the end, after cutting off those out of reach if it is time.

        Args:
            keys, values: (batch, tokens, head_dim).
            sinks: which of all tokens are kept for ever, (batch, sinks); all of them are out of reach, or none.
        """
        added = keys.shape[1]
        spare = _SPARE_TOKENS + int(_SPARE_SHARE * min(self.reach, self.length))
        if self.front + self.length + added > self.keys.shape[1] or self.length > self.reach + spare:
            kept = int(min(self.length, self.reach))
            end = self.front + self.length
            first_cut = sinks if kept < self.length and not self.dropped else None
            self.keys, self.values = (
                torch.cat(
                    [
                        x[:, : self.front] if first_cut is None else _pick(x, first_cut),
                        x[:, end - kept : end],
                        x.new_empty(len(x), added + spare, x.shape[-1]),
                    ],
                    dim=1,
                )
                for x in (self.keys, self.values)
            )
            self.front = self.front if first_cut is None else first_cut.shape[1]
            self.dropped += self.length - kept
            self.length = kept
        new = slice(self.front + self.length, self.front + self.length + added)
        self.keys[:, new], self.values[:, new] = keys, values
        self.norm = torch.maximum(self.norm, _norms(keys).amax(dim=-1))
        self.length += added


class AlibiLayer(CacheLayerMixin):
    """One layer of an `AlibiCache`; see there for the arguments."""

    is_sliding = False
    is_croppable = True

    def __init__(self, tolerance: float | None = None, margin: float = 1.25) -> None:
        super().__init__()
        self.tolerance, self.margin = tolerance, margin
        self._clear()

    def _clear(self) -> None:
        self.stores: list[_Store] = []
        self.tokens = 0
        self.observed = 0
        # Which tokens are sinks, (batch, sinks), once all of them have been seen.
        self.sinks: Tensor | None = None
        self.query_norm: Tensor | None = None
        self.least_lse: Tensor | None = None
        # Whether the attention has looked at what this layer gave it last.
        self.seen = True
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Stores for each key head, still empty."""
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads = key_states.shape[:2]
        self.stores = [
            _Store(
                key_states.new_empty(batch, 0, key_states.shape[-1]),
                value_states.new_empty(batch, 0, value_states.shape[-1]),
                0,
                torch.zeros(batch, device=self.device),
            )
            for _ in range(heads)
        ]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Add new tokens (batch, key-value heads, tokens, head_dim); gives what ALiBi's sdpa attention takes.

        Raises RuntimeError if gradients are wanted, or if the attention did not check what was dropped.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise RuntimeError("AlibiCache is for inference; use torch.no_grad(), or transformers' DynamicCache")
        if not self.seen and any(store.dropped for store in self.stores):
            raise RuntimeError(
                "the attention of this model did not look at its AlibiCache; it needs a model converted by hf_alibi"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first = self.tokens == 0
        for index, store in enumerate(self.stores):
            store.append(key_states[:, index], value_states[:, index], self.sinks)
        self.tokens += key_states.shape[2]
        self.seen = False
        keys = [store.keys[:, : store.front + store.length] for store in self.stores]
        values = [store.values[:, : store.front + store.length] for store in self.stores]
        whole = (key_states, value_states) if first else (None, None)
        sinks = [self.sinks if store.front else None for store in self.stores]
        return (
            CachedStates(self, keys, self.tokens, whole[0], sinks),
            CachedStates(self, values, self.tokens, whole[1], sinks),
        )

    def observe(self, call: AttentionCall, lse: Tensor | None, allowed: Tensor | None) -> None:
        """Check queries against what was dropped before them, and set the reach of those to come.

        Args:
            call: its queries are the last tokens; its tolerance counts if the cache has none of its own.
            lse: (batch, heads, queries), log-sum-exp of their logits over what is kept; None in the first step.
            allowed: bool (batch or 1, heads or 1, queries, tokens), what they see; None for all tokens before them.

        Raises RuntimeError if dropped tokens may have more of a query's weights than the tolerance, or if sinks are not
        those of earlier queries.
        """
        query, slopes = call.query, call.slopes
        self.seen = True
        limit = math.log(call.tolerance if self.tolerance is None else self.tolerance)
        norm = _norms(query) * abs(call.scaling)
        largest = norm.amax(dim=(0, 2))
        self.query_norm = largest if self.query_norm is None else torch.maximum(self.query_norm, largest)
        if lse is None:
            return
        per_head = slopes.per_head.to(query.device).clamp(min=1e-30)
        series = log_sum_of_bias(per_head)
        key_norm = torch.stack([store.norm for store in self.stores], dim=1)
        key_norm = key_norm.repeat_interleave(len(per_head) // len(self.stores), dim=1)
        self._check(norm * key_norm[..., None] - lse + series[:, None], per_head, limit)
        least = lse.amin(dim=(0, 2))
        self.least_lse = least if self.least_lse is None else torch.minimum(self.least_lse, least)
        self.observed += lse.shape[2]
        last_sink = -1
        if slopes.sink_tokens:
            last_sink = self._find_sinks(allowed, slopes.sink_tokens)
        if self.observed < _SETTLE or slopes.dynamic is not None or last_sink == self.tokens:
            return
        bound = self.margin * self.query_norm * key_norm.amax(dim=0) - self.least_lse + series - limit
        reach = (bound / per_head).clamp(min=1).unflatten(0, (len(self.stores), -1)).amax(dim=-1)
        for store, tokens in zip(self.stores, reach.tolist(), strict=True):
            store.reach = tokens + 1 if tokens == tokens else math.inf
            if not store.front and self.tokens - store.reach <= last_sink:
                store.reach = math.inf

    def _find_sinks(self, allowed: Tensor | None, sink_tokens: int) -> int:
        """Find the first tokens that queries see, and raise if they have changed since tokens were dropped.

        Args:
            allowed: see `observe`.
            sink_tokens: how many.

        Returns the last of them, in any sequence; the number of all tokens if fewer have been seen.
        """
        batch = len(self.stores[0].keys)
        if allowed is None:
            allowed = torch.ones(1, 1, 1, self.tokens, dtype=torch.bool, device=self.device)
        if self.sinks is None:
            row = allowed[:, 0, -1].expand(batch, -1)
            if bool((row.sum(dim=-1) < sink_tokens).any()):
                return self.tokens
            self.sinks = row.int().argsort(dim=-1, descending=True, stable=True)[:, :sink_tokens]
        last = int(self.sinks.max())
        if any(store.front for store in self.stores):
            until = torch.arange(last + 1, device=self.device) <= self.sinks[:, None, None, -1:]
            kept = torch.zeros(batch, last + 1, dtype=torch.bool, device=self.device).scatter_(1, self.sinks, True)
            same = ((allowed[..., : last + 1] & until) == kept[:, None, None]).all(dim=-1)
            if not bool((same | ~allowed.any(dim=-1)).all()):
                raise RuntimeError(
                    "the first tokens that a query sees are not those that AlibiCache has kept as sinks; give masks "
                    "that only grow, or use transformers' DynamicCache"
                )
        return last

    def _check(self, bound: Tensor, slopes: Tensor, limit: float) -> None:
        """Raise if dropped weights may pass a limit.

        Args:
            bound: (batch, heads, queries), logarithm of what dropped tokens could have at distance 0.
            slopes: (heads,).
            limit: logarithm of the tolerance.
        """
        queries, groups = bound.shape[2], len(slopes) // len(self.stores)
        after = torch.arange(queries - 1, -1, -1, device=bound.device)
        for index, store in enumerate(self.stores):
            if store.dropped:
                heads = slice(index * groups, (index + 1) * groups)
                share = (bound[:, heads] - slopes[heads, None] * (store.length - after)).max()
                if not share <= limit:
                    raise RuntimeError(
                        f"a query may reach tokens that AlibiCache has dropped: up to {share.exp():.1e} of its "
                        f"weights, and {math.exp(limit):.1e} are allowed; use a larger margin than {self.margin}, "
                        "a larger tolerance, or transformers' DynamicCache"
                    )

    def get_seq_length(self) -> int:
        """Tokens seen so far, kept or not."""
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens after `query_length` more, and the first of them: masks also cover what was dropped."""
        return self.tokens + query_length, 0

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, given as a negative number. Raises ValueError if they are no longer kept."""
        removed = abs(tokens_to_remove)
        if any(store.dropped and store.length <= removed for store in self.stores):
            raise ValueError(f"cannot take back {removed} tokens: AlibiCache has dropped what came before them")
        self.tokens -= removed
        for store in self.stores:
            store.length -= removed
            if self.sinks is not None and not store.front:
                # Sinks may have been among the tokens, or be in reach again.
                store.reach = math.inf
        if not any(store.front for store in self.stores):
            self.sinks = None

    def _map(self, select: Any) -> None:
        for store in self.stores:
            store.keys, store.values, store.norm = select(store.keys), select(store.values), select(store.norm)
        self.sinks = None if self.sinks is None else select(self.sinks)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The sequences of the batch in another order, for beam search."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these sequences."""
        self._map(lambda x: x[indices])


class CachedStates:
    """Keys or values of one layer, in place of a tensor (batch, key-value heads, tokens, head_dim).

    Args:
        layer: of the cache.
        parts: for each key-value head its last tokens, (batch, tokens kept, head_dim), and before them its sinks.
        tokens: seen so far, kept or not.
        whole: the tensor itself, if nothing was dropped.
        sinks: for each key-value head which of all tokens its sinks are, int64 (batch, sinks); None if there are
            none before the last tokens.
    """

    def __init__(
        self,
        layer: AlibiLayer,
        parts: list[Tensor],
        tokens: int,
        whole: Tensor | None,
        sinks: list[Tensor | None],
    ) -> None:
        self.layer, self.parts, self.whole, self.sinks = layer, parts, whole, sinks
        self.shape = torch.Size((parts[0].shape[0], len(parts), tokens, parts[0].shape[-1]))

    def __getattr__(self, name: str) -> Any:
        raise TypeError(_NO_TENSOR)

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        """What any function of torch does with it."""
        raise TypeError(_NO_TENSOR)


def _pick(x: Tensor, columns: Tensor) -> Tensor:
    """Of x (batch, tokens, head_dim) the tokens `columns` (batch, picked)."""
    return x.gather(1, columns[..., None].expand(-1, -1, x.shape[-1]))


def _norms(x: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    return norms

"""ALiBi attention on the kernels of flash-attn (Dao 2023, arXiv 2307.08691), which take a slope for each head.

The package is called directly: transformers' wrapper drops the slopes. Its kernels put the last query at the last key
and add -slope × distance. Padding is taken out before the call, so that distances count tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.nn.functional import pad

from .call import autocast, resolve

__all__ = ["flash_alibi_attention", "load_flash_attn", "refuse_sinks"]

# ALiBi came with 2.4.0; llm-foundry relies on it from 2.4.2 on.
_OLDEST = "2.4.2"
_OTHERWISE = "or use attn_implementation='sdpa'"


def flash_alibi_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention with the ALiBi bias, for float16 and bfloat16 on a CUDA device.

    Arguments as in `resolve`, but:
        attention_mask: see `_without_padding`; None means that every key is a token, queries at the last ones.
        kwargs: `sliding_window`, the number of tokens that a query sees, itself included; `deterministic` gradients,
            by default as the environment variable FLASH_ATTENTION_DETERMINISTIC says; packing, see `_packing`.

    Returns the output (batch, queries, heads, head_dim) and None: this backend has no weights to show.

    Raises ImportError without a usable flash-attn; ValueError for what its kernels cannot do.
    """
    states = (query, key, value)
    call = resolve("flash_attention_2", module, states, attention_mask, scaling=scaling, kwargs=kwargs)
    slopes = call.slopes
    if slopes.dynamic is not None:
        raise ValueError(
            "alibi_scaling of type 'dynamic' gives each query its own slopes, flash-attn takes one a head; make it "
            f"'linear' or 'ntk', {_OTHERWISE}"
        )
    refuse_sinks(slopes.sink_tokens)
    flash_attn = load_flash_attn()
    query, key, value = autocast(query.device, query, key, value)
    _check_kernel_takes(query)
    window, deterministic = kwargs.get("sliding_window"), kwargs.get("deterministic")
    if deterministic is None:
        deterministic = os.environ.get("FLASH_ATTENTION_DETERMINISTIC") == "1"
    options = {
        "dropout_p": dropout,
        "softmax_scale": call.scaling,
        "causal": True,
        "window_size": (-1, -1) if window is None else (window - 1, 0),
        "alibi_slopes": slopes.per_head,
        "deterministic": deterministic,
    }
    attend_joined = partial(flash_attn.flash_attn_varlen_func, **options)
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    packing = _packing(query, key, attention_mask, kwargs)
    if attention_mask is not None:
        return _without_padding(attend_joined, query, key, value, attention_mask), None
    if packing is not None:
        joined = attend_joined(*(tensor.flatten(0, 1) for tensor in (query, key, value)), **packing)
        return joined.unflatten(0, query.shape[:2]), None
    if key.shape[1] < query.shape[1]:
        raise ValueError(f"causal attention of {query.shape[1]} queries needs as many keys, got {key.shape[1]}")
    return flash_attn.flash_attn_func(query, key, value, **options), None


def refuse_sinks(sink_tokens: int) -> None:
    """Raise ValueError for sink tokens, which no argument of flash-attn can free from the bias."""
    if sink_tokens:
        raise ValueError(
            f"alibi_sink_tokens is {sink_tokens}, but flash-attn gives the bias to every key; make it 0, {_OTHERWISE}"
        )


def load_flash_attn() -> Any:
    """The module `flash_attn`. Raises ImportError if it is missing, does not load or is too old for ALiBi."""
    try:
        flash_attn: Any = import_module("flash_attn")
        # FlashAttention 4 alone leaves an empty package of this name.
        found = getattr(flash_attn, "__version__", "0")
        if Version(found) >= Version(_OLDEST):
            return flash_attn
    except ImportError as error:
        found = str(error)
    raise ImportError(
        f"attn_implementation 'flash_attention_2' needs the package flash-attn >= {_OLDEST} and a CUDA GPU, found "
        f"{found!r}; `pip install flash-attn --no-build-isolation`, {_OTHERWISE}"
    )


def _check_kernel_takes(query: Tensor) -> None:
    """Raise ValueError unless `query` is of a type and on a device that flash-attn has kernels for."""
    if query.dtype not in (torch.float16, torch.bfloat16) or not query.is_cuda:
        raise ValueError(
            f"'flash_attention_2' takes float16 or bfloat16 on a CUDA device, got {query.dtype} on {query.device}; "
            f"load the model with dtype=torch.bfloat16 onto a GPU, run it under torch.autocast, {_OTHERWISE}"
        )


def _without_padding(
    attend_joined: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor
) -> Tensor:
    """Attention among the tokens of each sequence; the output of padding is zero.

    Args:
        attend_joined: flash-attn's function for sequences that stand one after the other.
        query: (batch, queries, heads, head_dim), at the last positions of the mask.
        key, value: (batch, keys, key-value heads, head_dim).
        attention_mask: bool or integer (batch, filled), nonzero for tokens, with padding anywhere; keys beyond it are
            the part of a static cache that is still empty.
    """
    queries, filled, keys = query.shape[1], attention_mask.shape[-1], key.shape[1]
    fits = attention_mask.shape[:-1] == key.shape[:1] and queries <= filled <= keys
    if not fits or attention_mask.is_floating_point():
        raise ValueError(
            f"'flash_attention_2' with {queries} queries and {keys} keys takes a bool or integer padding mask "
            f"({key.shape[0]}, {queries} to {keys}), got {attention_mask.dtype} {tuple(attention_mask.shape)}; give "
            f"the model a 2D mask, {_OTHERWISE}"
        )
    tokens = attention_mask.bool()
    asking = tokens[:, filled - queries :]
    joined = attend_joined(
        query[asking],
        key[:, :filled][tokens],
        value[:, :filled][tokens],
        **_sequences(asking.sum(dim=-1), tokens.sum(dim=-1)),
    )
    output = joined.new_zeros(query.shape)
    output[asking] = joined
    return output


def _packing(
    query: Tensor, key: Tensor, attention_mask: Tensor | None, kwargs: dict[str, Any]
) -> dict[str, Any] | None:
    """flash-attn's arguments for packed sequences; None if nothing is packed.

    Args:
        query: (batch, queries, heads, head_dim).
        key: (batch, keys, key-value heads, head_dim).
        attention_mask: beside a mask or earlier keys, `position_ids` mean nothing.
        kwargs: `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and `max_length_k` over all tokens of the batch, as
            transformers' collator makes them; or `position_ids` (batch or 1, queries) that restart at each sequence.
    """
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    given = [kwargs.get(name) for name in names]
    if any(argument is not None for argument in given):
        if attention_mask is not None or any(argument is None for argument in given):
            raise ValueError(f"packed sequences are described by all of {', '.join(names)}, and without a mask")
        return dict(zip(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), given, strict=True))
    position_ids = kwargs.get("position_ids")
    if attention_mask is not None or position_ids is None or query.shape[1] != key.shape[1]:
        return None
    position_ids = position_ids.expand(query.shape[0], -1)
    restarts = position_ids.diff(dim=-1) != 1
    if not restarts.any():
        return None
    if (restarts & (position_ids[:, 1:] != position_ids.amin(dim=-1, keepdim=True))).any():
        raise ValueError(
            "position_ids may only count up, and restart where a packed sequence begins; ALiBi needs no others, leave "
            "them out"
        )
    begins = pad(restarts, (1, 0), value=True).flatten().nonzero()[:, 0]
    lengths = pad(begins, (0, 1), value=position_ids.numel()).diff()
    return _sequences(lengths, lengths)


def _sequences(query_lengths: Tensor, key_lengths: Tensor) -> dict[str, Any]:
    """flash-attn's arguments for sequences of these lengths, each (sequences,) in tokens."""
    return {
        "cu_seqlens_q": pad(query_lengths.cumsum(dim=0), (1, 0)).int(),
        "cu_seqlens_k": pad(key_lengths.cumsum(dim=0), (1, 0)).int(),
        "max_seqlen_q": int(query_lengths.max()),
        "max_seqlen_k": int(key_lengths.max()),
    }

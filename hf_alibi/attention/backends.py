"""ALiBi attention backends: one file each, with the signature of transformers' own attention functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from transformers import AttentionInterface

from .eager import eager_alibi_attention
from .flash import flash_alibi_attention, load_flash_attn, refuse_sinks
from .flex.backend import flex_alibi_attention
from .mask_by_rows import register_mask
from .paged import Attention, takes_paged_cache
from .sdpa.dispatch import sdpa_alibi_attention

__all__ = ["BACKENDS", "alibi_name", "check_backend", "register_backends", "wrapped_backends"]

BACKENDS = {
    "eager": eager_alibi_attention,
    "sdpa": takes_paged_cache(sdpa_alibi_attention),
    "flex_attention": flex_alibi_attention,
    "flash_attention_2": flash_alibi_attention,
}
"""From the name that users know (`attn_implementation`) to the attention function with ALiBi."""

# What transformers switches to by itself while it batches continuously, from `eager`.
_PAGED = {"paged|eager": takes_paged_cache(eager_alibi_attention, only=True)}


def alibi_name(attn_implementation: str) -> str:
    """The name under which the ALiBi form of `attn_implementation` is registered.

    Raises ValueError if there is none: running another form would drop the bias.
    """
    if attn_implementation not in BACKENDS and attn_implementation not in _PAGED:
        raise ValueError(
            f'Specified `attn_implementation="{attn_implementation}"` is not supported with ALiBi; supported: '
            f"{', '.join(BACKENDS)}"
        )
    return f"alibi_{attn_implementation}"


def check_backend(attn_implementation: str, sink_tokens: int) -> None:
    """Raise ValueError if `attn_implementation` has no ALiBi form with this number of sink tokens.

    Raises ImportError if its package is missing.
    """
    alibi_name(attn_implementation)
    if attn_implementation == "flash_attention_2":
        refuse_sinks(sink_tokens)
        load_flash_attn()


def register_backends() -> None:
    """Make the backends known to transformers; calling it again changes nothing."""
    for name, attention in {**BACKENDS, **_PAGED}.items():
        AttentionInterface.register(alibi_name(name), attention)
    register_mask()


@contextmanager
def wrapped_backends(wrap: Callable[[Attention], Attention]) -> Iterator[None]:
    """Context manager: inside, transformers calls `wrap(backend)` in place of each backend."""
    for name, attention in {**BACKENDS, **_PAGED}.items():
        AttentionInterface.register(alibi_name(name), wrap(attention))
    try:
        yield
    finally:
        register_backends()


register_backends()

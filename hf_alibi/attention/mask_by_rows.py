"""A mask of transformers that is built only in parts: the one of a padded batch of 4 × 32k tokens takes 4 GiB.

`sdpa` on a GPU asks which run of keys each query sees; that is found a few rows at a time. Whatever needs the matrix
gets it, by any use of it as a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from ..configuration import Converted

__all__ = ["MaskByRows", "register_mask"]

# Smaller masks are built: each is read once, and then known to all layers.
_ENTRIES = 2**26
# Entries of the rows that are looked at together.
_PART = 2**24
_DEVICES = {"cuda"}


class MaskByRows:
    """What stands for a mask (batch, 1, queries, keys), bool, True where a query may see a key.

    Args:
        shape: of the mask.
        device: where its parts are built.
        build: the rows of some queries, (batch, 1, rows, keys), from the first and the number of them.
    """

    dtype = torch.bool
    ndim = 4

    def __init__(self, shape: Sequence[int], device: Any, build: Callable[[int, int], Tensor]) -> None:
        self.shape, self.device, self._build = torch.Size(shape), torch.device(device), build
        self.known: Any = None
        """What was found in the mask: its runs."""

    def parts(self) -> Iterator[Tensor]:
        """The rows of a few queries after the other, (batch, 1, rows, keys) each."""
        batch, _, queries, keys = self.shape
        rows = max(1, _PART // (batch * keys))
        for first in range(0, queries, rows):
            yield self._build(first, min(rows, queries - first))

    def whole(self) -> Tensor:
        """The mask itself."""
        return self._build(0, self.shape[2])

    def to(self, *args: Any, **kwargs: Any) -> MaskByRows | Tensor:
        """As a tensor's: the same for layers on another device; in another type, the mask itself."""
        like = torch.empty(0, dtype=torch.bool, device=self.device).to(*args, **kwargs)
        if like.dtype != torch.bool:
            return self.whole().to(*args, **kwargs)
        moved = MaskByRows(self.shape, like.device, lambda *rows: self._build(*rows).to(like.device))
        moved.known = None if self.known is None else tuple(x.to(like.device) for x in self.known)
        return moved

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.whole(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.whole()[index]

    def __invert__(self) -> Tensor:
        return ~self.whole()

    def __and__(self, other: Tensor) -> Tensor:
        return self.whole() & other

    def __or__(self, other: Tensor) -> Tensor:
        return self.whole() | other

    __rand__, __ror__ = __and__, __or__

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What any function of torch does with the mask."""
        args, kwargs = tree_map(lambda x: x.whole() if isinstance(x, MaskByRows) else x, (args, kwargs or {}))
        return function(*args, **kwargs)


def _mask(*args: Any, **kwargs: Any) -> Any:
    """As `sdpa_mask`; but of large masks of ALiBi models on a GPU only what can build them."""
    if args or not _is_large(**kwargs):
        return sdpa_mask(*args, **kwargs)
    queries, keys = kwargs["q_length"], kwargs["kv_length"]
    if kwargs.get("allow_is_causal_skip", True) and queries == keys:
        padding = kwargs.get("attention_mask")
        if padding is None or bool(padding.all()):
            return sdpa_mask(**kwargs)

    def build(first: int, rows: int) -> Tensor:
        changes = {"q_length": rows, "q_offset": kwargs.get("q_offset", 0) + first, "allow_is_causal_skip": False}
        mask: Tensor = sdpa_mask(**{**kwargs, **changes})
        return mask

    return MaskByRows((kwargs["batch_size"], 1, queries, keys), kwargs["device"], build)


def _is_large(
    *, batch_size: int, q_length: int, kv_length: int, config: Any = None, device: Any = "cpu", **kwargs: Any
) -> bool:
    if not isinstance(config, Converted) or torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    is_plain = not kwargs.get("use_vmap") and not kwargs.get("allow_is_bidirectional_skip")
    return is_plain and torch.device(device).type in _DEVICES and batch_size * q_length * kv_length > _ENTRIES


def register_mask() -> None:
    """Make it the mask of `sdpa`, unless another one was registered there; calling it again changes nothing."""
    if ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is sdpa_mask:
        AttentionMaskInterface.register("sdpa", _mask)

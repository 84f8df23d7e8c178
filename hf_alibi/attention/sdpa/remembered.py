"""What is found in a mask is found once: all layers of a model get the same one."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["remembered"]

T = TypeVar("T")


def remembered(find: Callable[[Tensor, Tensor | None], T]) -> Callable[[Tensor, Tensor | None], T]:
    """`find(allowed, own)`, called again only for another mask `allowed`, or one that was changed since."""
    known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    @wraps(find)
    def once(allowed: Tensor, own: Tensor | None = None) -> T:
        # A tensor of inference mode has no version to tell whether it was changed since.
        if torch.compiler.is_compiling() or allowed.is_inference():
            return find(allowed, own)
        if allowed not in known or known[allowed][0] != allowed._version:
            known[allowed] = allowed._version, find(allowed, own)
        found: T = known[allowed][1]
        return found

    return once

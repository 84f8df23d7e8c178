"""What every engine answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["COMPARED", "Continuation", "Engine"]

COMPARED = 32
"""How many of a continuation's tokens come with their logits; engines are slow to hand out whole rows of them."""


@dataclass(frozen=True)
class Continuation:
    """What an engine wrote after a prompt, always taking the likeliest token."""

    ids: list[int]
    logits: Any
    """float32 numpy array (tokens, vocabulary): those that each of the first `COMPARED` tokens was chosen by."""


class Engine(Protocol):
    """A model that an engine has loaded, in float32 as far as the file holds that."""

    version: str
    """Name and version of the engine."""

    def continued(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Continuation]:
        """Continue prompts, token ids, by `tokens` each, all in one batch if the engine has batches.

        Prompts are read in chunks, and tokens are written with the engine's cache.
        """

    def tokenized(self, text: str) -> list[int] | None:
        """Ids by the tokenizer in the engine's own file; None if it uses that of the folder."""

    def close(self) -> None:
        """Free what the engine holds."""

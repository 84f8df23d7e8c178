"""Global heads: heads of slope 0 beside heads with ALiBi's bias.

The bias limits how far a head can look; a head without it can look at everything alike. Which heads are global is data
of the config, `alibi_slopes`. They stand in as few key groups as possible, because a cache keeps all tokens of a key
head that one global head reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .slopes import alibi_slopes, slopes_by_layer

__all__ = ["GlobalHeads", "count_global_heads", "describe_global_heads"]


@dataclass(frozen=True)
class GlobalHeads:
    """How many heads have no bias, and in which layers."""

    heads: int = 0
    """In each layer that has any."""
    every: int = 1
    """Every n-th layer has them, counted from the first: 1 for all layers, 4 for the 4th, 8th, ..."""

    def check(self, heads: int, layers: int) -> None:
        """Raise TypeError unless both are ints, ValueError unless a model of these `heads` and `layers` has as many."""
        for name, value, least, most, what in (
            ("global_heads", self.heads, 0, heads, "heads of a layer"),
            ("global_every", self.every, 1, layers, "layers, of which the last has global heads"),
        ):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if not least <= value <= most:
                raise ValueError(f"{name} is {value}; it must be from {least} to {most}, {what}")

    def slopes(self, heads: int, key_heads: int, layers: int) -> list[float] | list[list[float]] | None:
        """The paper's slopes with 0 at the places of global heads, as `alibi_slopes` of a config takes them.

        Args:
            heads: of each layer.
            key_heads: which they share; each has as many neighbours among the heads.
            layers: with self-attention.

        Returns (heads,) if all layers are alike, else (layers, heads); None, the paper's, without global heads.
        """
        self.check(heads, layers)
        if not self.heads:
            return None
        plain = alibi_slopes(heads).tolist()
        chosen = set(_flattest(plain, key_heads)[: self.heads])
        mixed = [0.0 if place in chosen else slope for place, slope in enumerate(plain)]
        if self.every == 1:
            return mixed
        return [list(plain if (layer + 1) % self.every else mixed) for layer in range(layers)]


def _flattest(slopes: Sequence[float], key_heads: int) -> list[int]:
    """Places by key group, that of the flattest slope first, and inside a group from flat to steep."""
    group = len(slopes) // key_heads

    def flat_groups_first(place: int) -> tuple[float, int, float]:
        first = place // group * group
        return min(slopes[first : first + group]), first, slopes[place]

    return sorted(range(len(slopes)), key=flat_groups_first)


def count_global_heads(slopes: Any) -> list[int]:
    """Heads of slope 0 in each list of `alibi_slopes`: one for all layers, or one a layer."""
    return [layer.count(0) for layer in slopes_by_layer(slopes)]


def describe_global_heads(slopes: Any) -> str:
    """How many heads are global, in words: "2 of 9 heads global", "3 of 9 heads global in 7 of 30 layers", or ""."""
    by_layer, counts = slopes_by_layer(slopes), count_global_heads(slopes)
    some = [count for count in counts if count]
    if not some:
        return ""
    number = str(max(some)) if min(some) == max(some) else f"{min(some)} to {max(some)}"
    where = f" in {len(some)} of {len(counts)} layers" if by_layer is slopes else ""
    return f"{number} of {len(by_layer[0])} heads global{where}"

"""Global heads: heads without a bias, which find what is far, beside heads with ALiBi, which keep the order near by.

ALiBi's heads cannot reach far, whatever they were trained on. A few heads of slope 0 can; which ones is data of the
config, `alibi_slopes`. They stand in as few key groups as possible, because a cache keeps all of a group that one head
reads all of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .slopes import alibi_slopes

__all__ = ["GlobalHeads", "count_global_heads", "describe_global_heads"]


@dataclass(frozen=True)
class GlobalHeads:
    """How many heads have no bias, and in which layers."""

    heads: int = 0
    """In each layer that has any."""
    every: int = 1
    """The last of each so many layers has them: 1 all layers, 4 one layer in four."""

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


def count_global_heads(slopes: Sequence[float] | Sequence[Sequence[float]] | None) -> list[int]:
    """Heads of slope 0 in each layer of `alibi_slopes`; one number if all layers share one list."""
    if not slopes:
        return [0]
    layers = slopes if isinstance(slopes[0], Sequence) else [slopes]
    return [sum(slope == 0 for slope in layer) for layer in layers]  # type: ignore[union-attr]


def describe_global_heads(slopes: Sequence[float] | Sequence[Sequence[float]] | None) -> str:
    """How many heads are global, in words: "2 of 9 heads global", "3 of 9 heads global in 7 of 30 layers", or ""."""
    counts = count_global_heads(slopes)
    if slopes is None or not any(counts):
        return ""
    if not isinstance(slopes[0], Sequence):
        return f"{counts[0]} of {len(slopes)} heads global"
    some = [count for count in counts if count]
    least, most = min(some), max(some)
    number = str(most) if least == most else f"{least} to {most}"
    return f"{number} of {len(slopes[0])} heads global in {len(some)} of {len(counts)} layers"

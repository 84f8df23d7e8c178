"""Which tokens are scored with which context: the two protocols, as plain arithmetic."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import InputError

__all__ = [
    "NON_OVERLAPPING",
    "PROTOCOLS",
    "SLIDING",
    "Window",
    "check_protocol",
    "non_overlapping_windows",
    "sliding_windows",
]

SLIDING = "sliding"
NON_OVERLAPPING = "non_overlapping"
PROTOCOLS = (SLIDING, NON_OVERLAPPING)


@dataclass(frozen=True)
class Window:
    """One forward pass over `tokens[start : start + length]`.

    Input `start + i` predicts token `start + i + 1`; the tokens from `first_target` to `start +
    length`, both included, are scored.
    """

    start: int
    length: int
    first_target: int

    @property
    def num_targets(self) -> int:
        """Number of scored tokens."""
        return self.start + self.length + 1 - self.first_target


def sliding_windows(num_tokens: int, *, length: int, scored_tokens: int, stride: int) -> list[Window]:
    """Windows that score their last `stride` targets only.

    Every target sees `length - stride + 1` to `length` tokens. They score the last `scored_tokens`
    of `num_tokens` tokens once each; the last window may score fewer.
    """
    windows = []
    for first in range(num_tokens - scored_tokens, num_tokens, stride):
        last = min(first + stride, num_tokens) - 1
        windows.append(Window(last - length, length, first))
    return windows


def non_overlapping_windows(num_tokens: int, *, length: int, scored_tokens: int) -> list[Window]:
    """Windows that score all their `length` targets: the p-th target of a window sees p tokens.

    They score the last `scored_tokens` of `num_tokens` tokens once each. Neighbours share one token,
    the last target of one and the first input of the next, so that no token is lost at the join.
    """
    first_targets = range(num_tokens - scored_tokens, num_tokens, length)
    return [Window(first - 1, length, first) for first in first_targets]


def check_protocol(
    num_tokens: int, *, lengths: Sequence[int], train_length: int, scored_tokens: int, stride: int
) -> None:
    """Check that lengths, stride and number of tokens fit together; raises `InputError` where not."""
    if not lengths or min(lengths) < 1 or len(set(lengths)) != len(lengths):
        raise InputError(f"lengths {list(lengths)} given; give one or more different numbers of tokens, each >= 1")
    if train_length not in lengths:
        raise InputError(
            f"train_length {train_length} is not among lengths {list(lengths)}; add it, the comparison starts there"
        )
    if not 1 <= stride <= min(lengths):
        raise InputError(f"stride {stride} given; allowed: 1 to the smallest length, {min(lengths)}")
    multiple = math.lcm(*lengths)
    if scored_tokens < 1 or scored_tokens % multiple:
        nearest = max(1, round(scored_tokens / multiple)) * multiple
        raise InputError(
            f"scored_tokens {scored_tokens} given; windows of {', '.join(map(str, lengths))} tokens tile "
            f"multiples of {multiple} only, so set it to {nearest}"
        )
    before = max(lengths) - min(stride, scored_tokens) + 1
    if num_tokens < scored_tokens + before:
        raise InputError(
            f"the text has {num_tokens} tokens and {scored_tokens + before} are needed ({scored_tokens} "
            f"scored and {before} before them as context of the longest length {max(lengths)}); "
            "give more text, fewer scored_tokens or shorter lengths"
        )

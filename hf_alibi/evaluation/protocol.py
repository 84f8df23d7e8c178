"""Which tokens are scored with which context: the two protocols, as plain arithmetic."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import InputError

__all__ = [
    "NON_OVERLAPPING",
    "PROTOCOLS",
    "SLIDING",
    "Window",
    "check_protocol",
    "context_seen",
    "non_overlapping_windows",
    "sliding_windows",
    "stride_at",
]

SLIDING = "sliding"
NON_OVERLAPPING = "non_overlapping"
PROTOCOLS = (SLIDING, NON_OVERLAPPING)

# A window's length divided by this is the default stride of the sliding protocol, and the largest one allowed.
_STRIDES_IN_A_WINDOW = 8


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


def stride_at(length: int, stride: int | None = None) -> int:
    """Stride of the sliding protocol at a length: `stride`, by default an eighth of the length.

    >>> stride_at(256), stride_at(4096), stride_at(256, 16)
    (32, 512, 16)
    """
    return max(1, length // _STRIDES_IN_A_WINDOW) if stride is None else stride


def context_seen(protocol: str, length: int, *, scored_tokens: int, stride: int | None = None) -> tuple[int, int]:
    """Smallest and greatest number of tokens that a scored token sees before it, in windows of `length`.

    >>> context_seen(SLIDING, 256, scored_tokens=8192), context_seen(NON_OVERLAPPING, 256, scored_tokens=8192)
    ((225, 256), (1, 256))
    """
    if protocol == NON_OVERLAPPING:
        return 1, length
    return length - min(stride_at(length, stride), scored_tokens) + 1, length


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
    num_tokens: int, *, lengths: Sequence[int], train_length: int, scored_tokens: int, stride: int | None = None
) -> None:
    """Check that lengths, stride and number of tokens fit together; raises `InputError` if not."""
    if not lengths or min(lengths) < 1 or len(set(lengths)) != len(lengths):
        raise InputError(f"lengths {list(lengths)} given; give one or more different numbers of tokens, each >= 1")
    if train_length not in lengths:
        raise InputError(
            f"train_length {train_length} is not among lengths {list(lengths)}; add it, the comparison starts there"
        )
    largest = stride_at(min(lengths))
    if stride is not None and not 1 <= stride <= largest:
        raise InputError(
            f"stride {stride} given; allowed: 1 to {largest}, an eighth of the smallest length, {min(lengths)}. With a "
            "larger one, tokens that should see the whole length see much less of it, and the perplexity comes out too "
            "high; leave stride out for an eighth of each length"
        )
    # Windows longer than the scored tokens only slide.
    tiling = [length for length in lengths if length <= max(scored_tokens, train_length)]
    multiple = math.lcm(*tiling)
    if scored_tokens < 1 or scored_tokens % multiple:
        nearest = max(1, round(scored_tokens / multiple)) * multiple
        raise InputError(
            f"scored_tokens {scored_tokens} given; windows of {', '.join(map(str, tiling))} tokens tile "
            f"multiples of {multiple} only, so set it to {nearest}"
        )
    # How far before the first scored token the windows of each length begin.
    before = max(context_seen(SLIDING, length, scored_tokens=scored_tokens, stride=stride)[0] for length in lengths)
    if num_tokens < scored_tokens + before:
        raise InputError(
            f"the text has {num_tokens} tokens and {scored_tokens + before} are needed ({scored_tokens} scored and "
            f"{before} before them as context of the longest length {max(lengths)}); "
            "give more text, fewer scored_tokens or shorter lengths"
        )

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
    "stride_at",
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


def stride_at(length: int, stride: int, stride_share: float) -> int:
    """Stride of the sliding window at a length: `stride`, or that share of the length where it is more.

    >>> stride_at(1024, 256, 1 / 16), stride_at(32768, 256, 1 / 16)
    (256, 2048)
    """
    return max(stride, int(length * stride_share))


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
    num_tokens: int,
    *,
    lengths: Sequence[int],
    train_length: int,
    scored_tokens: int,
    stride: int,
    stride_share: float = 0.0,
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
    if not 0 <= stride_share < 1:
        raise InputError(f"stride_share {stride_share} given; it is a share of the length, at least 0 and below 1")
    # Windows longer than what is scored only slide.
    tiling = [length for length in lengths if length <= max(scored_tokens, train_length)]
    multiple = math.lcm(*tiling)
    if scored_tokens < 1 or scored_tokens % multiple:
        nearest = max(1, round(scored_tokens / multiple)) * multiple
        raise InputError(
            f"scored_tokens {scored_tokens} given; windows of {', '.join(map(str, tiling))} tokens tile "
            f"multiples of {multiple} only, so set it to {nearest}"
        )
    longest = max(lengths)
    before = longest - min(stride_at(longest, stride, stride_share), scored_tokens) + 1
    if num_tokens < scored_tokens + before:
        raise InputError(
            f"the text has {num_tokens} tokens and {scored_tokens + before} are needed ({scored_tokens} "
            f"scored and {before} before them as context of the longest length {longest}); "
            "give more text, fewer scored_tokens or shorter lengths"
        )

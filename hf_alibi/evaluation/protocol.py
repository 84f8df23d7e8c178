"""Which tokens are scored with which context: two protocols, as plain arithmetic.

Both score the same last tokens of a text at every length, each once and with equal weight; only the context before
them varies.

- `sliding`: a window of `length` tokens moves by `stride` tokens and scores its last `stride` targets only, so that
  every target sees `length - stride + 1` to `length` tokens. By default the stride is an eighth of the length.
- `non_overlapping`: windows lie end to end and score all their targets, which see 1 to `length` tokens.

Why both: the first targets of a window have little to go by and are hard to predict (the early-token curse, Press et
al. 2022, appendix B). Longer non-overlapping windows have fewer such targets, so their perplexity falls with length
even for a model that uses only the few tokens before each target. It is nevertheless what most papers print. Under
`sliding`, what changes with length is what the model makes of the tokens added far away.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import InputError

__all__ = ["CANNOT_RUN", "CROPPED", "FULL", "NON_OVERLAPPING", "OK", "PROTOCOLS", "SLIDING", "Protocol", "Window"]

SLIDING = "sliding"
NON_OVERLAPPING = "non_overlapping"
PROTOCOLS = (SLIDING, NON_OVERLAPPING)

# The context of a row: the whole window, never more than the training length, or else the name of a baseline.
FULL = "full"
CROPPED = "cropped"

# The status of a row; without numbers, its reason says why.
OK = "ok"
CANNOT_RUN = "cannot run"

# A window's length divided by this is the default stride of the sliding protocol, and the largest one allowed.
_STRIDES_IN_A_WINDOW = 8


@dataclass(frozen=True)
class Window:
    """One forward pass over `tokens[start : start + length]`.

    Input `start + i` predicts token `start + i + 1`; the tokens from `first_target` to `start + length`, both included,
    are scored.
    """

    start: int
    length: int
    first_target: int

    @property
    def num_targets(self) -> int:
        """Number of scored tokens."""
        return self.start + self.length + 1 - self.first_target


@dataclass(frozen=True)
class Protocol:
    """How many tokens are scored, at which lengths; all in tokens. See the module for the two ways of scoring.

    Args:
        lengths: evaluated, in ascending order.
        train_length: one of them, where the comparison starts.
        scored_tokens: the last tokens of the text, a multiple of every length up to their number.
        stride: of the sliding window at every length; None for an eighth of each length, which is the most allowed.
    """

    lengths: Sequence[int]
    train_length: int
    scored_tokens: int
    stride: int | None = None

    def stride_at(self, length: int) -> int:
        """Stride of the sliding window at a length.

        >>> Protocol([256, 4096], 256, 8192).stride_at(4096), Protocol([256], 256, 8192, stride=16).stride_at(256)
        (512, 16)
        """
        return max(1, length // _STRIDES_IN_A_WINDOW) if self.stride is None else self.stride

    def context_seen(self, kind: str, length: int) -> tuple[int, int]:
        """Smallest and greatest number of tokens before a scored token, in windows of `length`.

        >>> Protocol([256], 256, 8192).context_seen(SLIDING, 256)
        (225, 256)
        """
        fewest = 1 if kind == NON_OVERLAPPING else length - min(self.stride_at(length), self.scored_tokens) + 1
        return fewest, length

    def windows(self, kind: str, length: int, num_tokens: int) -> list[Window]:
        """The windows of a length that score the last tokens of `num_tokens`; none if longer ones cannot tile them.

        The last sliding window may score fewer tokens than its stride. Neighbouring non-overlapping windows share one
        token, the last target of one and the first input of the next, so that no token is lost at the join.
        """
        if kind == NON_OVERLAPPING and length > self.scored_tokens:
            return []
        step = length if kind == NON_OVERLAPPING else self.stride_at(length)
        windows = []
        for first in range(num_tokens - self.scored_tokens, num_tokens, step):
            last = min(first + step, num_tokens) - 1
            windows.append(Window(last - length, length, first))
        return windows

    def check(self, num_tokens: int) -> None:
        """Raise `InputError` if lengths, stride and a text of `num_tokens` do not fit together."""
        lengths, train_length, scored = self.lengths, self.train_length, self.scored_tokens
        if not lengths or min(lengths) < 1 or len(set(lengths)) != len(lengths):
            raise InputError(f"lengths {list(lengths)} given; give one or more different numbers of tokens, each >= 1")
        if train_length not in lengths:
            raise InputError(
                f"train_length {train_length} is not among lengths {list(lengths)}; add it, the comparison starts there"
            )
        largest = replace(self, stride=None).stride_at(min(lengths))
        if self.stride is not None and not 1 <= self.stride <= largest:
            raise InputError(
                f"stride {self.stride} given; allowed: 1 to {largest}, an eighth of the smallest length, "
                f"{min(lengths)}. With a larger stride, tokens that should see the whole length see much less of it, "
                "and the perplexity comes out too high; leave stride out for an eighth of each length"
            )
        # Windows longer than the scored tokens only slide.
        tiling = [length for length in lengths if length <= max(scored, train_length)]
        multiple = math.lcm(*tiling)
        if scored < 1 or scored % multiple:
            nearest = max(1, round(scored / multiple)) * multiple
            raise InputError(
                f"scored_tokens {scored} given; windows of {', '.join(map(str, tiling))} tokens tile "
                f"multiples of {multiple} only, so set it to {nearest}"
            )
        # How far before the first scored token the windows of each length begin.
        before = max(self.context_seen(SLIDING, length)[0] for length in lengths)
        if num_tokens < scored + before:
            raise InputError(
                f"the text has {num_tokens} tokens and {scored + before} are needed ({scored} scored and {before} "
                f"before them as context of the longest length {max(lengths)}); give more text, fewer scored_tokens or "
                "shorter lengths"
            )

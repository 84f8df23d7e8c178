"""Documents to tokens in memory that does not grow with them: a long document is tokenised in parts.

A tokenizer takes hundreds of bytes for each token of a text that it is given at once.
"""

import re
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from .files import TEXT

__all__ = ["INPUT_IDS", "encode_documents"]

INPUT_IDS = "input_ids"
"""Column of the tokens."""

_PART = 50_000  # characters of a part
_AT_ONCE = 500_000  # characters that a tokenizer is given at once
# Tokenizers look no further than words, so that what is right this near to a cut, in characters, is right everywhere.
_NEAR = 500
_CUT = re.compile(r"(?<=\w)(?=\s\w)")
_MOST_CUTS = 20  # that are tried

_Encode = Callable[[list[str]], list[list[int]]]


def encode_documents(
    batch: dict[str, list[str]], *, tokenizer: PreTrainedTokenizerBase, bos: int | None
) -> dict[str, list[NDArray[np.int32]]]:
    """The tokens of each document, from the beginning-of-sequence token, if one is given, to that of the end.

    They are those that the tokenizer gives for the whole document: it is parted where that changes nothing, and if
    there is no such place (some tokenizers put a space before whatever they are given), it is not parted.
    """

    def encode(texts: list[str]) -> list[list[int]]:
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    first = [] if bos is None else [bos]
    rows = [[np.array(first, dtype=np.int32)] for _ in batch[TEXT]]
    for group in _groups((row, part) for row, text in enumerate(batch[TEXT]) for part in _parts(text, encode)):
        for (row, _), ids in zip(group, encode([part for _, part in group]), strict=True):
            rows[row].append(np.array(ids, dtype=np.int32))
    end = np.array([tokenizer.eos_token_id], dtype=np.int32)
    return {INPUT_IDS: [np.concatenate([*row, end]) for row in rows]}


def _groups(parts: Iterator[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Numbered texts in lists of about as much text as a tokenizer is given at once."""
    group, size = [], 0
    for row, part in parts:
        group.append((row, part))
        size += len(part)
        if size >= _AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group


def _parts(text: str, encode: _Encode) -> Iterator[str]:
    start = 0
    while len(text) - start > _PART + _NEAR:
        cut = _cut(text, start + _PART, encode)
        if cut is None:
            break
        yield text[start:cut]
        start = cut
    yield text[start:]


def _cut(text: str, start: int, encode: _Encode) -> int | None:
    """The next place from `start` on where a text can be parted without a change of its tokens, if one is near."""
    for found in islice(_CUT.finditer(text, start), _MOST_CUTS):
        cut = found.start()
        before, after = text[cut - _NEAR : cut], text[cut : cut + _NEAR]
        whole, left, right = encode([before + after, before, after])
        if whole == left + right:
            return cut
    return None

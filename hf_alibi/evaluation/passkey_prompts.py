"""Prompts that hide a number in filler text, with the answer: to ask a model, and to train one on the task.

The task is that of Mohtashami and Jaggi 2023, arXiv 2305.16300.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import InputError

__all__ = ["PasskeyCase", "PasskeyProbe", "PasskeyText", "passkey_training_tokens"]

_OPENING = "A pass key is hidden in this text. Remember it."
_FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_BEFORE_KEY = "\nThe pass key is"
_AFTER_KEY = ". Remember it."
_QUESTION = "\nWhat is the pass key? The pass key is"
_KEYS = range(10_000, 100_000)
# Keys that are divisible by this are asked for in evaluation only, all others in training only.
_HELD_OUT = 7
# How many of the blocks of the training stream are one case alone.
_WHOLE_BLOCKS = 0.25


class PasskeyCase(NamedTuple):
    """A prompt with its answer: int64 tokens of shape (length,), of which the last `answer` ones are the key."""

    tokens: Tensor
    answer: int


class PasskeyText:
    """The parts of the prompts as tokens of one tokenizer, put together to any exact number of tokens.

    With `bos_token_id` every prompt begins with that token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, bos_token_id: int | None = None) -> None:
        def encode(text: str) -> list[int]:
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
            return ids

        self._encode = encode
        self._opening, self._before_key, self._after_key, self._question, self._filler = (
            encode(text) for text in (_OPENING, _BEFORE_KEY, _AFTER_KEY, _QUESTION, _FILLER)
        )
        if bos_token_id is not None:
            self._opening = [bos_token_id, *self._opening]
        if encode(" 12345") == encode(" 67890"):
            raise InputError("the tokenizer gives all numbers the same tokens, so no passkey can be told from another")

    def case(self, *, length: int, depth: float, key: int, turn: float = 0.0) -> PasskeyCase:
        """One prompt with its answer, `length` tokens together.

        `depth` is the share of the filler before the key: 0 at the beginning, 1 right before the question. `turn`, from
        0 to below 1, says where in its round of sentences the filler begins.

        Raises `InputError` if the parts alone are longer than `length`.
        """
        # The answer is given with the same tokens as in the text, whatever the tokenizer makes of its neighbours.
        answer = self._encode(f" {key}")
        needle = [*self._before_key, *answer, *self._after_key]
        fixed = len(self._opening) + len(needle) + len(self._question) + len(answer)
        if fixed > length:
            raise InputError(
                f"a passkey prompt of {length} tokens was asked for, and its parts without any filler have {fixed} "
                f"with this tokenizer; give lengths of at least {fixed}"
            )
        first = int(turn * len(self._filler))
        filler = [self._filler[(first + index) % len(self._filler)] for index in range(length - fixed)]
        before = round(depth * len(filler))
        ids = [*self._opening, *filler[:before], *needle, *filler[before:], *self._question, *answer]
        return PasskeyCase(torch.tensor(ids, dtype=torch.int64), len(answer))

    def first_token(self) -> Tensor:
        """The first token of every prompt, shape (1, 1)."""
        return torch.tensor([self._opening[:1]])

    def shortest(self) -> int:
        """A length in tokens that every key fits in."""
        longest_key = max(len(self._encode(f" {key}")) for key in _KEYS[:: len(_KEYS) // 100])
        parts = (self._opening, self._before_key, self._after_key, self._question)
        # Two tokens more for keys that were not tried; tokenizers differ by one or two between numbers of five digits.
        return sum(map(len, parts)) + 2 * (longest_key + 1)


@dataclass(frozen=True)
class PasskeyProbe:
    """Which cases are asked: `cases` for each of `lengths` (tokens) and `depths` (0 to 1), the same for every model."""

    lengths: Sequence[int]
    depths: Sequence[float]
    cases: int
    seed: int = 0

    def check(self, text: PasskeyText) -> None:
        """Raise `InputError` if a length is too short for some of the keys."""
        shortest = text.shortest()
        if min(self.lengths) < shortest:
            raise InputError(
                f"passkey_lengths has {min(self.lengths)}, and a prompt with its answer has up to {shortest} tokens "
                f"with this tokenizer; give passkey_lengths of at least {shortest}"
            )

    def cell(self, text: PasskeyText, length: int, depth: float) -> list[PasskeyCase]:
        """The cases of one length and depth; the same at every call."""
        # By a string, a generator is seeded alike in every process.
        drawn = random.Random(f"{self.seed} {length} {depth}")
        keys = [key for key in _KEYS if key % _HELD_OUT == 0]
        return [
            text.case(length=length, depth=depth, key=drawn.choice(keys), turn=drawn.random())
            for _ in range(self.cases)
        ]


def passkey_training_tokens(
    tokenizer: PreTrainedTokenizerBase, *, block_size: int, blocks: int, seed: int, bos_token_id: int | None = None
) -> Tensor:
    """Cases to train on, each followed by the end-of-sequence token, so that every block holds whole cases only.

    With `bos_token_id` each begins with that token.

    Their keys are never those of a `PasskeyProbe`, their depths any, their lengths spread up to the block.

    Returns int64 of shape (blocks * block_size,). Raises `InputError` if a block is too short for a case.
    """
    text = PasskeyText(tokenizer, bos_token_id)
    shortest = text.shortest() + 1  # with the end-of-sequence token
    if block_size < shortest:
        raise InputError(
            f"passkey_block_size is {block_size}, and a case has up to {shortest} tokens with this tokenizer; "
            f"give at least {shortest}"
        )
    drawn = random.Random(f"training {seed}")
    end = torch.tensor([tokenizer.eos_token_id])
    keys = [key for key in _KEYS if key % _HELD_OUT]
    parts = []
    for _ in range(blocks):
        for length in _lengths(block_size, shortest, drawn):
            case = text.case(length=length - 1, depth=drawn.random(), key=drawn.choice(keys), turn=drawn.random())
            parts += [case.tokens, end]
    return torch.cat(parts)


def _lengths(block_size: int, shortest: int, drawn: random.Random) -> list[int]:
    """Lengths of at least `shortest` that fill one block, in any order."""
    lengths, left = [], block_size
    if drawn.random() < _WHOLE_BLOCKS:
        return [block_size]
    while left >= 2 * shortest:
        lengths.append(drawn.randint(shortest, left - shortest))
        left -= lengths[-1]
    lengths.append(left)
    drawn.shuffle(lengths)
    return lengths

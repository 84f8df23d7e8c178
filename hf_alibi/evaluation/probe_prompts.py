"""Prompts that hide statements in filler text and ask for them, with the answer: to ask a model, and to train one."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import InputError
from .probe_tasks import KEYS, TASKS, Draft

__all__ = ["Probe", "ProbeCase", "ProbeText", "probe_training_tokens"]

_FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
# Keys that are divisible by this are asked for in evaluation only, all others in training only.
_HELD_OUT = 7
# How many of the blocks of the training stream are one case alone.
_WHOLE_BLOCKS = 0.25
# Cases that are drawn to find how long prompts are, and tokens that other ones may have more in each of their pieces.
_TRIED = 100
_SPARE = 2


class ProbeCase(NamedTuple):
    """A prompt with its answer: int64 tokens of shape (length,), of which the last `answer` ones are the answer."""

    tokens: Tensor
    answer: int


class ProbeText:
    """The prompts of the tasks as tokens of one tokenizer, of any exact number of tokens.

    With `bos_token_id` every prompt begins with that token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, bos_token_id: int | None = None) -> None:
        @cache
        def encode(text: str) -> list[int]:
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
            return ids

        self._encode = encode
        self._bos = [] if bos_token_id is None else [bos_token_id]
        self._filler = encode(_FILLER)
        if encode(" 12345") == encode(" 67890"):
            raise InputError("the tokenizer gives all numbers the same tokens, so no key can be told from another")

    def case(self, task: str, draft: Draft, *, length: int, turn: float = 0.0) -> ProbeCase:
        """One prompt with its answer, `length` tokens together.

        `turn`, from 0 to below 1, says where in its round of sentences the filler begins. Raises `InputError` if the
        parts alone are longer than `length`.
        """
        opening, answer = self._opening(task), self._tokens(draft.answer)
        fixed = self._fixed(task, draft)
        if fixed > length:
            raise InputError(
                f"a {task} prompt of {length} tokens was asked for, and its parts without any filler have {fixed} "
                f"with this tokenizer; give lengths of at least {fixed}"
            )
        first = int(turn * len(self._filler))
        filler = [self._filler[(first + index) % len(self._filler)] for index in range(length - fixed)]
        ids, end = [*opening], 0
        for statement in sorted(draft.statements, key=lambda statement: statement.depth):
            at = round(statement.depth * len(filler))
            ids += [*filler[end:at], *self._tokens(statement.pieces)]
            end = at
        ids += [*filler[end:], *self._tokens(draft.question), *answer]
        return ProbeCase(torch.tensor(ids, dtype=torch.int64), len(answer))

    def first_token(self, task: str) -> Tensor:
        """The first token of every prompt of a task, shape (1, 1)."""
        return torch.tensor([self._opening(task)[:1]])

    def shortest(self, task: str) -> int:
        """A length in tokens that every case of a task fits in."""
        drawn = random.Random(task)
        drafts = [TASKS[task].draft(drawn, KEYS, drawn.random()) for _ in range(_TRIED)]
        # What differs from case to case is in the answer, or in statements one by one.
        pieces = max(len(draft.statements) + len(draft.answer) for draft in drafts)
        return max(self._fixed(task, draft) for draft in drafts) + _SPARE * pieces // 2

    def _fixed(self, task: str, draft: Draft) -> int:
        """Tokens of a prompt with its answer without any filler."""
        pieces = [piece for statement in draft.statements for piece in statement.pieces]
        return len(self._opening(task)) + len(self._tokens([*pieces, *draft.question, *draft.answer]))

    def _opening(self, task: str) -> list[int]:
        return [*self._bos, *self._encode(TASKS[task].opening)]

    def _tokens(self, pieces: Sequence[str]) -> list[int]:
        return [token for piece in pieces for token in self._encode(piece)]


@dataclass(frozen=True)
class Probe:
    """Which cases are asked: `cases` for each task, length (tokens) and depth (0 to 1), the same for every model.

    With `if_known` a model is asked longer prompts only of those tasks that it can do at the shortest length.
    """

    lengths: Sequence[int]
    depths: Sequence[float]
    cases: int
    tasks: Sequence[str] = ("passkey",)
    seed: int = 0
    if_known: bool = False

    def check(self, text: ProbeText) -> None:
        """Raise `InputError` if a length is too short for some of the cases."""
        for task in self.tasks:
            shortest = text.shortest(task)
            if min(self.lengths) < shortest and not self.if_known:
                raise InputError(
                    f"probe_lengths has {min(self.lengths)}, and a {task} prompt with its answer has up to {shortest} "
                    f"tokens with this tokenizer; give probe_lengths of at least {shortest}"
                )

    def cell(self, text: ProbeText, task: str, length: int, depth: float) -> list[ProbeCase]:
        """The cases of one task, length and depth; the same at every call."""
        # By a string, a generator is seeded alike in every process.
        drawn = random.Random(f"{self.seed} {task} {length} {depth}")
        keys = [key for key in KEYS if key % _HELD_OUT == 0]
        return [
            text.case(task, TASKS[task].draft(drawn, keys, depth), length=length, turn=drawn.random())
            for _ in range(self.cases)
        ]


def probe_training_tokens(
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int,
    blocks: int,
    seed: int,
    tasks: Sequence[str] = ("passkey",),
    bos_token_id: int | None = None,
) -> Tensor:
    """Cases to train on, each followed by the end-of-sequence token, so that every block holds whole cases only.

    With `bos_token_id` each begins with that token. Their keys are never those of a `Probe`, their depths any, their
    lengths spread up to the block, their tasks in turn.

    Returns int64 of shape (blocks * block_size,). Raises `InputError` if a block is too short for a case.
    """
    text = ProbeText(tokenizer, bos_token_id)
    shortest = max(map(text.shortest, tasks)) + 1  # with the end-of-sequence token
    if block_size < shortest:
        raise InputError(
            f"probe_block_size is {block_size}, and a case of {', '.join(tasks)} has up to {shortest} tokens with this "
            f"tokenizer; give at least {shortest}"
        )
    drawn = random.Random(f"training {seed}")
    end = torch.tensor([tokenizer.eos_token_id])
    keys = [key for key in KEYS if key % _HELD_OUT]
    parts: list[Tensor] = []
    for _ in range(blocks):
        for length in _lengths(block_size, shortest, drawn):
            task = tasks[len(parts) // 2 % len(tasks)]
            draft = TASKS[task].draft(drawn, keys, drawn.random())
            parts += [text.case(task, draft, length=length - 1, turn=drawn.random()).tokens, end]
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

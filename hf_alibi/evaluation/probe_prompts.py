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
from ..utils import Blocks
from .probe_tasks import KEYS, TASKS, Draft

__all__ = ["Probe", "ProbeBlocks", "ProbeCase", "ProbeText"]

_FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
# Keys that are divisible by this are asked for in evaluation only, all others in training only.
_HELD_OUT = 7
_ASKED_KEYS = range(-(-KEYS.start // _HELD_OUT) * _HELD_OUT, KEYS.stop, _HELD_OUT)
_TRAINING_KEYS = [key for key in KEYS if key % _HELD_OUT]
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

    def case(
        self, task: str, draft: Draft, *, length: int, turn: float = 0.0, filler: Sequence[int] | None = None
    ) -> ProbeCase:
        """One prompt with its answer, `length` tokens together.

        The filler is a round of sentences, or the tokens given as `filler`, from the beginning as often as needed;
        `turn`, from 0 to below 1, says where in them it begins. Raises `InputError` if the parts alone are longer than
        `length`.
        """
        opening, answer = self._opening(task), self._tokens(draft.answer)
        fixed = self._fixed(task, draft)
        if fixed > length:
            raise InputError(
                f"a {task} prompt of {length} tokens was asked for, and its parts without any filler have {fixed} "
                f"with this tokenizer; give lengths of at least {fixed}"
            )
        around = self._filler if filler is None else filler
        first = int(turn * len(around))
        fills = [around[(first + index) % len(around)] for index in range(length - fixed)]
        ids, end = [*opening], 0
        for statement in sorted(draft.statements, key=lambda statement: statement.depth):
            at = round(statement.depth * len(fills))
            ids += [*fills[end:at], *self._tokens(statement.pieces)]
            end = at
        ids += [*fills[end:], *self._tokens(draft.question), *answer]
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
        return [
            text.case(task, TASKS[task].draft(drawn, _ASKED_KEYS, depth), length=length, turn=drawn.random())
            for _ in range(self.cases)
        ]


class ProbeBlocks:
    """Blocks of cases to train on, each followed by the end-of-sequence token, so that every block holds whole cases.

    Each block is made as it is asked for, the same at every call, int64 of shape (block_size,). Keys are never those of
    a `Probe`, depths any, lengths spread up to the block, tasks in turn. The filler is that of the probes, or with
    `around` the blocks of a text.

    Raises `InputError` if a block is too short for a case.
    """

    def __init__(
        self,
        text: ProbeText,
        *,
        eos_token_id: int,
        block_size: int,
        blocks: int,
        seed: int,
        tasks: Sequence[str] = ("passkey",),
        around: Blocks | None = None,
    ) -> None:
        self._shortest = max(map(text.shortest, tasks)) + 1  # with the end-of-sequence token
        if block_size < self._shortest:
            raise InputError(
                f"blocks of probes have {block_size} tokens, and a case of {', '.join(tasks)} has up to "
                f"{self._shortest} with this tokenizer; give at least {self._shortest}"
            )
        self._text, self._tasks, self._around = text, tasks, around
        self._end, self._block_size, self._blocks, self._seed = [eos_token_id], block_size, blocks, seed

    def __len__(self) -> int:
        return self._blocks

    def __getitem__(self, index: int) -> Tensor:
        drawn = random.Random(f"training {self._seed} {index}")
        around = None
        if self._around is not None:
            around = self._around[drawn.randrange(len(self._around))].tolist()
        parts = []
        for number, length in enumerate(_lengths(self._block_size, self._shortest, drawn)):
            task = self._tasks[(index + number) % len(self._tasks)]
            draft = TASKS[task].draft(drawn, _TRAINING_KEYS, drawn.random())
            case = self._text.case(task, draft, length=length - 1, turn=drawn.random(), filler=around)
            parts += [case.tokens, torch.tensor(self._end)]
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

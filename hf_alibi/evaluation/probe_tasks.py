"""The tasks of the probes, each a way to hide statements in a text and to ask for one: a task is an entry of `TASKS`.

`passkey` is that of Mohtashami and Jaggi 2023, arXiv 2305.16300; `multikey` and `tracking` are those of RULER (Hsieh et
al. 2024, arXiv 2404.06654), `tracking` with a second chain of variables: it takes more than to repeat all names.
"""

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["KEYS", "TASKS", "Draft", "Statement", "Task"]

KEYS = range(10_000, 100_000)
"""Numbers that are hidden."""

_NAMES = ("Oslo", "Lima", "Cairo", "Tokyo", "Paris", "Rome", "Delhi", "Accra", "Quito", "Dublin", "Sydney", "Boston")
_KEYS_HIDDEN = 4
_HOPS = 4
_LETTERS = 5


class Statement(NamedTuple):
    """A part of the text at a depth from 0 (its beginning) to 1 (right before the question).

    The pieces become tokens one by one, so that what is asked for has the same tokens in the text and in the answer.
    """

    depth: float
    pieces: Sequence[str]


class Draft(NamedTuple):
    """What is hidden in a text, and what is asked for."""

    statements: Sequence[Statement]
    question: Sequence[str]
    answer: Sequence[str]


@dataclass(frozen=True)
class Task:
    """What is hidden and asked for."""

    plural: str
    """What is found, for reports."""
    asks: str
    """What is asked, for reports."""
    opening: str
    """How each prompt begins."""
    draft: Callable[[random.Random, Sequence[int], float], Draft]
    """Draws a case from a generator, the keys that may be asked for and the depth of what is asked for."""


def _passkey(drawn: random.Random, keys: Sequence[int], depth: float) -> Draft:
    key = f" {drawn.choice(keys)}"
    hidden = Statement(depth, ("\nThe pass key is", key, ". Remember it."))
    return Draft([hidden], ["\nWhat is the pass key? The pass key is"], [key])


def _multikey(drawn: random.Random, keys: Sequence[int], depth: float) -> Draft:
    names = [f" {name}" for name in drawn.sample(_NAMES, _KEYS_HIDDEN)]
    numbers = [f" {key}" for key in drawn.sample(keys, _KEYS_HIDDEN)]
    depths = [depth, *(drawn.random() for _ in names[1:])]
    hidden = [
        Statement(at, ("\nThe pass key of", name, " is", number, ". Remember it."))
        for at, name, number in zip(depths, names, numbers, strict=True)
    ]
    return Draft(hidden, ["\nWhat is the pass key of", names[0], "? The pass key of", names[0], " is"], numbers[:1])


def _tracking(drawn: random.Random, keys: Sequence[int], depth: float) -> Draft:
    names: list[str] = []
    while len(names) < 2 * (_HOPS + 1):
        name = " " + "".join(drawn.choices(string.ascii_uppercase, k=_LETTERS))
        names += [name] if name not in names else []
    values = [f" {key}" for key in drawn.sample(keys, 2)]
    asked, other = names[: _HOPS + 1], names[_HOPS + 1 :]
    depths = [depth, *sorted(drawn.uniform(depth, 1) for _ in asked[1:])]
    hidden = _chain(asked, values[0], depths) + _chain(other, values[1], sorted(drawn.random() for _ in other))
    question = ["\nWhich variables have the value", values[0], "? The variables"]
    return Draft(hidden, question, asked)


def _chain(names: Sequence[str], value: str, depths: Sequence[float]) -> list[Statement]:
    """Assignments of a value to the first of some variables, and of each variable to the next one."""
    sources = [(value,), *((" VAR", name) for name in names)]
    return [
        Statement(depth, ("\nVAR", name, " =", *source, "."))
        for depth, name, source in zip(depths, names, sources, strict=False)
    ]


TASKS = {
    "passkey": Task(
        "passkeys",
        "for one number in filler that repeats itself, the easiest case of retrieval",
        "A pass key is hidden in this text. Remember it.",
        _passkey,
    ),
    "multikey": Task(
        "passkeys among others",
        f"for one of {_KEYS_HIDDEN} numbers by its name; the others stand anywhere",
        "Pass keys of cities are hidden in this text. Remember them.",
        _multikey,
    ),
    "tracking": Task(
        "chains of variables",
        f"for the {_HOPS + 1} variables that have a value, from one to the next by {_HOPS} assignments in the text; "
        "another such chain is among them",
        "Variables are assigned in this text. Remember their values.",
        _tracking,
    ),
}
"""Name to task."""

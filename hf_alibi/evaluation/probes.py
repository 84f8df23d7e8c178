"""The probes: whether a model finds what stands far back in its context."""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..utils import evaluation_mode, input_device, progress_bar
from .intervals import wilson
from .probe_prompts import Probe, ProbeCase, ProbeText
from .protocol import CANNOT_RUN, FULL, OK

__all__ = ["KNOWN", "NOT_ASKED", "ProbeRow", "evaluate_probe"]

NOT_ASKED = "not asked"
"""The status of a row of a task that the model cannot do, or that does not fit into the length."""
KNOWN = 0.5
"""A model that is right in less than this share of the cases at the shortest length does not know the task."""


@dataclass(frozen=True)
class ProbeRow:
    """How many cases of a task one model got right at a length and a depth, or at all depths together (`depth` None).

    `low` and `high` are Wilson's 95 % interval of the share found. `status` is "ok", or "cannot run" or "not asked" for
    the `reason` given; then there are no numbers.
    """

    model: str
    context: str
    task: str
    length: int
    depth: float | None
    found: int | None
    cases: int
    low: float | None
    high: float | None
    status: str
    reason: str | None = None


def evaluate_probe(
    model: PreTrainedModel,
    text: ProbeText,
    probe: Probe,
    *,
    name: str = "model",
    context: str = FULL,
    limit: int | None = None,
    batch_tokens: int | None = None,
    progress: bool = True,
) -> list[ProbeRow]:
    """Ask a model: a case counts if every token of the answer is what greedy generation would give.

    One forward pass a case with the right answer fed back: the most probable token after each right beginning equals
    the next right token, for all of them, exactly if greedy generation writes the whole answer. Only the logits of the
    answer are computed.

    `limit` is the number of positions that the model has (None: no limit); longer lengths get rows without numbers.
    `batch_tokens` is the number of tokens in one forward pass (default: the longest length).

    Returns, for each task and length, a row for each depth and one for all depths together.
    """
    lengths = sorted(probe.lengths)
    runnable = [length for length in lengths if limit is None or length <= limit]
    batch_tokens = batch_tokens or max(runnable, default=1)
    total = len(probe.tasks) * sum(runnable) * len(probe.depths) * probe.cases
    rows: list[ProbeRow] = []
    with (
        evaluation_mode(model),
        torch.inference_mode(),
        progress_bar(f"asking {name}", total, shown=progress) as advance,
    ):
        for task in probe.tasks:
            # Rotations that adapt to the length ("dynamic") stay those of the longest text until they see a short one.
            model(input_ids=text.first_token(task).to(input_device(model)), use_cache=False)
            known = None  # until a length is asked
            for length in lengths:
                reason = _reason_not_to_ask(text, probe, task, length, known)
                status = OK if reason is None else NOT_ASKED
                if length not in runnable:
                    status, reason = CANNOT_RUN, f"learned position table has {limit} rows"
                found: list[int | None] = []
                for depth in probe.depths:
                    cases = probe.cell(text, task, length, depth) if status == OK else []
                    size = max(1, batch_tokens // length)
                    groups = [cases[first : first + size] for first in range(0, len(cases), size)]
                    right = sum(sum(_answers(model, group)) for group in groups)
                    found.append(right if status == OK else None)
                    advance(length * probe.cases if length in runnable else 0)
                rows += _rows((name, context, task, length), probe, found, status, reason)
                if status == OK and known is None:
                    known = rows[-1]
    return rows


def _reason_not_to_ask(text: ProbeText, probe: Probe, task: str, length: int, known: ProbeRow | None) -> str | None:
    """Why a length is left out if the model is asked only what it can do; `known` is its row at the shortest length."""
    if not probe.if_known:
        return None
    if length < (shortest := text.shortest(task)):
        return f"a prompt of this task has up to {shortest} tokens"
    if known is not None and (known.found or 0) < KNOWN * known.cases:
        return f"{known.found} of {known.cases} right at {known.length} tokens: the model does not know the task"
    return None


def _rows(
    which: tuple[str, str, str, int], probe: Probe, found: Sequence[int | None], status: str, reason: str | None
) -> Iterator[ProbeRow]:
    """The row of each depth, and that of all together."""
    together = None if None in found else sum(right for right in found if right is not None)
    for depth, right in zip((*probe.depths, None), (*found, together), strict=True):
        cases = probe.cases * (len(probe.depths) if depth is None else 1)
        low, high = (None, None) if right is None else wilson(right, cases)
        yield ProbeRow(*which, depth, right, cases, low, high, status, reason)


def _answers(model: PreTrainedModel, cases: Sequence[ProbeCase]) -> Iterator[bool]:
    """Whether the model answers each of some cases of one length."""
    longest = max(case.answer for case in cases)
    # The last token is only ever a target.
    ids = torch.stack([case.tokens[:-1] for case in cases]).to(input_device(model))
    options: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = longest
    logits = model(input_ids=ids, use_cache=False, **options).logits[:, -longest:]
    for case, said in zip(cases, logits.argmax(-1).cpu(), strict=True):
        yield torch.equal(said[-case.answer :], case.tokens[-case.answer :])

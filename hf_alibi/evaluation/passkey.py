"""The passkey probe: whether a model finds a number that stands far back in its context."""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..utils import evaluation_mode, input_device, progress_bar
from .intervals import wilson
from .passkey_prompts import PasskeyCase, PasskeyProbe, PasskeyText
from .protocol import CANNOT_RUN, FULL, OK

__all__ = ["PasskeyRow", "evaluate_passkey"]


@dataclass(frozen=True)
class PasskeyRow:
    """How many keys one model found at a length and a depth, or at all depths together (`depth` None).

    `low` and `high` are Wilson's 95 % interval of the share found. `status` is "ok", or "cannot run" for the `reason`
    given; then there are no numbers.
    """

    model: str
    context: str
    length: int
    depth: float | None
    found: int | None
    cases: int
    low: float | None
    high: float | None
    status: str
    reason: str | None = None


def evaluate_passkey(
    model: PreTrainedModel,
    text: PasskeyText,
    probe: PasskeyProbe,
    *,
    name: str = "model",
    context: str = FULL,
    limit: int | None = None,
    batch_tokens: int | None = None,
    progress: bool = True,
) -> list[PasskeyRow]:
    """Ask a model for its keys: a case counts if every token of the answer is what greedy generation would give.

    One forward pass a case with the right answer fed back: the most probable token after each right beginning equals
    the next right token, for all of them, exactly if greedy generation writes the whole key. Only the logits of the
    answer are computed.

    `limit` is the number of positions that the model has (None: no limit); longer lengths get rows without numbers.
    `batch_tokens` is the number of tokens in one forward pass (default: the longest length).

    Returns, for each length, a row for each depth and one for all depths together.
    """
    runnable = [length for length in sorted(probe.lengths) if limit is None or length <= limit]
    batch_tokens = batch_tokens or max(runnable, default=1)
    total = sum(runnable) * len(probe.depths) * probe.cases
    found: dict[tuple[int, float], int] = {}
    with (
        evaluation_mode(model),
        torch.inference_mode(),
        progress_bar(f"asking {name}", total, shown=progress) as advance,
    ):
        # Rotations that adapt to the length ("dynamic") stay those of the longest text until they see a short one.
        model(input_ids=text.first_token().to(input_device(model)), use_cache=False)
        for length in runnable:
            for depth in probe.depths:
                cases = probe.cell(text, length, depth)
                size = max(1, batch_tokens // length)
                right = 0
                for group in (cases[first : first + size] for first in range(0, len(cases), size)):
                    right += sum(_answers(model, group))
                    advance(length * len(group))
                found[length, depth] = right

    def row(length: int, depth: float | None) -> PasskeyRow:
        depths = probe.depths if depth is None else [depth]
        asked = probe.cases * len(depths)
        if length not in runnable:
            reason = f"learned position table has {limit} rows"
            return PasskeyRow(name, context, length, depth, None, asked, None, None, CANNOT_RUN, reason)
        right = sum(found[length, each] for each in depths)
        return PasskeyRow(name, context, length, depth, right, asked, *wilson(right, asked), OK)

    return [row(length, depth) for length in sorted(probe.lengths) for depth in (*probe.depths, None)]


def _answers(model: PreTrainedModel, cases: Sequence[PasskeyCase]) -> Iterator[bool]:
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

"""What a recipe leaves open, chosen by what the heads of the model do."""

from __future__ import annotations

from typing import NamedTuple

from transformers import PreTrainedModel

from ..errors import one_line
from ..model.patching import checked_config
from .measures import HeadMeasures
from .settings import ConversionArguments

__all__ = ["Choices", "choose"]

# One sink token made SmolLM2-135M better, where a third of the attention rests on the first token, and a LLaMA of 1M
# parameters worse, where a thousandth does.
_RESTS_ON_FIRST = 0.1
# Below this factor between the reaches of a layer's heads, which head gets which slope is as good as chance.
_SPREAD = 1.2


class Choices(NamedTuple):
    """What is done to a model, and why."""

    match_heads: bool
    sink_tokens: int
    reasons: list[str]
    """A sentence for each choice that was made by measuring."""


def choose(model: PreTrainedModel, recipe: ConversionArguments, measures: HeadMeasures | None) -> Choices:
    """Settle what `recipe` leaves open for an unconverted `model`; without `measures` nothing is done that is open."""
    match, sinks = recipe.match_heads, recipe.sink_tokens
    if measures is None:
        return Choices(bool(match), sinks or 0, [])
    reasons = []
    if match is None:
        spread = measures.spread()
        match = spread >= _SPREAD
        reasons.append(
            f"heads are {'' if match else 'not '}matched to slopes: their reaches in a layer differ by a factor of "
            f"{spread:.2f} (least that counts: {_SPREAD})"
        )
    if sinks is None:
        sinks = int(measures.first_token >= _RESTS_ON_FIRST)
        why = f"{measures.first_token:.1%} of the attention rests on the first token (from {_RESTS_ON_FIRST:.0%} on: 1)"
        try:
            checked_config(model, sink_tokens=sinks)
        except ValueError as error:
            sinks, why = 0, one_line(error)
        reasons.append(f"sink tokens: {sinks}, since {why}")
    return Choices(match, sinks, reasons)

"""The recipe of a conversion: match heads, put ALiBi in, distil each layer. Training comes after it."""

import copy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..errors import InputError
from ..model.anatomy import position_limit
from ..model.patching import apply_alibi, checked_config
from .distillation import check_distillation, distill_layers
from .matching import match_heads

__all__ = ["ConversionArguments", "convert_model"]


@dataclass
class ConversionArguments:
    """What is done to an unconverted model before it is trained as an ALiBi model; by default, nothing but ALiBi."""

    match_tokens: int = field(
        default=0,
        metadata={"help": "Training tokens on which the reach of each head is measured, to give it a slope that fits."},
    )
    sink_tokens: int = field(
        default=0, metadata={"help": "First tokens of each sequence that carry no bias; heads rest on them."}
    )
    distill_tokens: int = field(
        default=0,
        metadata={"help": "Training tokens on which each layer's attention is fitted to what the layer gave before."},
    )
    distill_epochs: int = field(default=4, metadata={"help": "How often the layers see these tokens."})
    distill_learning_rate: float = field(default=3e-3, metadata={"help": "Highest learning rate of these fits."})
    distill_batch_size: int = field(default=4, metadata={"help": "Blocks a step of these fits."})

    def __post_init__(self) -> None:
        for name in ("match_tokens", "sink_tokens", "distill_tokens"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 0, which leaves it out")
        for name in ("distill_epochs", "distill_learning_rate", "distill_batch_size"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be above 0")

    def steps(self) -> list[str]:
        """Fields that ask for more than ALiBi alone."""
        return [name for name in ("match_tokens", "sink_tokens", "distill_tokens") if getattr(self, name)]


def convert_model(
    model: PreTrainedModel,
    blocks: Tensor,
    recipe: ConversionArguments,
    *,
    bf16: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Convert an unconverted `model` by the recipe, in place.

    Args:
        model: with its weights.
        blocks: (blocks, tokens) of training text in blocks of the training length, of which the recipe reads the first.
        recipe: what is done.
        bf16: distil in bfloat16 by autocast.
        seed: of the distillation.
        progress: show bars.

    Returns what was done, for the metrics of a run. Raises ValueError where the model cannot be converted, or not like
    this; most reasons are found before anything is changed.
    """
    checked_config(model, sink_tokens=recipe.sink_tokens)
    # The unconverted model reads this text, so no more of a block than it has positions for.
    matched, distilled = (
        _first(blocks, getattr(recipe, name), name)[:, : position_limit(model)]
        for name in ("match_tokens", "distill_tokens")
    )
    batch_size = recipe.distill_batch_size
    done: dict[str, Any] = {}
    teacher = None
    if recipe.distill_tokens:
        check_distillation(model, distilled, batch_size=batch_size)
        teacher = copy.deepcopy(model)
    if recipe.match_tokens:
        done["head_order"] = match_heads(model, matched.to(model.device))
    apply_alibi(model, sink_tokens=recipe.sink_tokens)
    if teacher is not None:
        fits = distill_layers(
            model,
            teacher,
            distilled,
            epochs=recipe.distill_epochs,
            learning_rate=recipe.distill_learning_rate,
            batch_size=batch_size,
            bf16=bf16,
            seed=seed,
            progress=progress,
        )
        done["layer_error"] = [fit._asdict() for fit in fits]
    return done


def _first(blocks: Tensor, tokens: int, name: str) -> Tensor:
    """The first blocks that hold `tokens` tokens; raises ValueError where there are fewer."""
    count = -(-tokens // blocks.shape[1])
    if count > len(blocks):
        raise ValueError(f"{name} is {tokens:,}, but there are {blocks.numel():,} tokens of training text")
    return blocks[:count]

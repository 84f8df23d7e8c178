"""The recipe of a conversion: measure and match heads, put ALiBi in, distil each layer. Training comes after it."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..global_heads import GlobalHeads
from ..model.anatomy import text_decoder
from ..model.patching import apply_alibi, checked_config
from ..utils import Blocks, input_device
from .choices import choose
from .distillation import FitSettings, check_distillation, distill_layers
from .matching import match_heads
from .measures import measure_heads
from .settings import ConversionArguments

__all__ = ["convert_model"]


def convert_model(
    model: PreTrainedModel,
    blocks: Blocks,
    recipe: ConversionArguments,
    *,
    bf16: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Convert an unconverted `model` by the recipe, in place.

    Args:
        model: with its weights.
        blocks: of training text, (tokens,) each, of the training length; the recipe reads the first ones.
        recipe: what is done.
        bf16: distil in bfloat16 by autocast.
        seed: of the distillation.
        progress: show bars.

    Returns what was done, for the metrics of a run. Raises ValueError if the model cannot be converted, or not like
    this; most reasons are found before anything is changed.
    """
    heads, every = recipe.global_heads, recipe.global_every
    checked_config(model, sink_tokens=recipe.sink_tokens or 0, global_heads=GlobalHeads(heads, every))
    # The unconverted model reads this text, so no more at a time than it has positions for.
    limit = text_decoder(model).limit or len(blocks[0])
    measured = _FirstPieces(blocks, recipe.match_tokens, "match_tokens", limit)
    distilled = _FirstPieces(blocks, recipe.distill_tokens, "distill_tokens", min(limit, recipe.distill_block_size))
    batch_size = recipe.distill_batch_size
    done: dict[str, Any] = {}
    teacher = None
    if recipe.distill_tokens:
        check_distillation(model, distilled, batch_size=batch_size)
        teacher = copy.deepcopy(model)
    measures = None
    if recipe.match_tokens:
        text = torch.stack([measured[index] for index in range(len(measured))]).to(input_device(model))
        measures = measure_heads(model, text)
    choices = choose(model, recipe, measures)
    done["choices"] = choices._asdict()
    if choices.match_heads:
        done["head_order"] = match_heads(model, text, global_heads=heads, global_every=every, measures=measures)
    apply_alibi(model, sink_tokens=choices.sink_tokens, global_heads=heads, global_every=every)
    if teacher is not None:
        settings = FitSettings(recipe.distill_epochs, recipe.distill_learning_rate, batch_size, bf16, seed)
        fits = distill_layers(model, teacher, distilled, settings, progress=progress)
        done["layer_error"] = [fit._asdict() for fit in fits]
    return done


class _FirstPieces:
    """The first pieces, of up to `size` tokens, that hold `tokens` tokens; raises ValueError if there are fewer.

    No piece spans two blocks: what is left at the end of a block is not read.
    """

    def __init__(self, blocks: Blocks, tokens: int, name: str, size: int) -> None:
        self._blocks, self._size = blocks, min(size, len(blocks[0]))
        self._pieces = len(blocks[0]) // self._size
        self._count = -(-tokens // self._size)
        if self._count > len(blocks) * self._pieces:
            available = len(blocks) * self._pieces * self._size
            raise ValueError(f"{name} is {tokens:,}, but there are {available:,} tokens of training text")

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        block, piece = divmod(index, self._pieces)
        return self._blocks[block][piece * self._size : (piece + 1) * self._size]

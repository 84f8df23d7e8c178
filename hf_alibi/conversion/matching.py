"""Head matching: each pretrained head gets, of ALiBi's slopes, the one whose reach is nearest to its own.

ALiBi gives each head a fixed reach, and pretrained heads have theirs: some read the last few tokens, some all. Heads
are reordered in the weights, so that the model stays what it was and the slopes keep the order that every engine knows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..configuration import num_heads, num_key_heads, slopes_of_layer, text_config
from ..global_heads import GlobalHeads
from ..model.anatomy import is_alibi, text_decoder
from ..slopes import alibi_slopes
from ..utils import evaluation_mode
from .heads import head_counts, head_parameters, permute_heads
from .measures import HeadMeasures, measure_heads

__all__ = ["match_heads", "matching_order"]

# By how much the logarithm of a slope of 0 counts as less than that of the flattest other one.
_FLATTER = math.log(16)


def match_heads(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    global_heads: int = 0,
    global_every: int = 1,
    measures: HeadMeasures | None = None,
) -> list[list[int]]:
    """Reorder the heads of each self-attention layer of an unconverted `model` by their reach, in place.

    Args:
        model: before `apply_alibi`.
        input_ids: (batch, tokens) of text that the model was made for, a few thousand tokens in all.
        global_heads: how many heads of a layer will have no bias, as in `apply_alibi`: those that look farthest.
        global_every: which layers have them, as in `apply_alibi`.
        measures: what `measure_heads` gave for the model; measured by default.

    Returns the order of each layer: place i has what was head `order[i]`.

    Raises ValueError for a converted model, and for layers whose heads cannot be reordered (`permute_heads`); nothing
    is changed then. Raises RuntimeError if the reordered model computes something else; it is put back then.
    """
    if is_alibi(model.config):
        raise ValueError(
            "match_heads reads how far the heads of the unconverted model look; call it before apply_alibi"
        )
    layers = [layer for _, layer in text_decoder(model).self_attentions]
    for layer in layers:
        head_parameters(layer)
    measures = measures or measure_heads(model, input_ids)
    text = text_config(model.config)
    slopes = GlobalHeads(global_heads, global_every).slopes(num_heads(text), num_key_heads(text), len(layers))
    orders = [
        matching_order(reaches.tolist(), head_counts(layer)[1], slopes_of_layer(slopes, number))
        for number, (layer, reaches) in enumerate(zip(layers, measures.reaches, strict=True))
    ]
    sample = input_ids[:1, :64]
    before = _logits(model, sample)
    for layer, order in zip(layers, orders, strict=True):
        permute_heads(layer, order)
    difference = (_logits(model, sample) - before).abs().max().item()
    if not difference <= 64 * torch.finfo(before.dtype).eps * before.abs().max().item():
        for layer, order in zip(layers, orders, strict=True):
            permute_heads(layer, [order.index(head) for head in range(len(order))])
        raise RuntimeError(f"{type(model).__name__} is another function with its heads reordered: {difference:.2e} off")
    return orders


def matching_order(reaches: Sequence[float], key_heads: int, slopes: Sequence[float] | None = None) -> list[int]:
    """Which head stands at each place, so that the slopes of the places suit the reaches best.

    The heads' own slopes are taken to be those of the places, steepest for the shortest reach. Of all orders that keep
    the heads of a key head together, the least sum of squared differences of log slopes wins. `slopes` (heads,) are the
    paper's by default; a slope of 0 counts as much flatter than all others.
    """
    heads = len(reaches)
    group = heads // key_heads
    places = (alibi_slopes(heads) if slopes is None else torch.tensor(slopes)).double().log()
    sloped = places[places.isfinite()]
    flattest = sloped.min() if len(sloped) else torch.tensor(0.0)
    places = places.clamp(min=flattest - _FLATTER)
    by_reach = sorted(range(heads), key=lambda head: reaches[head])
    own = torch.empty(heads, dtype=torch.float64)
    own[by_reach] = places.sort(descending=True).values
    # Inside a group, steep goes with steep; so only the places of the groups are left to choose.
    own_sorted = own.view(key_heads, group).sort(dim=1, descending=True)
    place_sorted = places.view(key_heads, group).sort(dim=1, descending=True)
    cost = (own_sorted.values[:, None] - place_sorted.values[None]).square().sum(dim=-1)
    order = [0] * heads
    # Which group's heads go to each place, at the least sum.
    for place, chosen in zip(*linear_sum_assignment(cost.T.numpy()), strict=True):
        for head, where in zip(own_sorted.indices[chosen], place_sorted.indices[place], strict=True):
            order[int(place) * group + int(where)] = int(chosen) * group + int(head)
    return order


def _logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    with evaluation_mode(model), torch.no_grad():
        logits: Tensor = model(input_ids, use_cache=False)[0]
    return logits

"""What heads of an unconverted model do: how far each looks, and how much attention rests on the first token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..utils import evaluation_mode

__all__ = ["HeadMeasures", "measure_heads"]


class HeadMeasures(NamedTuple):
    """What heads do on some text."""

    reaches: list[Tensor]
    """How far each head looks back, (heads,) a layer: tokens, as a geometric mean."""
    first_token: float
    """Share of the attention that rests on the first token, beyond what it has if a head looks at all tokens alike."""

    def spread(self) -> float:
        """By which factor the reaches of a layer's heads differ (geometric standard deviation, mean over layers)."""
        deviations = [reaches.clamp(min=1e-9).log().std(correction=0) for reaches in self.reaches]
        return torch.stack(deviations).mean().exp().item()


def measure_heads(model: PreTrainedModel, input_ids: Tensor) -> HeadMeasures:
    """Measure the heads of an unconverted `model` on text, `input_ids` (batch, tokens).

    The reach is the mean of log(1 + distance) over the weights that a head gives to tokens but the first, where many
    heads rest whatever they look for (attention sinks; Xiao et al. 2023, arXiv 2309.17453). What rests there is
    measured over the second half of the tokens.
    """
    tokens = input_ids.shape[1]
    distance = (torch.arange(tokens)[:, None] - torch.arange(tokens)).clamp(min=0).to(input_ids.device)
    logarithm = distance.float().log1p()
    sums: list[Tensor] = []
    shares: list[Tensor] = []
    name = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with evaluation_mode(model), torch.no_grad():
            for row in input_ids:
                attentions = model(row[None], output_attentions=True, use_cache=False).attentions
                weights = [layer[0, :, 1:, 1:].float() for layer in attentions]
                moments = [
                    torch.stack([(w * logarithm[1:, 1:]).sum(dim=(1, 2)), w.sum(dim=(1, 2))]).double() for w in weights
                ]
                sums = [a + b for a, b in zip(sums, moments, strict=True)] if sums else moments
                shares += [layer[0, :, tokens // 2 :, 0].float().mean().cpu() for layer in attentions]
    finally:
        model.set_attn_implementation(name)
    reaches = [(total / weight.clamp(min=1e-9)).expm1() for total, weight in sums]
    alike = (1 / torch.arange(tokens // 2 + 1, tokens + 1)).mean()
    return HeadMeasures(reaches, (torch.stack(shares).mean() - alike).item())

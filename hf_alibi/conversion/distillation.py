"""Layer distillation: the attention of each converted layer learns what the unconverted layer gave.

Both models read the same text, and what comes out of each converted layer is drawn to what the unconverted layer
gave: a regression without labels, which costs a fraction of training on the same tokens. All layers are fitted at
once. First each reads what the unconverted layer before it gave, as in MOHAWK (arXiv 2408.10189); then each reads
what its own model makes of the text, and also learns what helps the layers after it, as in TinyBERT (arXiv
1909.10351). Nothing of the text is kept, so memory does not grow with it; and on a LLaMA of 1M parameters and on
SmolLM2-135M the loss came out lower than by fitting layer after layer on kept hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from ..model.anatomy import is_alibi, text_decoder
from ..utils import Blocks, evaluation_mode, input_device, progress_bar

__all__ = ["FitSettings", "LayerFit", "check_distillation", "distill_layers"]

# One block in this many is not fitted to and tells how good the fit is,
_HELD_OUT = 16
# but no more batches than this; nor are more read for the deviation of each channel.
_MOST_BATCHES = 64
_WARMUP_STEPS = 10
# Share of the steps in which layers read the unconverted model's states.
_GUIDED = 0.25
_LEAST_DEVIATION = 1e-6  # of a channel that is always the same


class LayerFit(NamedTuple):
    """Squared error of a converted layer on blocks that it was not fitted to; 1 is what the mean would give."""

    before: float
    after: float


@dataclass(frozen=True)
class FitSettings:
    """How the layers are fitted."""

    epochs: int
    """How often each block is seen."""
    learning_rate: float
    """Of AdamW, the highest of a cosine schedule."""
    batch_size: int
    """Blocks a step."""
    bf16: bool = False
    """Compute in bfloat16 by autocast; the weights keep their type."""
    seed: int = 0
    """Of the order of blocks."""


def check_distillation(model: PreTrainedModel, blocks: Blocks, *, batch_size: int) -> None:
    """Raise ValueError if the layers of an unconverted `model` cannot be distilled on `blocks`."""
    if is_alibi(model.config):
        raise ValueError("layer distillation needs the unconverted model as its teacher; copy it before apply_alibi")
    least = max(2 * batch_size, _HELD_OUT)
    if len(blocks) < least:
        raise ValueError(f"layer distillation was given {len(blocks)} blocks of text and needs at least {least}")
    with evaluation_mode(model):
        outputs = _layer_outputs(model, blocks[0][None], bf16=False)
    for index, times in enumerate(map(len, outputs)):
        if times != 1:
            raise ValueError(
                f"layer distillation needs layers that run once, but {type(model).__name__} ran layer {index} {times} "
                "times; leave distillation out for this model"
            )


def distill_layers(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    blocks: Blocks,
    settings: FitSettings,
    *,
    progress: bool = False,
) -> list[LayerFit]:
    """Fit the attention of all layers of the converted `model` to the unconverted `teacher`, in place.

    Args:
        model: after `apply_alibi`.
        teacher: a copy of it from before.
        blocks: of token ids, each (tokens,), all of one length; those that do not fill a batch are left out.
        settings: of the fit.
        progress: show a bar.

    Returns the error of each layer with attention, before and after. Raises ValueError if `check_distillation` does, or
    if all attention is frozen.
    """
    size = settings.batch_size
    check_distillation(teacher, blocks, batch_size=size)
    batches = torch.arange(len(blocks) // size * size).split(size)
    held_out = min(max(1, len(batches) // _HELD_OUT), _MOST_BATCHES)
    fitted = size * (len(batches) - held_out)
    with evaluation_mode(model), evaluation_mode(teacher):
        fit = _Fit(model, teacher, blocks, settings.bf16)
        fit.measure_deviations(batches[: len(batches) - held_out][:_MOST_BATCHES])
        before = fit.errors(batches[-held_out:])
        _train(fit, fitted, settings, progress)
        after = fit.errors(batches[-held_out:])
    return [LayerFit(*errors) for errors in zip(before, after, strict=True)]


def _train(fit: _Fit, fitted: int, settings: FitSettings, progress: bool) -> None:
    """Fit to the first `fitted` blocks, a whole number of batches."""
    generator = torch.Generator().manual_seed(settings.seed)
    steps = settings.epochs * fitted // settings.batch_size
    optimizer = torch.optim.AdamW(fit.parameters, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(_WARMUP_STEPS, steps // 2), steps)
    orders = (torch.randperm(fitted, generator=generator) for _ in range(settings.epochs))
    batches = chain.from_iterable(order.split(settings.batch_size) for order in orders)
    with progress_bar("distilling layers", steps, shown=progress) as advance:
        for step, batch in enumerate(batches):
            gradients = fit.gradients(batch, guided=step < _GUIDED * steps)
            for parameter, gradient in zip(fit.parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()
            advance(1)
    optimizer.zero_grad()


class _Fit:
    """The layers of a converted model beside those of its teacher, and how far apart what comes out of them is."""

    def __init__(self, model: PreTrainedModel, teacher: PreTrainedModel, blocks: Blocks, bf16: bool) -> None:
        self._model, self._teacher, self._blocks, self._bf16 = model, teacher, blocks, bf16
        found = [(index, _attention_parameters(model, layer)) for index, layer in enumerate(_decoder_layers(model))]
        # Layers without attention (of hybrid models), or with frozen attention, have nothing to fit.
        self._fitted = [index for index, parameters in found if parameters]
        self.parameters = [parameter for _, parameters in found for parameter in parameters]
        if not self.parameters:
            raise ValueError(
                f"layer distillation trains self-attention, and all weights of it in {type(model).__name__} are "
                "frozen; let some require gradients, or leave distillation out"
            )
        self._deviations: list[Tensor] = []

    def measure_deviations(self, batches: Sequence[Tensor]) -> None:
        """Standard deviation (width,) of each channel of the teacher's states: a few are far larger than all others."""
        moments = torch.stack([torch.stack(list(map(_moments, self._targets(batch)))) for batch in batches]).mean(0)
        mean, square = moments.unbind(1)
        self._deviations = list((square - mean.square()).clamp(min=_LEAST_DEVIATION**2).sqrt().float())

    @torch.no_grad()
    def errors(self, batches: Sequence[Tensor]) -> list[float]:
        """Mean squared error of each fitted layer."""
        found = torch.stack([torch.stack(self._errors(batch, guided=False)) for batch in batches])
        errors: list[float] = found.mean(0).tolist()
        return errors

    def gradients(self, batch: Tensor, *, guided: bool) -> Sequence[Tensor | None]:
        """Gradients of `parameters` for the sum of the errors; `guided` layers read the teacher's states."""
        errors = self._errors(batch, guided=guided)
        total = torch.stack([error.to(errors[0].device) for error in errors]).sum()
        return torch.autograd.grad(total, self.parameters, allow_unused=True)

    def _errors(self, batch: Tensor, *, guided: bool) -> list[Tensor]:
        """Squared error of each fitted layer on blocks."""
        targets, errors = self._targets(batch), []

        def compare(place: int, output: Tensor) -> Tensor | None:
            wanted = targets[place].to(output.device)
            deviation = self._deviations[place].to(output.device)
            errors.append(((_unit(output) - _unit(wanted)) / deviation).square().mean())
            return wanted if guided else None

        with _watched(_decoder_layers(self._model), self._fitted, compare):
            _read(self._model, self._input_ids(batch), self._bf16)
        return errors

    @torch.no_grad()
    def _targets(self, batch: Tensor) -> list[Tensor]:
        """What the teacher's layers give, (blocks, tokens, width) each."""
        outputs = _layer_outputs(self._teacher, self._input_ids(batch), self._bf16)
        return [outputs[index][0] for index in self._fitted]

    def _input_ids(self, batch: Tensor) -> Tensor:
        return torch.stack([self._blocks[index] for index in batch.tolist()])


def _unit(states: Tensor) -> Tensor:
    """Hidden states as the norms after them see them: without their size, which a few tokens have most of."""
    return nn.functional.rms_norm(states.float(), states.shape[-1:])


def _moments(states: Tensor) -> Tensor:
    """Mean and mean square (2, width) of each channel of `_unit(states)`, float64, on the CPU."""
    unit = _unit(states).double()
    return torch.stack([unit.mean((0, 1)), unit.square().mean((0, 1))]).cpu()


def _attention_parameters(model: PreTrainedModel, layer: nn.Module) -> list[nn.Parameter]:
    """Trainable parameters of the self-attention in a decoder layer."""
    inside = {id(module) for module in layer.modules()}
    return [
        parameter
        for _, attention in text_decoder(model).self_attentions
        if id(attention) in inside
        for parameter in attention.parameters()
        if parameter.requires_grad
    ]


def _decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of layers in which all self-attention of the text decoder is."""
    decoder = text_decoder(model)
    attentions = {id(attention) for _, attention in decoder.self_attentions}
    for module in decoder.module.modules():
        if isinstance(module, nn.ModuleList) and attentions <= {id(part) for part in module.modules()}:
            return module
    raise ValueError(
        f"layer distillation needs a list of layers, and {type(model).__name__} has none with its attention"
    )


@torch.no_grad()
def _layer_outputs(model: PreTrainedModel, input_ids: Tensor, bf16: bool) -> list[list[Tensor]]:
    """What comes out of each decoder layer, once for each time that it runs."""
    layers = _decoder_layers(model)
    outputs: list[list[Tensor]] = [[] for _ in layers]
    with _watched(layers, range(len(layers)), lambda place, output: outputs[place].append(output)):
        _read(model, input_ids, bf16)
    return outputs


@contextmanager
def _watched(
    layers: nn.ModuleList, watched: Sequence[int], use: Callable[[int, Tensor], Tensor | None]
) -> Iterator[None]:
    """While open, call `use(place, output)` as each watched layer has run; `place` is its place in `watched`.

    What it gives, if it is a tensor, is the output instead.
    """

    def hook(place: int, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        is_tuple = isinstance(output, tuple)
        instead = use(place, output[0] if is_tuple else output)
        return (instead, *output[1:]) if is_tuple and instead is not None else instead

    with ExitStack() as hooks:
        for place, index in enumerate(watched):
            hooks.enter_context(layers[index].register_forward_hook(partial(hook, place)))
        yield


def _read(model: PreTrainedModel, input_ids: Tensor, bf16: bool) -> None:
    device = input_device(model)
    # Autocast keeps what it has cast until it ends, and weights change from batch to batch.
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        text_decoder(model).module(input_ids=input_ids.to(device), use_cache=False)

"""Layer distillation: the attention of each converted layer learns what the unconverted layer gave.

Both models read the same text, layer by layer. Each converted layer is fitted, through its attention alone, so that
from the hidden states of the converted model comes what the unconverted layer makes of its own: what layers before it
could not learn, it can make good. A small regression for each layer, without the rest of the model and without labels,
costs a fraction of training on the same tokens. LinearARD (arXiv 2604.00004) is akin, for scaled rotary positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from ..model.anatomy import is_alibi, text_decoder
from ..utils import evaluation_mode, input_device, progress_bar

__all__ = ["FitSettings", "LayerFit", "check_distillation", "distill_layers"]

# One block in this many is not fitted to and tells how good the fit is.
_HELD_OUT = 16
_WARMUP_STEPS = 10
_LEAST_DEVIATION = 1e-6  # of a channel that is always the same


class LayerFit(NamedTuple):
    """Squared error of a converted layer on blocks that it was not fitted to; 1 is what the mean would give."""

    before: float
    after: float


@dataclass(frozen=True)
class FitSettings:
    """How each layer is fitted."""

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


def check_distillation(model: PreTrainedModel, input_ids: Tensor, *, batch_size: int) -> None:
    """Raise ValueError if the layers of an unconverted `model` cannot be distilled on `input_ids`."""
    _check_given(model, input_ids, batch_size)
    # What a layer reads besides its hidden states must be the same for all texts.
    with evaluation_mode(model):
        _calls(model, input_ids, batch_size, bf16=False)


def _check_given(model: PreTrainedModel, input_ids: Tensor, batch_size: int) -> None:
    if is_alibi(model.config):
        raise ValueError("layer distillation needs the unconverted model as its teacher; copy it before apply_alibi")
    least = max(2 * batch_size, _HELD_OUT)
    if len(input_ids) < least:
        raise ValueError(f"layer distillation was given {len(input_ids)} blocks of text and needs at least {least}")


def distill_layers(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    input_ids: Tensor,
    settings: FitSettings,
    *,
    progress: bool = False,
) -> list[LayerFit]:
    """Fit the attention of each layer of the converted `model` to the unconverted `teacher`, in place.

    Args:
        model: after `apply_alibi`.
        teacher: a copy of it from before.
        input_ids: (blocks, tokens); blocks that do not fill a batch are left out.
        settings: of each fit.
        progress: show a bar.

    Hidden states of all `input_ids` are kept twice, on the CPU. Returns the error of each layer with attention, before
    and after. Raises ValueError if `check_distillation` does.
    """
    batch_size, bf16 = settings.batch_size, settings.bf16
    _check_given(teacher, input_ids, batch_size)
    input_ids = input_ids[: len(input_ids) // batch_size * batch_size]
    fits = []
    with evaluation_mode(model), evaluation_mode(teacher):
        ours, theirs = _calls(model, input_ids, batch_size, bf16), _calls(teacher, input_ids, batch_size, bf16)
        states, targets = _embedded(model, ours[0], input_ids), _embedded(teacher, theirs[0], input_ids)
        with progress_bar("distilling layers", len(ours), shown=progress) as advance:
            for call, of_teacher in zip(ours, theirs, strict=True):
                of_teacher.advance(targets)
                parameters = _attention_parameters(model, call.layer)
                if parameters:
                    fits.append(_fit(call, parameters, states, targets, settings))
                call.advance(states)
                advance(1)
    return fits


class _Call(NamedTuple):
    """A decoder layer, and how its model calls it on a batch of blocks but for the hidden states."""

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch_size: int
    bf16: bool

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Hidden states (blocks, tokens, width) of a batch after the layer."""
        weight = next(self.layer.parameters())
        hidden_states = hidden_states.to(weight.device)
        # Autocast keeps what it has cast until it ends, and weights change from call to call.
        with torch.autocast(weight.device.type, torch.bfloat16, enabled=self.bf16):
            if self.args:
                return _output(self.layer(hidden_states, *self.args[1:], **self.kwargs))
            return _output(self.layer(**{**self.kwargs, "hidden_states": hidden_states}))

    @torch.no_grad()
    def advance(self, states: Tensor) -> None:
        """Replace hidden states of all blocks before the layer by those after it."""
        for batch in states.split(self.batch_size):
            batch.copy_(self(batch))


def _fit(
    call: _Call,
    parameters: list[nn.Parameter],
    states: Tensor,
    targets: Tensor,
    settings: FitSettings,
) -> LayerFit:
    """Fit `parameters` of a layer, so that it turns `states` into `targets`, both (blocks, tokens, width)."""
    batch_size, epochs = settings.batch_size, settings.epochs
    generator = torch.Generator().manual_seed(settings.seed)
    held_out = max(batch_size, len(states) // _HELD_OUT // batch_size * batch_size)
    fitted = len(states) - held_out
    deviation = _deviation(targets[:fitted], batch_size)

    def error(blocks: Tensor) -> Tensor:
        given = call(states[blocks])
        wanted = targets[blocks].to(given.device)
        return ((_unit(given) - _unit(wanted)) / deviation.to(given.device)).square().mean()

    @torch.no_grad()
    def held_out_error() -> float:
        blocks = torch.arange(fitted, len(states)).split(batch_size)
        return torch.stack([error(part) for part in blocks]).mean().item()

    steps = epochs * (fitted // batch_size)
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(_WARMUP_STEPS, steps // 2), steps)
    before = held_out_error()
    for _ in range(epochs):
        for blocks in torch.randperm(fitted, generator=generator).split(batch_size):
            gradients = torch.autograd.grad(error(blocks), parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()
    optimizer.zero_grad()
    return LayerFit(before, held_out_error())


def _unit(states: Tensor) -> Tensor:
    """Hidden states as the norms after them see them: without their size, which a few tokens have most of."""
    return nn.functional.rms_norm(states.float(), states.shape[-1:])


def _deviation(targets: Tensor, batch_size: int) -> Tensor:
    """Standard deviation (width,) of each channel of `_unit(targets)`: a few are far larger than all others."""
    batches = targets.split(batch_size)
    mean = torch.stack([_unit(batch).mean((0, 1)) for batch in batches]).mean(0)
    variance = torch.stack([(_unit(batch) - mean).square().mean((0, 1)) for batch in batches]).mean(0)
    return variance.sqrt().clamp(min=_LEAST_DEVIATION)


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


class _Seen(NamedTuple):
    """What a model gave one of its layers, and what came back."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    input: Tensor
    output: Tensor


@torch.no_grad()
def _calls(model: PreTrainedModel, input_ids: Tensor, batch_size: int, bf16: bool) -> list[_Call]:
    """How each decoder layer is called on a batch of blocks.

    Raises ValueError if the layers do not run one after another, or read more of a text than hidden states.
    """
    layers = _decoder_layers(model)
    seen, others = (_look(model, layers, batch) for batch in (input_ids[:batch_size], input_ids[-batch_size:]))
    for index, (one, other) in enumerate(zip(seen, others, strict=True)):
        if index and not torch.equal(one.input, seen[index - 1].output):
            raise ValueError(
                f"layer distillation runs layers one after another, but in {type(model).__name__} layer {index} reads "
                f"something else than layer {index - 1} gave; leave distillation out for this model"
            )
        for key in one.kwargs.keys() - {"hidden_states"}:
            if not _equal(one.kwargs[key], other.kwargs[key]):
                raise ValueError(
                    f"layer distillation runs each layer by itself, but layer {index} of {type(model).__name__} also "
                    f"reads {key}, which differs from text to text; leave distillation out for this model"
                )
    return [_Call(layer, one.args, one.kwargs, batch_size, bf16) for layer, one in zip(layers, seen, strict=True)]


def _look(model: PreTrainedModel, layers: nn.ModuleList, batch: Tensor) -> list[_Seen]:
    seen: dict[int, _Seen] = {}

    def keep(index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen[index] = _Seen(args, kwargs, _hidden_states(args, kwargs), _output(output))

    with ExitStack() as hooks:
        for index, layer in enumerate(layers):
            hooks.enter_context(layer.register_forward_hook(partial(keep, index), with_kwargs=True))
        _run(model, batch)
    return [seen[index] for index in range(len(layers))]


class _EnoughSeenError(Exception):
    """Ends a forward pass of which the rest is not needed."""


@torch.no_grad()
def _embedded(model: PreTrainedModel, first: _Call, input_ids: Tensor) -> Tensor:
    """Hidden states (blocks, tokens, width) of all blocks before the first layer, on the CPU."""
    batches: list[Tensor] = []

    def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batches.append(_hidden_states(args, kwargs).cpu())
        raise _EnoughSeenError

    with first.layer.register_forward_pre_hook(keep, with_kwargs=True):
        for batch in input_ids.split(first.batch_size):
            with suppress(_EnoughSeenError):
                _run(model, batch)
    return torch.cat(batches)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items())
    return bool(one == other)


def _run(model: PreTrainedModel, batch: Tensor) -> None:
    text_decoder(model).module(input_ids=batch.to(input_device(model)), use_cache=False)


def _hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    states: Tensor = args[0] if args else kwargs["hidden_states"]
    return states


def _output(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden

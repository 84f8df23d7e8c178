"""Layer distillation: the attention of each converted layer learns what the unconverted layer gave.

Both models read the same text, and all layers are fitted at once: each converted layer reads what the converted layers
before it make of the text, and learns to give what the unconverted layer gave. Gradients stay within a layer, and no
hidden states are kept, so memory does not grow with the text. A regression for each layer, without labels, costs a
fraction of training on the same tokens. MOHAWK (arXiv 2408.10189) and LoLCATs (arXiv 2410.10254) fit layers of other
kinds of attention like this, but on the unconverted model's states: here a layer also makes good what those before it
could not learn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
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

    Returns the error of each layer with attention, before and after. Raises ValueError if `check_distillation` does.
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
    parameters = [parameter for layer in fit.parameters for parameter in layer]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(_WARMUP_STEPS, steps // 2), steps)
    with progress_bar("distilling layers", steps, shown=progress) as advance:
        for _ in range(settings.epochs):
            for batch in torch.randperm(fitted, generator=generator).split(settings.batch_size):
                fit.set_gradients(batch)
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
        self.parameters = [parameters for _, parameters in found if parameters]
        self._deviations: list[Tensor] = []

    def measure_deviations(self, batches: Sequence[Tensor]) -> None:
        """Standard deviation (width,) of each channel of the teacher's states: a few are far larger than all others."""
        count = 0
        sums = squares = torch.zeros(())
        for targets in map(self._targets, batches):
            units = torch.stack([_unit(target).double().flatten(0, 1).cpu() for target in targets])
            count += units.shape[1]
            sums, squares = sums + units.sum(1), squares + units.square().sum(1)
        variances = squares / count - (sums / count).square()
        self._deviations = list(variances.sqrt().clamp(min=_LEAST_DEVIATION).float())

    @torch.no_grad()
    def errors(self, batches: Sequence[Tensor]) -> list[float]:
        """Mean squared error of each fitted layer."""
        found: list[list[Tensor]] = [[] for _ in self._fitted]
        for batch in batches:
            self._run(batch, lambda place, error: found[place].append(error))
        return [torch.stack(errors).mean().item() for errors in found]

    def set_gradients(self, batch: Tensor) -> None:
        """Give the weights of each layer the gradients of its own error."""

        def keep(place: int, error: Tensor) -> None:
            parameters = self.parameters[place]
            for parameter, gradient in zip(
                parameters, torch.autograd.grad(error, parameters, allow_unused=True), strict=True
            ):
                parameter.grad = gradient

        self._run(batch, keep)

    def _run(self, batch: Tensor, use: Callable[[int, Tensor], None]) -> None:
        """Run the converted model on blocks, with `use(place, error)` as each fitted layer has run."""
        targets = self._targets(batch)

        def compare(place: int, output: Tensor) -> None:
            given, wanted = _unit(output), _unit(targets[place].to(output.device))
            use(place, ((given - wanted) / self._deviations[place].to(output.device)).square().mean())

        with _hooked(_decoder_layers(self._model), self._fitted, compare, detached=True):
            _read(self._model, self._input_ids(batch), self._bf16)

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
    with _hooked(layers, range(len(layers)), lambda place, output: outputs[place].append(output), detached=False):
        _read(model, input_ids, bf16)
    return outputs


@contextmanager
def _hooked(
    layers: nn.ModuleList, watched: Sequence[int], use: Callable[[int, Tensor], None], *, detached: bool
) -> Iterator[None]:
    """While open, call `use(place, output)` as each of the watched layers has run; `place` is that in `watched`.

    `detached` layers pass no gradients on to the layers before them.
    """

    def keep(place: int, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        use(place, output[0] if isinstance(output, tuple) else output)

    with ExitStack() as hooks:
        for layer in layers if detached else ():
            hooks.enter_context(layer.register_forward_pre_hook(_detach, with_kwargs=True))
        for place, index in enumerate(watched):
            hooks.enter_context(layers[index].register_forward_hook(partial(keep, place)))
        yield


def _detach(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A layer's arguments without the graph that made its hidden states."""
    if args:
        return (args[0].detach(), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach()}


def _read(model: PreTrainedModel, input_ids: Tensor, bf16: bool) -> None:
    device = input_device(model)
    # Autocast keeps what it has cast until it ends, and weights change from batch to batch.
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        text_decoder(model).module(input_ids=input_ids.to(device), use_cache=False)

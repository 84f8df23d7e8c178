"""Attention distillation: each self-attention layer learns, by itself, what it gave with the old positions.

The inputs and outputs of each self-attention layer of the unconverted model are recorded on some text. Then each
converted layer is fitted to them by itself: a small regression without the rest of the model, which costs a fraction of
training on the same tokens. It is the idea of LinearARD (arXiv 2604.00004), there for scaled rotary positions.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from shutil import disk_usage
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from ..anatomy import is_alibi, is_rotary, position_modules, self_attentions, text_decoder
from ..configuration import text_config
from ..modes import evaluation_mode
from ..progress import progress_bar

__all__ = ["AttentionRecord", "LayerFit", "check_distillation", "distill_attention", "record_attention"]

# What is recorded is kept in bfloat16: its rounding is far below any error that a fit leaves.
_RECORD_DTYPE = torch.bfloat16
# One block of so many is not fitted to and tells how good the fit is.
_HELD_OUT = 16
_WARMUP_STEPS = 10


class AttentionRecord(NamedTuple):
    """Inputs and outputs of one self-attention layer of the unconverted model, each (blocks, tokens, width)."""

    inputs: Tensor
    outputs: Tensor


class LayerFit(NamedTuple):
    """Squared error of a converted layer, as a share of its target's, on blocks that it was not fitted to."""

    before: float
    after: float


def check_distillation(model: PreTrainedModel, input_ids: Tensor, *, batch_size: int, folder: Path) -> None:
    """Raise ValueError where the layers of an unconverted `model` cannot be distilled on `input_ids`.

    `folder` is where they are to be recorded.
    """
    if is_alibi(model.config):
        raise ValueError("attention distillation needs the unconverted model as its teacher; record before apply_alibi")
    if not any(is_rotary(positions) for _, _, positions in position_modules(model)):
        raise ValueError(
            f"{type(model).__name__} adds positions to its embeddings, so its layers' inputs hold what the converted "
            "model will not have; attention distillation is for rotary positions"
        )
    blocks, tokens = input_ids.shape
    least = max(2 * batch_size, _HELD_OUT)
    if blocks < least:
        raise ValueError(f"attention distillation was given {blocks} blocks of text and needs at least {least}")
    layers = sum(1 for _ in self_attentions(model))
    width: int = text_config(model.config).hidden_size
    needed = 2 * blocks * tokens * width * layers * _RECORD_DTYPE.itemsize
    available = disk_usage(folder).free
    if needed > available:
        raise ValueError(
            f"recording {layers} layers on {blocks * tokens:,} tokens takes {needed / 2**30:.1f} GiB, and {folder} has "
            f"{available / 2**30:.1f} GiB left; distil on fewer tokens, or set TMPDIR to a folder with more room"
        )


@torch.no_grad()
def record_attention(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    batch_size: int,
    folder: Path,
    bf16: bool = False,
    progress: bool = False,
) -> list[AttentionRecord]:
    """Inputs and outputs of each self-attention layer of an unconverted `model`, in order.

    Args:
        model: before `apply_alibi`.
        input_ids: (blocks, tokens).
        batch_size: blocks in one forward pass.
        folder: for files that stand behind the tensors, 4 bytes a token, layer and unit of width.
        bf16: compute in bfloat16 by autocast.
        progress: show a bar.

    Raises ValueError where `check_distillation` does.
    """
    check_distillation(model, input_ids, batch_size=batch_size, folder=folder)
    shape = (*input_ids.shape, text_config(model.config).hidden_size)

    def file(name: str) -> Tensor:
        return torch.from_file(str(folder / name), shared=True, size=math.prod(shape), dtype=_RECORD_DTYPE).view(shape)

    records = [
        AttentionRecord(file(f"{index}.inputs"), file(f"{index}.outputs"))
        for index, _ in enumerate(self_attentions(model))
    ]
    rows = slice(0, 0)

    def keep(
        record: AttentionRecord, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        record.inputs[rows] = _hidden_states(args, kwargs).to("cpu", _RECORD_DTYPE)
        record.outputs[rows] = _output(output).to("cpu", _RECORD_DTYPE)

    with ExitStack() as hooks:
        for record, (_, layer) in zip(records, self_attentions(model), strict=True):
            hooks.enter_context(layer.register_forward_hook(partial(keep, record), with_kwargs=True))
        advance = hooks.enter_context(progress_bar("recording attention", input_ids.numel(), shown=progress))
        hooks.enter_context(evaluation_mode(model))
        hooks.enter_context(_autocast(model.device, bf16))
        for batch in input_ids.split(batch_size):
            rows = slice(rows.stop, rows.stop + len(batch))
            _run(model, batch)
            advance(batch.numel())
    return records


def distill_attention(
    model: PreTrainedModel,
    input_ids: Tensor,
    records: list[AttentionRecord],
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    bf16: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> list[LayerFit]:
    """Fit each self-attention layer of the converted `model` to what was recorded before, in place.

    Args:
        model: after `apply_alibi`, with the weights that it had when `records` were made.
        input_ids: (blocks, tokens), those of the records.
        records: of `record_attention`, one a layer.
        epochs: how often each block is seen.
        learning_rate: of AdamW, the highest of a cosine schedule.
        batch_size: blocks a step.
        bf16: compute in bfloat16 by autocast; the weights keep their type.
        seed: of the order of blocks.
        progress: show a bar.

    Returns the error of each layer before and after. Raises ValueError where a layer's attention reads more of the
    text than its hidden states, so that it cannot be run by itself.
    """
    layers = list(self_attentions(model))
    with evaluation_mode(model), progress_bar("distilling attention", len(layers), shown=progress) as advance:
        calls = _calls(model, input_ids[:batch_size])
        _check_alone(calls, _calls(model, input_ids[-batch_size:]))
        fits = []
        for (name, layer), record in zip(layers, records, strict=True):
            generator = torch.Generator().manual_seed(seed)
            fits.append(
                _fit(
                    layer,
                    calls[name],
                    record,
                    epochs=epochs,
                    learning_rate=learning_rate,
                    batch_size=batch_size,
                    bf16=bf16,
                    generator=generator,
                )
            )
            advance(1)
    return fits


class _Call(NamedTuple):
    """How a model calls one of its self-attention layers on a batch of blocks, but for the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, layer: nn.Module, hidden_states: Tensor) -> Tensor:
        if self.args:
            return _output(layer(hidden_states, *self.args[1:], **self.kwargs))
        return _output(layer(**{**self.kwargs, "hidden_states": hidden_states}))


def _fit(
    layer: nn.Module,
    call: _Call,
    record: AttentionRecord,
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    bf16: bool,
    generator: torch.Generator,
) -> LayerFit:
    parameters = list(layer.parameters())
    device, dtype = parameters[0].device, parameters[0].dtype
    held_out = max(batch_size, len(record.inputs) // _HELD_OUT // batch_size * batch_size)
    fitted = len(record.inputs) - held_out
    scale = record.outputs.float().square().mean().item()

    def error(blocks: Tensor) -> Tensor:
        inputs, outputs = (part[blocks].to(device, dtype) for part in record)
        with _autocast(device, bf16):
            given = call(layer, inputs)
        return (given.float() - outputs.float()).square().mean() / scale

    @torch.no_grad()
    def held_out_error() -> float:
        blocks = torch.arange(fitted, len(record.inputs)).split(batch_size)
        return torch.stack([error(part) for part in blocks]).mean().item()

    steps = epochs * (fitted // batch_size)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(_WARMUP_STEPS, steps // 2), steps)
    before = held_out_error()
    for _ in range(epochs):
        # The kwargs of the call are those of a whole batch, so what does not fill one waits for the next epoch.
        for blocks in torch.randperm(fitted, generator=generator).split(batch_size)[: fitted // batch_size]:
            gradients = torch.autograd.grad(error(blocks), parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()
    optimizer.zero_grad()
    return LayerFit(before, held_out_error())


@torch.no_grad()
def _calls(model: PreTrainedModel, batch: Tensor) -> dict[str, _Call]:
    """How each self-attention layer is called on a batch, by name."""
    calls: dict[str, _Call] = {}

    def keep(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[name] = _Call(args, kwargs)

    with ExitStack() as hooks:
        for name, layer in self_attentions(model):
            hooks.enter_context(layer.register_forward_pre_hook(partial(keep, name), with_kwargs=True))
        _run(model, batch)
    return calls


def _check_alone(calls: dict[str, _Call], others: dict[str, _Call]) -> None:
    """Raise ValueError where the calls on two batches differ in more than the hidden states."""
    for name, call in calls.items():
        other = others[name]
        for key in call.kwargs.keys() - {"hidden_states"}:
            if not _equal(call.kwargs[key], other.kwargs[key]):
                raise ValueError(
                    f"attention distillation runs each layer by itself, but {name} also reads {key}, which differs "
                    "from text to text; leave distillation out for this model"
                )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return type(one) is type(other)


def _run(model: PreTrainedModel, batch: Tensor) -> None:
    text_decoder(model)(input_ids=batch.to(model.device), use_cache=False)


def _autocast(device: torch.device, bf16: bool) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def _hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    states: Tensor = args[0] if args else kwargs["hidden_states"]
    return states


def _output(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden

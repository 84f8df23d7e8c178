"""`verify_alibi`: proof, on the very model at hand, that every self-attention layer applies exactly the bias."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from ..attention.backends import wrapped_backends
from ..attention.inputs import visible_keys
from ..attention.layer_slopes import head_slopes
from ..configuration import text_config
from ..errors import VerificationError
from ..utils import evaluation_mode, input_device
from .anatomy import is_alibi, text_decoder
from .families import scales_by_position

__all__ = ["LayerReport", "LayerReports", "verify_alibi"]

# Tokens after those that carry no bias, and padding before them.
_LENGTH = 16
_PADDING = 5


@dataclass(frozen=True)
class LayerReport:
    """What `verify_alibi` found in one self-attention layer."""

    layer: str
    """Name of the module in the model."""
    slopes: tuple[float, ...]
    """Slopes measured at the layer's attention, one a head, logits per token."""
    error: float
    """Largest difference of the attention's output to the float64 reference, over the largest value."""


class LayerReports(list[LayerReport]):
    """Those of all layers, which print as a table."""

    def __str__(self) -> str:
        width = max(len(report.layer) for report in self)
        rows = [
            f"{report.layer:<{width}}  {len(report.slopes):>5}  {min(report.slopes):.6g} to {max(report.slopes):.6g}"
            f"  {report.error:.1e}"
            for report in self
        ]
        return "\n".join([f"{'layer':<{width}}  heads  slopes, error of the output", *rows])


@dataclass(frozen=True)
class _Call:
    """One call of a layer's attention; the output is (batch, queries, heads, head_dim)."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    output: Tensor
    scaling: float
    softcap: float | None
    sinks: Tensor | None


def verify_alibi(model: PreTrainedModel) -> LayerReports:
    """Prove that every self-attention layer of `model` applies exactly the bias that its config says.

    A short random batch goes through, once without and once with left padding. Each layer's own queries, keys and
    values are compared with a dense float64 attention, each head's slope and the bias of sink tokens are measured, and
    changed position ids must change nothing. Weights, modes and the random state stay as they are.

    Returns one report a layer, in order; printed, a table.

    Raises ValueError for a model that is not converted, VerificationError, which names the layer, where something
    else than the bias is applied.
    """
    if not is_alibi(model.config):
        raise ValueError(f"{type(model).__name__} has no ALiBi; convert it with hf_alibi.apply_alibi(model)")
    layers = dict(text_decoder(model).self_attentions)
    if not layers:
        raise VerificationError(f"{type(model).__name__} has no self-attention layer that ALiBi knows")
    length = _length(model)
    plain = torch.ones(2, length, dtype=torch.long, device=input_device(model))
    padded = plain.clone()
    padded[1, :_PADDING] = 0
    with evaluation_mode(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        errors = dict.fromkeys(layers, 0.0)
        for mask in (plain, padded):
            with _recorded_calls() as calls:
                _outputs(model, mask)
            for name, layer in layers.items():
                if layer not in calls:
                    raise VerificationError(f"layer {name} never called an ALiBi attention: it runs without the bias")
                errors[name] = max(errors[name], _compare(name, layer, calls[layer], mask))
        _check_positions(model, padded)
        return LayerReports(
            LayerReport(name, _measured_slopes(name, layer, calls[layer]), errors[name])
            for name, layer in layers.items()
        )


@contextmanager
def _recorded_calls() -> Iterator[dict[nn.Module, _Call]]:
    """The last call of each layer to an ALiBi attention function while the context is open."""
    calls: dict[nn.Module, _Call] = {}

    def recording(attention: Callable[..., tuple[Tensor, Any]]) -> Callable[..., tuple[Tensor, Any]]:
        def record(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
        ) -> tuple[Tensor, Any]:
            output, weights = attention(module, query, key, value, attention_mask, **kwargs)
            scaling = kwargs.get("scaling")
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            special = kwargs.get("softcap"), kwargs.get("s_aux")
            calls[module] = _Call(query, key, value, attention_mask, output, scaling, *special)
            return output, weights

        return record

    with wrapped_backends(recording):
        yield calls


def _length(model: PreTrainedModel) -> int:
    """Tokens that show which of them are sinks."""
    return _LENGTH + int(text_config(model.config).alibi_sink_tokens)


def _inputs(model: PreTrainedModel, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Random inputs (batch, tokens) for the text decoder, the same at every call."""
    decoder: Any = text_decoder(model).module
    # Of its own generator, so that the user's random state is not moved.
    generator = torch.Generator().manual_seed(0)
    vocabulary = getattr(decoder.get_input_embeddings(), "num_embeddings", None)
    inputs: dict[str, Tensor]
    if vocabulary is not None:
        inputs = {"input_ids": torch.randint(vocabulary, shape, generator=generator)}
    else:  # embeddings of several vocabularies, of audio
        width = text_config(model.config).hidden_size
        inputs = {"inputs_embeds": torch.randn(*shape, width, generator=generator).to(model.dtype)}
    return {name: value.to(input_device(model)) for name, value in inputs.items()}


def _outputs(model: PreTrainedModel, mask: Tensor, **kwargs: Any) -> Tensor:
    """Hidden states of the text decoder; under FSDP2 logits, since the hooks of the whole model gather its weights."""
    inputs = _inputs(model, tuple(mask.shape))
    called = model if _is_fully_sharded(model) else text_decoder(model).module
    outputs: Tensor = called(**inputs, attention_mask=mask, use_cache=False, **kwargs)[0]
    return outputs


def _is_fully_sharded(model: PreTrainedModel) -> bool:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def _expected_slopes(layer: nn.Module, call: _Call, context: Tensor) -> Tensor:
    """float64 (batch or 1, heads, queries or 1, 1) of queries that see `context` (batch or 1, 1, queries) tokens."""
    return head_slopes(layer, call.query, call.value, context.device).for_queries(lambda: context).double()


def _compare(name: str, layer: nn.Module, call: _Call, mask: Tensor) -> float:
    """The layer's largest error against dense float64 attention; raises if it is more than rounding."""
    query, key, value = call.query.double(), call.key.double(), call.value.double()
    key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], dim=1) for states in (key, value))
    position = mask.cumsum(dim=-1)
    distance = (position[:, :, None] - position[:, None, :])[:, None].double()
    config: Any = layer.config
    distance = distance.masked_fill((position <= config.alibi_sink_tokens)[:, None, None, :], 0.0)
    slopes = _expected_slopes(layer, call, position[:, None])
    logits = query @ key.transpose(-1, -2) * call.scaling
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    logits = logits - slopes * distance
    hidden = ~(torch.ones_like(distance, dtype=torch.bool).tril() & mask.bool()[:, None, None, :])
    if isinstance(call.mask, Tensor) and call.mask.ndim == 4:
        # The family's own part of the mask, such as a window.
        allowed, added, _ = visible_keys(call.mask, query, key)
        hidden = hidden | ~allowed
        logits = logits if added is None else logits + added.double().masked_fill(hidden, 0.0)
    largest_logit = logits.abs().masked_fill(hidden, 0.0).max().item()
    logits = logits.masked_fill(hidden, -torch.inf)
    if call.sinks is not None:
        logits = torch.cat([logits, call.sinks.double()[:, None, None].expand(*logits.shape[:-1], 1)], dim=-1)
    weights = logits.softmax(dim=-1)[..., : key.shape[2]]
    # Padding sees nothing; its output means nothing and is left out.
    expected = (weights @ value).transpose(1, 2)[mask.bool()]
    difference = (call.output.double()[mask.bool()] - expected).abs().max().item()
    error = difference / value.abs().max().clamp(min=1e-30).item()
    rounding = 8 * torch.finfo(call.output.dtype).eps + 16 * torch.finfo(torch.float32).eps * largest_logit
    if not error <= rounding:
        raise VerificationError(
            f"layer {name} does not apply the ALiBi bias of its config: output differs from float64 attention by "
            f"{error:.2e} of the largest value, rounding explains {rounding:.2e}"
        )
    return error


def _measured_slopes(name: str, layer: nn.Module, call: _Call) -> tuple[float, ...]:
    """Slopes read off the layer's attention: with equal logits, one token of distance costs exactly the slope.

    Raises if they are not those of the config, also for keys ahead of a query where a mask can show them, or if sink
    tokens cost anything.
    """
    config: Any = layer.config
    sinks, device = int(config.alibi_sink_tokens), call.query.device
    tokens = sinks + 2
    # flash-attn has kernels for half types only.
    dtype = call.query.dtype if "flash" in config._attn_implementation else torch.float64
    tolerance = max(1e-7, 8 * torch.finfo(dtype).eps)
    context = torch.full((1, 1, 1), tokens, device=device)
    expected = _expected_slopes(layer, call, context).expand(1, call.query.shape[1], 1, 1).flatten()
    seen, of_sinks = _cost(layer, call, dtype, query=tokens - 1, key=tokens - 2, mask=None)
    measured = {"": seen}
    try:
        everything = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=device)
        measured[" for keys ahead"] = _cost(layer, call, dtype, query=tokens - 2, key=tokens - 1, mask=everything)[0]
    except ValueError:
        pass  # refused
    for where, slopes in measured.items():
        if not torch.allclose(slopes, expected, rtol=1e-5, atol=tolerance):
            raise VerificationError(
                f"layer {name} has slopes {slopes.tolist()}{where}, its config says {expected.tolist()}"
            )
    if not of_sinks.abs().max().item() <= tolerance:
        raise VerificationError(
            f"layer {name} gives its first {sinks} tokens the bias {of_sinks.tolist()}, alibi_sink_tokens says none"
        )
    return tuple(seen.tolist())


def _cost(
    layer: nn.Module, call: _Call, dtype: torch.dtype, *, query: int, key: int, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What one of the two tokens after the sinks costs a query at the other one, and the bias of sinks, (heads,) each.

    All logits are equal, so that only the bias makes weights uneven.
    """
    config: Any = layer.config
    sinks = int(config.alibi_sink_tokens)
    attention = AttentionInterface().get_interface(config._attn_implementation, None)
    states = [
        states.new_zeros(1, states.shape[1], sinks + 2, states.shape[-1], dtype=dtype)
        for states in (call.query, call.key, call.value)
    ]
    # What the query gives to itself stands in no column of its values.
    states[2][:, :, key, 0] = 1
    states[2][:, :, :sinks, 1] = 1
    output, _ = attention(layer, *states, mask, scaling=call.scaling)
    other, of_sinks = output[0, query, :, :2].double().unbind(dim=-1)
    own = (1 - other - of_sinks).log()
    return own - other.log(), of_sinks.log() - math.log(sinks) - own if sinks else torch.zeros_like(own)


def _check_positions(model: PreTrainedModel, mask: Tensor) -> None:
    decoder: Any = text_decoder(model).module
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        _check_padding(model)
    elif not scales_by_position(decoder.config):
        # Reversed, not shifted: rotary positions cannot tell a shift, and a table may have no more rows.
        reverse = torch.arange(mask.shape[1], device=mask.device).flip(0).expand(mask.shape)
        default = _outputs(model, mask)
        changed = (_outputs(model, mask, position_ids=reverse) - default).abs().max().item()
        if not changed <= 8 * torch.finfo(default.dtype).eps * default.abs().max().item():
            raise VerificationError(
                f"position ids change the output of {type(decoder).__name__} by {changed:.2e}: "
                "positions are still added beside ALiBi"
            )


def _check_padding(model: PreTrainedModel) -> None:
    """For a decoder that counts positions itself: padding before the text must change nothing."""
    decoder: Any = text_decoder(model).module
    length = _length(model)
    inputs = _inputs(model, (2, length))
    alone = decoder(**inputs, use_cache=False)[0]
    padded = {name: torch.cat([value[:, :_PADDING], value], dim=1) for name, value in inputs.items()}
    mask = torch.ones(2, _PADDING + length, dtype=torch.long, device=input_device(model))
    mask[:, :_PADDING] = 0
    changed = (decoder(**padded, attention_mask=mask, use_cache=False)[0][:, _PADDING:] - alone).abs().max().item()
    # Sums over other numbers of keys round otherwise, layer after layer.
    if not changed <= max(1e-4, 32 * torch.finfo(alone.dtype).eps) * alone.abs().max().item():
        raise VerificationError(
            f"padding before the text changes the output of {type(decoder).__name__} by {changed:.2e}: "
            "positions are still added beside ALiBi, or the padding is seen"
        )

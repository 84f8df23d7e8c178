"""vLLM's own model classes with their positions taken out and slopes given to their attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from vllm import ModelRegistry
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from ...configuration import stock_config
from ...model.anatomy import text_decoder
from ...model.installation import replace_positions
from ..targets import layer_slopes
from .plugin import refuse_unserved

__all__ = ["AlibiServed"]

# Attention of vLLM that adds the slopes it is given. FlashInfer keeps and ignores them.
_BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")


class _NoRotation(nn.Module):
    """Stands for rotary positions, which vLLM's own classes call for queries and keys."""

    def forward(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys as they are."""
        return query, key


class _NoTable(nn.Module):
    """Stands for a learned table of positions."""

    def forward(self, positions: Tensor) -> Tensor:
        """An integer zero, which changes neither value nor type of what it is added to."""
        return positions.new_zeros(())


# By the name that vLLM's own classes give to what makes positions.
_STAND_INS = {"rotary_emb": _NoRotation, "wpe": _NoTable, "embed_positions": _NoTable}


class AlibiServed:
    """What is added to each of vLLM's classes: built without positions, with slopes, and checked."""

    def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
        """Build the model. Raises ValueError for a config, or an attention backend, that would run without the bias."""
        refuse_unserved(vllm_config.model_config)
        config = vllm_config.model_config.hf_config
        if current_platform.is_cuda() and vllm_config.attention_config.backend is None:
            vllm_config.attention_config.backend = _cuda_backend(vllm_config.model_config.dtype)
        slopes = layer_slopes(config)
        # Built as what it was before the conversion, with positions, which are then taken out.
        with _attention_with(slopes):
            super().__init__(  # type: ignore[call-arg]
                vllm_config=vllm_config.with_hf_config(stock_config(config)), prefix=prefix, **kwargs
            )
        _take_positions_out(self)
        _check(self, slopes)  # type: ignore[arg-type]


def _cuda_backend(dtype: torch.dtype) -> Any:
    """A backend that adds slopes; vLLM's own first choice on some GPUs is FlashInfer."""
    has_flash = current_platform.has_device_capability(80) and not current_platform.has_device_capability(100)
    name = "FLASH_ATTN" if has_flash and dtype.itemsize == 2 else "TRITON_ATTN"
    return AttentionBackendEnum[name]


@contextmanager
def _attention_with(slopes: list[list[float]]) -> Iterator[None]:
    """Context manager: inside, attention layers are built with the slopes of their layer and rank."""
    stock = Attention.__init__

    def init(self: Any, num_heads: int, *args: Any, prefix: str = "", **kwargs: Any) -> None:
        kwargs["alibi_slopes"] = _of_rank(slopes[extract_layer_index(prefix)], num_heads)
        stock(self, num_heads, *args, prefix=prefix, **kwargs)

    Attention.__init__ = init
    try:
        yield
    finally:
        Attention.__init__ = stock


def _of_rank(slopes: list[float], heads: int) -> list[float]:
    """Slopes of the heads that this tensor-parallel rank has of a layer."""
    first = get_tensor_model_parallel_rank() * heads
    return slopes[first : first + heads]


def _take_positions_out(model: Any) -> None:
    """Replace everything that makes positions. Raises ValueError if there is nothing."""
    if isinstance(model, TransformersForCausalLM):
        # vLLM has no classes of its own for some families: it builds transformers', with its attention inside.
        decoder = text_decoder(model.model)
        replace_positions(decoder)
        found: list[Any] = list(decoder.positions)
    else:
        found = [
            (parent, name) for parent in model.modules() for name, _ in parent.named_children() if name in _STAND_INS
        ]
        for parent, name in found:
            setattr(parent, name, _STAND_INS[name]())
        if any("Rotary" in type(part).__name__ for part in model.modules()):
            found = []  # under another name, where they would stay beside the bias
    if not found:
        raise ValueError(f"{type(model).__name__} of this vLLM does not have its positions where they are looked for")


def _check(model: nn.Module, slopes: list[list[float]]) -> None:
    """Raise ValueError unless every attention layer holds its slopes, in a backend that adds them."""
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    if not layers:
        raise ValueError(f"{type(model).__name__} of this vLLM has no attention layer that takes slopes")
    for layer in layers:
        backend = layer.attn_backend.get_name()
        if backend not in _BACKENDS:
            raise ValueError(
                f"the attention backend {backend} of vLLM does not add ALiBi's bias; choose one that does by "
                f"--attention-backend: {', '.join(_BACKENDS)}"
            )
        expected = _of_rank(slopes[extract_layer_index(layer.layer_name)], layer.num_heads)
        held = getattr(layer.impl, "alibi_slopes", None)
        if held is None or len(expected) != layer.num_heads or not torch.equal(held.cpu(), torch.tensor(expected)):
            raise ValueError(f"{layer.layer_name} did not take the slopes of its {layer.num_heads} heads")


def __getattr__(name: str) -> Any:
    """`Alibi<class of vLLM>`, made when it is first asked for."""
    if not name.startswith("Alibi"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    known = ModelRegistry.models.get(name.removeprefix("Alibi"))
    if known is None:
        raise AttributeError(f"this vLLM has no {name.removeprefix('Alibi')}, so it cannot serve {name}")
    stock = known.load_model_cls()
    made = type(name, (AlibiServed, stock), {"__module__": __name__, "__doc__": f"`{stock.__name__}` with ALiBi."})
    return globals().setdefault(name, made)

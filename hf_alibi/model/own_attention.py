"""Self-attention of families that do not ask transformers' interface for an attention function: forms that do."""

from __future__ import annotations

from importlib import import_module
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ..attention.inputs import visible_keys, visible_range

__all__ = ["convert_own_attention", "is_own_attention"]


def _attend(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """The ALiBi attention that the layer's config names; see `attention.eager` for the arguments."""
    config: Any = module.config
    attention = AttentionInterface().get_interface(config._attn_implementation, None)
    result: tuple[Tensor, Tensor | None] = attention(module, *args, **kwargs)
    return result


class _AttnMethod:
    """For layers that compute attention in a method `_attn(query, key, value, attention_mask)`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the family's, with every token at position 0, which rotates nothing."""
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = torch.zeros_like(kwargs["position_ids"])
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def _attn(
        self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        dropout = self.attn_dropout if hasattr(self, "attn_dropout") else self.attention_dropout
        output, weights = _attend(
            self,
            query.to(value.dtype),
            key.to(value.dtype),
            value,
            attention_mask,
            scaling=self.alibi_scaling_of_logits(),
            dropout=dropout.p if self.training else 0.0,
        )
        return output.transpose(1, 2), weights

    def alibi_scaling_of_logits(self: Any) -> float:
        """The factor of query times key."""
        return 1.0 / float(self.scale_attn if hasattr(self, "scale_attn") else self.norm_factor)


class _GPTNeo(_AttnMethod):
    """GPT-Neo: logits are not scaled, and every other layer sees a window only."""

    def _attn(
        self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if self.attention_type == "local":
            allowed, _, own = visible_keys(attention_mask, query, key)
            # With one query, the last key that it sees is its own, whatever cache the keys come from.
            own = (visible_range(allowed)[1] if own is None else own)[..., None]
            attention_mask = allowed & (torch.arange(key.shape[2], device=key.device) > own - self.config.window_size)
        output: tuple[Tensor, Tensor | None] = super()._attn(query, key, value, attention_mask)
        return output

    def alibi_scaling_of_logits(self) -> float:
        return 1.0


class _Falcon:
    """Falcon: its forward has the attention between its projections."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Tensor | None,
        layer_past: Any = None,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(batch, tokens, width) through projections and ALiBi attention."""
        states = self._split_heads(self.query_key_value(hidden_states))
        query, key, value = (state.transpose(1, 2) for state in states)
        # At position 0 the sines are 0, and the cosines are what a scaling of rotary positions multiplies logits by.
        cos = position_embeddings[0][:, None]
        query, key = query * cos, key * cos
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        output, weights = _attend(self, query, key, value, attention_mask)
        return self.dense(output.flatten(2)), weights


# From the family's class to the form that goes before it.
_FORMS: dict[str, tuple[str, type]] = {
    "CodeGenAttention": ("codegen.modeling_codegen", _AttnMethod),
    "FalconAttention": ("falcon.modeling_falcon", _Falcon),
    "GPTJAttention": ("gptj.modeling_gptj", _AttnMethod),
    "GPTNeoSelfAttention": ("gpt_neo.modeling_gpt_neo", _GPTNeo),
    "GPTNeoXJapaneseAttention": ("gpt_neox_japanese.modeling_gpt_neox_japanese", _AttnMethod),
}


def is_own_attention(module: nn.Module) -> bool:
    """Whether `module` is, or was converted from, self-attention with code of its own."""
    return type(module).__name__.removeprefix("Alibi") in _FORMS


def convert_own_attention(module: nn.Module) -> None:
    """Give `module` its form, in place; nothing to do for other modules, or a second time.

    Raises ValueError if the module has a forward of its own, which would go on without the bias.
    """
    stock = type(module)
    if stock.__name__ not in _FORMS:
        return
    module.__class__ = __getattr__(f"Alibi{stock.__name__}")
    # accelerate puts its hooks in the place of `forward`, and what they call into `_old_forward`.
    name = "_old_forward" if "_old_forward" in vars(module) else "forward"
    kept = vars(module).get(name)
    if getattr(kept, "__func__", None) is stock.forward:
        vars(module)[name] = MethodType(module.__class__.forward, module)
    elif kept is not None:
        raise ValueError(
            f"the forward of a {stock.__name__} was replaced, so that ALiBi would not reach it; convert the model "
            "before other tools change it"
        )


def __getattr__(name: str) -> Any:
    """The class of a form, made when it is first asked for; under its name here it can be pickled."""
    if name in globals():
        return globals()[name]
    stock = name.removeprefix("Alibi")
    if stock == name or stock not in _FORMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    source, form = _FORMS[stock]
    family_class = getattr(import_module(f"transformers.models.{source}"), stock)
    made = type(name, (form, family_class), {"__module__": __name__, "__doc__": f"`{stock}` with ALiBi."})
    # Another thread may have made it meanwhile.
    return globals().setdefault(name, made)

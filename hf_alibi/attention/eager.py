"""ALiBi attention with the whole matrix of weights, for `output_attentions` and as the plainest form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .call import AttentionCall, resolve
from .inputs import visible_keys

__all__ = ["attend_eagerly", "eager_alibi_attention"]


def eager_alibi_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Causal attention with the ALiBi bias, computed in float32 or wider whatever the type of the inputs.

    Arguments as in `resolve`, but:
        dropout: in training only.
        kwargs: `softcap`, which bounds the logits before the bias is added (Gemma 2); `s_aux`, (heads,), the logit of
            a sink that takes a share of each query's weights (gpt-oss).

    Returns the output (batch, queries, heads, head_dim) and the weights (batch, heads, queries, keys), of which a row
    sums to less than 1 if a sink takes its share.
    """
    call = resolve(
        "eager",
        module,
        (query, key, value),
        attention_mask,
        scaling=scaling,
        dropout=dropout,
        kwargs=kwargs,
        supported=("softcap", "s_aux"),
    )
    output, weights = attend_eagerly(call if module.training else replace(call, dropout=0.0))
    return output.transpose(1, 2).contiguous(), weights


def attend_eagerly(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Output (batch, heads, queries, head_dim) and weights (batch, heads, queries, keys) of any call."""
    query, softcap, sinks = call.query, call.softcap, call.learned_sinks
    allowed, added, _ = visible = visible_keys(call.mask, query, call.key)
    key, value = (states.repeat_interleave(call.groups, dim=1) for states in (call.key, call.value))

    wide = torch.promote_types(query.dtype, torch.float32)
    # Autocast would take the product of two float32 tensors in a half type.
    with torch.autocast(query.device.type, enabled=False):
        logits = query.to(wide) @ key.to(wide).transpose(-1, -2) * call.scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits + call.slopes.bias(visible)
        if added is not None:
            logits = logits + added
        # A query that may see nothing (padding) gets zeros, and finite gradients on the way.
        logits = logits.masked_fill(~allowed, torch.finfo(wide).min)
        if sinks is not None:
            sink = sinks.to(wide)[:, None, None].expand(*logits.shape[:-1], 1)
            weights = torch.cat([logits, sink], dim=-1).softmax(dim=-1)[..., :-1]
        else:
            weights = logits.softmax(dim=-1)
        weights = weights.masked_fill(~allowed.any(dim=-1, keepdim=True), 0.0)
        weights = nn.functional.dropout(weights, p=call.dropout)
        output = (weights @ value.to(wide)).to(value.dtype)
    return output, weights.to(value.dtype)

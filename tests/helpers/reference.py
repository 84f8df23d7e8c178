"""The truth: GPT-2 and LLaMA with ALiBi as in a textbook, dense and in float64, from nothing but their weights.

Written from the papers, without any code of the package: Radford et al. 2019, Touvron et al. 2023, Press et al. 2022.
"""

import math

import torch
from torch import Tensor


def slopes(num_heads: int) -> Tensor:
    """float64 (heads,): a geometric sequence that starts at and has the ratio 2^(-8/n); between powers of two, as the
    authors' code does it, filled up with every other value of the next one."""
    if math.log2(num_heads).is_integer():
        return torch.tensor([2.0 ** (-8.0 * (i + 1) / num_heads) for i in range(num_heads)], dtype=torch.float64)
    lower = 2 ** int(math.log2(num_heads))
    return torch.cat([slopes(lower), slopes(2 * lower)[0::2][: num_heads - lower]])


def token_positions(mask: Tensor) -> Tensor:
    """(batch, length): how many real tokens stand before each token."""
    return mask.long().cumsum(-1) - 1


def visible(mask: Tensor, segments: Tensor | None = None) -> Tensor:
    """bool (batch, queries, keys): causal, not padding, and of the same packed sequence."""
    length = mask.shape[-1]
    seen = torch.ones(length, length, dtype=torch.bool).tril() & mask.bool()[:, None, :]
    return seen if segments is None else seen & (segments[:, :, None] == segments[:, None, :])


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    position: Tensor,
    head_slopes: Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    sink_tokens: int = 0,
) -> Tensor:
    """softmax(q k^T · scaling − slope · |distance|) v, head by head.

    With a cap c, q k^T · scaling is c · tanh(q k^T · scaling / c) (Gemma 2, arXiv 2408.00118); a sink is one more logit
    of each row, whose share of the weights goes nowhere (gpt-oss). The first `sink_tokens` keys that a query sees are
    at distance 0 (Xiao et al. 2023, arXiv 2309.17453).

    query (batch, heads, queries, dim); key, value (batch, key heads, keys, dim); seen (batch, queries, keys);
    position (batch, keys) of the keys, those of the queries being the last ones.
    """
    query, key, value = query.double(), key.double(), value.double()
    group = query.shape[1] // key.shape[1]
    queries = query.shape[2]
    distance = (position[:, -queries:, None] - position[:, None, :]).abs().double()
    if sink_tokens:
        for row_seen, row_distance in zip(seen.flatten(0, 1), distance.flatten(0, 1), strict=True):
            row_distance[row_seen.nonzero()[:sink_tokens, 0]] = 0.0
    heads = []
    for head in range(query.shape[1]):
        logits = query[:, head] @ key[:, head // group].mT * scaling
        if softcap is not None:
            logits = softcap * (logits / softcap).tanh()
        logits = (logits - head_slopes[head].double() * distance).masked_fill(~seen, -math.inf)
        if sinks is not None:
            logits = torch.cat([logits, sinks[head].double().expand(*logits.shape[:-1], 1)], dim=-1)
        weights = logits.softmax(-1).nan_to_num(0.0)[..., : key.shape[2]]
        heads.append(weights @ value[:, head // group])
    return torch.stack(heads, dim=1)


def _heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def gpt2_logits(
    model, input_ids: Tensor, mask: Tensor, segments: Tensor | None = None, head_slopes=None, sink_tokens: int = 0
) -> Tensor:
    """float64 (batch, length, vocabulary)."""
    w = {name: value.detach().double() for name, value in model.state_dict().items()}
    config = model.config
    head_slopes = slopes(config.n_head) if head_slopes is None else head_slopes
    seen, position = visible(mask, segments), token_positions(mask)
    x = w["transformer.wte.weight"][input_ids]
    for i in range(config.n_layer):
        p = f"transformer.h.{i}."
        h = _layer_norm(x, w[p + "ln_1.weight"], w[p + "ln_1.bias"], config.layer_norm_epsilon)
        qkv = h @ w[p + "attn.c_attn.weight"] + w[p + "attn.c_attn.bias"]
        q, k, v = (_heads(part, config.n_head) for part in qkv.chunk(3, dim=-1))
        scaling = q.shape[-1] ** -0.5
        own = head_slopes[i] if head_slopes.ndim == 2 else head_slopes
        mixed = attention(q, k, v, seen, position, own, scaling, sink_tokens=sink_tokens)
        x = x + mixed.transpose(1, 2).flatten(2) @ w[p + "attn.c_proj.weight"] + w[p + "attn.c_proj.bias"]
        h = _layer_norm(x, w[p + "ln_2.weight"], w[p + "ln_2.bias"], config.layer_norm_epsilon)
        h = h @ w[p + "mlp.c_fc.weight"] + w[p + "mlp.c_fc.bias"]
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + h @ w[p + "mlp.c_proj.weight"] + w[p + "mlp.c_proj.bias"]
    x = _layer_norm(x, w["transformer.ln_f.weight"], w["transformer.ln_f.bias"], config.layer_norm_epsilon)
    return x @ w["lm_head.weight"].T


def llama_logits(
    model, input_ids: Tensor, mask: Tensor, segments: Tensor | None = None, head_slopes=None, sink_tokens: int = 0
) -> Tensor:
    """float64 (batch, length, vocabulary)."""
    w = {name: value.detach().double() for name, value in model.state_dict().items()}
    config = model.config
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    head_slopes = slopes(heads) if head_slopes is None else head_slopes
    seen, position = visible(mask, segments), token_positions(mask)
    x = w["model.embed_tokens.weight"][input_ids]
    for i in range(config.num_hidden_layers):
        p = f"model.layers.{i}."
        h = _rms_norm(x, w[p + "input_layernorm.weight"], config.rms_norm_eps)
        q = _heads(h @ w[p + "self_attn.q_proj.weight"].T, heads)
        k = _heads(h @ w[p + "self_attn.k_proj.weight"].T, key_heads)
        v = _heads(h @ w[p + "self_attn.v_proj.weight"].T, key_heads)
        scaling = q.shape[-1] ** -0.5
        own = head_slopes[i] if head_slopes.ndim == 2 else head_slopes
        mixed = attention(q, k, v, seen, position, own, scaling, sink_tokens=sink_tokens)
        x = x + mixed.transpose(1, 2).flatten(2) @ w[p + "self_attn.o_proj.weight"].T
        h = _rms_norm(x, w[p + "post_attention_layernorm.weight"], config.rms_norm_eps)
        gate = h @ w[p + "mlp.gate_proj.weight"].T
        x = x + (gate * torch.sigmoid(gate) * (h @ w[p + "mlp.up_proj.weight"].T)) @ w[p + "mlp.down_proj.weight"].T
    return _rms_norm(x, w["model.norm.weight"], config.rms_norm_eps) @ w["lm_head.weight"].T


LOGITS = {"gpt2": gpt2_logits, "llama": llama_logits}

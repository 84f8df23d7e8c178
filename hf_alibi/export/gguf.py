"""GGUF files for stock llama.cpp, whose architectures `mpt` and `refact` are GPT-2 and LLaMA with the paper's ALiBi.

Both derive slopes by the paper's rule from one number, so no others can be said; what they do not compute, such as
biases of a LLaMA's MLP, llama.cpp would leave out without a word: such weights and settings are refused by name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..configuration import head_width, num_key_heads
from ..errors import InputError
from ..utils import progress_bar, replacing
from .gguf_tokenizer import add_tokenizer, read_tokenizer
from .names import GGUF_TYPES
from .source import Source, check_new, check_package, check_space, open_source

__all__ = ["export_gguf"]

# Paper's ALiBi: slopes from 2^(-8/n) on.
_MAX_BIAS = 8.0


@dataclass(frozen=True)
class _Architecture:
    """How llama.cpp names the parts of a family."""

    name: str
    parts: dict[str, str]
    """From what a weight's name is made of in transformers, `{n}` for the number of the layer."""
    biases: frozenset[str]
    """Names in llama.cpp of the parts whose biases it adds."""
    transposed: frozenset[str] = frozenset()
    """Names in llama.cpp of the parts whose weights transformers stores as (inputs, outputs)."""


_MPT = _Architecture(
    name="mpt",
    parts={
        "transformer.wte": "token_embd",
        "transformer.ln_f": "output_norm",
        "lm_head": "output",
        "transformer.h.{n}.ln_1": "blk.{n}.attn_norm",
        "transformer.h.{n}.attn.c_attn": "blk.{n}.attn_qkv",
        "transformer.h.{n}.attn.c_proj": "blk.{n}.attn_output",
        "transformer.h.{n}.ln_2": "blk.{n}.ffn_norm",
        "transformer.h.{n}.mlp.c_fc": "blk.{n}.ffn_up",
        "transformer.h.{n}.mlp.c_proj": "blk.{n}.ffn_down",
    },
    biases=frozenset({"output_norm", "attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down"}),
    transposed=frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down"}),
)
_REFACT = _Architecture(
    name="refact",
    parts={
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers.{n}.input_layernorm": "blk.{n}.attn_norm",
        "model.layers.{n}.self_attn.q_proj": "blk.{n}.attn_q",
        "model.layers.{n}.self_attn.k_proj": "blk.{n}.attn_k",
        "model.layers.{n}.self_attn.v_proj": "blk.{n}.attn_v",
        "model.layers.{n}.self_attn.o_proj": "blk.{n}.attn_output",
        "model.layers.{n}.post_attention_layernorm": "blk.{n}.ffn_norm",
        "model.layers.{n}.mlp.gate_proj": "blk.{n}.ffn_gate",
        "model.layers.{n}.mlp.up_proj": "blk.{n}.ffn_up",
        "model.layers.{n}.mlp.down_proj": "blk.{n}.ffn_down",
    },
    biases=frozenset({"attn_q", "attn_k", "attn_v"}),
)
# Families that always have the biases which their architecture adds; a LLaMA may have them.
_WITH_BIASES = ("alibi_gpt2", "alibi_qwen2")
# What transformers computes and the architecture does not, by the field and the values that it holds.
_SETTINGS: dict[str, dict[str, tuple[Any, ...]]] = {
    "mpt": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    "refact": {"hidden_act": ("silu", "swish")},
}


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file."""

    name: str
    weight: str
    """Its name in transformers."""
    shape: tuple[int, ...]
    transposed: bool
    kind: Any
    """Its type in the file, of `gguf.GGMLQuantizationType`."""
    stored: tuple[int, ...]
    """Its shape in bytes if it is quantised, else `shape`."""

    @property
    def bytes(self) -> int:
        width = {"F32": 4, "F16": 2, "BF16": 2}.get(self.kind.name, 1)
        return int(np.prod(self.stored if width == 1 else self.shape)) * width


def export_gguf(
    folder: str | Path,
    out: str | Path,
    *,
    type: str = "f16",
    context_length: int | None = None,
    tokenizer: bool = True,
    progress: bool = False,
) -> Path:
    """Write a converted GPT-2 or LLaMA-shaped model as a GGUF file that stock llama.cpp runs.

    Args:
        folder: of the converted model, with its tokenizer.
        out: the file to write; it must not exist.
        type: of the weights, one of `GGUF_TYPES`. Rows that a quantised type cannot divide are f16.
        context_length: tokens that llama.cpp makes room for by default; None for the limit that the model had before.
        tokenizer: whether the file has one. Without, engines take token ids only.
        progress: whether to show a bar.

    Returns `out`. Raises InputError for what the format cannot hold, and without the package gguf. Nothing is left
    behind then.
    """
    out = Path(out).expanduser()
    check_new(out)
    if type not in GGUF_TYPES:
        raise InputError(f"type is {type!r}; it must be one of {', '.join(GGUF_TYPES)}")
    if context_length is not None and context_length < 1:
        raise InputError(f"context_length is {context_length}; it must be at least 1 token")
    check_package("gguf", "gguf")
    source = open_source(folder, "gguf")
    architecture = _MPT if source.config.model_type == "alibi_gpt2" else _REFACT
    _check_settings(source.config, architecture)
    tensors = _tensors(source, architecture, type)
    words = read_tokenizer(source.folder, source.config) if tokenizer else None
    check_space(out, sum(tensor.bytes for tensor in tensors))
    import gguf

    with replacing(out) as path:
        writer = gguf.GGUFWriter(path, architecture.name)
        try:
            _add_settings(writer, source, type, context_length)
            if words is None:
                writer.add_tokenizer_model("none")
            else:
                add_tokenizer(writer, words)
            _write(writer, source, tensors, progress)
        finally:
            writer.close()
    return out


def _check_settings(config: Any, architecture: _Architecture) -> None:
    for field, allowed in _SETTINGS[architecture.name].items():
        value = getattr(config, field, allowed[0])
        if value not in allowed:
            raise InputError(
                f"llama.cpp's {architecture.name} cannot compute {field} {value!r}; it computes {allowed[0]!r}"
            )


def _tensors(source: Source, architecture: _Architecture, type: str) -> list[_Tensor]:
    """The tensors of the file. Raises InputError for a weight that it has no place for, or lacks."""
    import gguf

    found, strange = {}, []
    for weight, shape in source.shapes.items():
        part, _, kind = weight.rpartition(".")
        layer = re.search(r"\.(\d+)\.", part)
        number = layer[1] if layer else ""
        name = architecture.parts.get(part.replace(f".{number}.", ".{n}.") if layer else part)
        short = "" if name is None else name.rpartition(".")[2]
        if name is None or kind not in ("weight", "bias") or (kind == "bias" and short not in architecture.biases):
            strange.append(weight)
        elif not (part == "lm_head" and source.config.tie_word_embeddings):
            transposed = kind == "weight" and short in architecture.transposed
            shape = shape[::-1] if transposed else shape
            ggml, stored = _stored(shape, type, gguf)
            name = f"{name.replace('{n}', number)}.{kind}"
            found[name] = _Tensor(name, weight, shape, transposed, ggml, stored)
    if strange:
        raise InputError(
            f"llama.cpp's {architecture.name} has no place for {len(strange)} weights of {source.folder} "
            f"({', '.join(sorted(strange)[:3])}{', ...' if len(strange) > 3 else ''}) and would leave them out"
        )
    return [found[name] for name in _expected(source.config, architecture, found)]


def _expected(config: Any, architecture: _Architecture, found: dict[str, _Tensor]) -> list[str]:
    """Names of the tensors, in the order of the layers. Raises InputError if a weight is missing."""
    names, has_biases = [], config.model_type in _WITH_BIASES
    for name in architecture.parts.values():
        layers = range(config.num_hidden_layers) if "{n}" in name else (0,)
        kinds = ("weight", "bias") if has_biases and name.rpartition(".")[2] in architecture.biases else ("weight",)
        if name != "output" or not config.tie_word_embeddings:
            names += [f"{name.replace('{n}', str(layer))}.{kind}" for layer in layers for kind in kinds]
    if missing := [name for name in names if name not in found]:
        raise InputError(f"the checkpoint lacks {len(missing)} weights ({missing[0]} of the GGUF file, ...)")
    # Parts of no layer have a word where the others have their number.
    return sorted(found, key=lambda name: (int(number) if (number := name.split(".")[1]).isdigit() else -1, name))


def _stored(shape: tuple[int, ...], type: str, gguf: Any) -> tuple[Any, tuple[int, ...]]:
    """Type and stored shape of a weight."""
    kinds = gguf.GGMLQuantizationType
    if len(shape) == 1:
        return kinds.F32, shape
    kind = kinds[type.upper()]
    if type in ("f32", "f16", "bf16"):
        return kind, shape
    if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        return kinds.F16, shape
    return kind, tuple(gguf.quant_shape_to_byte_shape(shape, kind))


def _add_settings(writer: Any, source: Source, type: str, context_length: int | None) -> None:
    config: Any = source.config
    import gguf

    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    limit = context_length or config.alibi_original_max_position_embeddings or config.alibi_train_length
    writer.add_name(source.folder.resolve().name)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{type.upper()}" if type != "f32" else "ALL_F32"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(limit or 2048)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(inner)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(num_key_heads(config))
    writer.add_key_length(head_width(config))
    writer.add_value_length(head_width(config))
    if config.model_type == "alibi_gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        writer.add_max_alibi_bias(_MAX_BIAS)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _write(writer: Any, source: Source, tensors: list[_Tensor], progress: bool) -> None:
    """Headers, then one tensor after another: the memory is that of the largest."""
    for tensor in tensors:
        dtype: Any = {"F32": np.float32, "F16": np.float16}.get(tensor.kind.name, np.uint8)
        raw = None if dtype != np.uint8 else tensor.kind
        stored = (*tensor.shape[:-1], tensor.shape[-1] * 2) if tensor.kind.name == "BF16" else tensor.stored
        writer.add_tensor_info(tensor.name, stored, np.dtype(dtype), tensor.bytes, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with progress_bar("writing weights", len(tensors), shown=progress) as advance:
        for tensor in tensors:
            values = source.read(tensor.weight)
            writer.write_tensor_data(_encode(values.T if tensor.transposed else values, tensor))
            advance(1)


def _encode(values: Tensor, tensor: _Tensor) -> Any:
    import gguf

    array = values.to(torch.float32).contiguous().numpy()
    return gguf.quants.quantize(array, tensor.kind)

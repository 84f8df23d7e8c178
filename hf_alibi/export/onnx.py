"""ONNX graphs with a cache, whose inputs and outputs have the names that optimum gives them.

The graph is that of this package's own attention, so it holds whatever a checkpoint can say: any slopes, sink tokens,
every scaling. It takes any batch, any number of new tokens and any cache, an empty one included.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ..configuration import stock_config
from ..errors import InputError, one_line
from ..model.loading import load_complete
from .source import check_new, check_package, check_space, open_source

__all__ = ["MODEL_FILE", "cache_names", "export_onnx"]

MODEL_FILE = "model.onnx"
# Sizes of the example that is traced: all different, none of them 0 or 1.
_BATCH, _PAST, _NEW = 2, 5, 3
# What is copied of the checkpoint besides the config; whatever it has of them.
_COPIED = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "spiece.model", "chat_template*")
_BATCH_SIZE, _LENGTH, _PAST_LENGTH = "batch_size", "sequence_length", "past_sequence_length"


# torch's optimizer takes adding 1e-8, the epsilon of Helium's norms, for adding nothing.
_DROPPED = 1e-7


class _WithCache(nn.Module):
    """A causal language model whose cache goes in and comes out as plain tensors."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Logits (batch, new tokens, vocabulary), and keys and values of all tokens for each layer.

        Args:
            input_ids: int64 (batch, new tokens).
            attention_mask: int64 (batch, past and new tokens), 0 for padding.
            position_ids: int64 (batch, new tokens), which nothing reads: optimum gives them to these families.
            past: keys and values of each layer, (batch, key heads, past tokens, head_dim).
        """
        cache = DynamicCache(config=self.model.config)
        for layer, (key, value) in enumerate(past):
            cache.update(key, value, layer)
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True)
        return output.logits, [(layer.keys, layer.values) for layer in output.past_key_values.layers]


def cache_names(prefix: str, layers: int) -> list[str]:
    """Names of the keys and values of all layers among the inputs (`past_key_values`) or outputs (`present`)."""
    return [f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def export_onnx(folder: str | Path, out: str | Path) -> Path:
    """Write a converted model as an ONNX graph that ONNX Runtime, or optimum's `ORTModelForCausalLM`, generates with.

    Args:
        folder: of the converted model.
        out: the folder to write; it must not exist. It gets the graph, its weights in float32, the tokenizer, and a
            config of the family without ALiBi, which is in the graph: so it loads where this package is not.

    Returns `out`. Raises InputError for what cannot be exported, and without the packages onnx and onnxscript. Nothing
    is left behind then.
    """
    out = Path(out).expanduser()
    check_new(out)
    source = open_source(folder, "onnx")
    check_package("onnxscript", "onnx")
    # The exporter holds the weights once more while it writes.
    check_space(out, 4 * sum(torch.Size(shape).numel() for shape in source.shapes.values()))
    model = load_complete(
        source.folder, dtype=torch.float32, attn_implementation="sdpa", name=f"the model in {source.folder}"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        _write_graph(model, temporary / MODEL_FILE)
        config = stock_config(source.config)
        config.max_position_embeddings = source.config.max_position_embeddings
        config.save_pretrained(temporary)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(temporary)
        for pattern in _COPIED:
            for file in source.folder.glob(pattern):
                shutil.copy(file, temporary)
        temporary.chmod(0o755)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _write_graph(model: PreTrainedModel, file: Path) -> None:
    """Export `model` with any batch, length and cache. Raises InputError if torch cannot."""
    cache = DynamicCache(config=model.config)
    ids = torch.ones(_BATCH, _PAST, dtype=torch.long)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    past = [(layer.keys, layer.values) for layer in cache.layers]
    sizes = {0: _BATCH_SIZE, 2: _PAST_LENGTH}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about itself
            torch.onnx.export(
                _WithCache(model).eval(),
                (ids[:, :_NEW], torch.ones(_BATCH, _PAST + _NEW, dtype=torch.long), ids[:, :_NEW], past),
                str(file),
                dynamo=True,
                verbose=False,
                optimize=_least_epsilon(model.config) > _DROPPED,
                external_data=True,
                input_names=["input_ids", "attention_mask", "position_ids", *cache_names("past_key_values", len(past))],
                output_names=["logits", *cache_names("present", len(past))],
                dynamic_shapes={
                    "input_ids": {0: _BATCH_SIZE, 1: _LENGTH},
                    "attention_mask": {0: _BATCH_SIZE, 1: "total_sequence_length"},
                    "position_ids": {0: _BATCH_SIZE, 1: _LENGTH},
                    "past": [(sizes, sizes) for _ in past],
                },
            )
    except torch.onnx.OnnxExporterError as error:
        raise InputError(f"torch.onnx cannot export {type(model).__name__}: {one_line(error)}") from error


def _least_epsilon(config: Any) -> float:
    """The least of what the norms of a model add to a variance."""
    found = [value for name, value in config.to_dict().items() if "eps" in name and isinstance(value, float)]
    return min(found, default=1.0)

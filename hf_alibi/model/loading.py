"""Loading a causal language model whole: weights that a checkpoint lacks are an error, not random numbers."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import InputError, one_line

__all__ = ["check_safetensors", "load_complete", "why_not_loaded"]


def why_not_loaded(error: Exception) -> str:
    """What to tell users whose checkpoint could not be loaded, from whatever was raised for it."""
    if isinstance(error, (OSError, ValueError, ImportError, RuntimeError, SafetensorError)):
        return f"{one_line(error)}; check that its files are complete"
    said = str(error.__cause__ or error)
    return f"its config.json does not suit its model type ({' '.join(said.split())}); correct it, or copy it again"


def load_complete(
    source: str | Path, *, dtype: torch.dtype | str, attn_implementation: str | None, name: str
) -> PreTrainedModel:
    """Load the causal language model `source`, a folder or a hub name, in evaluation mode on the CPU.

    `name` is what messages call it. Raises InputError if it cannot be loaded, or lacks weights.
    """
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, attn_implementation=attn_implementation, output_loading_info=True
        )
    except Exception as error:
        raise InputError(f"cannot load {name}: {why_not_loaded(error)}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            f"{name} lacks {len(missing)} of its weights ({missing[0]}, ...); give a complete checkpoint of a causal "
            "language model"
        )
    loaded: PreTrainedModel = model
    return loaded


def check_safetensors(folder: Path) -> None:
    """Check that every weight file in `folder` is there and as long as its header says; reads the headers only.

    Raises FileNotFoundError for a missing file; OSError, ValueError, KeyError or SafetensorError for a broken one.
    """
    index = folder / "model.safetensors.index.json"
    shards = ["model.safetensors"]
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    for shard in shards:
        with safe_open(folder / shard, framework="pt"):
            pass

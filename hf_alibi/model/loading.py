"""Loading a causal language model whole: weights that a checkpoint lacks are an error, not random numbers."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import InputError, one_line

__all__ = ["load_complete", "why_not_loaded"]


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

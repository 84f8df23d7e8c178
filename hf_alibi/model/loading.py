"""Loading a causal language model whole: weights that a checkpoint lacks are an error, not random numbers."""

import json
from pathlib import Path

import torch
from huggingface_hub import file_exists, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import CONFIG_NAME

from ..errors import InputError, one_line

__all__ = ["check_safetensors", "check_source", "load_complete", "weight_files", "why_not_loaded"]


def why_not_loaded(error: Exception) -> str:
    """What to tell users whose checkpoint could not be loaded, from whatever was raised for it."""
    if isinstance(error, (OSError, ValueError, ImportError, RuntimeError, SafetensorError)):
        return f"{one_line(error)}; check that its files are complete"
    said = str(error.__cause__ or error)
    return f"its config.json does not suit its model type ({' '.join(said.split())}); correct it, or copy it again"


def check_source(source: str | None, field: str) -> None:
    """Raise InputError at once if `source` is neither a folder nor, as far as the hub can be asked, a model there.

    Loading it would try the hub again and again, for the best part of a minute. `field` is the setting that holds it.
    """
    if source is None or Path(source).exists():
        return
    here = f"{field} is {source!r}: there is no such folder"
    try:
        if file_exists(source, CONFIG_NAME):
            return
        raise InputError(f"{here}, and the hub has no model of that name; give an existing folder or a hub name")
    except HFValidationError as error:
        raise InputError(f"{here}, and it is not a name on the hub; give an existing folder or a hub name") from error
    except (HfHubHTTPError, InputError):
        raise
    except Exception as error:  # whatever the network raises
        if isinstance(try_to_load_from_cache(source, CONFIG_NAME), str):
            return
        raise InputError(
            f"{here}, and the hub could not be asked for a model of that name ({one_line(error)}); give an existing "
            "folder, or connect"
        ) from error


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
    for file in weight_files(folder):
        with safe_open(file, framework="pt"):
            pass


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint, by its index if it has one; they need not exist."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    return [folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]

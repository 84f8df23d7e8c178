"""A model on disk that was checked before it is loaded: its files, its vocabulary, its memory."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ..configuration import text_config
from ..errors import InputError, one_line
from ..global_heads import describe_global_heads
from ..model.anatomy import has_no_positions, is_alibi, text_decoder
from ..model.loading import check_safetensors, why_not_loaded
from ..utils import METRICS_FILE
from .baselines import ChosenBaselines
from .memory import check_memory

__all__ = ["CheckedModel", "check_longest", "check_model"]

# A name on the hub: one or two parts, none of which is a step to another folder.
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]


@dataclass(frozen=True)
class CheckedModel:
    """A model on disk whose files were checked, and what can be known of it without its weights.

    `shell` is the model on the meta device.
    """

    name: str
    given: str
    folder: Path
    config: PretrainedConfig
    dtype: torch.dtype
    shell: PreTrainedModel

    @property
    def position_limit(self) -> int | None:
        """See `anatomy.TextDecoder.limit`."""
        return text_decoder(self.shell).limit

    @property
    def parameters(self) -> int:
        """How many there are."""
        return sum(parameter.numel() for parameter in self.shell.parameters())

    def describe(self, baselines: ChosenBaselines) -> dict[str, Any]:
        """Return what the results say of this model."""
        given = Path(self.given)
        return {
            # Keep only the folder name; results may be published.
            "source": given.name if given.is_absolute() else self.given,
            "model_type": self.config.model_type,
            "kind": self.kind,
            "positions": self._positions(),
            "attention": self.config._attn_implementation,
            "dtype": str(self.dtype).removeprefix("torch."),
            "parameters": self.parameters,
            "position_limit": self.position_limit,
            "made_for": self._made_for(),
            "training": self._training(),
            "baselines": baselines.labels,
            "left_out": baselines.left_out,
        }

    @property
    def kind(self) -> str:
        """As the `attention` of a training run."""
        if not is_alibi(self.config):
            return "original"
        return "nope" if has_no_positions(self.config) else "alibi"

    def _made_for(self) -> int | None:
        """The length in tokens that the model was made for, by its config; None if that does not say."""
        config = self.config.get_text_config()
        field = "alibi_train_length" if is_alibi(self.config) else "max_position_embeddings"
        length: int | None = getattr(config, field, None)
        return length

    def _training(self) -> dict[str, Any] | None:
        """How long `hf-alibi finetune` or `convert` trained it; None if no metrics of a training lie beside it."""
        try:
            metrics = json.loads((self.folder / METRICS_FILE).read_text(encoding="utf-8"))
            config = metrics["config"]
            distilled = config["distill_tokens"] * config["distill_epochs"] if self.kind == "alibi" else 0
            # A training that began with a converted model has no conversion of its own to tell of.
            continued = self.kind != "original" and bool(metrics.get("continued"))
            return {
                "steps": metrics["steps"],
                "tokens": metrics["tokens_seen"],
                "distilled": distilled,
                "continued": continued,
            }
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _positions(self) -> str:
        slopes = text_config(self.config).alibi_slopes if self.kind == "alibi" else None
        some_global = describe_global_heads(slopes)
        alibi = f"ALiBi, {some_global}" if some_global else "ALiBi"
        words = {"alibi": alibi, "nope": "none (ALiBi, all slopes 0)"}
        table = "its own" if self.position_limit is None else f"learned table, {self.position_limit} rows"
        return words.get(self.kind, table)


def check_model(name: str, given: str, *, dtype: str, attn_implementation: str | None) -> CheckedModel:
    """Find a model, check its config and its weight files, and build it without weights."""
    folder = _local_folder(name, given)
    _check_weights(name, folder)
    try:
        config = AutoConfig.from_pretrained(folder)
        of_weights = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=of_weights, attn_implementation=attn_implementation)
    except Exception as error:
        raise InputError(
            f"model {name!r} ({given}) cannot be built: {why_not_loaded(error)}; give a causal language model that "
            "transformers or hf-alibi saved"
        ) from error
    return CheckedModel(name, given, folder, model.config, of_weights, model)


def _local_folder(name: str, given: str) -> Path:
    """Return the folder of a model, downloading what the hub has under this name and no folder holds."""
    if Path(given).is_dir():
        return Path(given)
    reason = ""
    if _HUB_NAME.fullmatch(given):
        try:
            return Path(snapshot_download(given, allow_patterns=_HUB_FILES))
        except (OSError, ValueError) as error:
            reason = f", and the hub gives none ({one_line(error)})"
    raise InputError(f"model {name!r}: there is no folder {given}{reason}; give an existing folder or a hub name")


def _check_weights(name: str, folder: Path) -> None:
    """Check that every weight file is there and whole."""
    try:
        check_safetensors(folder)
    except FileNotFoundError as error:
        missing = Path(str(error)).name
        raise InputError(
            f"model {name!r}: {folder} has no {missing}; give a folder written by save_pretrained"
        ) from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(
            f"model {name!r}: a weight file in {folder} is broken or cut short ({one_line(error)}); copy it again"
        ) from error


def check_longest(model: CheckedModel, lengths: Sequence[int], device: torch.device) -> None:
    """Check that the longest length a model runs at fits in memory, its weights included."""
    limit = model.position_limit
    runnable = [length for length in lengths if limit is None or length <= limit]
    if runnable:
        check_memory(
            model.config,
            length=runnable[-1],
            batch=1,
            dtype=model.dtype,
            device=device,
            weight_bytes=model.parameters * model.dtype.itemsize,
        )

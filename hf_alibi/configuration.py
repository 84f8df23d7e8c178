"""Configurations of ALiBi models: those of transformers plus the `alibi_*` fields."""

import math
from collections.abc import Mapping
from typing import Any

from huggingface_hub.dataclasses import as_validated_field, strict
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig

from .slopes import check_scaling

__all__ = ["CONFIG_CLASSES", "AlibiConfig", "AlibiGPT2Config", "AlibiLlamaConfig", "check_slopes"]


def check_slopes(slopes: Any, num_heads: int) -> None:
    """Raise ValueError unless `slopes` is None (the paper's) or `num_heads` finite numbers that are not negative."""
    if slopes is not None and len(slopes) != num_heads:
        raise ValueError(f"alibi_slopes has {len(slopes)} values, but the model has {num_heads} heads")
    _check_slope_values(slopes)


def _check_slope_values(slopes: Any) -> None:
    wrong = [slope for slope in slopes or [] if not 0 <= slope < math.inf]
    if wrong:
        raise ValueError(f"alibi_slopes must be finite and not negative (logits per token), got {wrong}")


@as_validated_field
def _slopes_field(value: list[float] | None) -> None:
    _check_slope_values(value)


@as_validated_field
def _train_length_field(value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"alibi_train_length must be at least 1 token, got {value}")


@as_validated_field
def _scaling_field(value: dict[str, Any] | None) -> None:
    if value is not None:
        check_scaling(value)


@as_validated_field
def _tolerance_field(value: float | None) -> None:
    if value is not None and not 0 < value < 1:
        raise ValueError(f"alibi_tolerance must be a share of a row's weights between 0 and 1, or null, got {value}")


class AlibiConfig(PreTrainedConfig):
    """The fields that ALiBi adds to a configuration.

    Args:
        alibi_slopes: one number a head, logits per token of distance; None for the paper's geometric slopes.
        alibi_train_length: tokens that the model was trained on with ALiBi, for `dynamic` scaling and for readers.
        alibi_scaling: None, or {"type": "linear" | "ntk" | "dynamic", "factor": number >= 1}: see `scale_slopes`
            and `dynamic_scale`. It may be given when a checkpoint is loaded.
        alibi_tolerance: share of a query's weights that the far keys which are not read may have together; None for
            less than rounding takes, so that attention is exact. It may be given when a checkpoint is loaded.

    `max_position_embeddings` stays what it was and limits nothing.
    """

    alibi_slopes: list[float] | None = _slopes_field(default=None)
    alibi_train_length: int | None = _train_length_field(default=None)
    alibi_scaling: dict[str, Any] | None = _scaling_field(default=None)
    alibi_tolerance: float | None = _tolerance_field(default=None)

    def validate_alibi(self) -> None:
        """Raise ValueError where fields do not fit together (run by `strict` when the config is made)."""
        check_slopes(self.alibi_slopes, self.num_attention_heads)
        scaling: Mapping[str, Any] = self.alibi_scaling or {}
        if scaling.get("type") == "dynamic" and self.alibi_train_length is None:
            raise ValueError("alibi_scaling of type 'dynamic' needs alibi_train_length, the tokens trained on")
        if not getattr(self, "is_causal", True):
            raise ValueError("ALiBi is for causal attention, but the config says is_causal=False")

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a config of this type, or of the type that it converts while loading; refuse others."""
        config, rest = super().get_config_dict(*args, **kwargs)
        own = getattr(cls, "model_type", "")
        found = config.get("model_type", own)
        if found not in (own, own.removeprefix("alibi_")):
            raise ValueError(
                f"a checkpoint of model_type {found!r} cannot be loaded as {own!r}; load it with AutoModel"
            )
        return {**config, "model_type": own}, rest


@strict
class AlibiGPT2Config(GPT2Config, AlibiConfig):
    """GPT-2 with ALiBi in place of its table of positions; see `GPT2Config` and `AlibiConfig` for the fields."""

    model_type = "alibi_gpt2"


@strict
class AlibiLlamaConfig(LlamaConfig, AlibiConfig):
    """LLaMA with ALiBi in place of rotary positions; see `LlamaConfig` and `AlibiConfig` for the fields."""

    model_type = "alibi_llama"


CONFIG_CLASSES: dict[type[PreTrainedConfig], type[AlibiConfig]] = {
    GPT2Config: AlibiGPT2Config,
    LlamaConfig: AlibiLlamaConfig,
}
"""From a configuration class of transformers to its ALiBi form."""

"""The plugin itself: tells vLLM where the models are, without importing any of them.

vLLM calls `register` in each of its processes, by the entry point `vllm.general_plugins`.
"""

from __future__ import annotations

import logging
from typing import Any

from ..targets import TARGETS

__all__ = ["refuse_unserved", "register"]

# Without --max-model-len vLLM would make room for UNLIMITED tokens. It then fits the length to the memory, up to this.
_LONGEST = 131_072


def register() -> None:
    """Register the ALiBi form of every causal language model; calling it again changes nothing."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    class _Checked(VerifyAndUpdateConfig):
        """What is known before any weights are read."""

        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            _check(model_config)

    for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        for name in (names,) if isinstance(names, str) else names:
            alibi = name if name.startswith("Alibi") else f"Alibi{name}"
            ModelRegistry.register_model(alibi, f"{__package__}.models:{alibi}")
            MODELS_CONFIG_MAP[alibi] = _Checked


def _check(model_config: Any) -> None:
    """Refuse a model that vLLM cannot run as it is meant; choose a length if none was given."""
    refuse_unserved(model_config)
    if model_config.original_max_model_len in (None, -1):
        model_config.original_max_model_len = -1
        model_config.max_model_len = min(model_config.max_model_len, _LONGEST)
        logging.getLogger("vllm.hf_alibi").info(
            "ALiBi has no longest sequence; without --max-model-len it is what the memory holds, up to %d", _LONGEST
        )


def refuse_unserved(model_config: Any) -> None:
    """Raise ValueError for a model that vLLM cannot run as it is meant."""
    if (reason := TARGETS["vllm"].refusal(model_config.hf_config)) is not None:
        raise ValueError(f"cannot serve {model_config.model} with its ALiBi bias: {reason}")

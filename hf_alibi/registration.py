"""Makes the ALiBi classes known to transformers' Auto classes."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from .attention import register_backends
from .configuration import CONFIG_CLASSES
from .modeling import MODEL_CLASSES

__all__ = ["register"]


def register() -> None:
    """Register configs, models and attention backends; calling it again changes nothing.

    An ALiBi class takes its place in exactly those Auto classes that hold the class it converts, so that
    `AutoModelForCausalLM` and the like, and tokenizers, work for converted checkpoints as for plain ones.
    """
    register_backends()
    for config, alibi_config in CONFIG_CLASSES.items():
        AutoConfig.register(alibi_config.model_type, alibi_config, exist_ok=True)
        for auto_class in _auto_model_classes():
            model = auto_class._model_mapping.get(config, None)
            if model in MODEL_CLASSES:
                auto_class.register(alibi_config, MODEL_CLASSES[model], exist_ok=True)


def _auto_model_classes() -> list[Any]:
    everything: list[Any] = [item for item in vars(modeling_auto).values() if isinstance(item, type)]
    # The common base class stands among them, without a mapping.
    return [item for item in everything if issubclass(item, _BaseAutoModelClass) and item._model_mapping is not None]

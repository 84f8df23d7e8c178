"""Makes the ALiBi classes known to transformers' Auto classes, without importing any model."""

from __future__ import annotations

from typing import Any

from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _LazyAutoMapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name

from . import configuration, modeling
from .attention import register_backends

__all__ = ["register"]


def register() -> None:
    """Register configs, models and attention backends; calling it again changes nothing.

    An ALiBi class takes its place in exactly those Auto classes that hold the class it converts, so that
    `AutoModelForCausalLM` and the like work for converted checkpoints as for plain ones. Only names are written into
    the tables that transformers keeps, and where to find them: the classes are made when they are asked for.
    `register` of the Auto classes would need the classes themselves, and with them the code of every family.
    """
    register_backends()
    stock = {kind: name for kind, name in CONFIG_MAPPING._mapping.items() if not kind.startswith("alibi_")}
    for kind, name in stock.items():
        CONFIG_MAPPING._mapping[f"alibi_{kind}"] = f"Alibi{name}"
        CONFIG_MAPPING._modules[model_type_to_module_name(f"alibi_{kind}")] = configuration
    for mapping in _model_mappings():
        names = mapping._model_mapping
        for kind in [kind for kind in names if kind in stock]:
            names[f"alibi_{kind}"] = _alibi_names(names[kind])
            mapping._modules[model_type_to_module_name(f"alibi_{kind}")] = modeling
        mapping._reverse_config_mapping.update({name: kind for kind, name in mapping._config_mapping.items()})


def _alibi_names(names: Any) -> Any:
    """Of one class, or of those that a config may stand for."""
    return f"Alibi{names}" if isinstance(names, str) else tuple(_alibi_names(name) for name in names)


def _model_mappings() -> list[Any]:
    return [mapping for mapping in vars(modeling_auto).values() if isinstance(mapping, _LazyAutoMapping)]

"""Makes the ALiBi classes known to transformers' Auto classes, without importing any model."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from ..after_import import after_import
from ..peft_targets import register_peft_targets

__all__ = ["register"]

_AUTO = "transformers.models.auto"


def register() -> None:
    """Register configs and models, and PEFT's targets for them; calling it again changes nothing.

    An ALiBi class takes its place in exactly those Auto classes that hold the class it converts, so that
    `AutoModelForCausalLM` and the like work for converted checkpoints as for plain ones. Only names are written into
    the tables that transformers keeps, and where to find them: the classes are made when they are asked for.
    `register` of the Auto classes would need the classes themselves, and with them the code of every family.

    transformers imports its tables when an Auto class is first used, and torch with them; the names are written then.
    """
    after_import(f"{_AUTO}.configuration_auto", _write_configs)
    after_import(f"{_AUTO}.modeling_auto", _write_models)
    register_peft_targets()


def _write_configs(auto: ModuleType) -> None:
    from .. import configuration
    from .compat import config_tables

    names, modules = config_tables(auto)
    for kind, name in _stock(names).items():
        names[f"alibi_{kind}"] = f"Alibi{name}"
        modules[auto.model_type_to_module_name(f"alibi_{kind}")] = configuration


def _write_models(auto: ModuleType) -> None:
    from . import modeling
    from .compat import auto_tables

    for listed, add in auto_tables(auto):
        for kind, names in _stock(listed).items():
            add(f"alibi_{kind}", modeling, _alibi_names(names))


def _stock(table: Mapping[str, Any]) -> dict[str, Any]:
    """The rows that are transformers' own."""
    return {kind: names for kind, names in table.items() if not kind.startswith("alibi_")}


def _alibi_names(names: Any) -> Any:
    """Of one class, or of those that a config may stand for."""
    return f"Alibi{names}" if isinstance(names, str) else tuple(_alibi_names(name) for name in names)

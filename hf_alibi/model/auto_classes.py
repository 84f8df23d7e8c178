"""Makes the ALiBi classes known to transformers' Auto classes, without importing any model."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from ..after_import import after_import
from ..type_tables import register_type_tables
from .stock_modules import add_alias

__all__ = ["register"]

_AUTO = "transformers.models.auto"
# Auto classes whose tables have the same row for a converted model as for what it was converted from.
_SAME = ("tokenization", "processing", "feature_extraction", "image_processing", "video_processing")


def register() -> None:
    """Register configs and models, and them in tables of other packages; calling it again changes nothing.

    An ALiBi class takes its place in exactly those Auto classes that hold the class it converts, so that
    `AutoModelForCausalLM` and the like work for converted checkpoints as for plain ones. Tokenizers and processors are
    those of the family. Only names are written into
    the tables that transformers keeps, and where to find them: the classes are made when they are asked for.
    `register` of the Auto classes would need the classes themselves, and with them the code of every family.

    transformers imports its tables when an Auto class is first used, and torch with them; the names are written then.
    """
    after_import(f"{_AUTO}.configuration_auto", _write_configs)
    after_import(f"{_AUTO}.modeling_auto", _write_models)
    for kind in _SAME:
        after_import(f"{_AUTO}.{kind}_auto", _write_same)
    register_type_tables()


def _write_configs(auto: ModuleType) -> None:
    from .. import configuration
    from .compat import config_tables

    names, modules = config_tables(auto)
    for kind, name in _stock(names).items():
        names[f"alibi_{kind}"] = f"Alibi{name}"
        module = auto.model_type_to_module_name(f"alibi_{kind}")
        modules[module] = configuration
        add_alias(module, auto.model_type_to_module_name(kind))


def _write_models(auto: ModuleType) -> None:
    from . import modeling
    from .compat import auto_tables

    for listed, add in auto_tables(auto):
        for kind, names in _stock(listed).items():
            add(f"alibi_{kind}", _alibi_names(names), modeling)


def _write_same(auto: ModuleType) -> None:
    from .compat import auto_tables, config_names, wrong_tokenizers

    known = config_names()
    for listed, add in auto_tables(auto):
        for kind, names in _stock(listed).items():
            if kind in known:
                add(f"alibi_{kind}", names, None)
    wrong = wrong_tokenizers(auto)
    wrong.update([f"alibi_{kind}" for kind in wrong if not kind.startswith("alibi_")])


def _stock(table: Mapping[str, Any]) -> dict[str, Any]:
    """The rows that are transformers' own."""
    return {kind: names for kind, names in table.items() if not kind.startswith("alibi_")}


def _alibi_names(names: Any) -> Any:
    """Of one class, or of those that a config may stand for."""
    return f"Alibi{names}" if isinstance(names, str) else tuple(_alibi_names(name) for name in names)

"""Makes the ALiBi classes known to transformers' Auto classes, without importing any model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

__all__ = ["register"]

_AUTO = "transformers.models.auto"


def register() -> None:
    """Register configs and models; calling it again changes nothing.

    An ALiBi class takes its place in exactly those Auto classes that hold the class it converts, so that
    `AutoModelForCausalLM` and the like work for converted checkpoints as for plain ones. Only names are written into
    the tables that transformers keeps, and where to find them: the classes are made when they are asked for.
    `register` of the Auto classes would need the classes themselves, and with them the code of every family.

    transformers imports its tables when an Auto class is first used, and torch with them. Where that is still to
    come, or comes again, the names are written at that moment.
    """
    for name, write in ((f"{_AUTO}.configuration_auto", _write_configs), (f"{_AUTO}.modeling_auto", _write_models)):
        if not any(isinstance(finder, _AfterImport) and finder.name == name for finder in sys.meta_path):
            sys.meta_path.insert(0, _AfterImport(name, write))
        if name in sys.modules:
            write(sys.modules[name])


class _AfterImport(MetaPathFinder):
    """Calls `action` with the module `name` when that has been imported."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self.name = name
        self.action = action

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """What Python's finder of files gives for the module, with a loader that calls the action as well."""
        if name != self.name:
            return None
        # This finder stays: while threads walk through the list of finders, nothing may go from it.
        spec = PathFinder.find_spec(name, path, target)
        loader: Any = None if spec is None else spec.loader
        if loader is None:
            return None
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.action(module)

        loader.exec_module = exec_module
        return spec


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

"""`transformers.models.alibi_<type>`, where transformers looks for tokenizers and processors: those of `<type>`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["add_alias"]

_PREFIX = "transformers.models."
# From the last part of a module's name to that of the module which it stands for.
_aliases: dict[str, str] = {}


def add_alias(name: str, stock: str) -> None:
    """Let `transformers.models.<name>` be imported with everything that `transformers.models.<stock>` has."""
    _aliases[name] = stock
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        stock = _aliases.get(name.removeprefix(_PREFIX))
        return ModuleSpec(name, _Alias(_PREFIX + stock)) if stock and name.startswith(_PREFIX) else None


class _Alias(Loader):
    def __init__(self, stock: str) -> None:
        self.stock = stock

    def create_module(self, spec: ModuleSpec) -> None:
        """An ordinary module."""

    def exec_module(self, module: ModuleType) -> None:
        """Look everything up in the other module, when it is asked for."""
        vars(module)["__getattr__"] = lambda name: getattr(import_module(self.stock), name)

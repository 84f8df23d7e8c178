"""Runs an action when a module has been imported, without importing it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

__all__ = ["after_import"]


def after_import(name: str, action: Callable[[ModuleType], None]) -> None:
    """Call `action` with the module `name`: now if it is there, and whenever it is imported; asking twice is once."""
    if not any(isinstance(finder, _AfterImport) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(name, action))
    if name in sys.modules:
        action(sys.modules[name])


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

"""PEFT's default targets for ALiBi model types: those of the type that was converted."""

from __future__ import annotations

from types import ModuleType

from .after_import import after_import

__all__ = ["register_peft_targets"]

# Modules of PEFT and how the names of their tables by model type begin: what a method adapts, and what became of the
# names that experts had in transformers 4.
_TABLES = {
    "peft.utils.constants": "TRANSFORMERS_MODELS_TO_",
    "peft.utils.transformers_weight_conversion": "_MODEL_TO_CONVERSION_PATTERN",
}


def register_peft_targets() -> None:
    """Make PEFT know `alibi_<type>` wherever it knows `<type>`, once it is imported; an entry of the user's stays."""
    for module in _TABLES:
        after_import(module, _write)


def _write(module: ModuleType) -> None:
    for name, table in list(vars(module).items()):
        if name.startswith(_TABLES[module.__name__]) and isinstance(table, dict):
            for kind in [kind for kind in table if not str(kind).startswith("alibi_")]:
                table.setdefault(f"alibi_{kind}", table[kind])

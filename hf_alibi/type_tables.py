"""Tables by model type, of other packages, in which a converted model is what it was converted from."""

from __future__ import annotations

from types import ModuleType

from .after_import import after_import

__all__ = ["register_type_tables"]

# Modules and how the names of their tables begin: what a method of PEFT adapts, what became of the names that experts
# had in transformers 4, and the activations that AWQ scales.
_TABLES = {
    "peft.utils.constants": "TRANSFORMERS_MODELS_TO_",
    "peft.utils.transformers_weight_conversion": "_MODEL_TO_CONVERSION_PATTERN",
    "transformers.integrations.awq": "AWQ_SCALES_MAPPINGS",
}


def register_type_tables() -> None:
    """Let each table know `alibi_<type>` wherever it knows `<type>`, once it is imported; a row of the user's stays."""
    for module in _TABLES:
        after_import(module, _write)


def _write(module: ModuleType) -> None:
    for name, table in list(vars(module).items()):
        if name.startswith(_TABLES[module.__name__]) and isinstance(table, dict):
            for kind in [kind for kind in table if not str(kind).startswith("alibi_")]:
                table.setdefault(f"alibi_{kind}", table[kind])

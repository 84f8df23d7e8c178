"""PEFT's default targets for ALiBi model types: those of the type that was converted."""

from __future__ import annotations

import sys

__all__ = ["name_for_peft"]

# Modules of PEFT and how the names of their tables by model type begin: what a method adapts, and what became of the
# names that experts had in transformers 4.
_TABLES = {
    "peft.utils.constants": "TRANSFORMERS_MODELS_TO_",
    "peft.utils.transformers_weight_conversion": "_MODEL_TO_CONVERSION_PATTERN",
}


def name_for_peft(model_type: str) -> None:
    """Make PEFT, if it is imported, know `alibi_<type>` wherever it knows `<type>`; calling it again changes nothing.

    PEFT looks up which modules a method adapts by default in tables by model type. An entry that is there already,
    such as one the user made, stays.
    """
    stock = model_type.removeprefix("alibi_")
    for module, prefix in _TABLES.items():
        for name, table in list(vars(sys.modules.get(module, object)).items()):
            if name.startswith(prefix) and isinstance(table, dict) and stock in table:
                table.setdefault(model_type, table[stock])

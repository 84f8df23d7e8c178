"""What hf_alibi needs of transformers that is private there and has no public substitute.

Everything of the kind in this wing goes through here, and a test asserts that each name exists, so that a release which
renames one fails in one place. `attention/paged.py`, `attention/flex/backend.py` and `attention/sdpa/cpu_kernel.py`
have one such name each, for their own use.

Functions import what they need: some run while transformers is still importing its tables.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterator, MutableMapping
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "asks_for_a_backend",
    "auto_tables",
    "checkpoint_conversions",
    "config_names",
    "config_tables",
    "listed_classes",
    "record_outputs_by_class",
    "without_timestamps",
    "wrong_tokenizers",
]


def config_tables(auto: ModuleType) -> tuple[MutableMapping[str, str], MutableMapping[str, Any]]:
    """Of AutoConfig, as its module `auto` has them: names of config classes by model type; modules by module name."""
    return auto.CONFIG_MAPPING._mapping, auto.CONFIG_MAPPING._modules


def config_names() -> Container[str]:
    """Model types that AutoConfig knows."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    names: Container[str] = CONFIG_MAPPING._mapping
    return names


def wrong_tokenizers(auto: ModuleType) -> set[str]:
    """Model types for which AutoTokenizer believes its table and not the files; no set of that if `auto` has none."""
    return getattr(auto, "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS", set())


def auto_tables(
    auto: ModuleType,
) -> Iterator[tuple[MutableMapping[str, Any], Callable[[str, Any, ModuleType | None], None]]]:
    """Of each Auto class in a module: names of classes by model type, and a function that adds a row.

    The function takes a model type, the names of its classes and the module that has them, None for where transformers
    looks. `AutoConfig` must know the type.
    """
    from transformers.models.auto.auto_factory import _LazyAutoMapping
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    for table in [value for value in vars(auto).values() if isinstance(value, _LazyAutoMapping)]:

        def add(kind: str, names: Any, module: ModuleType | None, table: Any = table) -> None:
            table._model_mapping[kind] = names
            if module is not None:
                table._modules[model_type_to_module_name(kind)] = module
            table._reverse_config_mapping[table._config_mapping[kind]] = kind

        yield table._model_mapping, add


def listed_classes(kind: str) -> dict[str, tuple[str, ...]]:
    """From the name of each Auto class to the names of the model classes that it lists for a model type."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.auto_factory import _LazyAutoMapping

    found = {}
    for name, auto_class in vars(modeling_auto).items():
        table = getattr(auto_class, "_model_mapping", None)
        if name.startswith("Auto") and isinstance(table, _LazyAutoMapping):
            names = table._model_mapping.get(kind, ())
            found[name] = (names,) if isinstance(names, str) else tuple(names)
    return found


def checkpoint_conversions() -> MutableMapping[str, Any]:
    """How weights are renamed and merged while they load, by the name of a class or by model type."""
    from transformers import conversion_mapping

    conversion_mapping.get_checkpoint_conversion_mapping("")  # makes the table
    table: MutableMapping[str, Any] = conversion_mapping._checkpoint_conversion_mapping_cache
    return table


def record_outputs_by_class(model: PreTrainedModel) -> None:
    """Say anew what output_attentions and output_hidden_states record, after the class of `model` was changed."""
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

    registry: Any = _CAN_RECORD_REGISTRY
    # By instance in newer versions of transformers, in a plain dict by the name of the class before.
    registry[str(type(model)) if type(registry) is dict else model] = model._can_record_outputs


@cache
def asks_for_a_backend(forward: Callable[..., Any]) -> bool:
    """Whether a forward looks its attention function up in transformers' interface, by the name in its config."""
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return "get_interface" in getattr(code, "co_names", ())


@contextmanager
def without_timestamps(model: Any, prefix: str) -> Iterator[None]:
    """Let `push_to_hub`, which uploads what has changed since saving began, take files of a prefix for new."""
    timestamps = model._get_files_timestamps

    def without(folder: Any) -> dict[str, float]:
        return {name: time for name, time in timestamps(folder).items() if not name.startswith(prefix)}

    vars(model)["_get_files_timestamps"] = without
    try:
        yield
    finally:
        del vars(model)["_get_files_timestamps"]

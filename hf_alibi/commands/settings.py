"""The settings of a run: dataclasses filled from a YAML file, with overrides from the command line."""

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from ..errors import InputError, one_line

__all__ = ["load_settings", "make_settings", "read_yaml", "resolve_settings", "save_settings"]

# An action, a secret, a process number, a consequence of eval_strategy, and what every run here sets: not needed to
# repeat a run.
_NOT_SAVED = frozenset(
    {"resume_from_checkpoint", "hub_token", "local_rank", "do_eval", "include_num_input_tokens_seen"}
)

# Set automatically on CPU-only machines, so not saved.
_OF_THE_CPU = frozenset({"use_cpu", "dataloader_pin_memory"})


class _Parser(HfArgumentParser):
    """The parser of transformers, raising where argparse would print its usage and leave the process."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help lists every field")


def load_settings(classes: Sequence[type[Any]], argv: Sequence[str]) -> tuple[Any, ...]:
    """Fill dataclasses from `CONFIG.yaml --field value --field=value ...`; the command line wins.

    YAML values take the way of command-line words, so `5e-4`, which YAML 1.1 reads as a string, becomes the
    float that its field asks for. A list is several words, a mapping is JSON, and null, on the command line
    too, means the default.

    `classes` are dataclasses with distinct field names; one may be `transformers.TrainingArguments`. Returns
    one instance of each, in their order. Raises InputError for no or an unreadable YAML file, an unknown
    field, and a value that its field cannot take.
    """
    if {"-h", "--help"} & set(argv):
        _Parser(classes).print_help()
        raise SystemExit(0)
    if not argv or argv[0].startswith("-"):
        raise InputError("no configuration file given; the first argument must be a YAML file, then --field value")
    return make_settings(classes, read_yaml(argv[0]), argv[1:], source=argv[0])


def make_settings(
    classes: Sequence[type[Any]], values: Mapping[str, Any], argv: Sequence[str] = (), *, source: str = "the arguments"
) -> tuple[Any, ...]:
    """Fill dataclasses from `values`, which come from `source`, and `--field value ...`, which win.

    Returns and raises what `load_settings` does.
    """
    parser = _Parser(classes)
    values, overrides = dict(values), list(argv)
    fields = [field.name for cls in classes for field in dataclasses.fields(cls) if field.init]
    _require_known(values, fields, source=source)
    if "use_cpu" in fields and not torch.accelerator.is_available():
        # What runs anyway, said: without it transformers refuses bf16 here.
        values["use_cpu"] = True
    negations = [f"no_{name}" for name in fields]
    given = [word[2:].split("=", 1)[0].replace("-", "_") for word in overrides if word.startswith("--")]
    _require_known((name for name in given if name not in negations), fields, source="the command line")
    for name in _take_nulls(overrides):
        values.pop(name, None)
    words = [word for name, value in values.items() for word in _as_words(name, value)]
    try:
        *settings, rest = parser.parse_args_into_dataclasses(
            [*words, *overrides], return_remaining_strings=True, look_for_args_file=False
        )
    except InputError:
        raise
    except (ValueError, TypeError) as error:
        raise InputError(f"bad value in {source} or on the command line: {one_line(error)}") from error
    if rest:
        raise InputError(
            f"cannot place {' '.join(rest)!r}: every value follows its --field, and only lists take several"
        )
    return tuple(settings)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping.

    Raises InputError where the file cannot be read, is not YAML, or is not a mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the configuration file {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {one_line(error)}") from error
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise InputError(f"{path} holds {found}; it must hold a mapping, one `field: value` a line")
    return {str(name): value for name, value in values.items()}


def resolve_settings(settings: Iterable[Any]) -> dict[str, Any]:
    """Return every setting of a run as a plain value, from which `load_settings` rebuilds the same instances.

    Of TrainingArguments that is what its `to_dict` has, without secrets and what depends on the machine.
    """
    resolved: dict[str, Any] = {}
    not_saved = _NOT_SAVED if torch.accelerator.is_available() else _NOT_SAVED | _OF_THE_CPU
    for instance in settings:
        is_training = isinstance(instance, TrainingArguments)
        values = instance.to_dict() if is_training else vars(instance)
        names = [field.name for field in dataclasses.fields(instance) if field.init and field.name not in not_saved]
        for name in names:
            value = _plain(values[name])
            # TrainingArguments makes empty lists of fields that were not given, and takes none back.
            resolved[name] = None if is_training and value == [] else value
    return resolved


def save_settings(path: str | Path, settings: Iterable[Any]) -> None:
    """Write `resolve_settings(settings)` as YAML; `load_settings` on this file repeats the run."""
    text = yaml.safe_dump(resolve_settings(settings), sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")


def _require_known(names: Iterable[str], fields: Sequence[str], *, source: str) -> None:
    for name in names:
        if name not in fields:
            closest = difflib.get_close_matches(name, fields, n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(closest)}? " if closest else ""
            raise InputError(f"unknown field {name!r} in {source}; {hint}--help lists every field")


def _take_nulls(overrides: list[str]) -> list[str]:
    """Remove each `--field null` and `--field=null` from `overrides`, in place, and return the fields."""
    names = []
    for index in reversed(range(len(overrides))):
        name, equals, value = overrides[index].partition("=")
        width = 1 if equals else 2
        if name.startswith("--") and (value or "".join(overrides[index + 1 : index + 2])) == "null":
            names.append(name[2:].replace("-", "_"))
            del overrides[index : index + width]
    return names


def _as_words(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list):
        if not value:
            raise InputError(f"{name}: [] is empty; give at least one value, or null for the default")
        return [f"--{name}", *map(_as_text, value)]
    # With "=" a negative number such as -1e-4 is not taken for an option.
    return [f"--{name}={_as_text(value)}"]


def _as_text(value: Any) -> str:
    if isinstance(value, bool | dict | list):
        return json.dumps(value)
    return str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    return value

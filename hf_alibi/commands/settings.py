"""Settings of a run: a YAML file first, `--field value` after it."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from ..errors import InputError, one_line
from .fields import check_names, field_names, split_argv

__all__ = ["full_help", "load_settings", "make_settings", "resolve_settings", "save_settings"]

# An action, a secret, a process number, a consequence of eval_strategy, and what every run here sets: not needed to
# repeat a run.
_NOT_SAVED = frozenset(
    {"resume_from_checkpoint", "hub_token", "local_rank", "do_eval", "include_num_input_tokens_seen"}
)

# Set automatically on CPU-only machines, so not saved.
_OF_THE_CPU = frozenset({"use_cpu", "dataloader_pin_memory"})


# Fields whose parser takes no word for true.
_BARE = frozenset({"fsdp"})


class _Parser(HfArgumentParser):
    """The parser of transformers, raising where argparse would print its usage and leave the process."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help lists the fields")


def full_help(classes: Sequence[type[Any]], usage: str) -> str:
    """Every field with its whole help, those of TrainingArguments too."""
    return str(_Parser(classes, usage=usage).format_help())


def load_settings(classes: Sequence[type[Any]], argv: Sequence[str]) -> tuple[Any, ...]:
    """Fill dataclasses from `[CONFIG.yaml] --field value --field=value ...`; the command line wins.

    YAML values are parsed as command-line words are, so `5e-4`, which YAML 1.1 reads as a string, becomes the float
    that its field asks for. A list is several words, a mapping is JSON, and null, on the command line too, means the
    default. `bf16: auto` is true if the device has fast bfloat16.

    `classes` are dataclasses with distinct field names; one may be `transformers.TrainingArguments`. Returns one
    instance of each, in their order. Raises InputError for an unreadable YAML file, an unknown field, and a value that
    its field cannot take.
    """
    source, values, overrides = split_argv(argv)
    return make_settings(classes, values, overrides, source=source)


def make_settings(
    classes: Sequence[type[Any]], values: Mapping[str, Any], argv: Sequence[str] = (), *, source: str = "the arguments"
) -> tuple[Any, ...]:
    """Fill dataclasses from `values`, which come from `source`, and `--field value ...`, which win.

    Returns and raises what `load_settings` does.
    """
    values, overrides, fields = dict(values), list(argv), field_names(classes)
    check_names(source, values, overrides, fields)
    if "use_cpu" in fields and not torch.accelerator.is_available():
        # True either way; unless it is said, transformers refuses bf16 on the CPU.
        values["use_cpu"] = True
    for name in _take_nulls(overrides):
        values.pop(name, None)
    words = [word for name, value in values.items() for word in _as_words(name, value)]
    words = _choose_precision([*words, *overrides])
    try:
        *settings, rest = _Parser(classes).parse_args_into_dataclasses(
            words, return_remaining_strings=True, look_for_args_file=False
        )
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"a setting needs a package that is missing: {one_line(error)}; install it") from error
    except (ValueError, TypeError) as error:
        raise InputError(f"bad value in {source} or on the command line: {one_line(error)}") from error
    if rest:
        raise InputError(
            f"cannot place {' '.join(rest)!r}: every value follows its --field, and only lists take several"
        )
    return tuple(settings)


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


def _choose_precision(words: list[str]) -> list[str]:
    """`bf16` with the value auto, as true or false: a CPU without instructions for bfloat16 takes ten times as long."""
    fast = "true" if _has_fast_bfloat16() else "false"
    pairs = zip(["", *words], words, strict=False)
    return [
        f"--bf16={fast}" if word == "--bf16=auto" else fast if (before, word) == ("--bf16", "auto") else word
        for before, word in pairs
    ]


def _has_fast_bfloat16() -> bool:
    """Whether products in bfloat16 are faster than in float32 here: on a GPU, or a CPU with AMX or AVX512-BF16."""
    if torch.accelerator.is_available():
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return False
    return bool({"amx_bf16", "avx512_bf16"} & flags)


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
    if name in _BARE and value is True:
        return [f"--{name}"]
    # With "=" a negative number such as -1e-4 is not taken for an option.
    return [f"--{name}={_as_text(value)}"]


def _as_text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | dict | list) else str(value)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else str(value) if isinstance(value, Path) else value

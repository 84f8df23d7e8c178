"""The fields that a command takes: checked and listed without importing torch, so in a fraction of a second."""

from __future__ import annotations

import ast
import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError, one_line

__all__ = ["check_names", "field_names", "given_names", "help_lines", "read_yaml", "split_argv", "training_fields"]


def split_argv(argv: Sequence[str]) -> tuple[str, dict[str, Any], list[str]]:
    """The words of a command as the YAML file's name, its fields, and `--field value ...`; the file may be missing."""
    if not argv or argv[0].startswith("-"):
        return "the command line", {}, list(argv)
    return argv[0], read_yaml(argv[0]), list(argv[1:])


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping.

    Raises InputError if the file cannot be read, is not YAML, or is not a mapping.
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


def field_names(classes: Iterable[type[Any]]) -> list[str]:
    """The fields of dataclasses that a user may set."""
    return [field.name for cls in classes for field in dataclasses.fields(cls) if field.init]


@cache
def training_fields() -> tuple[str, ...]:
    """The fields of `transformers.TrainingArguments`, read from its source: importing it takes seconds."""
    spec = find_spec("transformers")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    tree = ast.parse(Path(folders[0], "training_args.py").read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    targets = [node.target for node in body if isinstance(node, ast.AnnAssign)]
    return tuple(target.id for target in targets if isinstance(target, ast.Name))


def given_names(overrides: Iterable[str]) -> list[str]:
    """The fields that `--field value --field=value ...` names."""
    return [word[2:].split("=", 1)[0].replace("-", "_") for word in overrides if word.startswith("--")]


def check_names(source: str, values: Iterable[str], overrides: Iterable[str], fields: Sequence[str]) -> None:
    """Raise InputError, with the closest names, for a field in `values` or `overrides` that is not in `fields`."""
    negations = {f"no_{name}" for name in fields}
    given = [name for name in given_names(overrides) if name not in negations]
    for where, names in ((source, values), ("the command line", given)):
        for name in names:
            if name not in fields:
                closest = difflib.get_close_matches(name, fields, n=3, cutoff=0.5)
                hint = f"did you mean {', '.join(closest)}? " if closest else ""
                raise InputError(f"unknown field {name!r} in {where}; {hint}--help lists the fields")


def help_lines(classes: Iterable[type[Any]], width: int) -> list[str]:
    """One line for each field, at most `width` characters: its name, its default, and what it is."""
    lines = []
    for cls in classes:
        for field in dataclasses.fields(cls):
            made = field.default_factory() if callable(field.default_factory) else field.default
            default = "" if made in (None, dataclasses.MISSING) else f" [{made}]"
            line = f"  {f'--{field.name}{default}':<34} {field.metadata['help']}"
            lines.append(line if len(line) <= width else f"{line[: width - 1]}…")
    return lines

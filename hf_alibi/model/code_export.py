"""Writes the code that a checkpoint needs beside its weights, as flat files: transformers copies no folders of code."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .compat import listed_classes, without_timestamps
from .families import stock_type

__all__ = ["code_files", "saving_code"]

# The kernels: transformers would ask for Triton wherever the code is loaded.
_LEFT_OUT = "attention/sdpa/gpu"
_PREFIX = "hf_alibi_"
_ENTRY = f"{_PREFIX}model_remote_code"
_HERE = Path(__file__)
_IS_COPY = _HERE.stem.startswith(_PREFIX)


@contextmanager
def saving_code(
    model: Any, folder: str | os.PathLike[str], wanted: bool, is_main_process: bool = True
) -> Iterator[None]:
    """While the body saves `model` into `folder`: its config names the code beside it, if that is there.

    Args:
        model: a converted model.
        folder: is made if missing.
        wanted: whether to write the code; that of a model which was itself loaded with such code is always written,
            as by transformers for every model with code of its own.
        is_main_process: as of `save_pretrained`; other processes write nothing.
    """
    config: Any = model.config
    attributes = vars(config)
    # What the config was read with may name files that are not in `folder`.
    before = attributes.pop("auto_map", None)
    try:
        if not (wanted or _IS_COPY) or not model.should_save_on_this_rank(is_main_process):
            yield
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, text in code_files().items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        config.auto_map = _auto_map(model)
        with without_timestamps(model, _PREFIX):
            yield
    finally:
        attributes.pop("auto_map", None)
        if before is not None:
            attributes["auto_map"] = before


def _auto_map(model: PreTrainedModel) -> dict[str, str]:
    """From each Auto class whose table holds the class of `model`, or the family's base model, to where that stands."""
    kind = stock_type(model.config)
    # FSDP puts its own name before that of the class.
    own = type(model).__name__.removeprefix("FSDP").removeprefix("Alibi")
    tables = listed_classes(kind)
    found = {"AutoConfig": type(model.config).__name__}
    for name, listed in tables.items():
        stock = next((each for each in (own, *tables["AutoModel"]) if each in listed), None)
        if stock is not None:
            found[name] = f"Alibi{stock}"
    return {name: f"{_ENTRY}.{each}" for name, each in found.items()}


def code_files() -> dict[str, str]:
    """The code of a checkpoint, by the names of its files: `remote_code` and all that it imports, without folders."""
    if _IS_COPY:
        return {path.name: path.read_text(encoding="utf-8") for path in sorted(_HERE.parent.glob(f"{_PREFIX}*.py"))}
    root = _HERE.parents[1]
    version = sys.modules[__name__.split(".")[0]].__version__
    files: dict[str, str] = {}
    waiting = [_HERE.with_name("remote_code.py")]
    while waiting:
        source = waiting.pop()
        name = f"{_flat_name(source, root)}.py"
        if name not in files:
            text, imported = _flat_imports(source, root)
            place = source.relative_to(root.parent).as_posix()
            files[name] = f"# Made from {place} of hf-alibi {version}. Licence: Apache-2.0.\n{text}"
            waiting.extend(imported)
    return files


def _flat_name(source: Path, root: Path) -> str:
    """The module name that a file of the package has beside a checkpoint."""
    parts = source.relative_to(root).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    if not parts:
        raise ValueError(f"the code of a checkpoint cannot import from {root.name}/__init__.py, which imports it all")
    return _PREFIX + "_".join(parts)


def _flat_imports(source: Path, root: Path) -> tuple[str, list[Path]]:
    """The text of a file of the package with its relative imports turned to flat names, and the files they mean."""
    content = source.read_bytes()
    # ast counts columns in bytes.
    lines = content.splitlines(keepends=True)
    nodes = [node for node in ast.walk(ast.parse(content)) if isinstance(node, ast.ImportFrom) and node.level]
    imported = []
    # From the end, so that the places of those before stay what they were.
    for node in sorted(nodes, key=lambda node: node.lineno, reverse=True):
        base = source.parents[node.level - 1].joinpath(*(node.module or "").split("."))
        statements, names = [], []
        for alias in node.names:
            module = _module_file(base / alias.name)
            if module is None:
                names.append(alias)
                continue
            if module.is_relative_to(root / _LEFT_OUT):
                statements.append("raise ImportError")
                continue
            imported.append(module)
            flat = _flat_name(module, root)
            # transformers finds the files to copy by lines of the first form, and overlooks the second.
            statements += [
                f"from .{flat} import __name__ as _",
                f"from . import {flat} as {alias.asname or alias.name}",
            ]
        if names:
            module = _module_file(base)
            if module is None:
                raise ValueError(f"{source.name}, line {node.lineno}: no module of the package is imported here")
            imported.append(module)
            statements.append(ast.unparse(ast.ImportFrom(_flat_name(module, root), names, 1)))
        end = node.end_lineno or node.lineno
        start, rest = lines[node.lineno - 1][: node.col_offset], lines[end - 1][node.end_col_offset :]
        lines[node.lineno - 1 : end] = [start + f"\n{' ' * node.col_offset}".join(statements).encode() + rest]
    return b"".join(lines).decode(), imported


def _module_file(path: Path) -> Path | None:
    """The file of the module at a path without an ending; None if there is none."""
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)

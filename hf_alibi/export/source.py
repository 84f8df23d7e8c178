"""The folder of a converted model that is to leave for another engine, checked before anything is written."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig

from ..errors import InputError, one_line
from ..model.loading import weight_files
from .targets import TARGETS

__all__ = ["Source", "check_new", "check_package", "check_space", "open_source"]


@dataclass(frozen=True)
class Source:
    """A complete checkpoint of a converted causal language model."""

    folder: Path
    config: Any
    """Its ALiBi config."""
    shapes: dict[str, tuple[int, ...]]
    """Of every weight, by its name."""
    files: dict[str, Path]
    """Where every weight is."""

    def read(self, weight: str) -> Tensor:
        """The values of one weight."""
        with safe_open(self.files[weight], framework="pt") as opened:
            values: Tensor = opened.get_tensor(weight)
        return values


def open_source(folder: str | Path, target: str) -> Source:
    """Check that `folder` holds a complete converted model which `target`, a name in `TARGETS`, can run.

    Raises InputError if not.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder; give the folder of a converted model")
    shapes, files = {}, {}
    try:
        config: Any = AutoConfig.from_pretrained(folder)
        for file in weight_files(folder):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    shapes[name], files[name] = tuple(opened.get_slice(name).get_shape()), file
    except Exception as error:  # whatever transformers and safetensors raise for broken files
        raise InputError(
            f"cannot read the model in {folder} ({one_line(error)}); give a complete checkpoint"
        ) from error
    if (reason := TARGETS[target].refusal(config)) is not None:
        raise InputError(f"{TARGETS[target].engine} cannot run {folder}: {reason}")
    return Source(folder, config, shapes, files)


def check_package(name: str, extra: str) -> None:
    """Raise InputError unless the package `name` can be imported; `extra` of this package brings it along."""
    try:
        import_module(name)
    except ImportError as error:
        raise InputError(f"{name} cannot be imported ({error}); pip install 'hf-alibi[{extra}]'") from error


def check_new(path: Path) -> None:
    """Raise InputError if `path` exists."""
    if path.exists():
        raise InputError(f"{path} exists; give another name, or delete it first")


def check_space(path: Path, needed: int) -> None:
    """Raise InputError if the disk has no room for `needed` bytes at `path`, whose folder may not exist yet."""
    free = shutil.disk_usage(next(parent for parent in path.absolute().parents if parent.is_dir())).free
    if free < needed:
        raise InputError(
            f"{path} takes {needed / 2**20:,.0f} MiB, and the disk has {free / 2**20:,.0f} MiB left; free some, or "
            "write elsewhere"
        )

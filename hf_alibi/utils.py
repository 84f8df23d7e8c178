"""Helpers without a better home: evaluation mode, devices, progress bars, mappings in settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tqdm import tqdm

from .errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

__all__ = ["METRICS_FILE", "Blocks", "evaluation_mode", "input_device", "progress_bar", "read_mapping", "replacing"]

# What a training leaves beside its model: every number and setting of the run.
METRICS_FILE = "metrics.json"


class Blocks(Protocol):
    """Text in blocks of one length: token ids, int64 of shape (tokens,) each. A tensor (blocks, tokens) is one too."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> torch.Tensor: ...


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Context manager: `eval()` inside; afterwards every module's own mode is restored."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the inputs of `model` go; for offloaded embeddings the CPU, from where accelerate's hooks fetch them."""
    import torch

    return torch.device("cpu") if model.device.type == "meta" else model.device


@contextmanager
def progress_bar(what: str, total: int, *, shown: bool) -> Iterator[Callable[[int], Any]]:
    """Show a progress bar on stderr; yields the function that advances it by a number of the `total`.

    Without a terminal, as in a log file, the bar writes a line every half minute.
    """
    bar = tqdm(desc=what, total=total, disable=not shown, unit_scale=True, dynamic_ncols=True)
    if not bar.disable and not bar.fp.isatty():
        bar.mininterval, bar.maxinterval = 30.0, 60.0
    with bar:
        yield bar.update


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; it takes the place of `path` at the end, or is removed on an error.

    So a reader sees the old file or the complete new one, never half of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_mapping(value: Any, field: str, example: str) -> dict[str, Any]:
    """The mapping that a setting holds, which the command line gives as JSON.

    Raises InputError, which names `field` and shows `example`, for anything else and for an empty mapping.
    """
    try:
        mapping = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise InputError(f"{field} {value!r} is not JSON ({error}); give {example}") from error
    if not isinstance(mapping, dict) or not mapping:
        raise InputError(f"{field} is {value!r}; it must be a mapping, {example}")
    return {str(name): of_name for name, of_name in mapping.items()}

"""Files of text, read by `datasets`: which ones a setting names, and the column of each that holds the text."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, islice
from pathlib import Path
from typing import Any, TypeVar

import datasets
from datasets.exceptions import DatasetGenerationError

from ..errors import InputError, one_line
from .settings import BUILDERS, COMPRESSED

__all__ = ["TEXT", "load_files", "loading", "only_text"]

_Dataset = TypeVar("_Dataset", datasets.Dataset, datasets.IterableDataset)

TEXT = "text"
"""Column of the documents."""

# A byte order mark at the beginning of a file is no text.
_OPTIONS: dict[str, dict[str, Any]] = {
    ".txt": {"sample_by": "document", "encoding": "utf-8-sig"},
    ".tsv": {"sep": "\t"},
}


def load_files(names: Sequence[str], column: str) -> datasets.Dataset:
    """Load the documents of files in order, as one string column `text`; a .txt file is one document.

    Args:
        names: files, folders (all files in them that can be read, sorted by name) and patterns (`*`, `**`, `?`, `[…]`)
            of files; a file that is there under that very name is no pattern. `~` is the user's home.
        column: which column of other than text files holds the text.

    Raises InputError for a name that leads to no file, an unknown extension, and a file or column that cannot be read.
    """
    paths = [path for name in names for path in _expand(name)]
    if all(path.stat().st_size == 0 for path in paths):
        raise InputError(f"{', '.join(names)}: empty; give files that hold text")
    # Neighbours that are text are read together; other files may each have columns of their own.
    groups = groupby(paths, key=lambda path: None if _extension(path) == ".txt" else path)
    return datasets.concatenate_datasets([_load(list(group), column) for _, group in groups])


def _expand(name: str) -> list[Path]:
    """The files that a name leads to."""
    path = Path(name).expanduser()
    if path.is_file():
        found = [path]
        if _extension(path) not in BUILDERS:
            raise InputError(f"cannot read {name}: its extension must be one of {', '.join(BUILDERS)}")
    elif path.is_dir():
        found = _readable(path.rglob("*"))
    else:
        # `Path.glob` takes no absolute patterns.
        found = _readable(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207
    if not found:
        what = "no file that can be read in the folder" if path.is_dir() else "no file"
        raise InputError(f"there is {what} {name}; give existing {', '.join(BUILDERS)} files, folders or patterns")
    return found


def _readable(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if _extension(path) in BUILDERS and path.is_file())


def _extension(path: Path) -> str:
    """The extension in small letters; of a compressed file, that of what is in it."""
    plain = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return plain.suffix.lower()


def _load(paths: list[Path], column: str) -> datasets.Dataset:
    """Files of one extension."""
    extension, source = _extension(paths[0]), ", ".join(map(str, paths))
    options = _OPTIONS.get(extension, {})
    with loading(source):
        # Escaped, since `datasets` takes names for patterns.
        files = [glob.escape(str(path)) for path in paths]
        dataset = datasets.load_dataset(BUILDERS[extension], data_files=files, split="train", **options)
    return only_text(dataset, TEXT if extension == ".txt" else column, source=source)


def only_text(dataset: _Dataset, column: str, *, source: str) -> _Dataset:
    """The column that holds the text, under the name `text`. Raises InputError if there is none, or none of text."""
    features = dataset.features
    if features is None:  # a dataset that is streamed may not know yet
        with loading(source):
            first: dict[str, Any] = next(iter(dataset), {})
        kinds = {name: "string" if isinstance(value, str) else "null" for name, value in first.items()}
        features = {name: datasets.Value(kind) for name, kind in kinds.items()}
    if column not in features:
        raise InputError(f"{source} has no column {column!r}; set text_column to one of {', '.join(features)}")
    dtype = str(getattr(features[column], "dtype", ""))
    # Strings that all look like dates are read as dates.
    if not dtype.startswith(("string", "large_string", "date", "time")):
        found = sorted({type(value).__name__ for value in islice(dataset[column], 1000)})
        raise InputError(
            f"column {column!r} of {source} holds {dtype or ' and '.join(found)}, not text alone; set text_column to "
            "one that holds text"
        )
    text = dataset.select_columns([column]).cast_column(column, datasets.Value("string"))
    return text if column == TEXT else text.rename_column(column, TEXT)


@contextmanager
def loading(source: str) -> Iterator[None]:
    """Turn what `datasets` raises while it loads into one line that names the source."""
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot write to {cache}, where datasets keep what they have read: {one_line(error)}; set the environment "
            "variable HF_DATASETS_CACHE to a folder that you may write to"
        ) from error
    try:
        yield
    except DatasetGenerationError as error:
        raise InputError(f"cannot read {source}: {one_line(error.__cause__ or error)}; check the file") from error
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load {source}: {one_line(error)}") from error

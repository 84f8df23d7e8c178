"""Result files: JSON with everything, CSV with the rows, and what a run ran on."""

import csv
import json
import platform
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..utils import replacing

__all__ = [
    "SCHEMA_VERSION",
    "Results",
    "check_output_dir",
    "environment",
    "write_results",
]

# A result is plain JSON data. Its "rows" are the numbers, one dictionary each; everything else says where
# they come from. Later kinds of runs add rows with further fields and keys beside "rows".
Results = dict[str, Any]

# Schema 4: `probes` in place of `passkey`, of which each row has a `task`.
SCHEMA_VERSION = 4


_PACKAGES = ("hf-alibi", "torch", "transformers", "accelerate", "datasets", "tokenizers")


def environment(*, seed: int | None = None) -> dict[str, Any]:
    """Describe what a run ran on: versions, device, seed, and the git commit of a checkout.

    Holds no host names, user names or paths, so that result files can be published.
    """
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "git_commit": _git_commit(Path(__file__).parents[2]),
        "seed": seed,
    }


def _version(package: str) -> str | None:
    """Version of an installed package, None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit(folder: Path) -> str | None:
    """Commit of the checkout at `folder` ("-dirty" after local changes); None for no checkout."""
    # Looking no higher keeps the commit of an unrelated repository around a virtual environment out.
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def check_output_dir(folder: Path) -> None:
    """Check that a run may write into `folder`: new or empty, and writable. Creates nothing.

    Raises `InputError` if not.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir {folder} is a file; give a new or empty folder")
    try:
        if folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"output_dir {folder} is not empty; give a new or empty folder, or empty this one")
        existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"output_dir {folder} cannot be written ({reason}); give a writable folder") from error


def write_results(results: Results, folder: Path, name: str = "results") -> tuple[Path, Path]:
    """Write `<name>.json` (everything) and `<name>.csv` (the rows) into `folder`; returns both paths.

    Raises ValueError for NaN and infinities, which are not JSON: a number that does not exist is None.
    """
    text = json.dumps({"schema": SCHEMA_VERSION, **results}, indent=1, allow_nan=False, ensure_ascii=False)
    json_path, csv_path = folder / f"{name}.json", folder / f"{name}.csv"
    with replacing(json_path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    with replacing(csv_path) as temporary:
        _write_csv(results["rows"], temporary)
    return json_path, csv_path


def _write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows with the union of their fields as columns, in order of first appearance; None is empty."""
    columns = list(dict.fromkeys(field for row in rows for field in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)

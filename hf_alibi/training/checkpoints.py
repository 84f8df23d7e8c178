"""Trainer's checkpoints: from which of them a run can resume exactly."""

import json
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

__all__ = ["STATE_FILE", "is_complete", "last_complete_checkpoint"]

STATE_FILE = "trainer_state.json"
# What a checkpoint needs for an exact continuation.
_RESUME_FILES = ("*model*", "optimizer*", "scheduler*", "rng_state*")


def last_complete_checkpoint(output_dir: Path) -> Path | None:
    """Return the newest `checkpoint-N` from which a run can resume exactly; None if there is none.

    A process that is killed while it saves leaves a partial one behind: it is passed over.
    """
    steps = {path: path.name.removeprefix("checkpoint-") for path in output_dir.glob("checkpoint-*")}
    newest_first = sorted((path for path in steps if steps[path].isdigit()), key=lambda path: -int(steps[path]))
    return next((path for path in newest_first if is_complete(path)), None)


def is_complete(checkpoint: Path) -> bool:
    """Whether a run can resume exactly from here: every file that takes is there and can be read to its end."""
    if not all(any(checkpoint.glob(pattern)) for pattern in _RESUME_FILES):
        return False
    try:
        json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        for index in checkpoint.glob("*.index.json"):
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            if not all((checkpoint / shard).is_file() for shard in shards):
                return False
        for path in checkpoint.rglob("*.safetensors"):
            with safe_open(path, framework="pt"):  # checks the header against the length of the file
                pass
        for path in [*checkpoint.rglob("*.pt"), *checkpoint.rglob("*.pth")]:
            with zipfile.ZipFile(path):  # the directory of a zip stands at its end: a cut file has none
                pass
    except (OSError, ValueError, KeyError, SafetensorError, zipfile.BadZipFile):
        return False
    return True

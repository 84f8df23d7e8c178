"""The module that `auto_map` in config.json names, for checkpoints that bring along the code they need.

`save_pretrained(..., export_remote_code=True)` writes the modules beside the weights (see `code_export`). When
transformers loads the copy of this one, on `trust_remote_code=True`, it registers the ALiBi classes as importing the
package would.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .. import configuration
from . import modeling
from .auto_classes import register

if Path(__file__).stem != "remote_code":  # a copy, which has another name beside a checkpoint
    # The package, or the code of a checkpoint loaded before, may have done it: two versions must not mix.
    if not any(kind.startswith("alibi_") for kind in CONFIG_MAPPING):
        register()

    def __getattr__(name: str) -> Any:
        """The ALiBi class that `auto_map` names."""
        if not name.startswith("Alibi"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        made = getattr(configuration if name.endswith("Config") else modeling, name)
        # When transformers saves an object whose class it found here, it copies the module that the class names, and
        # writes it into auto_map. Only this one registers, and only through it are configs and models of one copy.
        made.__module__ = __name__
        return made

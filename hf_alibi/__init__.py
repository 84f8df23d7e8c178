"""Attention with Linear Biases (ALiBi) for Hugging Face models.

Importing this package makes converted checkpoints known to transformers' Auto classes, and imports neither torch nor
any model: what is asked for is imported then.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from .registration import register

if TYPE_CHECKING:
    from .attention.reading import Reads, record_reads
    from .bias import build_alibi_tensor
    from .cache import AlibiCache
    from .configuration import AlibiConfig
    from .conversion.matching import match_heads
    from .converting import convert
    from .errors import InputError, VerificationError
    from .evaluation import evaluate_extrapolation
    from .families import supported_families
    from .patching import apply_alibi
    from .slopes import alibi_slopes
    from .verification import verify_alibi

__all__ = [
    "AlibiCache",
    "AlibiConfig",
    "InputError",
    "Reads",
    "VerificationError",
    "alibi_slopes",
    "apply_alibi",
    "build_alibi_tensor",
    "convert",
    "evaluate_extrapolation",
    "match_heads",
    "record_reads",
    "supported_families",
    "verify_alibi",
]

_MODULES = {
    "AlibiCache": "cache",
    "AlibiConfig": "configuration",
    "InputError": "errors",
    "Reads": "attention.reading",
    "VerificationError": "errors",
    "alibi_slopes": "slopes",
    "apply_alibi": "patching",
    "build_alibi_tensor": "bias",
    "convert": "converting",
    "evaluate_extrapolation": "evaluation",
    "match_heads": "conversion.matching",
    "record_reads": "attention.reading",
    "supported_families": "families",
    "verify_alibi": "verification",
}

try:
    __version__ = version("hf-alibi")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

register()


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first asked for.

    `Alibi<class of transformers>` is the ALiBi form of any of its configs and models, such as `AlibiQwen3Config` and
    `AlibiQwen3ForCausalLM`.
    """
    if name.startswith("Alibi") and name not in _MODULES:
        return getattr(import_module(f"{__name__}.{'configuration' if name.endswith('Config') else 'modeling'}"), name)
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    try:
        return import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

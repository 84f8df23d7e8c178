"""Attention with Linear Biases (ALiBi) for Hugging Face models.

Importing this package makes converted checkpoints known to transformers' Auto classes, and imports neither torch nor
any model: what is asked for is imported then.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from .model.auto_classes import register

if TYPE_CHECKING:
    from .attention.cache import AlibiCache
    from .attention.sdpa.reads import Reads, record_reads
    from .bias import build_alibi_tensor
    from .commands.convert import convert
    from .configuration import AlibiConfig
    from .conversion.matching import match_heads
    from .errors import InputError, VerificationError
    from .evaluation.perplexity import evaluate_extrapolation
    from .export.gguf import export_gguf
    from .export.onnx import export_onnx
    from .export.parity import verify_export
    from .model.families import supported_families
    from .model.modeling import alibi_class
    from .model.patching import apply_alibi
    from .model.verification import verify_alibi
    from .slopes import alibi_slopes

__all__ = [
    "AlibiCache",
    "AlibiConfig",
    "InputError",
    "Reads",
    "VerificationError",
    "alibi_class",
    "alibi_slopes",
    "apply_alibi",
    "build_alibi_tensor",
    "convert",
    "evaluate_extrapolation",
    "export_gguf",
    "export_onnx",
    "match_heads",
    "record_reads",
    "supported_families",
    "verify_alibi",
    "verify_export",
]

_MODULES = {
    "AlibiCache": "attention.cache",
    "AlibiConfig": "configuration",
    "InputError": "errors",
    "Reads": "attention.sdpa.reads",
    "VerificationError": "errors",
    "alibi_class": "model.modeling",
    "alibi_slopes": "slopes",
    "apply_alibi": "model.patching",
    "build_alibi_tensor": "bias",
    "convert": "commands.convert",
    "evaluate_extrapolation": "evaluation.perplexity",
    "export_gguf": "export.gguf",
    "export_onnx": "export.onnx",
    "match_heads": "conversion.matching",
    "record_reads": "attention.sdpa.reads",
    "supported_families": "model.families",
    "verify_alibi": "model.verification",
    "verify_export": "export.parity",
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
        module = "configuration" if name.endswith("Config") else "model.modeling"
        return getattr(import_module(f"{__name__}.{module}"), name)
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Attention with Linear Biases (ALiBi) for Hugging Face models."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from . import configuration, modeling
from .attention.reading import Reads, record_reads
from .bias import build_alibi_tensor
from .cache import AlibiCache
from .configuration import AlibiConfig
from .errors import InputError, VerificationError
from .evaluation import evaluate_extrapolation
from .families import supported_families
from .patching import apply_alibi
from .registration import register
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
    "evaluate_extrapolation",
    "record_reads",
    "supported_families",
    "verify_alibi",
]

try:
    __version__ = version("hf-alibi")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

register()


def __getattr__(name: str) -> Any:
    """`Alibi<class of transformers>`: the ALiBi form of any of its configs and models, made when first asked for."""
    return getattr(configuration if name.endswith("Config") else modeling, name)

"""Attention with Linear Biases (ALiBi) for Hugging Face models."""

from importlib.metadata import PackageNotFoundError, version

from .attention.reading import Reads, record_reads
from .bias import build_alibi_tensor
from .cache import AlibiCache
from .configuration import AlibiConfig, AlibiGPT2Config, AlibiLlamaConfig
from .errors import InputError, VerificationError
from .evaluation import evaluate_extrapolation
from .families import supported_families
from .modeling import (
    AlibiGPT2DoubleHeadsModel,
    AlibiGPT2ForQuestionAnswering,
    AlibiGPT2ForSequenceClassification,
    AlibiGPT2ForTokenClassification,
    AlibiGPT2LMHeadModel,
    AlibiGPT2Model,
    AlibiLlamaForCausalLM,
    AlibiLlamaForQuestionAnswering,
    AlibiLlamaForSequenceClassification,
    AlibiLlamaForTokenClassification,
    AlibiLlamaModel,
)
from .patching import apply_alibi
from .registration import register
from .slopes import alibi_slopes
from .verification import verify_alibi

__all__ = [
    "AlibiCache",
    "AlibiConfig",
    "AlibiGPT2Config",
    "AlibiGPT2DoubleHeadsModel",
    "AlibiGPT2ForQuestionAnswering",
    "AlibiGPT2ForSequenceClassification",
    "AlibiGPT2ForTokenClassification",
    "AlibiGPT2LMHeadModel",
    "AlibiGPT2Model",
    "AlibiLlamaConfig",
    "AlibiLlamaForCausalLM",
    "AlibiLlamaForQuestionAnswering",
    "AlibiLlamaForSequenceClassification",
    "AlibiLlamaForTokenClassification",
    "AlibiLlamaModel",
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

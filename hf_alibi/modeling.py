"""ALiBi model classes: those of transformers, converted as they are built."""

from typing import Any

from transformers import PreTrainedModel
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.models.llama import modeling_llama as llama

from .attention import check_backend
from .configuration import AlibiConfig, AlibiGPT2Config, AlibiLlamaConfig
from .installation import install_alibi

__all__ = [
    "MODEL_CLASSES",
    "AlibiGPT2DoubleHeadsModel",
    "AlibiGPT2ForQuestionAnswering",
    "AlibiGPT2ForSequenceClassification",
    "AlibiGPT2ForTokenClassification",
    "AlibiGPT2LMHeadModel",
    "AlibiGPT2Model",
    "AlibiLlamaForCausalLM",
    "AlibiLlamaForQuestionAnswering",
    "AlibiLlamaForSequenceClassification",
    "AlibiLlamaForTokenClassification",
    "AlibiLlamaModel",
    "AlibiModel",
]


class AlibiModel:
    """What every ALiBi model class shares; it stands before the class of transformers that it converts."""

    config: AlibiConfig
    _supports_flash_attn = True
    _supports_flex_attn = True
    # Engines that ask this put their own attention in place of the model's, and the bias would be lost.
    _supports_attention_backend = False

    def __init__(self, config: AlibiConfig, *args: Any, **kwargs: Any) -> None:
        if not isinstance(config, AlibiConfig):
            raise TypeError(
                f"{type(self).__name__} needs an ALiBi config, got {type(config).__name__}; "
                "to convert a model that is built already, use hf_alibi.apply_alibi(model)"
            )
        # Again: fields may have been changed since the config was made, such as by from_pretrained's arguments.
        config.validate_alibi()
        # Parts are first built as transformers' own, and its GPT-2 refuses flex_attention.
        flex = config._attn_implementation == "flex_attention"
        try:
            if flex:
                config._attn_implementation = "sdpa"
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        finally:
            if flex:
                config._attn_implementation = "flex_attention"
        install_alibi(self, MODEL_CLASSES)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As any model's. Raises ValueError where the empty end of a static cache would be taken for tokens."""
        name = self.config._attn_implementation
        if name == "flex_attention" or (name == "flash_attention_2" and kwargs.get("attention_mask") is None):
            caches = [value for value in (*args, *kwargs.values()) if getattr(value, "is_compileable", False)]
            if caches and name == "flex_attention":
                # transformers' mask looks up how full the cache is only after this has changed.
                raise ValueError(
                    f"'flex_attention' has no right mask beside a {type(caches[0]).__name__}; use a DynamicCache, or "
                    "attn_implementation='sdpa'"
                )
            if caches:
                raise ValueError(
                    f"'flash_attention_2' needs the keyword attention_mask beside a {type(caches[0]).__name__}, "
                    "(batch, tokens so far); give it, or use attn_implementation='sdpa'"
                )
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, is_init_check: bool = False, **kwargs: Any
    ) -> str:
        # That of transformers first puts kernels from the hub, which ALiBi does not know, in place of flash-attn.
        return self.get_correct_attn_implementation(attn_implementation, is_init_check)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """The implementation to use, as transformers decides.

        Raises ValueError for one that has no ALiBi form, ImportError for one whose package is missing.
        """
        if requested_attention is not None:
            check_backend(requested_attention)
        name: str = super().get_correct_attn_implementation(requested_attention, is_init_check)  # type: ignore[misc]
        return name


class AlibiGPT2Model(AlibiModel, gpt2.GPT2Model):
    """`GPT2Model` with ALiBi."""

    config: AlibiGPT2Config


class AlibiGPT2LMHeadModel(AlibiModel, gpt2.GPT2LMHeadModel):
    """`GPT2LMHeadModel` with ALiBi; `from_pretrained` of a plain GPT-2 checkpoint converts it."""

    config: AlibiGPT2Config


class AlibiGPT2DoubleHeadsModel(AlibiModel, gpt2.GPT2DoubleHeadsModel):
    """`GPT2DoubleHeadsModel` with ALiBi."""

    config: AlibiGPT2Config


class AlibiGPT2ForSequenceClassification(AlibiModel, gpt2.GPT2ForSequenceClassification):
    """`GPT2ForSequenceClassification` with ALiBi."""

    config: AlibiGPT2Config


class AlibiGPT2ForTokenClassification(AlibiModel, gpt2.GPT2ForTokenClassification):
    """`GPT2ForTokenClassification` with ALiBi."""

    config: AlibiGPT2Config


class AlibiGPT2ForQuestionAnswering(AlibiModel, gpt2.GPT2ForQuestionAnswering):
    """`GPT2ForQuestionAnswering` with ALiBi."""

    config: AlibiGPT2Config


class AlibiLlamaModel(AlibiModel, llama.LlamaModel):
    """`LlamaModel` with ALiBi."""

    config: AlibiLlamaConfig


class AlibiLlamaForCausalLM(AlibiModel, llama.LlamaForCausalLM):
    """`LlamaForCausalLM` with ALiBi; `from_pretrained` of a plain LLaMA checkpoint converts it."""

    config: AlibiLlamaConfig


class AlibiLlamaForSequenceClassification(AlibiModel, llama.LlamaForSequenceClassification):
    """`LlamaForSequenceClassification` with ALiBi."""

    config: AlibiLlamaConfig


class AlibiLlamaForTokenClassification(AlibiModel, llama.LlamaForTokenClassification):
    """`LlamaForTokenClassification` with ALiBi."""

    config: AlibiLlamaConfig


class AlibiLlamaForQuestionAnswering(AlibiModel, llama.LlamaForQuestionAnswering):
    """`LlamaForQuestionAnswering` with ALiBi."""

    config: AlibiLlamaConfig


MODEL_CLASSES: dict[type[PreTrainedModel], type[PreTrainedModel]] = {
    alibi_class.__mro__[2]: alibi_class for alibi_class in AlibiModel.__subclasses__()
}
"""From a model class of transformers to its ALiBi form."""

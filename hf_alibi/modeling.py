"""ALiBi model classes: those of transformers, converted as they are built."""

from typing import Any

from transformers import PreTrainedModel
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.models.llama import modeling_llama as llama

from .attention import alibi_name
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

    _supports_flash_attn = False
    _supports_flex_attn = False
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
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        install_alibi(self, MODEL_CLASSES)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """The implementation to use, as transformers decides. Raises ValueError for one that has no ALiBi form."""
        if requested_attention is not None:
            alibi_name(requested_attention)
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

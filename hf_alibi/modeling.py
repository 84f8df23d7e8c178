"""ALiBi model classes: those of transformers, converted as they are built."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedModel

from . import configuration
from .attention import check_backend
from .configuration import Converted
from .installation import install_alibi

__all__ = ["AlibiModel", "model_class"]


class AlibiModel:
    """What every ALiBi model class shares; it stands before the class of transformers that it converts."""

    config: Converted
    # Engines that ask this put their own attention in place of the model's, and the bias would be lost.
    _supports_attention_backend = False

    def __init__(self, config: Converted, *args: Any, **kwargs: Any) -> None:
        if not isinstance(config, Converted):
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
        install_alibi(self, model_class)

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


def model_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel] | None:
    """The ALiBi form of a model class of transformers; None for any other class, and for what is inside models only."""
    if getattr(transformers, stock.__name__, None) is not stock:
        return None
    made: type[PreTrainedModel] = __getattr__(f"Alibi{stock.__name__}")
    return made


def __getattr__(name: str) -> Any:
    """`Alibi<name of a model of transformers>`, made when it is first asked for; so it can be pickled by its name."""
    if name in globals():
        return globals()[name]
    stock = configuration.stock_class(__name__, name, PreTrainedModel)
    members: dict[str, Any] = {
        "__module__": __name__,
        "__doc__": f"`{stock.__name__}` with ALiBi; `from_pretrained` of a plain checkpoint converts it.",
    }
    if stock.config_class is not None:
        config = configuration.config_class(stock.config_class)
        members.update(config_class=config, __annotations__={"config": config})
    if stock.__name__.startswith("GPT2"):
        # transformers does not offer what GPT-2's self-attention can do.
        members.update(_supports_flex_attn=True)
    globals()[name] = type(name, (AlibiModel, stock), members)
    return globals()[name]

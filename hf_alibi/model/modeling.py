"""ALiBi model classes: those of transformers, converted as they are built."""

from __future__ import annotations

import os
import sys
from copy import copy
from typing import Any, ClassVar

import transformers
from torch import nn
from transformers import PreTrainedModel

from .. import configuration
from ..attention.backends import check_backend
from ..attention.cache import AlibiCache
from ..attention.paged import WITHOUT_PAGED_CACHE
from ..configuration import (
    PLAIN_CHECKPOINT,
    Converted,
    is_unsaved_name,
    name_until_saved,
    original_limit,
    text_config,
)
from .anatomy import text_decoder
from .code_export import saving_code
from .families import stock_type
from .installation import check_attention, check_family, install_alibi
from .own_attention import is_own_attention
from .weight_conversions import register_conversions

__all__ = ["AlibiModel", "alibi_class", "model_class"]

register_conversions()

# What configs call layers that keep more than keys and values, or something else, from token to token.
_WITH_A_STATE = {"conv", "hybrid", "linear_attention", "mamba"}


# The forms of users' own classes; those of transformers' are names of this module.
_own: dict[Any, type[PreTrainedModel]] = {}


class AlibiModel:
    """What every ALiBi model class shares; it stands before the class of transformers that it converts."""

    config: Converted
    # Engines that ask this put their own attention in place of the model's, and the bias would be lost.
    _supports_attention_backend = False
    _stand_ins: ClassVar[dict[str | None, str]] = {"flex_attention": "sdpa"}  # of GPT-2
    _named_by_saving = False
    alibi_stock_class: type[PreTrainedModel] | None = None
    """What a class of one's own was made of; None for those of transformers."""

    def __init__(self, config: Converted, *args: Any, **kwargs: Any) -> None:
        if not isinstance(config, Converted):
            raise TypeError(
                f"{type(self).__name__} needs an ALiBi config, got {type(config).__name__}; "
                "to convert a model that is built already, use hf_alibi.apply_alibi(model)"
            )
        # Again: fields may have been changed since the config was made, such as by from_pretrained's arguments.
        config.validate_alibi()
        check_family(config)
        if config.__dict__.pop(PLAIN_CHECKPOINT, False):
            config.name_or_path = name_until_saved(config)
        # Parts are first built as transformers' own, which refuse what only their ALiBi forms can do.
        name = config._attn_implementation or ("sdpa" if "sdpa" in self._stand_ins else None)
        try:
            if name in self._stand_ins:
                config._attn_implementation = self._stand_ins[name]
            with original_limit(config):
                super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        finally:
            if name in self._stand_ins:
                config._attn_implementation = name
        decoder = text_decoder(self)
        check_attention(self, decoder)
        install_alibi(self, decoder, model_class)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As any model's. Raises ValueError if a cache does not fit: see the messages."""
        name = self.config._attn_implementation
        if any(isinstance(value, AlibiCache) for value in kwargs.values()):
            types = getattr(text_config(self.config), "layer_types", None) or ()
            recurrent = {kind for kind in types if kind in _WITH_A_STATE}
            if recurrent:
                raise ValueError(
                    f"AlibiCache holds keys and values, but {type(self).__name__} has layers with a state of their own "
                    f"({', '.join(sorted(recurrent))}); use transformers' DynamicCache(config=model.config)"
                )
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

    def init_continuous_batching(
        self: Any, generation_config: Any = None, continuous_batching_config: Any = None, **kwargs: Any
    ) -> Any:
        """As any model's, but never with flash-attn instead: its paged kernels are called without ALiBi.

        Raises ValueError for an attention implementation that takes no paged cache; later, transformers would only
        note it in each result.
        """
        name = self.config._attn_implementation
        if name not in ("sdpa", "eager", "paged|eager"):
            raise ValueError(
                "continuous batching of ALiBi models works with attn_implementation 'sdpa' and 'eager', this model has "
                f"{name!r}; call model.set_attn_implementation('sdpa') first"
            )
        own = any(is_own_attention(layer) for _, layer in text_decoder(self).self_attentions)
        if own or stock_type(text_config(self.config)) in WITHOUT_PAGED_CACHE:
            raise ValueError(
                f"{type(self).__name__} has no continuous batching: its attention layers do not use the paged cache "
                "correctly, converted or not; use generate"
            )
        old_way = getattr(generation_config or self.generation_config, "continuous_batching_config", None)
        config = copy(continuous_batching_config or old_way or transformers.ContinuousBatchingConfig())
        config.auto_switch_to_flash = False
        return super().init_continuous_batching(generation_config, config, **kwargs)  # type: ignore[misc]

    def _init_weights(self: Any, module: nn.Module) -> None:
        # Some families fill tables of that size.
        with original_limit(self.config):
            super()._init_weights(module)  # type: ignore[misc]

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: what transformers does for its own classes, such as initializing parts without parameters, is right."""
        return False

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # The converted layers ask the config at each call, also those of families that do not by themselves.
        return True

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, is_init_check: bool = False, **kwargs: Any
    ) -> str:
        # That of transformers first puts kernels from the hub, which ALiBi does not know, in place of flash-attn.
        return self.get_correct_attn_implementation(attn_implementation, is_init_check)

    def save_pretrained(
        self: Any,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        *args: Any,
        export_remote_code: bool = False,
        **kwargs: Any,
    ) -> None:
        """As any model's.

        With `export_remote_code` the checkpoint brings along the code it needs, and loads without this package if
        `trust_remote_code=True` is given. Raises ValueError for a class of one's own, whose code is not among it.
        """
        if export_remote_code and self.alibi_stock_class is not None:
            raise ValueError(
                f"export_remote_code cannot bring the code of {self.alibi_stock_class.__name__} along; leave it out, "
                f"and load the checkpoint with hf_alibi.alibi_class({self.alibi_stock_class.__name__})"
            )
        with saving_code(self, save_directory, export_remote_code, is_main_process):
            super().save_pretrained(save_directory, is_main_process, *args, **kwargs)  # type: ignore[misc]
        # A conversion has the name of the folder that it was saved to last; a loaded model keeps its own.
        if self._named_by_saving or is_unsaved_name(self.name_or_path):
            self._named_by_saving = True
            self.name_or_path = self.config.name_or_path = str(save_directory)

    def push_to_hub(self: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """As any model's. A conversion then has the repository's name, not that of a folder which is gone."""
        commit = super().push_to_hub(repo_id, *args, **kwargs)  # type: ignore[misc]
        if self._named_by_saving:
            url = getattr(commit, "repo_url", None)
            self.name_or_path = self.config.name_or_path = repo_id if url is None else url.repo_id
        return commit

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """The implementation to use, as transformers decides.

        Raises ValueError for one that has no ALiBi form, ImportError for one whose package is missing.
        """
        if requested_attention is not None:
            check_backend(requested_attention, text_config(self.config).alibi_sink_tokens)
        name: str = super().get_correct_attn_implementation(requested_attention, is_init_check)  # type: ignore[misc]
        return name


def model_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel] | None:
    """The ALiBi form of a model class; None for what is inside models of transformers only, and for an ALiBi form.

    Raises ValueError for a class of the user's own that has no ALiBi form; see `alibi_class`.
    """
    if getattr(transformers, stock.__name__, None) is stock:
        made: type[PreTrainedModel] = __getattr__(f"Alibi{stock.__name__}")
        return made
    inside = stock.__module__.split(".")[0] == "transformers" or issubclass(stock, AlibiModel)
    return None if inside else _of_ones_own(stock)


def alibi_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The ALiBi form of a model class of transformers, or of one derived from it with a head or a loss of your own.

    `alibi_class(MyModel).from_pretrained(folder)` loads what a converted `MyModel` was saved to.

    Raises TypeError for anything but a class of models, ValueError for a class that has no ALiBi form: one that Python
    cannot import, such as a class inside a function, and one with a config class of its own.
    """
    if not (isinstance(stock, type) and issubclass(stock, PreTrainedModel)):
        raise TypeError(f"alibi_class takes a class of transformers models, got {stock!r}")
    made = model_class(stock)
    if made is None:
        raise ValueError(f"no ALiBi form of {stock.__module__}.{stock.__name__}: it is not a model of its own")
    return made


def _of_ones_own(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    if stock in _own:
        return _own[stock]
    found: Any = sys.modules.get(stock.__module__)
    for part in stock.__qualname__.split("."):
        found = getattr(found, part, None)
    if found is not stock:
        raise ValueError(
            f"no ALiBi form of {stock.__module__}.{stock.__qualname__}: Python cannot import it, so that nothing could "
            "load what is saved; put the class at the top of a module"
        )
    return _own.setdefault(
        stock, _made(stock, f"Alibi{stock.__name__}", __reduce_ex__=_reduced, alibi_stock_class=stock)
    )


def _reduced(model: Any, _: Any) -> tuple[Any, ...]:
    """How a model of one's own class is copied and pickled: by the class that it was made of."""
    return _empty, (model.alibi_stock_class,), vars(model)


def _empty(stock: type[PreTrainedModel]) -> Any:
    made: Any = alibi_class(stock)
    return made.__new__(made)


def _made(stock: type[PreTrainedModel], name: str, **members: Any) -> type[PreTrainedModel]:
    members["__module__"] = __name__
    members["__doc__"] = f"`{stock.__name__}` with ALiBi; `from_pretrained` of a plain checkpoint converts it."
    if stock.config_class is not None:
        config = configuration.config_class(stock.config_class)
        members.update(config_class=config, __annotations__={"config": config})
    if stock.__name__.startswith("GPT2"):
        # transformers does not offer what GPT-2's self-attention can do.
        members.update(_supports_flex_attn=True)
    lacks_sdpa = stock._supports_attention_backend and not stock._supports_sdpa
    if lacks_sdpa and stock.config_class is not None and not stock.config_class.sub_configs:
        # Nor capped logits and learned sinks under this name.
        members.update(_supports_sdpa=True, _stand_ins={"sdpa": "eager", "flex_attention": "eager"})
    return type(name, (AlibiModel, stock), members)


def __getattr__(name: str) -> Any:
    """`Alibi<name of a model of transformers>`, made when it is first asked for; so it can be pickled by its name."""
    if name in globals():
        return globals()[name]
    if name.endswith("Config"):
        # transformers looks for a config where the model is, to say what it has found.
        return getattr(configuration, name)
    stock = configuration.stock_class(__name__, name, PreTrainedModel)
    # Another thread may have made it meanwhile.
    return globals().setdefault(name, _made(stock, name))

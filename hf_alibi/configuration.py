"""Configurations of ALiBi models: those of transformers plus the `alibi_*` fields."""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, ClassVar

import transformers
from huggingface_hub.dataclasses import as_validated_field, strict
from transformers import PreTrainedConfig

from .slopes import check_scaling, slopes_by_layer

__all__ = [
    "PLAIN_CHECKPOINT",
    "UNLIMITED",
    "AlibiConfig",
    "Converted",
    "alibi_config",
    "check_sink_tokens",
    "check_slopes",
    "config_class",
    "head_width",
    "is_unsaved_name",
    "name_until_saved",
    "num_heads",
    "num_key_heads",
    "original_limit",
    "partial_layers",
    "slopes_of_layer",
    "stock_class",
    "stock_config",
    "text_config",
    "text_config_name",
]

UNLIMITED = 2**31 - 1
"""What `max_position_embeddings` of a converted model says, so that tools, which compare it, cut nothing there."""

# Parts of a composite config that hold the language model.
_TEXT_CONFIGS = ("text_config", "decoder")
PLAIN_CHECKPOINT = "_is_plain_checkpoint"
"""Attribute of a config that was read from a plain model's folder, until a model is made of it."""
_UNSAVED = "this ALiBi conversion"
_COMPARED_TYPES = {"musicgen", "vision-encoder-decoder", "whisper"}
_LIMIT = "max_position_embeddings"


def text_config_name(config: PreTrainedConfig | type[PreTrainedConfig]) -> str | None:
    """Under which name a composite config, or a class of them, has the config of its language model; None if plain."""
    return next((name for name in _TEXT_CONFIGS if name in config.sub_configs), None)


def text_config(config: PreTrainedConfig) -> Any:
    """The config of the language model in `config`, or `config` itself."""
    name = text_config_name(config)
    return config if name is None else getattr(config, name)


def num_heads(config: Any) -> int:
    """Heads of each self-attention layer of a text decoder."""
    for name in ("decoder_attention_heads", "num_attention_heads"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    raise ValueError(f"no ALiBi for model_type {config.model_type!r}: its config has no number of attention heads")


def num_key_heads(config: Any) -> int:
    """Key heads that the heads of a self-attention layer share; as many as heads if the config does not say."""
    heads, shared = num_heads(config), getattr(config, "num_key_value_heads", None)
    if shared is None and getattr(config, "multi_query", False):
        return 1
    return shared if isinstance(shared, int) and 0 < shared <= heads and heads % shared == 0 else heads


def head_width(config: Any) -> int:
    """Dimensions of each head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // num_heads(config))


def check_slopes(slopes: Any, heads: int, layers: int | None = None) -> None:
    """Raise ValueError unless `slopes` is None (the paper's) or `heads` finite numbers that are not negative.

    They may be a list of such lists, one for each of `layers` (None: any number) layers with self-attention.
    """
    by_layer = slopes_by_layer(slopes)
    for values in by_layer:
        if len(values) != heads:
            raise ValueError(f"alibi_slopes has {len(values)} values, but the model has {heads} heads")
    if by_layer is slopes and layers not in (None, len(by_layer)):
        raise ValueError(
            f"alibi_slopes has slopes of {len(by_layer)} layers, but the model has {layers} with self-attention"
        )
    _check_slope_values(slopes)


def slopes_of_layer(slopes: Any, layer: int) -> Any:
    """The slopes of one layer with self-attention, by its number among them, in `alibi_slopes`; None as it is."""
    by_layer = slopes_by_layer(slopes)
    return by_layer[layer] if by_layer is slopes else slopes


def _check_slope_values(slopes: Any) -> None:
    wrong = [slope for values in slopes_by_layer(slopes) for slope in values if not 0 <= slope < math.inf]
    if wrong:
        raise ValueError(f"alibi_slopes must be finite and not negative (logits per token), got {wrong}")


def check_sink_tokens(sink_tokens: Any) -> None:
    """Raise TypeError unless `sink_tokens` is an int, ValueError if it is negative."""
    allowed = "tokens at the beginning of a sequence, an int of at least 0"
    if isinstance(sink_tokens, bool) or not isinstance(sink_tokens, int):
        raise TypeError(f"alibi_sink_tokens must be {allowed}, got {sink_tokens!r}")
    if sink_tokens < 0:
        raise ValueError(f"alibi_sink_tokens must be {allowed}, got {sink_tokens}")


def partial_layers(config: Any) -> list[str]:
    """What in a text decoder's config says that some layers see only a window or a chunk; empty if all see all."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    if kinds is not None:
        return sorted({kind for kind in kinds if any(word in kind for word in ("sliding", "chunked", "local"))})
    return [name for name in ("sliding_window", "attention_chunk_size") if getattr(config, name, None) is not None]


@as_validated_field
def _slopes_field(value: list[float] | list[list[float]] | None) -> None:
    _check_slope_values(value)


@as_validated_field
def _train_length_field(value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"alibi_train_length must be at least 1 token, got {value}")


@as_validated_field
def _scaling_field(value: dict[str, Any] | None) -> None:
    if value is not None:
        check_scaling(value)


@as_validated_field
def _tolerance_field(value: float | None) -> None:
    if value is not None and not 0 < value < 1:
        raise ValueError(f"alibi_tolerance must be a share of a row's weights between 0 and 1, or null, got {value}")


@as_validated_field
def _sink_tokens_field(value: int) -> None:
    check_sink_tokens(value)


class _ComparedType(str):
    """A model type `alibi_<type>` that is also equal to `<type>`.

    For the few types that transformers' generation and pipelines compare with a word of their own, for what has nothing
    to do with positions: Whisper's prompts and timestamps, MusicGen's processor, Donut's first token.
    """

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) or str.__eq__(self.removeprefix("alibi_"), other)

    def __ne__(self, other: object) -> bool:
        return not self == other


def name_until_saved(config: PreTrainedConfig) -> str:
    """What stands for the name of a conversion that is in memory only, so that nothing loads the plain model by it."""
    return (
        f"{_UNSAVED} (of {config.name_or_path or 'a model without a name'}) has no name before it is saved; call its "
        "save_pretrained first, and pass a tokenizer, or a reference model, where one would be looked up by the name"
    )


def is_unsaved_name(name: str) -> bool:
    """Whether `name` is that of a conversion in memory."""
    return name.startswith(_UNSAVED)


class Converted(PreTrainedConfig):
    """What the config of every converted model shares."""

    # Read by tools, without asking whether it is there.
    auto_map: ClassVar[Mapping[str, str]] = MappingProxyType({})

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a config of this type, or of the type that it converts while loading; refuse others."""
        config, rest = super().get_config_dict(*args, **kwargs)
        own = cls.model_type
        found = config.get("model_type", own)
        if found not in (own, own.removeprefix("alibi_")):
            then = "" if found.startswith("alibi_") else " and convert it with hf_alibi.apply_alibi"
            raise ValueError(
                f"a checkpoint of model_type {found!r} cannot be loaded as {own!r}; load it with AutoModel{then}"
            )
        if not found.startswith("alibi_"):
            config[PLAIN_CHECKPOINT] = True
        return {**config, "model_type": own}, rest

    def to_dict(self) -> dict[str, Any]:
        """As any config's."""
        return {name: value for name, value in super().to_dict().items() if name != PLAIN_CHECKPOINT}


class AlibiConfig(Converted):
    """The fields that ALiBi adds to the config of a language model.

    Args:
        alibi_slopes: one number a head, logits per token of distance; None for the paper's geometric slopes. Or one
            such list for each layer with self-attention. A head of slope 0 is global: it has no bias.
        alibi_train_length: tokens that the model was trained on with ALiBi, for `dynamic` scaling and for readers.
        alibi_scaling: None, or {"type": "linear" | "ntk" | "dynamic", "factor": number >= 1}: see `scale_slopes`
            and `dynamic_scale`. It may be given when a checkpoint is loaded.
        alibi_tolerance: share of a query's weights that the far keys which are not read may have together; None for
            less than rounding takes, so that attention is exact. It may be given when a checkpoint is loaded.
        alibi_sink_tokens: how many tokens at the beginning of each sequence carry no bias as keys, whatever their
            distance (attention sinks: Xiao et al. 2023, arXiv 2309.17453); 0 is the paper's ALiBi.
        alibi_original_max_position_embeddings: what `max_position_embeddings` was before the conversion. That says
            `UNLIMITED` now, unless it is given when the checkpoint is loaded, or an encoder shares it.
    """

    alibi_slopes: list[float] | list[list[float]] | None = _slopes_field(default=None)
    alibi_train_length: int | None = _train_length_field(default=None)
    alibi_scaling: dict[str, Any] | None = _scaling_field(default=None)
    alibi_tolerance: float | None = _tolerance_field(default=None)
    alibi_sink_tokens: int = _sink_tokens_field(default=0)
    alibi_original_max_position_embeddings: int | None = None

    def validate_alibi(self) -> None:
        """Raise ValueError if fields do not fit together (run by `strict` when the config is made)."""
        check_slopes(self.alibi_slopes, num_heads(self))
        scaling: Mapping[str, Any] = self.alibi_scaling or {}
        if scaling.get("type") == "dynamic" and self.alibi_train_length is None:
            raise ValueError("alibi_scaling of type 'dynamic' needs alibi_train_length, the tokens trained on")
        partial = partial_layers(self) if self.alibi_sink_tokens else []
        if partial:
            raise ValueError(
                f"alibi_sink_tokens is {self.alibi_sink_tokens}, but some self-attention layers of {self.model_type!r} "
                f"see only a part of the sequence ({', '.join(partial)}), which does not tell them where it begins; "
                "use 0, or a model whose layers all see the whole sequence"
            )
        if not getattr(self, "is_causal", True):
            raise ValueError("ALiBi is for causal attention, but the config says is_causal=False")


@contextmanager
def original_limit(config: PreTrainedConfig) -> Iterator[None]:
    """Context manager: inside, `max_position_embeddings` says what the positions to be replaced are made for."""
    config = text_config(config)
    limit, original = (getattr(config, name, None) for name in (_LIMIT, f"alibi_original_{_LIMIT}"))
    if original is not None:
        setattr(config, _LIMIT, original)
    try:
        yield
    finally:
        if original is not None:
            setattr(config, _LIMIT, limit)


def _lift_limit(config: Any) -> None:
    limit = getattr(config, _LIMIT, None)
    if config.alibi_original_max_position_embeddings is None and limit is not None and not config.is_encoder_decoder:
        config.alibi_original_max_position_embeddings = limit
        setattr(config, _LIMIT, UNLIMITED)


def _of_the_language_model(field: str) -> property:
    def get(config: PreTrainedConfig) -> Any:
        return getattr(text_config(config), field)

    def put(config: PreTrainedConfig, value: Any) -> None:
        setattr(text_config(config), field, value)

    return property(get, put, doc=f"`{field}` of the language model's config.")


class AlibiCompositeConfig(Converted):
    """A config of several models, of which the language model has ALiBi: the `alibi_*` fields are in its config."""

    def __post_init__(self, **kwargs: Any) -> None:
        """Make the parts, as transformers does, and the language model's an ALiBi config."""
        super().__post_init__(**kwargs)
        name = text_config_name(self)
        if name is not None and not isinstance(text_config(self), Converted):
            setattr(self, name, alibi_config(text_config(self)))

    def validate_alibi(self) -> None:
        """As that of the language model."""
        text_config(self).validate_alibi()


_FIELDS = tuple(AlibiConfig.__annotations__)
for _field in _FIELDS:
    setattr(AlibiCompositeConfig, _field, _of_the_language_model(_field))


def alibi_config(stock: PreTrainedConfig, **fields: Any) -> Any:
    """The ALiBi form of a config: a copy with every value, private ones too, of another class.

    Args:
        stock: a config of transformers.
        fields: `alibi_*` fields that are not to have their defaults.

    Raises ValueError for a class that is not one of transformers' own, or fields that do not fit together.
    """
    config: Any = copy.deepcopy(stock)
    config.__class__ = config_class(type(stock))
    # A config that was read from a file carries its model type itself, which would hide that of the class.
    vars(config).pop("model_type", None)
    name = text_config_name(config)
    if name is not None:
        setattr(config, name, alibi_config(getattr(config, name), **fields))
    else:
        for field in _FIELDS:
            # The part of a composite config that was read from a file brings these fields along.
            default = vars(config).get(field, getattr(type(config), field))
            setattr(config, field, fields.get(field, default))
        _lift_limit(config)
    config.validate_alibi()
    return config


def stock_config(config: PreTrainedConfig) -> Any:
    """What `alibi_config` made `config` of: a copy of transformers' own class, with the limit that it had."""
    stock: Any = copy.deepcopy(config)
    stock.__class__ = getattr(transformers, type(config).__name__.removeprefix("Alibi"))
    for name in ("model_type", *_FIELDS):
        vars(stock).pop(name, None)
    stock.architectures = [name.removeprefix("Alibi") for name in config.architectures or ()]
    if (limit := getattr(config, f"alibi_original_{_LIMIT}", None)) is not None:
        setattr(stock, _LIMIT, limit)
    return stock


def config_class(stock: type[PreTrainedConfig]) -> type[Converted]:
    """The ALiBi form of a config class of transformers. Raises ValueError for any other class."""
    if getattr(transformers, stock.__name__, None) is not stock:
        raise ValueError(
            f"no ALiBi form of {stock.__module__}.{stock.__name__}: it is not a config class of transformers"
        )
    made: type[Converted] = __getattr__(f"Alibi{stock.__name__}")
    return made


def stock_class(module: str, name: str, kind: type) -> Any:
    """The class of transformers whose ALiBi form is `name`. Raises AttributeError, for `module`, if there is none."""
    stock = getattr(transformers, name.removeprefix("Alibi"), None) if name.startswith("Alibi") else None
    if isinstance(stock, type) and issubclass(stock, kind):
        return stock
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


def __getattr__(name: str) -> Any:
    """`Alibi<name of a config of transformers>`, made when it is first asked for; so it can be pickled by its name."""
    if name in globals():
        return globals()[name]
    stock = stock_class(__name__, name, PreTrainedConfig)
    added = AlibiConfig if text_config_name(stock) is None else AlibiCompositeConfig
    members: dict[str, Any] = {
        "__module__": __name__,
        "__doc__": f"`{stock.__name__}` of a model with ALiBi; see `{added.__name__}` for what that adds.",
        "model_type": (_ComparedType if stock.model_type in _COMPARED_TYPES else str)(f"alibi_{stock.model_type}"),
    }
    if added is AlibiConfig:

        def __post_init__(self: Any, **kwargs: Any) -> None:
            with original_limit(self):
                stock.__post_init__(self, **kwargs)
            _lift_limit(self)

        members["__post_init__"] = __post_init__
    made = type(name, (stock, added) if added is AlibiConfig else (added, stock), members)
    # Another thread may have made it meanwhile.
    return globals().setdefault(name, strict(made))

"""What a conversion is compared with: ways to longer contexts that need no training, one row each in `BASELINES`.

A baseline is a changed config on the same weights.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from accelerate import init_empty_weights  # type: ignore[import-untyped]
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..errors import InputError
from ..model.anatomy import has_no_positions, is_alibi, is_rotary, text_decoder
from ..model.own_attention import is_own_attention
from .sliding_window import sliding_window_attention

__all__ = ["ALL", "BASELINES", "Baseline", "ChosenBaselines", "Lengths", "check_names", "choose", "with_baseline"]

ALL = "all"


class Lengths(NamedTuple):
    """For which lengths baselines are made, in tokens: the training length and the longest evaluated one."""

    train_length: int
    longest: int


@dataclass(frozen=True)
class Baseline(ABC):
    """A change of a model's config; `label` names it in tables, with {factor} or {train_length}."""

    label: str

    @abstractmethod
    def fits(self, model: PreTrainedModel) -> bool:
        """Whether the model is of the kind that this baseline is made for."""

    @abstractmethod
    def obstacle(self, model: PreTrainedModel, lengths: Lengths) -> str | None:
        """Why there is nothing to do for a model of this kind, or None."""

    @abstractmethod
    def change(self, config: PreTrainedConfig, lengths: Lengths) -> None:
        """Change the config of such a model, in place."""

    def factor(self, config: PreTrainedConfig, lengths: Lengths) -> float:
        """How many times longer than what the model knows the longest length is."""
        return lengths.longest / lengths.train_length

    def name(self, config: PreTrainedConfig, lengths: Lengths) -> str:
        """What tables call it."""
        return self.label.format(factor=f"{self.factor(config, lengths):.4g}", train_length=lengths.train_length)


@dataclass(frozen=True)
class RopeScaling(Baseline):
    """A `rope_type` of transformers for rotary models, stretched from `max_position_embeddings` to the longest length.

    linear: Chen et al. 2023, arXiv 2306.15595; dynamic: NTK-aware scaling; yarn: Peng et al. 2023, arXiv 2309.00071.
    """

    rope_type: str

    def fits(self, model: PreTrainedModel) -> bool:
        """Unconverted, with rotary positions."""
        return not is_alibi(model.config) and any(is_rotary(module) for _, _, module in text_decoder(model).positions)

    def obstacle(self, model: PreTrainedModel, lengths: Lengths) -> str | None:
        """Within reach already, or with rotations that are scaled or differ from layer to layer."""
        config: Any = model.config.get_text_config()
        rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
        if rope_type is None:
            return "its layers do not share one set of rope_parameters"
        if rope_type != "default":
            return f"its rotations are scaled already (rope_type {rope_type})"
        if lengths.longest <= config.max_position_embeddings:
            known = config.max_position_embeddings
            return f"the longest length, {lengths.longest}, is within the {known} tokens that it was made for"
        return None

    def factor(self, config: PreTrainedConfig, lengths: Lengths) -> float:
        """The longest length in units of what the rotations were made for."""
        known: int = config.get_text_config().max_position_embeddings
        return lengths.longest / known

    def change(self, config: PreTrainedConfig, lengths: Lengths) -> None:
        """Give `rope_parameters` the type and the factor."""
        text: Any = config.get_text_config()
        text.rope_parameters = {
            **text.rope_parameters,
            "rope_type": self.rope_type,
            "factor": self.factor(config, lengths),
        }
        if self.rope_type == "yarn":
            text.rope_parameters["original_max_position_embeddings"] = text.max_position_embeddings


@dataclass(frozen=True)
class SlidingWindow(Baseline):
    """Every layer sees the last training length of tokens; through the layers below, it hears of older ones."""

    def fits(self, model: PreTrainedModel) -> bool:
        """Unconverted."""
        return not is_alibi(model.config)

    def obstacle(self, model: PreTrainedModel, lengths: Lengths) -> str | None:
        """Layers that this attention cannot stand in for, or nothing to leave out."""
        config: Any = model.config.get_text_config()
        decoder = text_decoder(model)
        layers = [layer for _, layer in decoder.self_attentions]
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if len(layers) != config.num_hidden_layers or any(map(is_own_attention, layers)) or kinds != {"full_attention"}:
            return "not all of its layers are full attention by transformers' attention functions"
        if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
            return f"it has a window of its own, of {config.sliding_window} tokens"
        limit = decoder.limit
        if limit is not None and limit <= lengths.train_length:
            return f"its table of positions ends at {limit} tokens"
        return None if lengths.longest > lengths.train_length else "no length is beyond the training length"

    def change(self, config: PreTrainedConfig, lengths: Lengths) -> None:
        """Name the attention."""
        config._attn_implementation = sliding_window_attention(lengths.train_length)


@dataclass(frozen=True)
class SlopeScaling(Baseline):
    """A type of `alibi_scaling` for converted models, from the training length to the longest; see `scale_slopes`."""

    scaling: str

    def fits(self, model: PreTrainedModel) -> bool:
        """Converted, with slopes."""
        return is_alibi(model.config) and not has_no_positions(model.config)

    def obstacle(self, model: PreTrainedModel, lengths: Lengths) -> str | None:
        """Slopes that are scaled already, or no need."""
        if model.config.get_text_config().alibi_scaling is not None:
            return "its slopes are scaled already"
        return None if lengths.longest > lengths.train_length else "no length is beyond the training length"

    def change(self, config: PreTrainedConfig, lengths: Lengths) -> None:
        """Set `alibi_scaling`."""
        config.get_text_config().alibi_scaling = {"type": self.scaling, "factor": self.factor(config, lengths)}


BASELINES: Mapping[str, Baseline] = {
    "rope_linear": RopeScaling("linear RoPE scaling ×{factor}", "linear"),
    "rope_dynamic": RopeScaling("dynamic NTK ×{factor}", "dynamic"),
    "rope_yarn": RopeScaling("YaRN ×{factor}", "yarn"),
    "sliding_window": SlidingWindow("window of {train_length}"),
    "alibi_linear": SlopeScaling("slopes ÷{factor}", "linear"),
    "alibi_ntk": SlopeScaling("NTK slopes ÷{factor}", "ntk"),
}


class ChosenBaselines(NamedTuple):
    """Baselines of one model: name to label in tables, and name to the reason why there is none."""

    labels: dict[str, str]
    left_out: dict[str, str]


def check_names(names: Iterable[str]) -> None:
    """Raise `InputError` for names that are not baselines; `all` stands for every one that fits."""
    allowed = f"{', '.join(BASELINES)}, or {ALL} alone for those that fit each model"
    names = list(names)
    if unknown := [name for name in names if name not in BASELINES and names != [ALL]]:
        raise InputError(f"baselines names {unknown[0]!r}; allowed: {allowed}")


def choose(names: Iterable[str], models: Mapping[str, PreTrainedModel], lengths: Lengths) -> dict[str, ChosenBaselines]:
    """Find the baselines of each model; weights are not read, so the models may be on the meta device.

    Raises `InputError` if a name was given that is made for another kind of model than any of these.
    """
    names = list(names)
    chosen = {name: ChosenBaselines({}, {}) for name in models}
    for baseline in BASELINES if names == [ALL] else names:
        made_for = {name: model for name, model in models.items() if BASELINES[baseline].fits(model)}
        if not made_for and names != [ALL]:
            kind = type(BASELINES[baseline]).__doc__ or ""
            raise InputError(
                f"baselines names {baseline!r}, which is for none of the models {', '.join(models)} "
                f"({kind.split(';')[0].splitlines()[0].rstrip('.')}); leave it out"
            )
        for name, model in made_for.items():
            reason = BASELINES[baseline].obstacle(model, lengths)
            if reason is None:
                chosen[name].labels[baseline] = BASELINES[baseline].name(model.config, lengths)
            else:
                chosen[name].left_out[baseline] = reason
    return chosen


def with_baseline(model: PreTrainedModel, name: str, lengths: Lengths) -> PreTrainedModel:
    """Build the model of a baseline around the very parameters of `model`, which stays as it is.

    Returns a model in evaluation mode. Its rotations and other computed buffers are those that transformers makes for
    the changed config.
    """
    config = copy.deepcopy(model.config)
    BASELINES[name].change(config, lengths)
    with init_empty_weights(include_buffers=False):
        changed: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    changed.load_state_dict(model.state_dict(), assign=True)
    changed.tie_weights()
    return changed.to(model.device).eval()

"""Putting ALiBi into a model whose config is already an ALiBi config: positions out, backends in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .attention import alibi_name
from .families import family_of, self_attentions
from .positions import NoPositions, NoRotation

__all__ = ["LayerConfig", "install_alibi"]


class LayerConfig:
    """A self-attention layer's view of the model's config, whose attention implementation is the ALiBi form.

    Everything else is read from, and set on, the config itself. So mask builders, `generate` and every other part of
    transformers see the standard name, and switching it later still gives ALiBi, or an error where a name has no
    ALiBi form.
    """

    def __init__(self, config: Any) -> None:
        self.__dict__["_config"] = config

    @property
    def _attn_implementation(self) -> str:
        return alibi_name(self.__dict__["_config"]._attn_implementation)

    def __getattr__(self, name: str) -> Any:
        # Python asks for special methods when it copies and pickles; the config's must not answer for the view.
        if name.startswith("__") or "_config" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["_config"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_config"], name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def install_alibi(model: PreTrainedModel, classes: Mapping[type[PreTrainedModel], type[PreTrainedModel]]) -> None:
    """Turn `model`, whose config is already the ALiBi one, and the models inside it into their ALiBi form, in place.

    Args:
        model: freshly built, or unconverted with its config replaced.
        classes: the ALiBi class of each class of transformers.

    Installing twice changes nothing, so a model may be built of parts that did it already.
    """
    for part in model.modules():
        if type(part) in classes:
            part.__class__ = classes[type(part)]
            # transformers looks up what to record for output_attentions and output_hidden_states by class.
            _CAN_RECORD_REGISTRY[part] = part._can_record_outputs
        if isinstance(part, PreTrainedModel) and part.loss_type is None:
            # What transformers falls back to, but with a warning on the way that torch.compile cannot trace.
            part.loss_type = "ForCausalLM"
    family = family_of(model.config)
    base = model.base_model
    positions = getattr(base, family.positions)
    if not isinstance(positions, (NoPositions, NoRotation)):
        setattr(base, family.positions, _without_positions(family.kind, positions))
    # A plain checkpoint brings its table along; that it is not loaded is the point.
    ignored = {rf"(^|\.){re.escape(family.positions)}\."}
    model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | ignored
    for _, attention in self_attentions(model):
        # Past the types of torch: a config is no tensor and no module.
        attention.__dict__["config"] = LayerConfig(model.config)


def _without_positions(kind: str, positions: nn.Module) -> nn.Module:
    if kind == "learned":
        return NoPositions()
    inv_freq: Any = positions.inv_freq
    return NoRotation(2 * inv_freq.shape[-1])

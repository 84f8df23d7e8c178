"""Model classes of a user's own, derived from those of transformers."""

import torch
from torch import nn
from transformers import GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaAttention


class WithValueHead(LlamaForCausalLM):
    """A second head, and a loss of its own."""

    def __init__(self, config):
        super().__init__(config)
        self.value = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(self, input_ids, labels=None, **kwargs):
        output = super().forward(input_ids, output_hidden_states=True, **kwargs)
        output["values"] = self.value(output.hidden_states[-1])[..., 0]
        output["loss"] = None if labels is None else output["values"].square().mean()
        return output


class Doubled(GPT2LMHeadModel):
    """Logits times two."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


class OwnBase(LlamaModel):
    """A base model of one's own, inside a model of one's own."""


class WithOwnBase(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model = OwnBase(config)
        self.post_init()


class PositionsAgain(LlamaForCausalLM):
    """Adds positions by itself, which ALiBi must not miss."""

    def __init__(self, config):
        super().__init__(config)
        self.model = AddsPositions(config)
        self.post_init()


class AddsPositions(LlamaModel):
    def forward(self, input_ids, inputs_embeds=None, **kwargs):
        position = torch.arange(input_ids.shape[1])[None, :, None]
        return super().forward(inputs_embeds=self.embed_tokens(input_ids) + position, **kwargs)


class OwnAttention(LlamaAttention):
    """Attention without transformers' interface."""

    def forward(self, hidden_states, *args, **kwargs):
        return self.o_proj(self.q_proj(hidden_states)), None


class WithOwnAttention(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            layer.self_attn = OwnAttention(config, index)


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class WithOwnConfig(LlamaForCausalLM):
    config_class = OwnConfig

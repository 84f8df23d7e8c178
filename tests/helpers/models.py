"""A small GPT-2 and a small LLaMA, the same at every call."""

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

VOCABULARY = 64
FAMILIES = ("gpt2", "llama")


def stock_config(family: str, heads: int = 4, **changes):
    """A small config; LLaMA with grouped heads where the count allows."""
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if family == "gpt2":
        sizes = {
            "n_embd": 8 * heads,
            "n_head": heads,
            "n_layer": 2,
            "n_positions": 32,
            "vocab_size": VOCABULARY,
        }
        # Larger than usual weights make attention uneven, so that a wrong bias shows.
        return GPT2Config(**{**sizes, "initializer_range": 0.2, **special, **changes})
    key_heads = {4: 2, 6: 2, 9: 3, 12: 4}.get(heads, heads)
    sizes = {
        "hidden_size": 8 * heads,
        "intermediate_size": 16 * heads,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "num_hidden_layers": 2,
        "max_position_embeddings": 32,
        "vocab_size": VOCABULARY,
    }
    return LlamaConfig(**{**sizes, "initializer_range": 0.2, **special, **changes})


def stock_model(family: str, heads: int = 4, *, auto_class=AutoModelForCausalLM, **changes):
    """An unconverted model in evaluation mode, the same at every call."""
    torch.manual_seed(0)
    return auto_class.from_config(stock_config(family, heads, **changes)).eval()


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    """Random token ids without the special ones."""
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def snapshot(model):
    """All that a failed conversion could have changed."""
    modules = {name: (module, type(module), getattr(module, "config", None)) for name, module in model.named_modules()}
    return modules, model.config.to_dict(), {name: p.data_ptr() for name, p in model.named_parameters()}

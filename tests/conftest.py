"""Tiny random models and the markers' rules."""

from pathlib import Path
from pydoc_data.topics import topics

import datasets
import pytest
import torch
import transformers
from hypothesis import settings
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

# The same examples at every run; `--hypothesis-profile=default` draws new ones.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")

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


@pytest.fixture(autouse=True)
def _quiet_and_seeded():
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    """Each family in turn."""
    return request.param


def pytest_collection_modifyitems(items):
    """Skip GPU tests, with the reason, where there is no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="module")
def one_thread():
    """Tiny tensors gain nothing from threads, and a busy machine makes them wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """Give a test a folder of its own with a text in it, an empty cache, and no network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("\n".join(topics[name] for name in sorted(topics))[:6000])
    return tmp_path

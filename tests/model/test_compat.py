"""Names that are private elsewhere: each exists, or the message says what breaks without it."""

from importlib import import_module

import pytest
import torch
import transformers

import hf_alibi
from helpers.models import stock_model
from hf_alibi.attention.sdpa import cpu_kernel
from hf_alibi.model import anatomy, compat

# Module, attribute path, and what breaks without it.
NAMES = [
    ("transformers.models.auto.auto_factory", "_LazyAutoMapping", "AutoModel… does not know converted models"),
    ("transformers.models.auto.configuration_auto", "CONFIG_MAPPING._mapping", "AutoConfig does not know alibi_ types"),
    (
        "transformers.models.auto.configuration_auto",
        "CONFIG_MAPPING._modules",
        "AutoConfig does not find alibi configs",
    ),
    *(
        (
            "transformers.models.auto.modeling_auto",
            f"MODEL_FOR_CAUSAL_LM_MAPPING.{name}",
            "AutoModel… loads no alibi_ type",
        )
        for name in ("_model_mapping", "_modules", "_reverse_config_mapping", "_config_mapping")
    ),
    ("transformers.models.auto.modeling_auto", "AutoModel._model_mapping", "exported code has no auto_map"),
    ("transformers.utils.output_capturing", "_CAN_RECORD_REGISTRY", "output_attentions records nothing"),
    *(
        ("transformers", f"PreTrainedModel.{name}", breaks)
        for name, breaks in {
            "_can_record_outputs": "output_attentions records nothing",
            "_keys_to_ignore_on_load_unexpected": "plain checkpoints report their position table as unexpected",
            "_can_set_attn_implementation": "set_attn_implementation is refused for some families",
            "_check_and_adjust_attn_implementation": "kernels from the hub run instead, without the bias",
            "_supports_attention_backend": "engines put attention without the bias in place",
            "_get_files_timestamps": "push_to_hub leaves the exported code out",
        }.items()
    ),
    ("transformers", "PreTrainedConfig._attn_implementation", "layers do not ask for the ALiBi form"),
    ("transformers", "StaticCache", "the benchmark cannot take a token back"),
    ("transformers", "Trainer._issue_warnings_after_load", "resuming warns of tied weights"),
    ("transformers", "PreTrainedModel._init_weights", "loading a GPT-Neo asks for petabytes"),
    ("torch._C", "_are_functorch_transforms_active", "sdpa fails under torch.func"),
    ("transformers.models.auto.tokenization_auto", "TOKENIZER_MAPPING_NAMES", "tokenizers are not the family's"),
    (
        "transformers.models.auto.tokenization_auto",
        "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS",
        "tokenizers of some families are not the family's",
    ),
    ("transformers", "Trainer.set_initial_training_values", "resuming a finished run trains one step more"),
    ("transformers.generation.continuous_batching.cache", "PagedAttentionCache", "generate_batch is refused"),
    ("transformers.integrations.sdpa_attention", "repeat_kv", "the window baseline does not run"),
    ("torch._dynamo", "mark_static", "flex_attention compiles code that fails"),
    ("torch", "Tensor._version", "a mask that was changed in place is taken for the old one"),
]


@pytest.mark.parametrize(("module", "path", "breaks"), NAMES, ids=[f"{module}.{path}" for module, path, _ in NAMES])
def test_each_private_name_exists(module, path, breaks):
    found = import_module(module)
    for name in path.split("."):
        assert hasattr(found, name), f"{module}.{path} is gone: {breaks}; see hf_alibi/model/compat.py"
        found = getattr(found, name)


def test_the_table_of_weight_conversions_is_there():
    assert len(compat.checkpoint_conversions()) > 10, "weights of mixtures of experts would be newly initialized"


def test_the_cpu_kernel_is_there():
    assert cpu_kernel.is_available(), "sdpa on the CPU would take the plain kernel and skip no keys"


def test_without_the_cpu_kernel_another_path_is_exact(monkeypatch):
    model = hf_alibi.apply_alibi(stock_model("llama"))
    ids = torch.randint(3, 60, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).logits
        monkeypatch.setattr(cpu_kernel, "is_available", lambda: False)
        monkeypatch.setattr("hf_alibi.attention.sdpa.windowed.attend", lambda *args, **kwargs: pytest.fail("called"))
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
    hf_alibi.verify_alibi(model)


def test_a_layer_that_alibi_would_miss_is_an_error(monkeypatch):
    """As if one kind of layer no longer looked its attention up."""
    model = stock_model("llama")
    missed = model.model.layers[1].self_attn
    found = anatomy._is_self_attention
    monkeypatch.setattr(anatomy, "_is_self_attention", lambda module: module is not missed and found(module))
    with pytest.raises(ValueError, match="has 2 layers with self-attention by its config, but ALiBi finds 1"):
        hf_alibi.apply_alibi(model)
    assert type(model) is transformers.LlamaForCausalLM

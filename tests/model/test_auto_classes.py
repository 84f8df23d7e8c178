"""Checkpoints and fresh configs through the Auto classes."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    ByT5Tokenizer,
    GPT2Config,
    LlamaConfig,
)

import hf_alibi
from helpers.models import stock_config, stock_model, tokens
from hf_alibi.model.auto_classes import register

AUTO_CLASSES = [
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
]
ALIBI_CONFIG = {"gpt2": hf_alibi.AlibiGPT2Config, "llama": hf_alibi.AlibiLlamaConfig}
CAUSAL_LM = {"gpt2": hf_alibi.AlibiGPT2LMHeadModel, "llama": hf_alibi.AlibiLlamaForCausalLM}


def outputs(model):
    with torch.no_grad():
        return [x for x in model(tokens(1, 60)).to_tuple() if isinstance(x, torch.Tensor)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(outputs(a), outputs(b), strict=True))


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_a_patched_model_comes_back_identical(family, auto_class, tmp_path):
    model = hf_alibi.apply_alibi(stock_model(family, auto_class=auto_class))
    model.save_pretrained(tmp_path)
    loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not any(info.values())
    assert same(loaded, model)
    hf_alibi.verify_alibi(loaded)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == f"alibi_{family}"
    assert config["architectures"] == [type(model).__name__]
    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        assert not [name for name in weights.keys() if "wpe" in name or "rotary" in name]  # noqa: SIM118


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_a_fresh_config_builds_and_comes_back(family, auto_class, tmp_path):
    stock = stock_config(family)
    config = ALIBI_CONFIG[family](**{k: v for k, v in stock.to_dict().items() if k != "model_type"})
    model = auto_class.from_config(config).eval()
    hf_alibi.verify_alibi(model)
    model.save_pretrained(tmp_path)
    assert same(auto_class.from_pretrained(tmp_path), model)
    assert type(AutoConfig.from_pretrained(tmp_path)) is ALIBI_CONFIG[family]


def test_causal_lm_checkpoint_loads_as_base_and_classifier(family, tmp_path):
    model = hf_alibi.apply_alibi(stock_model(family))
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        states = model.base_model(tokens(1, 60)).last_hidden_state
        assert torch.equal(base(tokens(1, 60)).last_hidden_state, states)
    hf_alibi.verify_alibi(AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2))


def test_a_plain_checkpoint_converts_while_loading(family, tmp_path, caplog):
    stock = stock_model(family)
    stock.save_pretrained(tmp_path)
    loaded, info = CAUSAL_LM[family].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    hf_alibi.verify_alibi(loaded)
    assert same(loaded, hf_alibi.apply_alibi(stock))
    assert "model of type" not in caplog.text


def test_a_checkpoint_of_another_family_does_not_load(family, tmp_path):
    BertConfig(hidden_size=8, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type 'bert' cannot be loaded as"):
        CAUSAL_LM[family].from_pretrained(tmp_path)


def test_sharded_half_precision_checkpoints(family, tmp_path):
    model = hf_alibi.apply_alibi(stock_model(family).bfloat16())
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert same(loaded, model)
    hf_alibi.verify_alibi(loaded)


def test_custom_slopes_survive(family, tmp_path):
    slopes = hf_alibi.alibi_slopes(4).mul(0.3).tolist()
    model = hf_alibi.apply_alibi(stock_model(family), slopes=slopes)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.alibi_slopes == slopes
    assert same(loaded, model)


def test_scaling_is_chosen_at_load_time(family, tmp_path):
    model = hf_alibi.apply_alibi(stock_model(family))
    model.config.alibi_train_length = 32
    model.save_pretrained(tmp_path)
    for scaling in ({"type": "linear", "factor": 4.0}, {"type": "ntk", "factor": 4.0}, {"type": "dynamic"}):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, alibi_scaling=scaling)
        hf_alibi.verify_alibi(loaded)
        assert not same(loaded, model)


def test_scaling_that_cannot_work_is_refused_at_load_time(family, tmp_path):
    hf_alibi.apply_alibi(stock_model(family)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="needs alibi_train_length"):
        AutoModelForCausalLM.from_pretrained(tmp_path, alibi_scaling={"type": "dynamic"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, alibi_scaling={"type": "dynamic"}, alibi_train_length=8)
    hf_alibi.verify_alibi(loaded)


def test_a_class_of_this_package_needs_its_config(family):
    with pytest.raises(TypeError, match="needs an ALiBi config"):
        CAUSAL_LM[family](stock_config(family))


def test_the_implementation_is_chosen_at_load_time(family, tmp_path):
    hf_alibi.apply_alibi(stock_model(family)).save_pretrained(tmp_path)
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").config._attn_implementation
        == "eager"
    )
    with pytest.raises((ValueError, ImportError)):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="flash_attention_3")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alibi_slopes", [0.5, -1.0, 0.1, 0.1]),
        ("alibi_slopes", [float("inf")] * 4),
        ("alibi_slopes", "steep"),
        ("alibi_train_length", 0),
        ("alibi_train_length", 2.5),
        ("alibi_scaling", {"type": "yarn", "factor": 2.0}),
        ("alibi_scaling", {"type": "linear"}),
        ("alibi_scaling", "linear"),
    ],
)
def test_config_values_are_checked_when_read_and_when_set(family, field, value):
    with pytest.raises(StrictDataclassFieldValidationError, match=field):
        ALIBI_CONFIG[family](**{field: value})
    config = ALIBI_CONFIG[family]()
    with pytest.raises(StrictDataclassFieldValidationError, match=field):
        setattr(config, field, value)


def test_config_values_that_do_not_fit_together(family):
    with pytest.raises(Exception, match="3 values, but the model has"):
        ALIBI_CONFIG[family](alibi_slopes=[0.1, 0.2, 0.3])
    with pytest.raises(Exception, match="needs alibi_train_length"):
        ALIBI_CONFIG[family](alibi_scaling={"type": "dynamic"})


def test_stock_defaults_are_kept():
    """Fields of the ALiBi config must not override those of the family."""
    for stock, alibi in ((GPT2Config, hf_alibi.AlibiGPT2Config), (LlamaConfig, hf_alibi.AlibiLlamaConfig)):
        ours, theirs = alibi().to_dict(), stock().to_dict()
        changed = {name for name in theirs if ours[name] != theirs[name]}
        assert changed == {"model_type", stock.attribute_map.get("max_position_embeddings", "max_position_embeddings")}
        assert set(ours) - set(theirs) == {
            "alibi_slopes",
            "alibi_train_length",
            "alibi_scaling",
            "alibi_tolerance",
            "alibi_sink_tokens",
            "alibi_original_max_position_embeddings",
        }


def test_the_tokenizer_loads_beside_the_checkpoint(family, tmp_path):
    hf_alibi.apply_alibi(stock_model(family)).save_pretrained(tmp_path)
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("abc")["input_ids"][:3] == [100, 101, 102]


def test_registering_twice_changes_nothing():
    from transformers.models.auto import configuration_auto, modeling_auto

    def tables():
        mappings = (configuration_auto.CONFIG_MAPPING_NAMES, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        return [dict(mapping) for mapping in mappings], list(sys.meta_path)

    register()
    before = tables()
    assert before[0][0]["alibi_gpt2"] == "AlibiGPT2Config"
    register()
    assert tables() == before


def test_stock_checkpoints_still_load_as_stock(family, tmp_path):
    stock = stock_model(family)
    stock.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(stock)
    assert same_at(loaded, stock, 20)


def same_at(a, b, length):
    with torch.no_grad():
        return torch.equal(a(tokens(1, length)).logits, b(tokens(1, length)).logits)


def test_without_the_package_loading_fails_clearly(family, tmp_path):
    hf_alibi.apply_alibi(stock_model(family)).save_pretrained(tmp_path)
    code = f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert f"alibi_{family}" in result.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("BloomForCausalLM", "no ALiBi for model_type 'bloom': its attention has a bias by distance already"),
        ("MambaForCausalLM", "no ALiBi for model_type 'mamba': no attention"),
        ("BertModel", "AlibiBertModel has no causal self-attention"),
        ("ViTModel", "no causal self-attention"),
    ],
)
def test_classes_of_refused_families_cannot_be_built(name, message, tmp_path):
    """They exist by name, but a model of them would run without this package's bias."""
    stock = getattr(transformers, name)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = stock.config_class(**sizes)
    stock(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        getattr(hf_alibi, f"Alibi{name}").from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        getattr(hf_alibi, f"Alibi{name}")(getattr(hf_alibi, f"Alibi{type(config).__name__}")(**sizes))

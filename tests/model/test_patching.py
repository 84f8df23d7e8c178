import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    GPT2DoubleHeadsModel,
    GPT2LMHeadModel,
)

import hf_alibi
from helpers.models import snapshot, stock_config, stock_model, tokens
from hf_alibi.model import patching
from hf_alibi.model.anatomy import is_alibi, text_decoder
from hf_alibi.model.installation import LayerConfig


@pytest.mark.parametrize(
    "auto_class",
    [
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoModelForQuestionAnswering,
    ],
)
def test_converts_any_head_in_place_without_copying(family, auto_class):
    model = stock_model(family, auto_class=auto_class)
    stock_class, parameters = type(model), dict(model.named_parameters())
    assert hf_alibi.apply_alibi(model) is model
    assert type(model).__name__ == f"Alibi{stock_class.__name__}"
    assert isinstance(model, stock_class)
    assert type(model.base_model).__name__ == f"Alibi{stock_class.__name__[: 4 if family == 'gpt2' else 5]}Model"
    assert model.config.model_type == f"alibi_{family}"
    kept = dict(model.named_parameters())
    assert all(kept[name] is parameters[name] for name in kept)
    assert {name for name in parameters if name not in kept} == {n for n in parameters if "wpe" in n}
    hf_alibi.verify_alibi(model)


def test_converts_what_was_loaded_from_a_checkpoint(family, tmp_path):
    """Config and weights come from files here, with private values that a fresh config has not."""
    stock = stock_model(family)
    stock.save_pretrained(tmp_path / "stock")
    model = hf_alibi.apply_alibi(AutoModelForCausalLM.from_pretrained(tmp_path / "stock"))
    assert model.config.model_type == f"alibi_{family}"
    hf_alibi.verify_alibi(model)
    model.save_pretrained(tmp_path / "alibi")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "alibi")
    with torch.no_grad():
        expected = hf_alibi.apply_alibi(stock)(tokens(1, 50)).logits
        assert torch.equal(model(tokens(1, 50)).logits, expected)
        assert torch.equal(loaded(tokens(1, 50)).logits, expected)
    hf_alibi.verify_alibi(loaded)


def test_converts_double_heads():
    model = hf_alibi.apply_alibi(GPT2DoubleHeadsModel(stock_config("gpt2", num_labels=1)))
    hf_alibi.verify_alibi(model)


def test_leaves_the_given_config_as_it_was(family):
    config = stock_config(family)
    before = config.to_dict()
    model = hf_alibi.apply_alibi(AutoModelForCausalLM.from_config(config))
    assert config.to_dict() == before
    assert model.config is model.base_model.config
    assert not is_alibi(config)
    assert is_alibi(model.config)


def test_keeps_the_configs_own_values(family):
    model = hf_alibi.apply_alibi(stock_model(family, layer_norm_epsilon=1e-3, rms_norm_eps=1e-3, my_field="kept"))
    assert model.config.my_field == "kept"
    assert getattr(model.config, "layer_norm_epsilon" if family == "gpt2" else "rms_norm_eps") == 1e-3
    assert model.config._attn_implementation == "sdpa"


def test_no_length_limits_it(family):
    model = stock_model(family)
    assert text_decoder(model).limit == (32 if family == "gpt2" else None)
    hf_alibi.apply_alibi(model)
    assert text_decoder(model).limit is None
    with torch.no_grad():
        assert model(tokens(1, 500)).logits.isfinite().all()


def fails(model, error, match, **kwargs):
    before = snapshot(model)
    with pytest.raises(error, match=match):
        hf_alibi.apply_alibi(model, **kwargs)
    assert snapshot(model) == before


def test_refuses_a_second_conversion(family):
    fails(hf_alibi.apply_alibi(stock_model(family)), ValueError, "already has ALiBi")


@pytest.mark.parametrize(
    ("slopes", "match"),
    [
        ([0.5], "1 values, but the model has 4 heads"),
        ([0.5, 0.1, -1.0, 0], "not negative"),
        ([float("nan")] * 4, "finite"),
    ],
)
def test_refuses_slopes_that_do_not_fit(family, slopes, match):
    fails(stock_model(family), ValueError, match, slopes=slopes)


def test_refuses_an_encoder_and_a_family_with_its_own_bias():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 10}
    bert = BertModel(BertConfig(**sizes, num_attention_heads=2, intermediate_size=8))
    fails(bert, ValueError, "BertModel has no causal self-attention")
    fails(BloomForCausalLM(BloomConfig(**sizes, n_head=2)), ValueError, "model_type 'bloom': its attention has a bias")


def test_refuses_a_class_without_alibi_form():
    class Mine(GPT2LMHeadModel):
        pass

    fails(Mine(stock_config("gpt2")), ValueError, "no ALiBi form of .*Mine: Python cannot import it")


def test_refuses_a_decoder_without_a_number_of_heads():
    model = stock_model("llama")
    before = type(model.config).__getattribute__

    class Headless(type(model.config)):
        def __getattribute__(self, name):
            return None if name == "num_attention_heads" else before(self, name)

    model.config.__class__ = Headless
    with pytest.raises(ValueError, match="no number of attention heads"):
        hf_alibi.apply_alibi(model)


def test_refuses_what_is_no_model():
    with pytest.raises(TypeError, match="PreTrainedModel, got Linear"):
        hf_alibi.apply_alibi(torch.nn.Linear(2, 2))


def test_refuses_an_attention_implementation_without_alibi_form(family):
    model = stock_model(family)
    model.config._attn_implementation = "flash_attention_3"
    fails(model, ValueError, '"flash_attention_3"` is not supported with ALiBi; supported: eager, sdpa')


def test_refuses_bidirectional_models(family):
    fails(stock_model(family, is_causal=False), ValueError, "is_causal=False")


def test_switching_the_implementation_keeps_alibi(family):
    model, input_ids = hf_alibi.apply_alibi(stock_model(family)), tokens(1, 40)
    with torch.no_grad():
        before = model(input_ids).logits
        for name in ("eager", "sdpa", "eager"):
            model.set_attn_implementation(name)
            assert model.config._attn_implementation == name
            assert torch.allclose(model(input_ids).logits, before, atol=1e-5)
            hf_alibi.verify_alibi(model)


@pytest.mark.parametrize("name", ["flash_attention_3", "nonsense"])
def test_switching_to_an_unsupported_implementation_raises_and_changes_nothing(family, name):
    model = hf_alibi.apply_alibi(stock_model(family))
    with pytest.raises((ValueError, ImportError)):
        model.set_attn_implementation(name)
    assert model.config._attn_implementation == "sdpa"
    hf_alibi.verify_alibi(model)


def test_an_unsupported_implementation_set_behind_our_back_raises_in_the_forward(family):
    model = hf_alibi.apply_alibi(stock_model(family))
    model.config._attn_implementation = "flash_attention_3"
    with pytest.raises(ValueError, match="is not supported with ALiBi"):
        model(tokens(1, 5))


def test_cross_attention_is_untouched():
    model = GPT2LMHeadModel(stock_config("gpt2", add_cross_attention=True)).eval()
    hf_alibi.apply_alibi(model)
    assert [name for name, _ in text_decoder(model).self_attentions] == ["transformer.h.0.attn", "transformer.h.1.attn"]
    assert model.transformer.h[0].crossattention.config is model.config
    hf_alibi.verify_alibi(model)
    # Cross-attention is a set: the order of what it reads changes nothing.
    states = torch.randn(1, 7, model.config.n_embd)
    with torch.no_grad():
        forward = model(tokens(1, 5), encoder_hidden_states=states).logits
        backward = model(tokens(1, 5), encoder_hidden_states=states.flip(1)).logits
    assert torch.allclose(forward, backward, atol=1e-5)


def test_gpt2_options_of_attention_keep_their_meaning():
    """Scaling by layer and upcasting concern the logits, not the bias."""
    options = {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}
    model = hf_alibi.apply_alibi(stock_model("gpt2", **options))
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        hf_alibi.verify_alibi(model)


def test_copies_and_pickles(family):
    model, input_ids = hf_alibi.apply_alibi(stock_model(family)), tokens(1, 20)
    with torch.no_grad():
        expected = model(input_ids).logits
        for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            assert torch.equal(twin(input_ids).logits, expected)
            twin.set_attn_implementation("eager")
            hf_alibi.verify_alibi(twin)
    assert model.config._attn_implementation == "sdpa"


def test_a_layer_reads_and_writes_the_models_config():
    config = SimpleNamespace(_attn_implementation="sdpa", hidden_size=8)
    view = LayerConfig(config, SimpleNamespace(alibi_slopes=[0.5]), 0)
    assert view._attn_implementation == "alibi_sdpa"
    assert view.hidden_size == 8
    assert view.alibi_slopes == [0.5]
    view._attn_implementation = "eager"
    assert config._attn_implementation == "eager"
    assert copy.copy(view)._attn_implementation == "alibi_eager"
    with pytest.raises(AttributeError):
        _ = view.missing
    config._attn_implementation = "flash_attention_3"
    with pytest.raises(ValueError, match="is not supported with ALiBi"):
        _ = view._attn_implementation


def test_a_layer_reads_its_own_slopes_of_several():
    alibi = SimpleNamespace(alibi_slopes=[[0.5], [0.25]])
    assert [LayerConfig(SimpleNamespace(), alibi, layer).alibi_slopes for layer in (0, 1)] == [[0.5], [0.25]]


def test_supported_families():
    table = hf_alibi.supported_families()
    assert len(table) >= 125
    assert {"gpt2", "llama", "qwen3", "gemma3_text", "mistral", "gpt_oss"} <= set(table)
    assert "bloom" not in table
    for text in (repr(table), table.markdown()):
        assert "qwen3_moe" in text
        assert table.refused["mamba"] in text


def test_it_says_once_that_training_is_needed(caplog):
    patching._say_once.cache_clear()
    caplog.set_level("WARNING", logger="hf_alibi")  # commands are quieter, whichever test ran one before
    for _ in range(2):
        hf_alibi.apply_alibi(stock_model("llama"))
    assert [record.getMessage() for record in caplog.records] == [
        "AlibiLlamaForCausalLM now has ALiBi, which its weights have never seen: train it before you use it, or "
        "convert it by `hf-alibi convert`"
    ]

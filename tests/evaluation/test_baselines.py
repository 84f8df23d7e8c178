"""Baselines: changed configs on shared weights, equal to what transformers loads with such a config."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, MistralConfig

import hf_alibi
from helpers.models import stock_model, tokens
from helpers.runs import refused
from hf_alibi.evaluation.baselines import ALL, BASELINES, Lengths, check_names, choose, with_baseline

ROPE = {"rope_linear": "linear", "rope_dynamic": "dynamic", "rope_yarn": "yarn"}
REACH = Lengths(train_length=16, longest=128)  # the tiny models are made for 32 positions


@torch.no_grad()
def logits(model, ids):
    return model(ids, use_cache=False).logits


def chosen(names, model, reach=REACH):
    return choose(names, {"m": model}, reach)["m"]


@pytest.mark.parametrize(("name", "rope_type"), ROPE.items())
def test_rope_scaling_equals_transformers_loaded_with_it(tmp_path, name, rope_type):
    model, ids = stock_model("llama"), tokens(1, 128)
    model.save_pretrained(tmp_path)
    parameters = {"rope_type": rope_type, "factor": 4.0, "rope_theta": 10000.0}
    if rope_type == "yarn":
        parameters["original_max_position_embeddings"] = 32
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, rope_parameters=parameters)
    baseline = with_baseline(model, name, REACH)
    assert torch.equal(logits(baseline, ids), logits(loaded, ids))
    assert (logits(baseline, ids) - logits(model, ids)).abs().max() > 1e-3
    short_differs = (logits(baseline, ids[:, :20]) - logits(model, ids[:, :20])).abs().max() > 1e-3
    assert short_differs == (rope_type != "dynamic")  # which leaves lengths alone that the model was made for


@pytest.mark.parametrize(("name", "scaling"), [("alibi_linear", "linear"), ("alibi_ntk", "ntk")])
def test_slope_scaling_equals_loading_with_it(tmp_path, family, name, scaling):
    model, ids = hf_alibi.apply_alibi(stock_model(family)), tokens(1, 60)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, alibi_scaling={"type": scaling, "factor": 8.0})
    baseline = with_baseline(model, name, REACH)
    torch.testing.assert_close(logits(baseline, ids), logits(loaded, ids))
    assert (logits(baseline, ids) - logits(model, ids)).abs().max() > 1e-3


@pytest.mark.parametrize("name", BASELINES)
def test_weights_are_shared_and_the_model_stays_as_it_is(name):
    model = stock_model("llama", tie_word_embeddings=True)
    if name.startswith("alibi"):
        hf_alibi.apply_alibi(model)
    before, config = logits(model, tokens(1, 60)), copy.deepcopy(model.config.to_dict())
    baseline = with_baseline(model, name, REACH)
    assert (logits(baseline, tokens(1, 60)) - before).abs().max() > 1e-3
    assert {p.data_ptr() for p in baseline.parameters()} == {p.data_ptr() for p in model.parameters()}
    assert not any(p.is_meta for p in (*baseline.parameters(), *baseline.buffers()))
    assert model.config.to_dict() == config
    assert torch.equal(logits(model, tokens(1, 60)), before)
    assert not baseline.training


def test_the_window_is_the_training_length():
    model, ids = stock_model("llama", num_hidden_layers=1), tokens(1, 60)
    baseline = with_baseline(model, "sliding_window", REACH)
    changed = ids.clone()
    changed[0, 59 - 16] += 1  # the first token that is out of sight of the last
    assert torch.equal(logits(baseline, ids)[0, -1], logits(baseline, changed)[0, -1])
    changed[0, 59 - 15] += 1
    assert not torch.equal(logits(baseline, ids)[0, -1], logits(baseline, changed)[0, -1])


def test_all_is_what_fits_the_kind_of_model():
    assert list(chosen([ALL], stock_model("llama")).labels) == [*ROPE, "sliding_window"]
    assert list(chosen([ALL], stock_model("gpt2")).labels) == ["sliding_window"]
    assert list(chosen([ALL], hf_alibi.apply_alibi(stock_model("llama"))).labels) == ["alibi_linear", "alibi_ntk"]
    assert chosen([ALL], hf_alibi.apply_alibi(stock_model("llama"), slopes=[0.0] * 4)) == ({}, {})
    assert chosen([], stock_model("llama")) == ({}, {})


def test_labels_say_how_far_it_is_stretched():
    reach = Lengths(train_length=16, longest=112)
    assert chosen(["rope_yarn", "sliding_window"], stock_model("llama"), reach).labels == {
        "rope_yarn": "YaRN ×3.5",
        "sliding_window": "window of 16",
    }
    alibi = hf_alibi.apply_alibi(stock_model("llama"))
    assert chosen(["alibi_linear"], alibi, reach).labels == {"alibi_linear": "slopes ÷7"}


def test_what_is_within_reach_or_changed_already_is_left_out_with_the_reason():
    llama, alibi = stock_model("llama"), hf_alibi.apply_alibi(stock_model("llama"))
    within = Lengths(train_length=16, longest=32)
    assert chosen(list(ROPE), llama, within).labels == {}
    assert "32, is within the 32 tokens" in chosen(["rope_yarn"], llama, within).left_out["rope_yarn"]
    assert chosen(["rope_yarn"], llama, Lengths(16, 33)).labels
    nothing = Lengths(train_length=16, longest=16)
    for model, name in ((llama, "sliding_window"), (alibi, "alibi_ntk")):
        assert chosen([name], model, nothing).left_out == {name: "no length is beyond the training length"}
    scaled = stock_model("llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})
    assert "rope_type linear" in chosen(["rope_yarn"], scaled).left_out["rope_yarn"]
    alibi.config.alibi_scaling = {"type": "linear", "factor": 2.0}
    assert chosen(["alibi_ntk"], alibi).left_out == {"alibi_ntk": "its slopes are scaled already"}
    table = stock_model("gpt2", n_positions=16)
    assert chosen(["sliding_window"], table).left_out == {"sliding_window": "its table of positions ends at 16 tokens"}


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MistralConfig(**SMALL, vocab_size=64, sliding_window=8), "window of its own, of 8 tokens"),
        (Gemma2Config(**SMALL, vocab_size=64, head_dim=8), "not all of its layers are full attention"),
    ],
)
def test_windows_of_a_models_own_are_left_alone(config, reason):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert reason in chosen(["sliding_window"], model).left_out["sliding_window"]


def test_names_are_checked():
    check_names([ALL])
    check_names(BASELINES)
    for names in (["yarn"], [ALL, "rope_yarn"]):
        with refused(r"baselines names '.*'; allowed: rope_linear, rope_dynamic, .*or all"):
            check_names(names)


@pytest.mark.parametrize(("name", "family"), [("alibi_linear", "llama"), ("rope_yarn", "gpt2")])
def test_a_baseline_for_no_given_model_is_an_error(name, family):
    with refused(f"baselines names '{name}', which is for none of the models m"):
        chosen([name], stock_model(family))

"""What each engine is given, and what it is not."""

import math

import pytest
from transformers import Qwen2Config

import hf_alibi
from helpers.models import stock_config
from hf_alibi.configuration import alibi_config
from hf_alibi.export.names import TARGET_NAMES
from hf_alibi.export.targets import TARGETS, layer_slopes, support_table

HEADS = 6


def config(family="llama", **fields):
    return alibi_config(stock_config(family, HEADS), **fields)


def papers():
    return hf_alibi.alibi_slopes(HEADS).tolist()


def test_the_names_are_those_of_the_table():
    assert tuple(TARGETS) == TARGET_NAMES


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_papers_slopes_go_everywhere(target, family):
    assert TARGETS[target].refusal(config(family)) is None
    assert TARGETS[target].refusal(config(family, alibi_slopes=papers())) is None


GLOBAL = [*[0.5] * (HEADS - 1), 0.0]
REFUSED = [
    ("vllm", {"alibi_sink_tokens": 1}, "no sink tokens, and the model has 1"),
    ("gguf", {"alibi_sink_tokens": 2}, "no sink tokens, and the model has 2"),
    ("vllm", {"alibi_scaling": {"type": "dynamic"}, "alibi_train_length": 8}, "change with the length"),
    ("gguf", {"alibi_scaling": {"type": "dynamic"}, "alibi_train_length": 8}, "change with the length"),
    ("gguf", {"alibi_scaling": {"type": "linear", "factor": 2}}, "other slopes than the paper's, in 2 of 2 layers"),
    ("gguf", {"alibi_slopes": [0.5] * HEADS}, "other slopes than the paper's, in 2 of 2 layers"),
    ("gguf", {"alibi_slopes": GLOBAL}, "no global heads, in 2 of 2 layers"),
    ("gguf", {"alibi_slopes": [papers(), GLOBAL]}, "no global heads, in 1 of 2 layers"),
]


@pytest.mark.parametrize(("target", "fields", "reason"), REFUSED)
def test_what_an_engine_cannot_hold_is_refused_by_name(target, fields, reason):
    assert reason in TARGETS[target].refusal(config(**fields))


HELD = [
    ("vllm", {"alibi_slopes": [papers(), GLOBAL]}),
    ("vllm", {"alibi_scaling": {"type": "ntk", "factor": 4}}),
    ("onnx", {"alibi_slopes": GLOBAL, "alibi_sink_tokens": 2}),
    ("onnx", {"alibi_scaling": {"type": "dynamic"}, "alibi_train_length": 8}),
]


@pytest.mark.parametrize(("target", "fields"), HELD)
def test_what_an_engine_can_hold_is_not(target, fields):
    assert TARGETS[target].refusal(config(**fields)) is None


def test_a_temperature_that_the_conversion_kept_is_refused_or_computed():
    scaling = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
    sharp = alibi_config(stock_config("llama", HEADS, rope_parameters=scaling))
    assert "no temperature, which the conversion kept of 'yarn'" in TARGETS["vllm"].refusal(sharp)
    assert "no temperature" in TARGETS["gguf"].refusal(sharp)
    assert TARGETS["onnx"].refusal(sharp) is None
    linear = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    assert TARGETS["vllm"].refusal(alibi_config(stock_config("llama", HEADS, rope_parameters=linear))) is None


@pytest.mark.parametrize("target", TARGETS)
def test_other_models_are_refused(target):
    assert "plain 'llama' model; convert it first" in TARGETS[target].refusal(stock_config("llama"))
    other = alibi_config(hf_alibi.AlibiBartConfig.__mro__[1]())
    assert "no model of type 'bart'" in TARGETS[target].refusal(other)
    windows = Qwen2Config(num_hidden_layers=2, use_sliding_window=True, max_window_layers=1)
    assert "sliding" in TARGETS[target].refusal(alibi_config(windows))


def test_slopes_of_layers_are_those_that_the_model_uses():
    by_layer = [papers(), GLOBAL]
    assert layer_slopes(config()) == [papers()] * 2
    assert layer_slopes(config(alibi_slopes=by_layer)) == by_layer
    halved = layer_slopes(config(alibi_slopes=by_layer, alibi_scaling={"type": "linear", "factor": 2}))
    assert halved == [[slope / 2 for slope in layer] for layer in by_layer]
    stretched = layer_slopes(config(alibi_scaling={"type": "ntk", "factor": 4}))[0]
    assert max(stretched) == max(papers())
    assert math.isclose(min(stretched), min(papers()) / 4, rel_tol=1e-6)


def test_the_docs_show_the_table():
    from helpers.runs import ROOT

    assert support_table() in (ROOT / "docs" / "export.md").read_text(encoding="utf-8")

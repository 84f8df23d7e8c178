"""Models with global heads, in all layers or in some: the float64 reference, caches, saved and refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_alibi
from helpers import reference
from helpers.models import stock_model, tokens
from hf_alibi.attention.cache import AlibiCache
from hf_alibi.conversion import matching
from hf_alibi.conversion.matching import matching_order
from hf_alibi.conversion.measures import HeadMeasures
from hf_alibi.global_heads import GlobalHeads
from hf_alibi.model.anatomy import has_no_positions

# transformers has no flex_attention for GPT-2.
MODELS = [("gpt2", "eager"), ("gpt2", "sdpa"), ("llama", "eager"), ("llama", "sdpa"), ("llama", "flex_attention")]


def reference_slopes(number, every, layers=2, heads=4):
    """(layers, heads): the textbook's, with the flattest ones 0 in some layers."""
    slopes = reference.slopes(heads).repeat(layers, 1)
    # All slopes fall with the place at 4 heads; LLaMA shares each key head between two.
    slopes[every - 1 :: every, heads - number :] = 0
    return slopes


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize(("family", "backend"), MODELS)
@torch.no_grad()
def test_logits_equal_the_reference(family, every, backend):
    model = stock_model(family, attn_implementation=backend)
    hf_alibi.apply_alibi(model.eval(), global_heads=2, global_every=every)
    input_ids = tokens(2, 40)
    mask = torch.ones_like(input_ids)
    mask[1, :7] = 0
    want = reference.LOGITS[family](model, input_ids, mask, head_slopes=reference_slopes(2, every))
    got = model(input_ids, attention_mask=mask).logits.double()
    assert (got - want)[mask.bool()].abs().max() < 2e-5
    plain = reference.LOGITS[family](model, input_ids, mask)
    assert (got - plain)[mask.bool()].abs().max() > 1e-3


@pytest.mark.parametrize("make_cache", [None, AlibiCache], ids=["dynamic", "AlibiCache"])
@torch.no_grad()
def test_decoding_equals_one_pass(make_cache):
    model = stock_model("llama", attn_implementation="sdpa")
    hf_alibi.apply_alibi(model.eval(), global_heads=2, global_every=2)
    input_ids = tokens(1, 60)
    want = model(input_ids).logits[:, -1]
    first = model(input_ids[:, :50], past_key_values=make_cache and make_cache(), use_cache=True)
    past, logits = first.past_key_values, first.logits[:, -1]
    for index in range(50, 60):
        logits = model(input_ids[:, index : index + 1], past_key_values=past).logits[:, -1]
    assert (logits - want).abs().max() < 1e-5


def test_a_saved_model_comes_back(tmp_path):
    model = hf_alibi.apply_alibi(stock_model("llama").eval(), global_heads=3, global_every=2)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.alibi_slopes == model.config.alibi_slopes
    assert len(loaded.config.alibi_slopes) == 2
    input_ids = tokens(1, 30)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


def test_each_layer_is_verified_with_its_own_slopes():
    model = hf_alibi.apply_alibi(stock_model("gpt2"), global_heads=1, global_every=2)
    first, second = hf_alibi.verify_alibi(model)
    assert min(first.slopes) > 0
    assert min(second.slopes) == pytest.approx(0, abs=1e-6)


def test_slopes_of_each_layer_may_be_given():
    slopes = [[0.5, 0.25, 0.0, 0.0], [1.0, 0.5, 0.25, 0.125]]
    model = hf_alibi.apply_alibi(stock_model("gpt2").eval(), slopes=slopes)
    input_ids = tokens(1, 30)
    given = torch.tensor(slopes).double()
    want = reference.gpt2_logits(model, input_ids, torch.ones_like(input_ids), head_slopes=given)
    with torch.no_grad():
        assert (model(input_ids).logits - want).abs().max() < 2e-5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"slopes": [0.5, 0.25, 0.125, 0.0], "global_heads": 1}, "both slopes and global_heads given"),
        ({"slopes": [[0.5, 0.25, 0.125, 0.0]]}, "alibi_slopes has slopes of 1 layers, but the model has 2"),
        ({"slopes": [[0.5, 0.25], [0.5, 0.25]]}, "alibi_slopes has 2 values, but the model has 4 heads"),
        ({"slopes": [[0.5, 0.25, -1, 1], [0.5, 0.25, 1, 1]]}, r"not negative \(logits per token\), got \[-1.0\]"),
        ({"global_heads": 5}, "global_heads is 5; it must be from 0 to 4"),
        ({"global_heads": 1, "global_every": 9}, "global_every is 9; it must be from 1 to 2"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(given, message):
    model = stock_model("llama")
    with pytest.raises(ValueError, match=message):
        hf_alibi.apply_alibi(model, **given)
    assert type(model).__name__ == "LlamaForCausalLM"


def test_a_checkpoint_with_too_few_layers_of_slopes_does_not_load(tmp_path):
    model = hf_alibi.apply_alibi(stock_model("llama"), global_heads=1, global_every=2)
    model.config.alibi_slopes = model.config.alibi_slopes[:1]
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="slopes of 1 layers, but the model has 2"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_model_whose_heads_are_all_global_has_no_positions():
    everywhere = hf_alibi.apply_alibi(stock_model("llama"), global_heads=4)
    somewhere = hf_alibi.apply_alibi(stock_model("llama"), global_heads=4, global_every=2)
    assert has_no_positions(everywhere.config)
    assert not has_no_positions(somewhere.config)


def test_matching_puts_the_farthest_looking_heads_at_the_global_places():
    reaches = [900.0, 2.0, 3.0, 800.0, 5.0, 6.0, 7.0, 8.0]
    order = matching_order(reaches, 8, GlobalHeads(2).slopes(8, 8, 1))
    assert {order[6], order[7]} == {0, 3}
    # With groups of two the group of the farthest looking head comes there, steep inside flat or not.
    order = matching_order([900.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], 4, GlobalHeads(1).slopes(8, 4, 1))
    assert order[7] == 0
    assert order[6] == 1


def test_match_heads_gives_each_layer_the_order_of_its_own_slopes(monkeypatch):
    model = stock_model("llama", 6, num_key_value_heads=3)
    # Head 2 looks farthest, and the paper's slopes alone would put it at another place than the global one, 3.
    reaches = torch.tensor([15.0, 24.0, 51.0, 11.0, 22.0, 28.0])
    monkeypatch.setattr(matching, "measure_heads", lambda model, input_ids: HeadMeasures([reaches, reaches], 0.0))
    first, second = hf_alibi.match_heads(model, tokens(1, 30), global_heads=1, global_every=2)
    assert first == matching_order(reaches.tolist(), 3)
    assert first.index(2) != 3
    assert second.index(2) == 3
    hf_alibi.apply_alibi(model, global_heads=1, global_every=2)
    assert [layer.index(0) if 0 in layer else None for layer in model.config.alibi_slopes] == [None, 3]

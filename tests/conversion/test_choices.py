"""What a recipe leaves open is chosen by measuring; what is given stays."""

import pytest
import torch

from helpers.models import stock_model, tokens
from hf_alibi.conversion.choices import choose
from hf_alibi.conversion.measures import HeadMeasures, measure_heads
from hf_alibi.conversion.recipe import convert_model
from hf_alibi.conversion.settings import ConversionArguments
from hf_alibi.errors import InputError


def measured(first_token=0.0, reaches=(1.0, 9.0)):
    return HeadMeasures([torch.tensor(reaches)] * 2, first_token)


def chosen(measures, **recipe):
    choices = choose(stock_model("llama", 4), ConversionArguments(match_tokens=64, **recipe), measures)
    return choices.match_heads, choices.sink_tokens, choices.reasons


def test_the_share_of_the_first_token_is_measured():
    """Against the mean over heads and over the queries of the second half, one by one."""
    model = stock_model("llama", 4)
    input_ids = tokens(3, 21)
    model.set_attn_implementation("eager")
    attentions = [model(row[None], output_attentions=True).attentions for row in input_ids]
    shares = [
        layer[0, head, query, 0].item() - 1 / (query + 1)
        for row in attentions
        for layer in row
        for head in range(4)
        for query in range(10, 21)
    ]
    assert measure_heads(model, input_ids).first_token == pytest.approx(sum(shares) / len(shares), abs=1e-6)


def test_heads_that_look_at_all_tokens_alike_rest_nowhere():
    model = stock_model("llama", 4)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    measures = measure_heads(model, tokens(2, 40))
    assert measures.first_token == pytest.approx(0.0, abs=1e-6)
    assert measures.spread() == pytest.approx(1.0, abs=1e-4)
    assert chosen(measures)[:2] == (False, 0)


@pytest.mark.parametrize(("share", "sinks"), [(0.099, 0), (0.1, 1), (0.6, 1), (-0.02, 0)])
def test_a_model_that_rests_on_the_first_token_gets_a_sink(share, sinks):
    match, given, reasons = chosen(measured(share))
    assert (match, given) == (True, sinks)
    assert f"sink tokens: {sinks}, since {share:.1%} of the attention rests on the first token" in reasons[1]


@pytest.mark.parametrize(("reaches", "match"), [((1.0, 9.0), True), ((5.0, 5.5), False)])
def test_heads_that_differ_are_matched(reaches, match):
    given, _, reasons = chosen(measured(reaches=reaches))
    assert given is match
    assert reasons[0].startswith("heads are matched" if match else "heads are not matched")


def test_what_is_given_stays():
    assert chosen(measured(0.9), sink_tokens=0, match_heads=False) == (False, 0, [])
    assert chosen(measured(0.0), sink_tokens=2)[:2] == (True, 2)


def test_without_measuring_nothing_open_is_done():
    choices = choose(stock_model("llama", 4), ConversionArguments(), None)
    assert (choices.match_heads, choices.sink_tokens, choices.reasons) == (False, 0, [])
    with pytest.raises(InputError, match="match_heads is true and match_tokens 0"):
        ConversionArguments(match_heads=True)


def test_a_model_that_cannot_have_sinks_gets_none_and_the_reason():
    model = stock_model("mistral", 4, sliding_window=16)
    choices = choose(model, ConversionArguments(match_tokens=64), measured(0.5))
    assert choices.sink_tokens == 0
    assert "sink tokens: 0, since" in choices.reasons[-1]
    assert "window" in choices.reasons[-1]


@pytest.mark.parametrize(("match_tokens", "matched"), [(0, False), (40, True)])
def test_the_recipe_does_and_records_what_is_chosen(match_tokens, matched):
    model = stock_model("llama", 4)
    blocks = tokens(20, 20)
    done = convert_model(model, blocks, ConversionArguments(match_tokens=match_tokens))
    assert ("head_order" in done) is done["choices"]["match_heads"]
    assert done["choices"]["sink_tokens"] == model.config.alibi_sink_tokens == 0
    assert len(done["choices"]["reasons"]) == 2 * matched

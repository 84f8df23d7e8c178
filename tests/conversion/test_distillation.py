"""Layer distillation: what layers are fitted to, through what, and what is refused."""

import copy

import pytest
import torch

import hf_alibi
from helpers.models import stock_model, tokens
from helpers.tiny_models import stock_tiny
from hf_alibi.conversion import distillation
from hf_alibi.conversion.distillation import FitSettings, check_distillation, distill_layers
from hf_alibi.model.anatomy import text_decoder

FIT = {"epochs": 4, "learning_rate": 5e-3, "batch_size": 4}
BLOCKS = 160
FITTED, HELD_OUT = slice(-8), slice(-8, None)


@pytest.fixture
def input_ids():
    return tokens(BLOCKS, 24)


def pair(model, **options):
    """A converted model, and its teacher."""
    teacher = copy.deepcopy(model)
    return hf_alibi.apply_alibi(model, **options), teacher


def hidden_states(model, input_ids, layer):
    """What comes out of a decoder layer in a whole forward pass of the model."""
    seen = []
    layers = model.model.layers if hasattr(model, "model") else model.transformer.h
    hook = layers[layer].register_forward_hook(
        lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        model(input_ids)
    hook.remove()
    return seen[0].double()


def reference_error(model, teacher, input_ids, layer):
    """Squared error of hidden states without their size, each channel as a share of the teacher's variance."""

    def unit(states):
        return states / states.square().mean(-1, keepdim=True).sqrt()

    wanted = unit(hidden_states(teacher, input_ids, layer))
    given = unit(hidden_states(model, input_ids[HELD_OUT], layer))
    variance = wanted[FITTED].flatten(0, 1).var(0, correction=0)
    return ((given - wanted[HELD_OUT]).square() / variance).mean().item()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_layer_comes_nearer_to_what_it_was_and_only_attention_changes(family, input_ids):
    model, teacher = pair(stock_model(family, 4))
    untouched = reference_error(model, teacher, input_ids, 1)
    before, of_teacher = copy.deepcopy(model.state_dict()), copy.deepcopy(teacher.state_dict())
    fits = distill_layers(model, teacher, input_ids, FitSettings(**FIT))
    assert len(fits) == 2
    assert fits[0].after < 0.7 * fits[0].before
    assert fits[1].after < fits[1].before < untouched
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if "attn." in name}
    assert all(torch.equal(weight, of_teacher[name]) for name, weight in teacher.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    hf_alibi.verify_alibi(model)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("sink_tokens", [0, 1])
def test_the_errors_are_those_of_the_whole_models_on_blocks_not_fitted_to(family, sink_tokens, input_ids):
    """The layers before are fitted already when a layer is: the last error is that of the finished model."""
    model, teacher = pair(stock_model(family, 4), sink_tokens=sink_tokens)
    first = reference_error(model, teacher, input_ids, 0)
    fits = distill_layers(model, teacher, input_ids, FitSettings(**FIT))
    assert fits[0].before == pytest.approx(first, rel=1e-3)
    for layer, fit in enumerate(fits):
        assert fit.after == pytest.approx(reference_error(model, teacher, input_ids, layer), rel=1e-3)


def test_a_model_that_is_already_right_has_no_error(input_ids):
    """Slopes of 0 and rotations of 0: nothing was converted away."""
    stock = stock_model("llama", 4)
    stock.model.rotary_emb.inv_freq.zero_()
    model, teacher = pair(stock, slopes=[0.0] * 4)
    fits = distill_layers(model, teacher, input_ids, FitSettings(epochs=1, learning_rate=1e-9, batch_size=4))
    assert all(fit.before < 1e-9 for fit in fits)


def test_the_same_seed_gives_the_same_weights(input_ids):
    weights = []
    for seed in (0, 0, 1):
        model, teacher = pair(stock_model("llama", 4))
        distill_layers(model, teacher, input_ids, FitSettings(**{**FIT, "epochs": 1}, seed=seed))
        weights.append(model.model.layers[0].self_attn.q_proj.weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("model_type", ["qwen3", "mistral", "gemma2", "gpt_neox", "phi3", "olmo2", "opt", "lfm2"])
def test_other_families(model_type, input_ids):
    model, teacher = pair(stock_tiny(model_type))
    fits = distill_layers(model, teacher, input_ids, FitSettings(**FIT))
    assert all(fit.after < fit.before for fit in fits)
    assert len(fits) == len(list(text_decoder(model).self_attentions))
    hf_alibi.verify_alibi(model)


def test_half_precision_keeps_the_type_of_the_weights(input_ids):
    model, teacher = pair(stock_model("llama", 4))
    fits = distill_layers(model, teacher, input_ids, FitSettings(**FIT, bf16=True))
    assert all(fit.after < fit.before for fit in fits)
    in_float32 = distill_layers(*pair(stock_model("llama", 4)), input_ids, FitSettings(**FIT))
    assert 0 < abs(fits[0].before - in_float32[0].before) < 0.01
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_frozen_weights_stay(input_ids):
    model, teacher = pair(stock_model("llama", 4))
    frozen = model.model.layers[0].self_attn.k_proj.weight.requires_grad_(False)
    before = frozen.clone()
    distill_layers(model, teacher, input_ids, FitSettings(**{**FIT, "epochs": 1}))
    assert torch.equal(frozen, before)


def test_a_model_of_frozen_attention_is_refused(input_ids):
    model, teacher = pair(stock_model("llama", 4))
    for layer in model.model.layers:
        layer.self_attn.requires_grad_(False)
    with pytest.raises(ValueError, match="all weights of it in AlibiLlamaForCausalLM are frozen"):
        distill_layers(model, teacher, input_ids, FitSettings(**FIT))


def test_channels_that_are_always_the_same_do_no_harm(input_ids):
    """Their variance is 0, or less by rounding."""
    stock = stock_model("llama", 4)
    with torch.no_grad():
        stock.model.embed_tokens.weight[:, 3] = 0.1
        for layer in stock.model.layers:
            layer.self_attn.o_proj.weight[3] = 0
            layer.mlp.down_proj.weight[3] = 0
    fits = distill_layers(*pair(stock), input_ids, FitSettings(**FIT))
    assert all(fit.after < fit.before < float("inf") for fit in fits)


def test_the_first_quarter_of_the_steps_is_guided(input_ids, monkeypatch):
    """There each layer reads what the unconverted layer before it gave: its error depends on no other layer."""
    guided = []
    errors = distillation._Fit._errors
    monkeypatch.setattr(
        distillation._Fit, "_errors", lambda fit, batch, **told: guided.append(told) or errors(fit, batch, **told)
    )
    model, teacher = pair(stock_model("llama", 4))
    distill_layers(model, teacher, input_ids, FitSettings(**FIT))
    held_out = 2 * 2  # batches, before and after
    assert len(guided) == 4 * 38 + held_out
    assert guided[2 : 2 + 38] == [{"guided": True}] * 38
    assert guided[:2] + guided[2 + 38 :] == [{"guided": False}] * (3 * 38 + held_out)


def test_guided_layers_read_what_the_unconverted_layers_gave(input_ids):
    model, teacher = pair(stock_model("llama", 4))
    fit = distillation._Fit(model, teacher, input_ids, bf16=False)
    batch = torch.arange(4)
    fit.measure_deviations([batch])
    with torch.no_grad():
        before = [error.item() for error in fit._errors(batch, guided=True)]
        alone = [error.item() for error in fit._errors(batch, guided=False)]
        model.model.layers[0].self_attn.o_proj.weight.mul_(3)
        after = [error.item() for error in fit._errors(batch, guided=True)]
        changed = [error.item() for error in fit._errors(batch, guided=False)]
    assert after[0] != before[0]
    assert after[1] == before[1]
    assert changed[1] != alone[1]


def test_held_out_blocks_are_not_learned_from(input_ids):
    weights = []
    for seed in (2, 3):
        text = torch.cat([input_ids[FITTED], tokens(8, 24, seed=seed)])
        model, teacher = pair(stock_model("llama", 4))
        distill_layers(model, teacher, text, FitSettings(**{**FIT, "epochs": 1}))
        weights.append(model.model.layers[0].self_attn.q_proj.weight.detach())
    assert torch.equal(*weights)


def test_blocks_that_do_not_fill_a_batch_are_left_out(input_ids):
    weights = []
    for blocks in (20, 23):
        model, teacher = pair(stock_model("llama", 4))
        distill_layers(model, teacher, input_ids[:blocks], FitSettings(**{**FIT, "epochs": 1}))
        weights.append(model.model.layers[0].self_attn.q_proj.weight.detach())
    assert torch.equal(*weights)


def test_what_cannot_be_distilled_is_refused(input_ids):
    with pytest.raises(ValueError, match="was given 15 blocks of text and needs at least 16"):
        check_distillation(stock_model("llama", 4), input_ids[:15], batch_size=4)
    with pytest.raises(ValueError, match="needs the unconverted model as its teacher"):
        check_distillation(hf_alibi.apply_alibi(stock_model("llama", 4)), input_ids, batch_size=4)


def test_layers_that_run_more_than_once_are_refused(input_ids):
    model = stock_model("llama", 4)
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(ValueError, match="needs layers that run once, but LlamaForCausalLM ran layer 0 2 times"):
        check_distillation(model, input_ids, batch_size=4)


def test_layers_may_read_more_of_a_text_than_hidden_states(input_ids):
    """Each layer gets its inputs from its own model, whatever stands between the layers."""
    stock = stock_model("llama", 4)
    model, teacher = pair(stock)
    for each in (model, teacher):
        each.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] + args[0].mean(),))
    fits = distill_layers(model, teacher, input_ids, FitSettings(**FIT))
    assert all(fit.after < fit.before for fit in fits)

"""Attention distillation: what is recorded, what is fitted, and what is refused."""

import copy

import pytest
import torch
from conftest import stock_model, tokens
from tiny_models import stock_tiny

import hf_alibi
from hf_alibi.anatomy import self_attentions
from hf_alibi.conversion.distillation import check_distillation, distill_attention, record_attention

FIT = {"epochs": 8, "learning_rate": 1e-2, "batch_size": 4}


@pytest.fixture
def input_ids():
    return tokens(40, 24)


def test_records_are_inputs_and_outputs_of_the_unconverted_layers(input_ids, tmp_path):
    model = stock_model("llama", 4)
    records = record_attention(model, input_ids, batch_size=4, folder=tmp_path)
    with torch.no_grad():
        states = model.model(input_ids, output_hidden_states=True, use_cache=False).hidden_states[0]
        layer = model.model.layers[0]
        normed = layer.input_layernorm(states)
        rotary = model.model.rotary_emb(states, torch.arange(24)[None])
        output = layer.self_attn(normed, position_embeddings=rotary, attention_mask=None)[0]
    assert len(records) == 2
    assert records[0].inputs.shape == records[0].outputs.shape == (40, 24, 32)
    # What is kept is bfloat16.
    torch.testing.assert_close(records[0].inputs.float(), normed, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(records[0].outputs.float(), output, rtol=2**-8, atol=1e-4)


def test_each_layer_comes_nearer_to_what_it_was_and_nothing_else_changes(input_ids, tmp_path):
    model = stock_model("llama", 4)
    records = record_attention(model, input_ids, batch_size=4, folder=tmp_path)
    hf_alibi.apply_alibi(model)
    before = copy.deepcopy(model.state_dict())
    fits = distill_attention(model, input_ids, records, **FIT)
    assert len(fits) == 2
    assert all(fit.after < 0.7 * fit.before for fit in fits)
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if "self_attn" in name}
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    hf_alibi.verify_alibi(model)


def test_the_error_is_that_of_the_converted_layer_on_blocks_it_was_not_fitted_to(input_ids, tmp_path):
    """Written out for the first layer, whose inputs are the same in both models."""
    model = stock_model("llama", 4)
    records = record_attention(model, input_ids, batch_size=4, folder=tmp_path)
    hf_alibi.apply_alibi(model)
    target = records[0].outputs[-4:].float()
    untouched = copy.deepcopy(model)
    fits = distill_attention(model, input_ids, records, **FIT)
    scale = records[0].outputs.float().square().mean()
    for converted, share in ((untouched, fits[0].before), (model, fits[0].after)):
        given = []
        hook = converted.model.layers[0].self_attn.register_forward_hook(
            lambda layer, args, output, given=given: given.append(output[0].detach())
        )
        with torch.no_grad():
            converted(input_ids[-4:])
        hook.remove()
        assert share == pytest.approx(((given[0] - target).square().mean() / scale).item(), rel=0.02)


def test_a_layer_that_is_already_right_has_no_error(input_ids, tmp_path):
    """Slopes of 0 and rotations of 0: nothing was converted away."""
    model = stock_model("llama", 4)
    model.model.rotary_emb.inv_freq.zero_()
    records = record_attention(model, input_ids, batch_size=4, folder=tmp_path)
    hf_alibi.apply_alibi(model, slopes=[0.0] * 4)
    fits = distill_attention(model, input_ids, records, epochs=1, learning_rate=1e-9, batch_size=4)
    assert all(fit.before < 1e-4 for fit in fits)


def test_the_same_seed_gives_the_same_weights(input_ids, tmp_path):
    weights = []
    for seed in (0, 0, 1):
        model = stock_model("llama", 4)
        records = record_attention(model, input_ids, batch_size=4, folder=tmp_path)
        hf_alibi.apply_alibi(model)
        distill_attention(model, input_ids, records, **{**FIT, "epochs": 1}, seed=seed)
        weights.append(model.model.layers[0].self_attn.q_proj.weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("model_type", ["qwen3", "mistral", "gemma2", "gpt_neox", "phi3", "olmo2"])
def test_other_rotary_families(model_type, input_ids, tmp_path):
    model = stock_tiny(model_type)
    records = record_attention(model, input_ids, batch_size=4, folder=tmp_path)
    hf_alibi.apply_alibi(model)
    fits = distill_attention(model, input_ids, records, **FIT)
    assert all(fit.after < fit.before for fit in fits)
    assert len(fits) == len(list(self_attentions(model)))
    hf_alibi.verify_alibi(model)


def test_half_precision_keeps_the_type_of_the_weights(input_ids, tmp_path):
    model = stock_model("llama", 4)
    records = record_attention(model, input_ids, batch_size=4, folder=tmp_path)
    hf_alibi.apply_alibi(model)
    fits = distill_attention(model, input_ids, records, **FIT, bf16=True)
    assert all(fit.after < fit.before for fit in fits)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_what_cannot_be_distilled_is_refused(input_ids, tmp_path):
    options = {"batch_size": 4, "folder": tmp_path}
    with pytest.raises(ValueError, match="GPT2LMHeadModel adds positions to its embeddings"):
        check_distillation(stock_model("gpt2", 4), input_ids, **options)
    with pytest.raises(ValueError, match="was given 15 blocks of text and needs at least 16"):
        check_distillation(stock_model("llama", 4), input_ids[:15], **options)
    with pytest.raises(ValueError, match="needs the unconverted model as its teacher"):
        record_attention(hf_alibi.apply_alibi(stock_model("llama", 4)), input_ids, **options)


def test_too_little_room_is_found_before_recording(input_ids, tmp_path, monkeypatch):
    class Usage:
        free = 1000

    monkeypatch.setattr("hf_alibi.conversion.distillation.disk_usage", lambda folder: Usage)
    with pytest.raises(ValueError, match=r"recording 2 layers on 960 tokens takes .* GiB, and .* has 0.0 GiB left"):
        check_distillation(stock_model("llama", 4), input_ids, batch_size=4, folder=tmp_path)


def test_attention_that_reads_more_than_its_hidden_states_is_refused(input_ids, tmp_path):
    model = stock_model("llama", 4)
    records = record_attention(model, input_ids, batch_size=4, folder=tmp_path)
    hf_alibi.apply_alibi(model)
    layer = model.model.layers[1]
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "of_the_text": args[0].detach().sum()}), with_kwargs=True
    )
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn also reads of_the_text"):
        distill_attention(model, input_ids, records, **FIT)

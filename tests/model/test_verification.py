"""verify_alibi must find every way in which the bias can get lost. Each test breaks a model on purpose."""

import pytest
import torch
from transformers import LlamaForCausalLM

import hf_alibi
from helpers.models import stock_model, tokens
from helpers.tiny_models import stock_tiny
from hf_alibi.attention import eager
from hf_alibi.attention.backends import BACKENDS
from hf_alibi.attention.inputs import visible_keys
from hf_alibi.attention.sdpa import dense, dispatch
from hf_alibi.errors import VerificationError
from hf_alibi.model.anatomy import text_decoder

pytestmark = pytest.mark.parametrize("backend", ["eager", "sdpa"])


def converted(family, backend, **changes):
    model = hf_alibi.apply_alibi(stock_model(family, 6, **changes))
    model.set_attn_implementation(backend)
    return model


def last_layer(model):
    return list(text_decoder(model).self_attentions)[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_reports_slopes_and_error_of_each_layer(family, backend, dtype):
    model = converted(family, backend).to(dtype)
    reports = hf_alibi.verify_alibi(model)
    assert [report.layer for report in reports] == [name for name, _ in text_decoder(model).self_attentions]
    for report in reports:
        assert report.slopes == pytest.approx(hf_alibi.alibi_slopes(6).tolist(), rel=1e-5)
        # Slopes are float32 numbers whatever the model's type.
        assert report.error < max(16 * torch.finfo(dtype).eps, 1e-7)


def test_leaves_the_model_and_the_random_state_as_they_were(family, backend):
    model = converted(family, backend).train()
    model.base_model.eval()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    hf_alibi.verify_alibi(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    calls = BACKENDS[backend]
    module = "sdpa.dispatch" if backend == "sdpa" else backend
    assert calls.__module__ == f"hf_alibi.attention.{module}"


def test_refuses_an_unconverted_model(family, backend):
    with pytest.raises(ValueError, match="has no ALiBi; convert it"):
        hf_alibi.verify_alibi(stock_model(family, attn_implementation=backend))


def test_finds_a_layer_with_stock_attention(family, backend):
    model = converted(family, backend)
    name, attention = last_layer(model)
    attention.config = model.config
    with pytest.raises(VerificationError, match=f"layer {name} never called"):
        hf_alibi.verify_alibi(model)


def test_finds_a_layer_with_other_slopes(family, backend):
    """One flat head off by a tenth, far below what the output shows in half precision."""
    model = converted(family, backend)
    name, attention = last_layer(model)

    class Wrong(type(attention.config)):
        @property
        def alibi_slopes(self):
            return None if getattr(self, "_asked", False) else slopes

    slopes = hf_alibi.alibi_slopes(6).tolist()
    slopes[3] *= 1.1
    original = BACKENDS[backend]

    def wrong(module, *args, **kwargs):
        if module is not attention:
            return original(module, *args, **kwargs)
        keep, module.config = module.config, Wrong(model.config, model.config, 0)
        try:
            return original(module, *args, **kwargs)
        finally:
            module.config = keep

    BACKENDS[backend] = wrong
    try:
        with pytest.raises(VerificationError, match=f"layer {name}"):
            hf_alibi.verify_alibi(model.bfloat16())
    finally:
        BACKENDS[backend] = original
        hf_alibi.attention.backends.register_backends()


@pytest.mark.parametrize("fault", ["no_bias", "mask_ignored", "future_seen"])
def test_finds_a_broken_backend(family, backend, fault):
    model = converted(family, backend)
    original = BACKENDS[backend]

    def broken(module, query, key, value, attention_mask, **kwargs):
        if fault == "no_bias":
            attention = torch.nn.functional.scaled_dot_product_attention
            output = attention(query, key, value, is_causal=True, scale=kwargs.get("scaling"), enable_gqa=True)
            return output.transpose(1, 2), None
        if fault == "mask_ignored":
            queries = query.shape[2]
            attention_mask = torch.ones(1, 1, queries, queries, dtype=torch.bool).tril()
        if fault == "future_seen":
            attention_mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool)
        return original(module, query, key, value, attention_mask, **kwargs)

    BACKENDS[backend] = broken
    try:
        with pytest.raises(VerificationError, match=r"layer .* does not apply"):
            hf_alibi.verify_alibi(model)
    finally:
        BACKENDS[backend] = original
        hf_alibi.attention.backends.register_backends()


def test_finds_positions_left_in(family, backend):
    model = converted(family, backend)
    stock = stock_model(family, 6)
    if family == "gpt2":
        model.transformer.wpe = stock.transformer.wpe
    else:
        model.model.rotary_emb = stock.model.rotary_emb
    with pytest.raises(VerificationError, match="position ids change the output"):
        hf_alibi.verify_alibi(model)


def test_finds_a_conversion_that_never_reached_the_layers(family, backend):
    """The worst of this field: a converter whose method nobody calls."""
    model = converted(family, backend)
    for _, attention in text_decoder(model).self_attentions:
        attention.config = model.config
    with pytest.raises(VerificationError, match="never called"):
        hf_alibi.verify_alibi(model)


def test_proves_scaled_and_custom_slopes(family, backend):
    model = converted(family, backend)
    model.config.alibi_slopes = [0.9, 0.0, 0.2, 0.001, 0.5, 0.5]
    seen = hf_alibi.verify_alibi(model)[0].slopes
    assert seen == pytest.approx(model.config.alibi_slopes, rel=1e-5, abs=1e-7)
    model.config.alibi_scaling = {"type": "linear", "factor": 2.0}
    assert hf_alibi.verify_alibi(model)[0].slopes[0] == pytest.approx(0.45, rel=1e-5)
    model.config.alibi_train_length = 4
    model.config.alibi_scaling = {"type": "dynamic"}
    hf_alibi.verify_alibi(model)


def test_works_beside_a_stock_model_of_the_same_process(family, backend):
    """Registering ALiBi must not change anybody else's attention."""
    stock, input_ids = stock_model(family, attn_implementation=backend), tokens(1, 12)
    before = stock(input_ids).logits
    hf_alibi.verify_alibi(converted(family, backend))
    assert torch.equal(stock(input_ids).logits, before)
    assert not isinstance(stock, hf_alibi.model.modeling.AlibiModel)
    assert family == "gpt2" or isinstance(stock, LlamaForCausalLM)


def test_finds_positions_of_a_decoder_that_counts_them_itself(backend):
    model = stock_tiny("bart", attn_implementation=backend)
    decoder = model.model.decoder
    table = decoder.embed_positions
    hf_alibi.verify_alibi(hf_alibi.apply_alibi(model))
    decoder.embed_positions = table
    with pytest.raises(VerificationError, match="padding before the text changes the output of BartDecoder"):
        hf_alibi.verify_alibi(model)


def test_a_bias_that_grows_for_keys_ahead_is_found(backend, monkeypatch):
    model = converted("llama", backend)
    for module in (dense, eager, dispatch):
        monkeypatch.setattr(module, "visible_keys", lambda *args: visible_keys(*args)._replace(own=None))
    with pytest.raises(VerificationError, match=r"has slopes \[-.*\] for keys ahead, its config says"):
        hf_alibi.verify_alibi(model)

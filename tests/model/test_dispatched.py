"""Models that accelerate has dispatched before they are converted: its hooks keep the forward that a module had."""

import functools

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model

import hf_alibi
from helpers.tiny_models import stock_tiny
from hf_alibi.model.own_attention import is_own_attention

OWN = ["codegen", "falcon", "gpt_neo", "gpt_neox_japanese", "gptj"]
HOOKS = {
    "dispatched": lambda model, folder: dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True),
    "each part dispatched": lambda model, folder: dispatch_model(
        model, dict.fromkeys((name for name, _ in model.named_children()), "cpu"), main_device="cpu", force_hooks=True
    ),
    "offloaded": lambda model, folder: cpu_offload(model, "cpu"),
    "on disk": lambda model, folder: disk_offload(model, str(folder), "cpu"),
}


def ids():
    return torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("how", HOOKS)
@pytest.mark.parametrize("family", [*OWN, "llama", "gpt2", "opt"])
def test_converted_afterwards_it_computes_what_it_would_without_hooks(family, how, tmp_path):
    expected = hf_alibi.apply_alibi(stock_tiny(family)).eval()(ids()).logits
    model = hf_alibi.apply_alibi(HOOKS[how](stock_tiny(family).eval(), tmp_path))
    assert any(is_own_attention(module) for module in model.modules()) == (family in OWN)
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, expected)
    assert hf_alibi.verify_alibi(model)


@pytest.mark.parametrize("how", ["offloaded", "on disk"])
def test_evaluates_with_offloaded_embeddings(how, tmp_path):
    settings = {"lengths": [16, 32], "train_length": 16, "scored_tokens": 64, "progress": False}
    tokens = torch.randint(3, 60, (200,), generator=torch.Generator().manual_seed(0))
    expected = hf_alibi.evaluate_extrapolation(hf_alibi.apply_alibi(stock_tiny("llama")), tokens, **settings)
    model = hf_alibi.apply_alibi(HOOKS[how](stock_tiny("llama").eval(), tmp_path))
    assert model.device.type == "meta"
    assert hf_alibi.evaluate_extrapolation(model, tokens, **settings) == expected


@pytest.mark.parametrize("family", OWN)
def test_a_replaced_forward_is_refused(family):
    model = stock_tiny(family)
    layer = next(module for module in model.modules() if is_own_attention(module))
    layer.forward = functools.partial(type(layer).forward, layer)
    with pytest.raises(ValueError, match="was replaced, so that ALiBi would not reach it"):
        hf_alibi.apply_alibi(model)
    assert not type(layer).__name__.startswith("Alibi")

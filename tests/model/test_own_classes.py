"""Classes of a user's own: their ALiBi form is made of them, saved, loaded, copied and pickled."""

import copy
import io
import pickle

import pytest
import torch
from transformers import LlamaForCausalLM

import hf_alibi
from helpers import own_classes, reference
from helpers.models import stock_config, tokens
from helpers.own_classes import Doubled, OwnBase, OwnConfig, WithOwnBase, WithValueHead

FAMILY = {WithValueHead: "llama", WithOwnBase: "llama", Doubled: "gpt2"}


def built(own, **changes):
    torch.manual_seed(0)
    return own(stock_config(FAMILY.get(own, "llama"), **changes)).eval()


@pytest.mark.parametrize("own", FAMILY)
def test_it_has_exactly_the_bias_and_all_of_its_own(own):
    plain = built(own)
    model = hf_alibi.apply_alibi(copy.deepcopy(plain))
    assert type(model) is hf_alibi.alibi_class(own)
    assert type(model).__name__ == f"Alibi{own.__name__}"
    assert isinstance(model, own)
    assert hf_alibi.verify_alibi(model)
    ids = tokens(2, 12)
    expected = reference.LOGITS[FAMILY[own]](model, ids, torch.ones_like(ids))
    scale = 2 if own is Doubled else 1
    assert (model(ids).logits - scale * expected).abs().max() < 1e-4
    assert not torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-3)


@pytest.mark.parametrize("own", FAMILY)
def test_it_is_saved_and_loaded(own, tmp_path):
    model = hf_alibi.apply_alibi(built(own), slopes=[0.5, 0.4, 0.3, 0.2])
    model.save_pretrained(tmp_path)
    loaded, report = hf_alibi.alibi_class(own).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys"))
    assert type(loaded) is type(model)
    ids = tokens(2, 40)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.config.alibi_slopes == [0.5, 0.4, 0.3, 0.2]


def test_a_head_of_ones_own_trains_and_comes_back(tmp_path):
    model = hf_alibi.apply_alibi(built(WithValueHead))
    ids = tokens(2, 12)
    output = model(ids, labels=ids)
    output["loss"].backward()
    assert model.value.weight.grad.abs().max() > 0
    model.save_pretrained(tmp_path)
    again = hf_alibi.alibi_class(WithValueHead).from_pretrained(tmp_path)
    assert torch.equal(again(ids)["values"], output["values"])


@pytest.mark.parametrize("own", FAMILY)
def test_it_is_copied_and_pickled(own):
    model = hf_alibi.apply_alibi(built(own))
    ids = tokens(1, 9)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for again in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert type(again) is type(model)
        assert again is not model
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert {id(part) for part in again.modules()}.isdisjoint(id(part) for part in model.modules())


def test_parts_of_ones_own_are_converted_too():
    model = hf_alibi.apply_alibi(built(WithOwnBase))
    assert type(model.model) is hf_alibi.alibi_class(OwnBase)


@pytest.mark.parametrize("export", [False, True])
def test_its_code_is_not_exported(export, tmp_path):
    model = hf_alibi.apply_alibi(built(WithValueHead))
    if export:
        with pytest.raises(ValueError, match=r"cannot bring the code of WithValueHead along.*alibi_class"):
            model.save_pretrained(tmp_path, export_remote_code=True)
    else:
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))


def in_a_function():
    class Hidden(LlamaForCausalLM):
        pass

    return Hidden


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: built(in_a_function()), r"Hidden: Python cannot import it.*put the class at the top of a module"),
        (
            lambda: built(own_classes.PositionsAgain),
            "classes of its own, and trying it gave",
        ),
        (lambda: built(own_classes.WithOwnAttention), "has no causal self-attention"),
        (
            lambda: own_classes.WithOwnConfig(OwnConfig(**stock_config("llama").to_dict())),
            "no ALiBi for model_type 'own_llama'|it is not a config class of transformers",
        ),
    ],
    ids=["in a function", "adds positions", "own attention", "own config"],
)
def test_what_cannot_be_converted_is_refused_and_left_alone(make, message):
    model = make()
    before, ids = type(model), tokens(1, 8)
    logits = model(ids).logits
    with pytest.raises(ValueError, match=message):
        hf_alibi.apply_alibi(model)
    assert type(model) is before
    assert torch.equal(model(ids).logits, logits)


def test_alibi_class_takes_model_classes():
    assert hf_alibi.alibi_class(LlamaForCausalLM) is hf_alibi.AlibiLlamaForCausalLM
    for wrong in ("LlamaForCausalLM", torch.nn.Linear, built(Doubled)):
        with pytest.raises(TypeError, match="takes a class of transformers models"):
            hf_alibi.alibi_class(wrong)
    with pytest.raises(ValueError, match="not a model of its own"):
        hf_alibi.alibi_class(hf_alibi.AlibiLlamaForCausalLM)

"""A conversion in memory has no name, so that no tool loads the plain model in its place."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import PushToHubMixin

import hf_alibi
from helpers.models import FAMILIES, stock_model, tokens
from hf_alibi.model import modeling


@pytest.fixture(params=FAMILIES)
def plain(request, tmp_path):
    folder = tmp_path / "plain"
    stock_model(request.param).save_pretrained(folder)
    return folder


def converted(folder):
    return hf_alibi.apply_alibi(AutoModelForCausalLM.from_pretrained(folder))


def in_memory(folder):
    """Every way to a conversion that no folder holds."""
    stock = type(AutoModelForCausalLM.from_pretrained(folder)).__name__
    yield converted(folder)
    yield copy.deepcopy(converted(folder))
    yield getattr(modeling, f"Alibi{stock}").from_pretrained(folder)


def test_its_name_leads_nowhere_and_says_why(plain):
    for model in in_memory(plain):
        assert model.name_or_path == model.config.name_or_path == model.config._name_or_path
        assert str(plain) in model.name_or_path
        for loader in (AutoConfig, AutoTokenizer, AutoModelForCausalLM):
            with pytest.raises(OSError, match="has no name before it is saved"):
                loader.from_pretrained(model.name_or_path)


def test_saving_names_it_anew_each_time(plain, tmp_path):
    for index, model in enumerate(in_memory(plain)):
        for folder in (tmp_path / f"first{index}", tmp_path / f"second{index}"):
            model.save_pretrained(folder)
            assert model.name_or_path == model.config.name_or_path == str(folder)
            again = AutoModelForCausalLM.from_pretrained(model.name_or_path)
            ids = tokens(1, 9)
            assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_a_loaded_model_keeps_its_name(plain, tmp_path):
    converted(plain).save_pretrained(tmp_path / "alibi")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "alibi")
    model.save_pretrained(tmp_path / "elsewhere")
    assert model.name_or_path == str(tmp_path / "alibi")


def test_pushing_names_it_by_the_repository(plain, tmp_path, monkeypatch):
    def push(model, repo_id):
        model.save_pretrained(tmp_path / "gone")
        return SimpleNamespace(repo_url=SimpleNamespace(repo_id=f"somebody/{repo_id}"))

    monkeypatch.setattr(PushToHubMixin, "push_to_hub", push)
    model = converted(plain)
    model.push_to_hub("alibi")
    assert model.name_or_path == model.config.name_or_path == "somebody/alibi"
    converted(plain).save_pretrained(tmp_path / "alibi")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "alibi")
    loaded.push_to_hub("alibi")
    assert loaded.name_or_path == str(tmp_path / "alibi")


def test_a_failed_conversion_leaves_the_name(plain):
    model = AutoModelForCausalLM.from_pretrained(plain)
    with pytest.raises(ValueError, match="has 1 values"):
        hf_alibi.apply_alibi(model, slopes=[1.0])
    assert model.name_or_path == model.config.name_or_path == str(plain)


def test_the_files_say_nothing_of_it(plain, tmp_path):
    model = converted(plain)
    model.save_pretrained(tmp_path / "alibi")
    kind = type(model.config)
    kind.from_pretrained(plain).save_pretrained(tmp_path / "config")
    for folder in ("alibi", "config"):
        text = (tmp_path / folder / "config.json").read_text()
        assert "no name" not in text
        assert "plain" not in text


def test_an_adapter_of_a_conversion_in_memory_does_not_load_onto_the_plain_model(plain, tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        converted(plain), peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False)
    ).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    for loader in (peft.AutoPeftModelForCausalLM, AutoModelForCausalLM):
        with pytest.raises(OSError, match="has no name before it is saved"):
            loader.from_pretrained(tmp_path / "adapter")
    ids = tokens(1, 9)
    again = peft.PeftModel.from_pretrained(converted(plain), tmp_path / "adapter").eval()
    assert torch.equal(again(ids).logits, adapted(ids).logits)


def test_an_adapter_of_a_saved_conversion_loads_by_itself(plain, tmp_path):
    peft = pytest.importorskip("peft")
    model = converted(plain)
    model.save_pretrained(tmp_path / "alibi")
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    ids = tokens(1, 9)
    for loader in (peft.AutoPeftModelForCausalLM, AutoModelForCausalLM):
        again = loader.from_pretrained(tmp_path / "adapter").eval()
        assert (again(ids).logits - adapted(ids).logits).abs().max() < 1e-5


def test_tools_may_ask_for_auto_map(plain, tmp_path):
    model = converted(plain)
    assert dict(model.config.auto_map) == {}
    model.save_pretrained(tmp_path / "alibi")
    assert "AutoModelForCausalLM" not in AutoConfig.from_pretrained(tmp_path / "alibi").auto_map
    model.save_pretrained(tmp_path / "code", export_remote_code=True)
    assert "AutoModelForCausalLM" in AutoConfig.from_pretrained(tmp_path / "code").auto_map

"""`max_position_embeddings` of a converted model stops no tool; what it was is kept under a name of our own."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BartConfig, BartForConditionalGeneration, LlamaConfig

import hf_alibi
from helpers.composites import MODELS, SEQ2SEQ, built
from helpers.models import FAMILIES, stock_config, stock_model, tokens
from hf_alibi.configuration import UNLIMITED, text_config
from hf_alibi.model.modeling import AlibiLlamaForCausalLM

LIMIT = 32


def limits(config):
    return config.max_position_embeddings, config.alibi_original_max_position_embeddings


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_lifted_and_the_old_one_kept(family, tmp_path):
    model = hf_alibi.apply_alibi(stock_model(family))
    assert limits(model.config) == (UNLIMITED, LIMIT)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert limits(loaded.config) == limits(AutoConfig.from_pretrained(tmp_path)) == (UNLIMITED, LIMIT)
    assert limits(AutoModelForCausalLM.from_config(loaded.config).config) == (UNLIMITED, LIMIT)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_from_before_is_lifted_while_it_loads(family, tmp_path):
    hf_alibi.apply_alibi(stock_model(family)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    written = json.loads(file.read_text())
    del written["alibi_original_max_position_embeddings"]
    written["n_positions" if family == "gpt2" else "max_position_embeddings"] = LIMIT
    file.write_text(json.dumps(written))
    assert limits(AutoModelForCausalLM.from_pretrained(tmp_path).config) == (UNLIMITED, LIMIT)


def test_a_limit_can_be_set_for_tools_that_ask(tmp_path):
    hf_alibi.apply_alibi(stock_model("llama")).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, max_position_embeddings=100)
    assert limits(model.config) == (100, LIMIT)
    model.save_pretrained(tmp_path / "again")
    assert limits(AutoConfig.from_pretrained(tmp_path / "again")) == (100, LIMIT)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_goes_past_the_old_limit(family, caplog):
    model = hf_alibi.apply_alibi(stock_model(family, eos_token_id=None))
    ids = tokens(1, LIMIT + 5)
    assert model.generate(ids, max_length=LIMIT + 9).shape == (1, LIMIT + 9)
    assert model.generate(ids).shape[1] > LIMIT + 5
    assert "predefined maximum length" not in caplog.text


def test_rotary_scalings_keep_the_length_they_were_made_for(tmp_path):
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    config = LlamaConfig(**{**stock_config("llama").to_dict(), "rope_parameters": rope})
    model = hf_alibi.apply_alibi(AutoModelForCausalLM.from_config(config)).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.rope_parameters == model.config.rope_parameters
    ids = tokens(1, 9)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    stock = AlibiLlamaForCausalLM.config_class(**{**stock_config("llama").to_dict(), "rope_parameters": rope})
    assert stock.rope_parameters["original_max_position_embeddings"] == LIMIT


def test_what_an_encoder_shares_stays():
    model = hf_alibi.apply_alibi(BartForConditionalGeneration(BartConfig(**SEQ2SEQ, max_position_embeddings=16)))
    assert limits(model.config) == (16, None)


@pytest.mark.parametrize("kind", [kind for kind in MODELS if "max_position_embeddings" in str(MODELS[kind])])
def test_of_composite_models_it_is_the_text_decoders(kind):
    model = built(*MODELS[kind][:2])
    before = getattr(text_config(model.config), "max_position_embeddings", None)
    hf_alibi.apply_alibi(model)
    text = text_config(model.config)
    if before is not None and not text.is_encoder_decoder:
        assert limits(text) == (UNLIMITED, before)

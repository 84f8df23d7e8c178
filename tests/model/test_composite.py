"""Encoder-decoder and vision-language models: the text decoder's self-attention is converted and nothing else."""

import pytest
import torch
from transformers import (
    AutoConfig,
    EvollaForProteinText2Text,
    Florence2ForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

import hf_alibi
from helpers.composites import MODELS, TEXT, VISION, built
from helpers.models import snapshot
from helpers.tiny_models import make_sensitive, tiny_config
from hf_alibi.configuration import text_config
from hf_alibi.model.anatomy import text_decoder
from hf_alibi.model.installation import LayerConfig


@pytest.fixture(params=MODELS)
def case(request):
    model_class, config, auto_class, inside = MODELS[request.param]
    return built(model_class, config), auto_class, inside


@torch.no_grad()
def text_states(model, input_ids, **kwargs):
    return text_decoder(model).module(input_ids=input_ids, **kwargs).last_hidden_state


def test_the_decoders_self_attention_is_converted_and_nothing_else(case):
    model, _, inside = case
    untouched = {
        name: (type(module), module)
        for name, module in model.named_modules()
        if name and not name.startswith(inside) and not inside.startswith(name)
    }
    hf_alibi.apply_alibi(model)
    assert all(type(untouched[name][1]) is untouched[name][0] for name in untouched)
    layers = [name for name, _ in text_decoder(model).self_attentions]
    assert len(layers) == len({name for name in layers if name.startswith(inside)}) > 0
    with_view = [name for name, module in model.named_modules() if isinstance(vars(module).get("config"), LayerConfig)]
    assert with_view == layers
    assert list(text_decoder(model).positions)
    for parent, _, _ in text_decoder(model).positions:
        assert any(parent is module for module in text_decoder(model).module.modules())
    assert len(hf_alibi.verify_alibi(model)) == len(layers)


def test_saves_and_loads_through_its_auto_class(case, tmp_path):
    model, auto_class, _ = case
    hf_alibi.apply_alibi(model).save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert type(loaded.config) is type(model.config)
    input_ids = torch.randint(3, 98, (2, 50), generator=torch.Generator().manual_seed(0))
    assert torch.equal(text_states(loaded, input_ids), text_states(model, input_ids))
    assert not [module for module in loaded.modules() if isinstance(module, PreTrainedModel) and module.training]
    hf_alibi.verify_alibi(loaded)


def test_positions_are_gone_and_the_order_is_not(case):
    """Left padding changes nothing, at three times the length of the tables; the order of the tokens does."""
    model = hf_alibi.apply_alibi(case[0])
    input_ids = torch.randint(3, 98, (1, 50), generator=torch.Generator().manual_seed(0))
    alone = text_states(model, input_ids)
    padded = torch.cat([torch.zeros(1, 7, dtype=torch.long), input_ids], dim=1)
    mask = (torch.arange(57) >= 7).long()[None]
    assert (text_states(model, padded, attention_mask=mask)[:, 7:] - alone).abs().max() < 1e-4
    shuffled = torch.cat([input_ids[:, :-1].flip(1), input_ids[:, -1:]], dim=1)
    assert (text_states(model, shuffled)[:, -1] - alone[:, -1]).abs().max() > 0.01


@pytest.mark.parametrize("name", ["bart", "whisper"])
def test_encoders_and_cross_attention_stay_as_they_are(name):
    model_class, config, *_ = MODELS[name]
    model = built(model_class, config)
    states = torch.randn(1, 8, 40) if name == "whisper" else torch.randint(3, 98, (1, 12))
    with torch.no_grad():
        before = model.get_encoder()(states).last_hidden_state
        hf_alibi.apply_alibi(model)
        assert torch.equal(model.get_encoder()(states).last_hidden_state, before)
        tokens = torch.tensor([[1, 5, 6]])
        forward = model.get_decoder()(input_ids=tokens, encoder_hidden_states=before).last_hidden_state
        backward = model.get_decoder()(input_ids=tokens, encoder_hidden_states=before.flip(1)).last_hidden_state
    # Cross-attention reads a set: the order of what it reads changes nothing.
    assert torch.allclose(forward, backward, atol=1e-5)


def test_generates_with_a_cache_what_it_computes_without():
    model = hf_alibi.apply_alibi(built(*MODELS["bart"][:2]))
    source = torch.randint(3, 98, (2, 12), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "num_beams": 1}
    with_cache = model.generate(source, **options)
    assert with_cache.shape[1] > 40  # past the 16 rows that the table had
    assert torch.equal(with_cache, model.generate(source, use_cache=False, **options))


@pytest.mark.parametrize(
    ("model_class", "encoder"),
    [
        (Florence2ForConditionalGeneration, "model.language_model.encoder"),
        (EvollaForProteinText2Text, "model.protein_encoder.model"),
    ],
)
def test_encoders_inside_the_language_model_stay_as_they_are(model_class, encoder):
    model = model_class._from_config(tiny_config(model_class.config_class)).eval()
    make_sensitive(model, 0)
    input_ids = torch.randint(3, 30, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model.get_submodule(encoder)(input_ids=input_ids).last_hidden_state
        hf_alibi.apply_alibi(model)
        assert torch.equal(model.get_submodule(encoder)(input_ids=input_ids).last_hidden_state, before)
    assert list(text_decoder(model).positions)
    hf_alibi.verify_alibi(model)


@pytest.mark.parametrize("name", ["llava", "idefics3", "bert2bert"])
def test_fields_are_those_of_the_language_model(name, tmp_path):
    model_class, config, auto_class, _ = MODELS[name]
    hf_alibi.apply_alibi(built(model_class, config), slopes=[0.5, 0.25, 0.1, 0.0]).save_pretrained(tmp_path)
    model = auto_class.from_pretrained(tmp_path, alibi_scaling={"type": "linear", "factor": 4.0})
    assert model.config.alibi_slopes == text_config(model.config).alibi_slopes == [0.5, 0.25, 0.1, 0.0]
    assert text_config(model.config).alibi_scaling == {"type": "linear", "factor": 4.0}
    assert hf_alibi.verify_alibi(model)[0].slopes == pytest.approx([0.125, 0.0625, 0.025, 0.0])
    assert not {field for field in model.config.to_dict() if field.startswith("alibi")}
    with pytest.raises(Exception, match="nonsense"):
        AutoConfig.from_pretrained(tmp_path, alibi_scaling={"type": "nonsense"})
    with pytest.raises(ValueError, match="3 values, but the model has 4 heads"):
        auto_class.from_pretrained(tmp_path, alibi_slopes=[0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("model_class", "config", "message"),
    [
        (T5ForConditionalGeneration, T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4), "position bias"),
        (
            PaliGemmaForConditionalGeneration,
            PaliGemmaConfig(
                vision_config={**VISION, "model_type": "siglip_vision_model", "projection_dim": 32},
                text_config={**TEXT, "model_type": "gemma"},
                projection_dim=32,
            ),
            "no causal self-attention",
        ),
        (ViTModel, ViTConfig(**VISION), "no causal self-attention"),
    ],
)
def test_what_does_not_verify_is_refused_and_left_as_it_was(model_class, config, message):
    model = built(model_class, config)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        hf_alibi.apply_alibi(model)
    assert snapshot(model) == before

"""PEFT on converted models: LoRA, prefix tuning, prompt tuning."""

import subprocess
import sys

import pytest
import torch
from transformers import DynamicCache

import hf_alibi
from helpers.models import stock_model, tokens
from helpers.tiny_models import FIRST_TOKEN, VOCABULARY, stock_tiny

peft = pytest.importorskip("peft")
TARGETS = {"gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]}

families = pytest.mark.parametrize("model_type", ["gpt2", "llama", "qwen3", "gemma3_text", "mistral", "gpt_oss"])
PREFIX = 6


def converted(model_type):
    return hf_alibi.apply_alibi(stock_tiny(model_type))


def words(*shape, seed=0):
    return torch.randint(FIRST_TOKEN, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def train(model, steps, learning_rate=1e-2):
    """Losses of some steps on one batch."""
    input_ids = words(2, 24)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), labels=input_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_lora_trains_saves_and_reloads(family, tmp_path):
    torch.manual_seed(0)
    base = hf_alibi.apply_alibi(stock_model(family))
    base.save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=4, target_modules=TARGETS[family], task_type="CAUSAL_LM", fan_in_fan_out=family == "gpt2")
    model = peft.get_peft_model(base, lora)
    input_ids = tokens(2, 50)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(input_ids, labels=input_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    hf_alibi.verify_alibi(model.get_base_model())

    model.eval().save_pretrained(tmp_path / "adapter")
    fresh = hf_alibi.model.modeling.model_class(type(stock_model(family))).from_pretrained(tmp_path / "base")
    reloaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = model(input_ids).logits
        assert torch.equal(reloaded(input_ids).logits, expected)
        merged = reloaded.merge_and_unload()
        assert torch.allclose(merged(input_ids).logits, expected, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    hf_alibi.verify_alibi(merged)


def test_a_wrapped_model_is_refused(family):
    wrapped = peft.get_peft_model(stock_model(family), peft.LoraConfig(target_modules=TARGETS[family]))
    with pytest.raises(TypeError, match="wrappers such as PEFT's"):
        hf_alibi.apply_alibi(wrapped)


@families
@pytest.mark.parametrize("method", ["LoraConfig", "IA3Config", "AdaLoraConfig", "VeraConfig"])
def test_default_targets_are_those_of_the_unconverted_model(model_type, method):
    settings = {"AdaLoraConfig": {"total_step": 10}, "VeraConfig": {"save_projection": False}}.get(method, {})
    found = []
    for model in (stock_tiny(model_type), converted(model_type)):
        config = getattr(peft, method)(task_type="CAUSAL_LM", **settings)
        try:
            found.append(peft.get_peft_model(model, config).peft_config["default"].target_modules)
        except ValueError as error:  # PEFT knows no targets of this family
            found.append(str(error))
    assert found[0] == found[1]


@families
def test_default_targets_train(model_type):
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM")
    if model_type == "gpt_oss":
        with pytest.raises(ValueError, match="specify `target_modules`"):
            peft.get_peft_model(converted(model_type), config)
        config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(converted(model_type), config)
    losses = train(model, 6)
    assert losses[-1] < losses[0]
    hf_alibi.verify_alibi(model.get_base_model())


def test_default_targets_of_adapters_added_by_transformers(family):
    model = hf_alibi.apply_alibi(stock_model(family))
    model.add_adapter(peft.LoraConfig())
    assert any("lora_A" in name for name, _ in model.named_parameters())


def test_targets_that_the_user_named_stay(monkeypatch):
    table = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    monkeypatch.setitem(table, "alibi_llama", ["k_proj"])
    model = peft.get_peft_model(converted("llama"), peft.LoraConfig())
    assert model.peft_config["default"].target_modules == {"k_proj"}


def test_peft_is_not_imported_until_it_is_used_and_may_come_last():
    """PEFT is an optional extra, and slow to import."""
    code = """
import sys, hf_alibi
from transformers import LlamaConfig, LlamaForCausalLM
small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
model = hf_alibi.apply_alibi(LlamaForCausalLM(LlamaConfig(**small)))
model.config.to_dict()
assert "peft" not in sys.modules
import peft
peft.get_peft_model(model, peft.LoraConfig())
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@families
@pytest.mark.parametrize("method", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_virtual_tokens_train_save_and_reload(model_type, method, tmp_path):
    config = getattr(peft, method)(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX)
    model = peft.get_peft_model(converted(model_type), config)
    losses = train(model, 6, learning_rate=0.05)
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(converted(model_type), tmp_path).eval()
    input_ids = words(2, 24, seed=1)
    with torch.no_grad():
        mask = torch.ones_like(input_ids)
        mask[0, :4] = 0
        expected = model(input_ids=input_ids, attention_mask=mask).logits
        assert torch.equal(reloaded(input_ids=input_ids, attention_mask=mask).logits, expected)
    hf_alibi.verify_alibi(model.get_base_model())


@families
@pytest.mark.parametrize("method", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_virtual_tokens_count_as_tokens_before_the_text(model_type, method):
    """Those of a prefix that is there in full give what the model gives after that text, also for generate."""
    base = converted(model_type)
    base.generation_config.eos_token_id = None
    text, rest = words(1, PREFIX, seed=3), words(2, 24)
    whole = torch.cat([text.expand(2, -1), rest], dim=1)
    with torch.no_grad():
        expected = base(whole).logits[:, PREFIX:]
        alone = base(rest).logits
        embeddings = base.get_input_embeddings()(text)[0]
        cache = DynamicCache()
        base(text, past_key_values=cache, use_cache=True)
        # (layers, 2, heads, tokens, head_dim)
        states = torch.stack([torch.cat([layer.keys, layer.values]) for layer in cache.layers])
        continued = base.generate(whole, do_sample=False, max_new_tokens=8, pad_token_id=0)[:, -8:]
    model = peft.get_peft_model(base, getattr(peft, method)(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX)).eval()
    weight = model.prompt_encoder["default"].embedding.weight
    prefix = method == "PrefixTuningConfig"
    weight.data.copy_(states.permute(3, 0, 1, 2, 4).reshape(PREFIX, -1) if prefix else embeddings)
    with torch.no_grad():
        found = model(input_ids=rest, attention_mask=torch.ones_like(rest)).logits
        generated = model.generate(
            input_ids=rest, attention_mask=torch.ones_like(rest), do_sample=False, max_new_tokens=8, pad_token_id=0
        )[:, -8:]
    found = found if prefix else found[:, PREFIX:]
    scale = expected.abs().max()
    assert (found - expected).abs().max() < 1e-4 * scale
    assert (alone - expected).abs().max() > 0.01 * scale
    assert torch.equal(generated, continued)

"""LoRA on a converted model."""

import pytest
import torch
from conftest import stock_model, tokens

import hf_alibi

peft = pytest.importorskip("peft")
TARGETS = {"gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]}


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
    fresh = hf_alibi.modeling.model_class(type(stock_model(family))).from_pretrained(tmp_path / "base")
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

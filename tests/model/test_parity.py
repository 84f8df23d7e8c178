"""Parity with ALiBi code that is not ours: transformers' MPT is GPT-2 with ALiBi but for names and missing biases."""

import pytest
import torch
from transformers import MptConfig, MptForCausalLM

import hf_alibi
from helpers.models import tokens


def gpt2_from_mpt(mpt):
    """The same function as an ALiBi GPT-2, from MPT's weights; what MPT has not (biases) is zero."""
    config = hf_alibi.AlibiGPT2Config(
        n_embd=mpt.config.d_model,
        n_head=mpt.config.n_heads,
        n_layer=mpt.config.n_layers,
        vocab_size=mpt.config.vocab_size,
        activation_function="gelu",
        n_positions=16,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = hf_alibi.AlibiGPT2LMHeadModel(config).eval()
    weights = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    for name, value in mpt.state_dict().items():
        stem = name.replace("transformer.blocks", "transformer.h").replace("norm_f", "ln_f")
        stem = stem.replace("norm_1", "ln_1").replace("norm_2", "ln_2").replace("ffn.up_proj", "mlp.c_fc")
        stem = stem.replace("ffn.down_proj", "mlp.c_proj").replace("attn.Wqkv", "attn.c_attn")
        stem = stem.replace("attn.out_proj", "attn.c_proj")
        conv1d = any(part in stem for part in ("c_attn", "c_proj", "c_fc"))
        assert stem in weights, name
        weights[stem] = value.T.clone() if conv1d else value
    model.load_state_dict(weights)
    return model


# MPT deals out the slopes of other head counts in another order.
@pytest.mark.parametrize("heads", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_mpt(heads, backend):
    torch.manual_seed(0)
    sizes = {"d_model": 16 * heads, "n_heads": heads, "n_layers": 2, "vocab_size": 64, "max_seq_len": 512}
    mpt = MptForCausalLM(MptConfig(**sizes, initializer_range=0.2)).eval()
    model = gpt2_from_mpt(mpt)
    model.set_attn_implementation(backend)
    input_ids = tokens(2, 300)
    mask = torch.ones_like(input_ids)
    mask[0, :40] = 0
    with torch.no_grad():
        for given in (torch.ones_like(mask), mask):
            theirs = mpt(input_ids, attention_mask=given).logits[given.bool()]
            ours = model(input_ids, attention_mask=given).logits[given.bool()]
            assert (ours - theirs).abs().max() < 1e-4
        model.config.alibi_slopes = [0.9 * slope for slope in hf_alibi.alibi_slopes(heads).tolist()]
        assert (model(input_ids).logits - mpt(input_ids).logits).abs().max() > 1e-2

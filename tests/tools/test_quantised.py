"""Quantised weights: the attention is still exactly ALiBi, and logits stay near those of the whole model."""

import pytest
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import hf_alibi
from helpers.models import stock_model, tokens


def int8_of_torchao():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


# Package, settings, and mean error of the logits as a share of their size.
KINDS = {
    "int8": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True), 0.1),
    "nf4": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), 0.6),
    "torchao int8": ("torchao", int8_of_torchao, 0.1),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_the_bias_is_exact_and_the_logits_are_near(kind, tmp_path):
    package, config, share = KINDS[kind]
    pytest.importorskip(package)
    model = hf_alibi.apply_alibi(stock_model("llama", hidden_size=64, intermediate_size=128, head_dim=16)).eval()
    model.save_pretrained(tmp_path)
    ids = tokens(2, 40)
    expected = model(ids).logits
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config(), device_map="cpu")
    assert hf_alibi.verify_alibi(quantised)
    error = (quantised(ids).logits - expected).abs().mean() / expected.abs().mean()
    assert 0 < error < share

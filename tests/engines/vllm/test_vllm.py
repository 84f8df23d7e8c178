"""vLLM with the plugin computes what transformers does, in every family; whatever would run without the bias fails."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTBigCodeConfig

import hf_alibi
from helpers.exports import converted, wide_config
from hf_alibi.export import parity
from hf_alibi.export.engines.vllm import open_engine
from hf_alibi.export.targets import TARGETS

vllm = pytest.importorskip("vllm")


@pytest.mark.parametrize("family", TARGETS["vllm"].families)
def test_logits_and_text_agree(family, tmp_path):
    converted(tmp_path, family, config=wide_config(family), cut=None)
    found = parity.verify_export("vllm", tmp_path, lengths=[5, 40, 1100], new_tokens=20)
    assert len(found["rows"]) == 3


def test_global_heads_and_scaled_slopes_agree(tmp_path):
    converted(tmp_path, config=wide_config("llama"), conversion={"global_heads": 3, "global_every": 2})
    said = json.loads((tmp_path / "config.json").read_text())
    said["alibi_scaling"] = {"type": "ntk", "factor": 4}
    (tmp_path / "config.json").write_text(json.dumps(said))
    assert parity.verify_export("vllm", tmp_path, lengths=[5, 1100])["rows"]


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_each_rank_has_the_slopes_of_its_heads(family, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    converted(tmp_path, family, config=wide_config(family), cut=None)
    assert parity.verify_export("vllm", tmp_path, lengths=[5, 40], tensor_parallel=2)["rows"]


def test_other_slopes_and_none_show(tmp_path):
    """The engine serves one folder and is compared with another, of the same weights."""
    converted(tmp_path / "model", config=wide_config("llama"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    prompt = torch.randint(320, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    engine = open_engine(tmp_path / "model", tmp_path / "model", 128, 1)

    def compare():
        (row,) = parity._compare(engine, model, [prompt], 5, 5e-4)
        return row

    with torch.no_grad():
        assert compare().is_within
        for scale in (0.5, 0.0):
            model.config.alibi_slopes = [scale * slope for slope in hf_alibi.alibi_slopes(6).tolist()]
            assert not compare().is_within
    engine.close()


def llm(folder, **options):
    return vllm.LLM(str(folder), dtype="float32", skip_tokenizer_init=True, **options)


def test_without_a_length_it_is_what_the_memory_holds(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    converted(tmp_path, config=wide_config("llama"), cut=None)
    made = llm(tmp_path)
    assert 64 < made.llm_engine.model_config.max_model_len <= 131_072
    made.llm_engine.engine_core.shutdown()


REFUSED = {
    "sinks": ({"conversion": {"sink_tokens": 1}}, {}, "no sink tokens, and the model has 1"),
    "family": ({"config": GPTBigCodeConfig(n_embd=64, n_head=2, n_layer=1)}, {}, "no model of type 'gpt_bigcode'"),
    "transformers as it is": ({}, {"model_impl": "transformers"}, "Cannot find model module. 'AlibiLlamaForCausalLM'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_run_without_the_bias_does_not_load(case, tmp_path):
    given, options, message = REFUSED[case]
    converted(tmp_path, **{"config": wide_config("llama"), "cut": None, **given})
    with pytest.raises(Exception, match=message):
        llm(tmp_path, max_model_len=64, **options)


def test_registering_again_changes_nothing():
    from vllm import ModelRegistry

    from hf_alibi.export.vllm.plugin import register

    register()
    before = dict(ModelRegistry.models)
    register()
    assert ModelRegistry.models == before


def test_positions_that_would_stay_are_refused():
    from hf_alibi.export.vllm.models import _take_positions_out

    class RotaryEmbedding(torch.nn.Module):
        pass

    model = torch.nn.Module()
    with pytest.raises(ValueError, match="does not have its positions where they are looked for"):
        _take_positions_out(model)
    model.rotary_emb, model.rope = RotaryEmbedding(), RotaryEmbedding()
    with pytest.raises(ValueError, match="does not have its positions where they are looked for"):
        _take_positions_out(model)

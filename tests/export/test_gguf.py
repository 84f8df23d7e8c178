"""GGUF files: every weight and setting where llama.cpp looks for it, and refusals that leave nothing behind."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, Qwen2Config

from helpers.exports import CUTS, converted, tokenizer
from helpers.models import stock_model
from helpers.runs import cut, drop_weight, refused
from hf_alibi.export.gguf import export_gguf

gguf = pytest.importorskip("gguf")


def read(path):
    """Fields and tensors of a file; tensors in float32, as rows."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).reshape(
            tuple(int(size) for size in reversed(tensor.shape))
        )
        for tensor in reader.tensors
    }


def test_a_gpt2_is_an_mpt(tmp_path):
    weights = converted(tmp_path / "model", "gpt2").state_dict()
    fields, tensors = read(export_gguf(tmp_path / "model", tmp_path / "model.gguf", type="f32"))
    assert fields["general.architecture"] == "mpt"
    assert fields["mpt.attention.max_alibi_bias"] == 8.0
    assert fields["mpt.context_length"] == 64
    assert (fields["mpt.block_count"], fields["mpt.attention.head_count"]) == (2, 6)
    assert np.isclose(fields["mpt.attention.layer_norm_epsilon"], 1e-5)
    expected = {
        "token_embd.weight": weights["transformer.wte.weight"],
        "output_norm.weight": weights["transformer.ln_f.weight"],
        "output_norm.bias": weights["transformer.ln_f.bias"],
    }
    for layer in range(2):
        for name, part in {
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        }.items():
            for kind in ("weight", "bias"):
                values = weights[f"transformer.h.{layer}.{part}.{kind}"]
                expected[f"blk.{layer}.{name}.{kind}"] = values.T if values.ndim == 2 else values
    assert tensors.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(tensors[name], values), name


@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_is_a_refact(tied, tmp_path):
    weights = converted(tmp_path / "model", tie_word_embeddings=tied, head_dim=16).state_dict()
    out = export_gguf(tmp_path / "model", tmp_path / "model.gguf", type="f32", context_length=4096)
    fields, tensors = read(out)
    assert fields["general.architecture"] == "refact"
    assert fields["refact.context_length"] == 4096
    heads = (fields["refact.attention.head_count"], fields["refact.attention.head_count_kv"])
    assert (*heads, fields["refact.attention.key_length"], fields["refact.attention.value_length"]) == (6, 2, 16, 16)
    assert "refact.rope.freq_base" not in fields
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        **({} if tied else {"output.weight": "lm_head.weight"}),
    }
    for layer in range(2):
        for name, part in {
            "attn_norm": "input_layernorm",
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_norm": "post_attention_layernorm",
            "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
        }.items():
            names[f"blk.{layer}.{name}.weight"] = f"model.layers.{layer}.{part}.weight"
    assert tensors.keys() == names.keys()
    for name, part in names.items():
        assert torch.equal(tensors[name], weights[part]), name


def test_qwen2_brings_its_three_biases(tmp_path):
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 320}
    config = Qwen2Config(**sizes, num_attention_heads=6, num_key_value_heads=2)
    weights = converted(tmp_path / "model", config=config).state_dict()
    _, tensors = read(export_gguf(tmp_path / "model", tmp_path / "model.gguf", type="f32"))
    for short in "qkv":
        assert torch.equal(tensors[f"blk.1.attn_{short}.bias"], weights[f"model.layers.1.self_attn.{short}_proj.bias"])


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0"])
def test_weights_are_rounded_and_vectors_are_not(kind, tmp_path):
    sizes = {"hidden_size": 192, "intermediate_size": 96}
    weights = converted(tmp_path / "model", **sizes).state_dict()
    out = export_gguf(tmp_path / "model", tmp_path / "model.gguf", type=kind)
    kinds = {tensor.name: tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(out).tensors}
    assert {name for name, found in kinds.items() if found == "f32"} == {name for name in kinds if "norm" in name}
    assert {found for name, found in kinds.items() if "norm" not in name} == {kind}
    _, tensors = read(out)
    exact, found = weights["model.layers.1.mlp.up_proj.weight"], tensors["blk.1.ffn_up.weight"]
    share = {"f16": 1e-3, "bf16": 5e-3, "q8_0": 1e-2, "q4_0": 0.15}[kind]
    assert 0 < (found - exact).norm() / exact.norm() < share


def test_rows_that_blocks_do_not_divide_are_f16(tmp_path):
    converted(tmp_path / "model")  # rows of 48
    out = export_gguf(tmp_path / "model", tmp_path / "model.gguf", type="q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors}
    assert kinds["blk.0.attn_q.weight"] == "F16"
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0"


def test_shards_are_read_by_their_index(tmp_path):
    model = converted(tmp_path / "model")
    whole = export_gguf(tmp_path / "model", tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "model" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "model", max_shard_size="100kB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    assert export_gguf(tmp_path / "model", tmp_path / "shards.gguf").read_bytes() == whole


@pytest.mark.parametrize("kind", CUTS)
def test_the_tokenizer_goes_along(kind, tmp_path):
    converted(tmp_path / "model", cut=kind)
    fields, _ = read(export_gguf(tmp_path / "model", tmp_path / "model.gguf"))
    own = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", kind)
    found = fields["tokenizer.ggml.tokens"]
    assert len(found) == 320
    assert all(found[number] == word for word, number in own.get_vocab().items())
    types = dict(zip(found, fields["tokenizer.ggml.token_type"], strict=True))
    assert [types[word] for word in ("<s>", "<pad>", "<think>", "t")] == [3, 3, 4, 1]
    assert types[found[-1]] == 5  # a row without a token
    merges = json.loads((tmp_path / "model" / "tokenizer.json").read_text())["model"]["merges"]
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]
    ids = [fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")]
    assert ids == [own.bos_token_id, own.eos_token_id, own.pad_token_id]
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == own.chat_template


def test_sentencepiece_goes_along(tmp_path):
    converted(tmp_path / "model", cut="pieces")
    fields, _ = read(export_gguf(tmp_path / "model", tmp_path / "model.gguf"))
    assert fields["tokenizer.ggml.model"] == "llama"
    assert (fields["tokenizer.ggml.add_bos_token"], fields["tokenizer.ggml.add_space_prefix"]) == (True, True)
    types = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True))
    assert [types[word] for word in ("<unk>", "<s>", "<0x0A>", "▁")] == [2, 3, 6, 1]
    scores = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"], strict=True))
    merges = json.loads((tmp_path / "model" / "tokenizer.json").read_text())["model"]["merges"]
    in_order = [scores["".join(pair)] for pair in merges]
    assert in_order == sorted(in_order, reverse=True)
    assert scores["<s>"] < min(in_order)


def test_without_a_tokenizer_there_is_none(tmp_path):
    converted(tmp_path / "model", cut=None)
    with refused("no tokenizer.json.*--tokenizer false"):
        export_gguf(tmp_path / "model", tmp_path / "model.gguf")
    fields, _ = read(export_gguf(tmp_path / "model", tmp_path / "model.gguf", tokenizer=False))
    assert fields["tokenizer.ggml.model"] == "none"


def test_another_tokenizer_is_refused(tmp_path):
    converted(tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    said = json.loads(path.read_text())
    said["pre_tokenizer"]["add_prefix_space"] = True
    path.write_text(json.dumps(said))
    with refused("none of those that can be written: gpt-2, smollm, llama-bpe, qwen2"):
        export_gguf(tmp_path / "model", tmp_path / "model.gguf")
    said["pre_tokenizer"]["add_prefix_space"] = False
    said["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(said))
    with refused("none of those that can be written"):
        export_gguf(tmp_path / "model", tmp_path / "model.gguf")
    said["model"]["byte_fallback"] = True
    path.write_text(json.dumps(said))
    with refused("changes text before it is cut"):
        export_gguf(tmp_path / "model", tmp_path / "model.gguf")
    said["model"] = {"type": "WordLevel", "vocab": said["model"]["vocab"], "unk_token": "t"}
    path.write_text(json.dumps(said))
    with refused("is WordLevel, and only BPE can be written"):
        export_gguf(tmp_path / "model", tmp_path / "model.gguf")


def test_more_tokens_than_embeddings_are_refused(tmp_path):
    converted(tmp_path / "model", vocab_size=256)
    with refused("a token 300, but the model has 256 rows"):
        export_gguf(tmp_path / "model", tmp_path / "model.gguf")


def llama(**changes):
    return LlamaConfig(
        vocab_size=320, hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=6, **changes
    )


CANNOT = {
    "output bias": ("llama", {"config": llama(attention_bias=True)}, r"no place for 1 weights.*o_proj\.bias"),
    "mlp bias": ("llama", {"config": llama(mlp_bias=True)}, r"no place for 3 weights.*down_proj\.bias"),
    "activation": ("llama", {"hidden_act": "gelu"}, "cannot compute hidden_act 'gelu'"),
    "exact GELU": ("gpt2", {"activation_function": "gelu"}, "cannot compute activation_function 'gelu'"),
    "inverse": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
    "sinks": ("llama", {"conversion": {"sink_tokens": 1}}, "no sink tokens"),
    "global heads": ("llama", {"conversion": {"global_heads": 1}}, "no global heads, in 2 of 2 layers"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_llama_cpp_would_leave_out_is_refused(case, tmp_path):
    family, given, message = CANNOT[case]
    converted(tmp_path / "model", family, **given)
    with refused(message):
        export_gguf(tmp_path / "model", tmp_path / "out" / "model.gguf")
    assert not (tmp_path / "out").exists()


def test_bad_input_leaves_nothing_behind(tmp_path, monkeypatch):
    model, out = tmp_path / "model", tmp_path / "out.gguf"
    with refused("there is no such folder"):
        export_gguf(model, out)
    stock_model("llama").save_pretrained(tmp_path / "plain")
    with refused("a plain 'llama' model; convert it first"):
        export_gguf(tmp_path / "plain", out)
    converted(model)
    with refused("type is 'q3'; it must be one of f32, f16"):
        export_gguf(model, out, type="q3")
    with refused("context_length is 0"):
        export_gguf(model, out, context_length=0)
    out.write_text("mine")
    with refused("exists; give another name"):
        export_gguf(model, out)
    assert out.read_text() == "mine"
    out.unlink()
    with monkeypatch.context() as patch:
        patch.setattr("hf_alibi.export.source.shutil.disk_usage", lambda _: SimpleNamespace(free=1))
        with refused("MiB, and the disk has 0 MiB left"):
            export_gguf(model, tmp_path / "new" / "out.gguf")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gguf", None)
        with refused(r"gguf cannot be imported .*; pip install 'hf-alibi\[gguf\]'"):
            export_gguf(model, out)
    weights = model / "model.safetensors"
    cut(weights)
    with refused("give a complete checkpoint"):
        export_gguf(model, out)
    weights.unlink()
    with refused("give a complete checkpoint"):
        export_gguf(model, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "plain"]


def test_an_error_while_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    converted(tmp_path / "model")

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OSError, match="no space left"):
        export_gguf(tmp_path / "model", tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


LACKING = {
    "llama": ("model.layers.1.mlp.up_proj.weight", r"lacks 1 weights \(blk.1.ffn_up.weight"),
    "gpt2": ("transformer.h.1.attn.c_attn.bias", r"lacks 1 weights \(blk.1.attn_qkv.bias"),
}


@pytest.mark.parametrize("family", LACKING)
def test_a_lacking_weight_is_refused(family, tmp_path):
    converted(tmp_path / "model", family)
    name, message = LACKING[family]
    assert drop_weight(tmp_path / "model", name) == name
    with refused(message):
        export_gguf(tmp_path / "model", tmp_path / "out.gguf")


def test_the_helpers_cuts_differ():
    texts = {cut: tuple(tokenizer(cut)("12 heads\n\n  12345 tokens don't").input_ids) for cut in CUTS}
    assert len(set(texts.values())) > 2

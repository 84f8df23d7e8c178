"""Stock llama.cpp computes what transformers does; other slopes, or none, show."""

import dataclasses

import pytest

from helpers.exports import CUTS, TEXT, converted, wide_config
from hf_alibi.errors import VerificationError
from hf_alibi.export import gguf
from hf_alibi.export.gguf import export_gguf
from hf_alibi.export.parity import verify_export
from hf_alibi.export.targets import TARGETS

pytest.importorskip("llama_cpp")

MODELS = {
    "gpt2": {},
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, wide heads": {"head_dim": 64},
    "llama, 9 heads": {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 288},
    "mistral": {},
    "qwen2": {},
}


def config(name):
    return wide_config(name.split(",")[0], **MODELS[name])


def exported(tmp_path, name, **options):
    converted(tmp_path / "model", config=config(name))
    return export_gguf(tmp_path / "model", tmp_path / "model.gguf", type="f32", **options)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_text_agree(name, tmp_path):
    file = exported(tmp_path, name)
    found = verify_export("gguf", tmp_path / "model", file, lengths=[5, 64, 1500], new_tokens=20)
    assert len(found["rows"]) == 3
    assert all(row["same_text"] and row["control"] > 0.1 for row in found["rows"])


@pytest.mark.parametrize("cut", [*CUTS, "pieces"])
def test_text_is_cut_alike(cut, tmp_path):
    converted(tmp_path / "model", cut=cut)
    file = export_gguf(tmp_path / "model", tmp_path / "model.gguf", type="f32")
    text = tmp_path / "text.txt"
    text.write_text(TEXT + "12345678 tokens  \n\n\n\tx=3; y >= 'we're' <think> DON'T\r\n  日本語 ١٢٣ é\n" * 3)
    assert verify_export("gguf", tmp_path / "model", file, lengths=[50], text_file=text)["rows"]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_other_slopes_show(name, tmp_path, monkeypatch):
    """The file has the paper's; the model that it is compared with does not."""
    file = exported(tmp_path, name)
    config = tmp_path / "model" / "config.json"
    config.write_text(
        config.read_text().replace('"alibi_scaling": null', '"alibi_scaling": {"type":"linear","factor":2}')
    )
    monkeypatch.setitem(TARGETS, "gguf", dataclasses.replace(TARGETS["gguf"], any_slopes=True))
    with pytest.raises(VerificationError, match="differs from transformers"):
        verify_export("gguf", tmp_path / "model", file, lengths=[64])


def test_a_file_with_another_number_for_the_slopes_shows(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "_MAX_BIAS", 4.0)
    file = exported(tmp_path, "gpt2")
    with pytest.raises(VerificationError, match="differs from transformers"):
        verify_export("gguf", tmp_path / "model", file, lengths=[64])


def test_a_file_without_a_tokenizer_takes_ids(tmp_path):
    file = exported(tmp_path, "llama", tokenizer=False)
    assert verify_export("gguf", tmp_path / "model", file, lengths=[64])["rows"]


def test_rounded_weights_keep_the_perplexity(tmp_path):
    converted(tmp_path / "model", config=config("llama"))
    file = export_gguf(tmp_path / "model", tmp_path / "model.gguf", type="q8_0")
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 100)
    found = verify_export("gguf", tmp_path / "model", file, text_file=text)["perplexity"]
    assert found["engine"] != found["transformers"]

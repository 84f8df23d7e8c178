"""sentence-transformers on converted models: pooled embeddings of texts beyond the plain model's length."""

import pytest
import torch
from transformers import AutoModel

import hf_alibi
from helpers.made_up import word_tokenizer
from helpers.models import stock_config

st = pytest.importorskip("sentence_transformers")


@pytest.fixture
def folder(tmp_path):
    tokenizer = word_tokenizer(with_bos=False)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    torch.manual_seed(0)
    config = stock_config("llama", vocab_size=len(tokenizer))
    hf_alibi.apply_alibi(AutoModel.from_config(config)).save_pretrained(tmp_path / "alibi")
    tokenizer.save_pretrained(tmp_path / "alibi")
    return tmp_path / "alibi"


def test_embeddings_of_long_texts_also_after_reload(folder, tmp_path):
    texts = ["w1 w2 w3 w4 w5 w6 " * 20, "w1 w2"]
    model = st.SentenceTransformer(str(folder), device="cpu")
    first = model.encode(texts, convert_to_tensor=True)
    model.save_pretrained(str(tmp_path / "again"))
    again = st.SentenceTransformer(str(tmp_path / "again"), device="cpu")
    assert torch.allclose(again.encode(texts, convert_to_tensor=True), first, atol=1e-6)
    plain, tokenizer = AutoModel.from_pretrained(folder), model.tokenizer
    for text, embedding in zip(texts, first, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        assert torch.allclose(plain(ids).last_hidden_state.mean(dim=1)[0], embedding, atol=1e-5)
    assert tokenizer(texts[0], return_tensors="pt")["input_ids"].shape[1] > 64

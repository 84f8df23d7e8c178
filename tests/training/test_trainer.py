"""What the trainer adds to transformers'."""

from types import SimpleNamespace

import torch
import transformers.trainer
from transformers import ByT5Tokenizer, TrainingArguments

import hf_alibi
from helpers.models import stock_model
from hf_alibi.training.token_blocks import TokenBlocks
from hf_alibi.training.trainer import RateScales, make_trainer


def test_weights_that_are_tied_are_not_missed(tmp_path, monkeypatch):
    model = hf_alibi.apply_alibi(stock_model("llama", tie_word_embeddings=True))
    blocks = TokenBlocks(torch.arange(3, 35).view(-1, 8))
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    trainer = make_trainer(model, ByT5Tokenizer(), arguments, blocks, None, RateScales())
    said = []
    monkeypatch.setattr(transformers.trainer.logger, "warning", said.append)
    trainer._issue_warnings_after_load(SimpleNamespace(missing_keys=["lm_head.weight"], unexpected_keys=[]))
    assert not said
    missing = ["lm_head.weight", "model.norm.weight"]
    trainer._issue_warnings_after_load(SimpleNamespace(missing_keys=missing, unexpected_keys=[]))
    assert len(said) == 1
    assert "['model.norm.weight']" in said[0]

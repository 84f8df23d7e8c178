"""TRL's trainers on converted models, in memory, saved, and by path."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

import hf_alibi
from helpers.made_up import word_tokenizer
from helpers.models import stock_config

trl = pytest.importorskip("trl")

PAIRS = Dataset.from_list([{"prompt": "w1 w2 w3", "chosen": " w4 w5", "rejected": " w6"}] * 4)
TEXTS = Dataset.from_list([{"text": "w1 w2 w3 w4 w5 w6 " * 30}] * 8)


@pytest.fixture
def tokenizer():
    tokenizer = word_tokenizer(with_bos=False)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    config = stock_config("llama", vocab_size=len(tokenizer))
    return hf_alibi.apply_alibi(AutoModelForCausalLM.from_config(config), slopes=[0.5, 0.3, 0.2, 0.1])


@pytest.fixture
def folder(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "alibi")
    tokenizer.save_pretrained(tmp_path / "alibi")
    return str(tmp_path / "alibi")


def settings(kind, tmp_path, **changes):
    common = {"max_steps": 1, "learning_rate": 0.0, "logging_steps": 1, "report_to": [], "use_cpu": True, "bf16": False}
    return kind(output_dir=str(tmp_path / "out"), per_device_train_batch_size=2, **common, **changes)


def dpo_loss(model, tokenizer, tmp_path, **options):
    args = settings(trl.DPOConfig, tmp_path, disable_dropout=True)
    trainer = trl.DPOTrainer(model, args=args, train_dataset=PAIRS, processing_class=tokenizer, **options)
    trainer.train()
    return trainer.state.log_history[0]["loss"]


def test_the_reference_of_dpo_is_the_conversion_and_not_the_plain_model(model, tokenizer, tmp_path):
    with pytest.raises(OSError, match="has no name before it is saved"):
        dpo_loss(model, tokenizer, tmp_path)
    model.save_pretrained(tmp_path / "alibi")
    assert dpo_loss(model, tokenizer, tmp_path) == pytest.approx(math.log(2), abs=1e-6)


def test_dpo_by_path(folder, tokenizer, tmp_path):
    assert dpo_loss(folder, tokenizer, tmp_path) == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("by_path", [False, True])
def test_sft(by_path, folder, model, tokenizer, tmp_path):
    args = settings(trl.SFTConfig, tmp_path, max_length=90)
    trainer = trl.SFTTrainer(
        folder if by_path else model, args=args, train_dataset=TEXTS, processing_class=None if by_path else tokenizer
    )
    trainer.train()
    assert type(trainer.model).__name__ == "AlibiLlamaForCausalLM"
    ids = torch.tensor(tokenizer(TEXTS[0]["text"])["input_ids"][:90])[None]
    expected = model.eval()(ids, labels=ids).loss.item()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=0.02)

"""Every block of docs/works-with.md, run as it stands beside a small converted model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_alibi
from helpers.made_up import word_tokenizer
from helpers.models import stock_config

ROOT = Path(__file__).parents[2]
SECTIONS = (ROOT / "docs" / "works-with.md").read_text(encoding="utf-8").split("\n## ")[1:]
BLOCKS = [
    (section.splitlines()[0], language, code)
    for section in SECTIONS
    for language, code in re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)
]
NEEDED = {
    "trl": "trl",
    "lm_eval": "lm_eval",
    "sentence_transformers": "sentence_transformers",
    "BitsAndBytesConfig": "bitsandbytes",
    "torchao": "torchao",
    "onnx": "onnxscript",
    "peft": "peft",
}

TASK = """
task: tiny
dataset_path: json
dataset_kwargs:
  data_files:
    test: tasks/data.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["w4", "w5"]
doc_to_target: 0
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("works_with")
    tokenizer = word_tokenizer(with_bos=False)
    tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(0)
    config = stock_config("gpt2", vocab_size=len(tokenizer), n_embd=64)
    hf_alibi.apply_alibi(AutoModelForCausalLM.from_config(config)).save_pretrained(folder / "gpt2-alibi")
    tokenizer.save_pretrained(folder / "gpt2-alibi")
    (folder / "text.txt").write_text("w1 w2 w3 w4 " * 1000)
    (folder / "tasks").mkdir()
    (folder / "tasks" / "data.jsonl").write_text('{"question": "w1 w2 w3"}\n' * 3)
    (folder / "tasks" / "tiny.yaml").write_text(TASK)
    return folder


@pytest.mark.parametrize(("title", "language", "code"), BLOCKS, ids=[f"{i} {b[0]}" for i, b in enumerate(BLOCKS)])
def test_block_runs(title, language, code, folder):
    for word, package in NEEDED.items():
        if word in code:
            pytest.importorskip(package)
    command = [sys.executable, "-c", code] if language == "python" else ["bash", "-ec", code]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-3000:]

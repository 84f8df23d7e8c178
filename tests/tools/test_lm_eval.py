"""lm-evaluation-harness on a converted folder, beyond the length that the plain model was made for."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_alibi
from helpers.made_up import WORDS, word_tokenizer
from helpers.models import stock_config

lm_eval = pytest.importorskip("lm_eval")
LENGTH = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alibi")
    tokenizer = word_tokenizer(with_bos=False)
    torch.manual_seed(0)
    config = stock_config("llama", vocab_size=len(tokenizer))
    hf_alibi.apply_alibi(AutoModelForCausalLM.from_config(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def harness(folder):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", batch_size=2)


class Request:
    def __init__(self, *args):
        self.args = self.arguments = args


def test_no_length_is_cut(harness, folder):
    assert type(harness.model).__name__ == "AlibiLlamaForCausalLM"
    assert harness.max_length > 10**6
    text = " ".join(WORDS[index * index % len(WORDS)] for index in range(LENGTH))
    ids = torch.tensor(harness.tok_encode(text))
    assert len(ids) >= LENGTH > harness.model.config.alibi_original_max_position_embeddings
    (found,) = harness.loglikelihood_rolling([Request(text)], disable_tqdm=True)
    # The harness scores the first token, too, after a prefix of its own.
    prefix = torch.tensor([harness.prefix_token_id, *ids.tolist()])
    logits = AutoModelForCausalLM.from_pretrained(folder)(prefix[None]).logits.log_softmax(-1)[0]
    assert found == pytest.approx(logits[:-1].gather(-1, prefix[1:, None]).sum().item(), rel=1e-5)


def test_the_command(folder, tmp_path):
    task = tmp_path / "task"
    task.mkdir()
    (task / "data.jsonl").write_text('{"question": "w1 w2 w3", "answer": "w4"}\n' * 3)
    (task / "tiny.yaml").write_text(
        f"""
task: tiny
dataset_path: json
dataset_kwargs:
  data_files:
    test: {task}/data.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["w4", "w5"]
doc_to_target: 0
metric_list:
  - metric: acc
"""
    )
    model = ["--model", "hf", "--model_args", f"pretrained={folder},dtype=float32", "--device", "cpu"]
    command = [sys.executable, "-m", "hf_alibi.lm_eval", "run", *model, "--tasks", "tiny", "--include_path", str(task)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "|tiny" in result.stdout.replace(" ", "")

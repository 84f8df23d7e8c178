"""Checkpoints that earlier versions saved load, with and without the package, and give the same logits."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_alibi

# Tiny random models: a GPT-2 with the paper's slopes; a LLaMA with slopes of its own, a sink token and its code.
ARCHIVE = Path(__file__).parents[1] / "data" / "saved_by_0.1.0.tar.xz"
NAMES = ("gpt2", "llama_with_code")

# Processors sum in different orders: an earlier version differs from its own logits by up to 4.4e-6 on another one.
WITHOUT_PACKAGE = """
import sys
sys.modules["hf_alibi"] = None
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("llama_with_code", trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
saved = load_file("llama_with_code/expected.safetensors")
with torch.no_grad():
    logits = model(saved["tokens"], attention_mask=saved["attention_mask"]).logits
torch.testing.assert_close(logits, saved["logits"], atol=1e-5, rtol=1e-6)
"""


@pytest.fixture
def folder(tmp_path):
    shutil.unpack_archive(ARCHIVE, tmp_path, filter="data")
    return tmp_path


def test_the_archive_is_small():
    assert ARCHIVE.stat().st_size < 100_000


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_logits_are_those_that_the_earlier_version_gave(folder, name, backend):
    model = AutoModelForCausalLM.from_pretrained(folder / name, attn_implementation=backend)
    assert type(model).__module__ == "hf_alibi.model.modeling"
    hf_alibi.verify_alibi(model)
    saved = load_file(folder / name / "expected.safetensors")
    with torch.no_grad():
        logits = model(saved["tokens"], attention_mask=saved["attention_mask"]).logits
    torch.testing.assert_close(logits, saved["logits"], atol=1e-5, rtol=1e-6)


def test_the_code_beside_a_checkpoint_still_works_without_the_package(folder):
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr

"""Several processes on one machine (gloo): the losses of one process, checkpoints, resuming. A minute in all."""

import json
import os
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

MODEL = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
LAYERS = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
PLANS = {"ddp": {}, "fsdp2": {"fsdp": True, "fsdp_config": LAYERS}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    words = ["sun", "moon", "sea", "wind", "sand", "rock"]
    (folder / "text.txt").write_text(" ".join(words[i * i % 6] + words[i % 5] for i in range(2000)))
    return folder


def run(folder, name, *start, **settings):
    """Metrics and logged losses of `hf-alibi finetune`; `start` are the words that start a process, or several."""
    settings = {
        "model_config": {**MODEL, "num_attention_heads": 4},
        "tokenizer_name": "bytes",
        "train_file": [str(folder / "text.txt")],
        "block_size": 64,
        "learning_rate": 1e-2,
        "save_steps": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "output_dir": str(folder / name),
        "max_steps": 4,
        **settings,
    }
    config = folder / f"{name}.yaml"
    config.write_text(json.dumps(settings))  # JSON is YAML
    process = subprocess.run(
        [*(start or [sys.executable]), "-m", "hf_alibi", "finetune", str(config)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    history = json.loads((folder / name / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return json.loads((folder / name / "metrics.json").read_text()), losses


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def alone(folder):
    return run(folder, "alone", per_device_train_batch_size=4)


@pytest.mark.parametrize("plan", PLANS)
def test_two_processes_train_as_one_and_resume(plan, folder, alone):
    settings = {"per_device_train_batch_size": 2, "ddp_backend": "gloo", **PLANS[plan]}
    metrics, losses = run(folder, plan, *TORCHRUN, **settings)
    assert losses == pytest.approx(alone[1], abs=1e-5)
    for name in ("eval_loss", "train_loss", "bits_per_byte"):
        assert metrics[name] == pytest.approx(alone[0][name], abs=1e-5)
    assert metrics["tokens_seen"] == alone[0]["tokens_seen"]
    # As if it had been interrupted after the first checkpoint.
    for gone in ("metrics.json", "model.safetensors"):
        (folder / plan / gone).unlink()
    shutil.rmtree(folder / plan / "checkpoint-4")
    resumed, losses = run(folder, plan, *TORCHRUN, **settings, resume_from_checkpoint="true")
    assert losses == pytest.approx(alone[1], abs=1e-5)
    assert resumed["eval_loss"] == pytest.approx(alone[0]["eval_loss"], abs=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_the_recipe_in_two_processes_is_that_of_one(plan, folder):
    run(folder, "pretrained", per_device_train_batch_size=4, attention="original")
    recipe = {"model_config": None, "model_name_or_path": str(folder / "pretrained"), "match_tokens": 512}
    recipe |= {"match_heads": True, "global_heads": 1, "distill_tokens": 2048, "distill_epochs": 1}
    recipe |= {"probe_share": 0.0, "teacher_name_or_path": str(folder / "pretrained"), "teacher_share": 0.5}
    one, losses = run(folder, "recipe", per_device_train_batch_size=4, **recipe)
    settings = {"per_device_train_batch_size": 2, "ddp_backend": "gloo", **PLANS[plan]}
    two, of_two = run(folder, f"recipe-{plan}", *TORCHRUN, **settings, **recipe)
    assert of_two == pytest.approx(losses, abs=1e-5)
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], abs=1e-5)
    assert two["conversion"]["head_order"] == one["conversion"]["head_order"]
    shutil.rmtree(folder / "pretrained")
    shutil.rmtree(folder / "recipe")


def test_the_settings_of_a_run_can_be_read_again(folder):
    metrics, _ = run(folder, "again", *TORCHRUN, ddp_backend="gloo", **PLANS["fsdp2"])
    config = folder / "again" / "config.yaml"
    repeated = folder / "repeated"
    command = [*TORCHRUN, "-m", "hf_alibi", "finetune", str(config), "--output_dir", str(repeated), "--use_cpu", "true"]
    subprocess.run(command, check=True, capture_output=True)
    again = json.loads((repeated / "metrics.json").read_text())
    assert again["eval_loss"] == pytest.approx(metrics["eval_loss"], abs=1e-6)


VERIFY = """
import sys, torch, hf_alibi
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
torch.distributed.init_process_group("gloo")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
expected = str(hf_alibi.verify_alibi(model)).split("error")[0]
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
reports = hf_alibi.verify_alibi(model)
assert str(reports).split("error")[0] == expected
assert all(report.error < 1e-5 for report in reports), reports

torch.distributed.destroy_process_group()
"""


def test_verifies_under_fsdp2(folder, alone):
    script = folder / "verify.py"
    script.write_text(VERIFY)
    result = subprocess.run(
        [*TORCHRUN, str(script), str(folder / "alone")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]

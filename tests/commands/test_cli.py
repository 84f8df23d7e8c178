import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_alibi import cli
from hf_alibi.commands.finetune import FinetuneArguments
from hf_alibi.commands.settings import load_settings
from hf_alibi.conversion.recipe import ConversionArguments
from hf_alibi.errors import InputError
from hf_alibi.training.data import DataArguments

ROOT = Path(__file__).parents[2]


def fake(monkeypatch, action):
    """Put `action` in the place of the command finetune."""
    monkeypatch.setitem(cli._COMMANDS, "finetune", action)


def raising(error):
    def action(argv):
        raise error

    return action


def test_help_and_version(capsys):
    assert cli.main(["--help"]) == 0
    assert "finetune" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("hf-alibi ")


@pytest.mark.parametrize("argv", [[], ["finetun", "run.yaml"]])
def test_wrong_usage(argv, capsys):
    assert cli.main(argv) == 2
    assert "commands: convert, ablation, finetune, extrapolate" in capsys.readouterr().err


@pytest.mark.parametrize("error", [InputError("bad\nvalue"), OSError("bad value")])
def test_input_errors_are_one_line(error, monkeypatch, capsys):
    fake(monkeypatch, raising(error))
    assert cli.main(["finetune", "run.yaml"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "hf-alibi: error: bad value\n"
    assert captured.out == ""


def test_long_error_is_not_wrapped(monkeypatch, capsys):
    fake(monkeypatch, raising(InputError("word " * 100)))
    cli.main(["finetune"])
    assert capsys.readouterr().err.count("\n") == 1


def test_bugs_keep_their_traceback(monkeypatch):
    fake(monkeypatch, raising(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["finetune"])


def test_interruption(monkeypatch, capsys):
    fake(monkeypatch, raising(KeyboardInterrupt()))
    assert cli.main(["finetune"]) == 130
    assert capsys.readouterr().err == "hf-alibi: interrupted\n"


def test_arguments_reach_the_command(monkeypatch):
    seen = []
    fake(monkeypatch, seen.append)
    assert cli.main(["finetune", "run.yaml", "--seed", "1"]) == 0
    assert seen == [["run.yaml", "--seed", "1"]]


@pytest.mark.parametrize("name", ["gpt2", "llama", "passkey", "gpt2-small"])
def test_shipped_configs_are_valid(name):
    from transformers import TrainingArguments

    classes = (FinetuneArguments, ConversionArguments, DataArguments, TrainingArguments)
    argv = [str(ROOT / f"configs/finetune/{name}.yaml")]
    arguments, _, data, training = load_settings(classes, argv)
    assert arguments.attention == ("original" if name == "gpt2-small" else "alibi")
    assert data.dataset_name is not None
    assert data.passkey_block_size in (None, arguments.block_size)
    # One of them says how long the training is.
    assert (training.max_steps > 0) == (arguments.budget_tokens is None)
    assert not Path(training.output_dir).is_absolute()


def test_script_runs_from_start_to_end(tmp_path):
    settings = {
        "model_config": {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 16},
        "tokenizer_name": "bytes",
        "train_file": ["text.txt"],
        "block_size": 32,
        "max_steps": 2,
        "output_dir": "run",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "text.txt").write_text("".join(f"{number} is a number. " for number in range(100)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": "home", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts/finetune.py"), "run.yaml"]

    first = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    assert "saved to run" in first.stdout
    assert {"loss.png", "metrics.json", "config.yaml"} <= {path.name for path in (tmp_path / "run").iterdir()}

    second = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert second.stderr.strip().splitlines()[-1].startswith("hf-alibi: error: output_dir run holds an earlier run")
    assert "Traceback" not in second.stderr
